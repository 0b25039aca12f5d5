"""The page of a run: what was asked, a section with maps and rankings for each method, the prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.attribution.page import shortened
from interp.cli.tracing.cost import duration
from interp.cli.tracing.folder import TraceFolder, runs_frame
from interp.cli.tracing.texts import QUESTIONS, SITES, TITLES, explanation
from interp.errors import InputError
from interp.figures import interval_lines
from interp.report import Figure, Folded, Prompts, Provenance, Section, Table, Text, write_report

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.data import Prompt
    from interp.tracing import CausalMap

MOST_LINES, LONGEST = 7, 90


def write_page(folder: TraceFolder) -> Path:
    """Write `report.html` from what the folder holds.

    Raises:
        FileError: a result is missing or damaged.
    """
    results = dict(folder.results())
    sections = [_summary(folder, results)]
    sections += [_method(folder, method, found) for method, found in results.items()]
    sections.append(Section("Prompts", [Prompts([_text(p) for p in folder.prompts])]))
    source = Provenance(**{**folder.record.get("provenance", {}), "settings": _settings(folder)})
    names = ", ".join(TITLES[m].lower() for m in results)
    title = f"What carries the answer in {folder.settings.model}"
    return write_report(folder.path, title=title, subtitle=f"By {names}", sections=sections, provenance=source)


def _settings(folder: TraceFolder) -> dict[str, Any]:
    seconds = {m: row["seconds"] for m, row in folder.record["methods"].items()}
    return {**folder.record["settings"], **folder.record.get("model", {}), "seconds": seconds}


def _text(prompt: "Prompt") -> str:
    image = f"[{prompt.image.name}] " if prompt.image else ""
    answer = f" → {prompt.answer.strip()}" if prompt.answer else ""
    wrong = f" (not {prompt.wrong.strip()})" if prompt.wrong else ""
    known = {n: prompt.labels[n] for n in ("subject", "object", "corrupt") if n in prompt.labels}
    more = f"   [{', '.join(f'{name}: {value}' for name, value in known.items())}]" if known else ""
    return f"{image}{prompt.text}{answer}{wrong}{more}"


def place(row: Mapping[str, Any]) -> str:
    """Where a cell is: its position with the token, or its group, and its head."""
    at = row["group"] if "group" in row else f"{row['position']}{' ' + repr(row['token']) if row.get('token') else ''}"
    return at if row["head"] < 0 else f"head {row['head']}" if at == "all" else f"head {row['head']} @ {at}"


def _strongest(found: "CausalMap") -> str:
    best = found.top(1, by="abs").to_dict("records")[0]
    return f"{best['site']} layer {best['layer']}, {place(best)}: {best['effect']:+.2f}"


def _summary(folder: TraceFolder, results: "dict[str, CausalMap]") -> Section:
    import pandas as pd

    rows = []
    for method, found in results.items():
        cost = folder.record.get("costs", {}).get(method)
        expected = f" of about {duration(cost['seconds'])}" if cost else ""
        rows.append(
            {
                "method": TITLES[method],
                "prompts": f"{len(found)} of {len(folder.prompts)}",
                "clean": float(found.clean.mean()),
                "corrupt": float(found.corrupt.mean()) if method != "knockout" else float("nan"),
                "strongest cell": _strongest(found),
                "took": duration(folder.record["methods"][method]["seconds"]) + expected,
            }
        )
    return Section(
        "Summary",
        [
            Text(
                "Each method puts something of one run of the model into another, or takes something away, and "
                "measures what becomes of the answer. Layers and positions are counted from zero."
            ),
            Table(pd.DataFrame(rows), "Clean and corrupt: mean of the metric in both runs, named in its section."),
        ],
    )


def _method(folder: TraceFolder, method: str, found: "CausalMap") -> Section:
    blocks: list[Any] = [Text(f"{QUESTIONS[method]} {explanation(method, found)}")]
    drawn = pictures(method, found)
    captions = ["Layers downwards, all sites on one scale. A gap is a cell that does not exist."] if drawn else []
    for n, figure in enumerate(drawn):
        blocks.append(Figure(figure, captions[n] if n < len(captions) else _about(found, n - 1)))
    if not drawn:
        blocks.append(
            Text("By heads and by positions: more than a picture can show; the table has the strongest cells.")
        )
    top = found.top(folder.settings.top, by="abs")
    top: Any = top.assign(where=[place(row) for row in top.to_dict("records")])
    if len(found) > 1:
        top["95% interval"] = [f"{low:.3f} to {high:.3f}" for low, high in zip(top["low"], top["high"], strict=True)]
    columns: Any = [c for c in ("site", "layer", "where", "effect", "95% interval", "prompts") if c in top]
    blocks.append(Table(top[columns], "The strongest cells; all are in cells.parquet."))
    runs = runs_frame(found)
    runs.insert(1, "text", [shortened(_text(folder.prompts[i - 1]), LONGEST) for i in runs["prompt"]])
    blocks.append(Folded("The metric of both runs in each prompt", [Table(runs)]))
    return Section(TITLES[method], blocks)


def _about(found: "CausalMap", number: int) -> str:
    site = found.sites[number]
    about = SITES.get(site.rpartition(":")[2], site)
    return f"{site}: {about}. Lines are effects of a group by layer, with 95% intervals over prompts."


def pictures(method: str, found: "CausalMap") -> "list[go.Figure]":
    """A heat map of all sites, then for each site lines over layers where groups are few; none for heads by groups."""
    try:
        tables = {site: found.grid(site) for site in found.sites}
    except InputError:  # by heads and by groups: no single picture
        return []
    figures = [found.plot(title=f"{TITLES[method]}: effect")]
    if found.single or any(len(table) < 2 or table.shape[1] > MOST_LINES for table in tables.values()):
        return figures
    frame: Any = found.frame()
    for site, table in tables.items():
        mine, series = frame[frame["site"] == site], {}
        for name in table.columns:
            by = "group" if table.columns.name == "group" else "head"
            rows = mine[mine[by] == name].set_index("layer").reindex(table.index)
            ends = (rows["low"], rows["high"]) if len(found) > 1 else (None, None)
            series[str(name)] = (rows["effect"], *ends)
        layers = [int(layer) for layer in table.index]
        figures.append(interval_lines(layers, series, title=site, x_title="layer", unit="effect"))
    return figures
