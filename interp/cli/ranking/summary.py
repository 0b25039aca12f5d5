"""The short summary of a run in Markdown: what a note or an issue would quote."""

from pathlib import Path
from typing import Any

from interp.cli.ranking.evidence import leading
from interp.cli.ranking.findings import effects_table, signed
from interp.cli.ranking.folder import RunFolder, with_interval
from interp.cli.ranking.texts import QUESTIONS, TITLES
from interp.files import write_text
from interp.heads.agreement import agreement

HEADS = 5


def write_summary(folder: RunFolder) -> Path:
    """Write `report.md`: for every ranking its first heads, then agreement and effects, in tables.

    Raises:
        FileError: a result is missing or damaged.
    """
    settings, results = folder.settings, folder.scores()
    images = sum(p.image is not None for p in folder.prompts)
    about = f"{len(folder.prompts)} prompts" + (f", {images} with an image" if images else "")
    lines = [
        f"# Attention heads of {plain(settings.model)}",
        "",
        f"{about}. Heads are L(layer) H(head), from zero.",
        "",
    ]
    for method, scores in results.items():
        frame = with_interval(scores, settings.seed, folder.intervals(method))
        several = "low" in frame
        lines += [f"## {TITLES[method]}", "", f"{QUESTIONS[method]} Unit: {scores.unit or 'none'}.", ""]
        topics = folder.topics(method)
        known = {} if topics is None else {(r["layer"], r["head"]): r["tokens"] for r in topics.to_dict("records")}
        rows = []
        for row in scores.top(HEADS, by=leading(method, scores)).to_dict("records"):
            at = frame[(frame["layer"] == row["layer"]) & (frame["head"] == row["head"])].iloc[0]
            cells = [f"L{row['layer']} H{row['head']}", f"{row['score']:.4g}"]
            cells += [f"{at['low']:.4g} to {at['high']:.4g}"] if several else []
            tokens = known.get((row["layer"], row["head"]))
            cells += ["" if tokens is None else " ".join(str(t).strip() for t in tokens)] if known else []
            rows.append(cells)
        lines += table(["head", "score", *(["95% interval"] if several else []), *(["topic"] if known else [])], rows)
    if len(results) > 1:
        pairs = agreement(results, settings.top).round(2)
        lines += ["## Agreement", "", *table(list(pairs.columns), pairs.fillna("").to_numpy().tolist())]
    effects = effects_table(folder)
    if effects is not None:
        what = "removed" if settings.effect_scale == 0 else f"multiplied by {settings.effect_scale:g}"
        lines += [f"## Heads {what}, against random heads of the same layers", ""]
        rows = [
            [
                *(TITLES[r["method"]], r["set"], r["metric"], f"{r['before']:.3f}"),
                *(signed(r["change"], r["low"], r["high"]), signed(r["random"], r["random_low"], r["random_high"])),
                f"{r['p']:.2f}",
            ]
            for r in effects.to_dict("records")
        ]
        lines += table(["ranking", "heads", "what", "before", "change", "random", "p"], rows)
    source = folder.record.get("provenance", {})
    versions = ", ".join(f"{name} {version}" for name, version in source.get("versions", {}).items())
    lines += [f"Made {source.get('date', '')} with {versions}; {source.get('hardware', '')}. Seed {settings.seed}.", ""]
    path = folder.path / "report.md"
    write_text(path, "\n".join(lines))
    return path


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a Markdown table, with an empty line behind it."""
    made = ["| " + " | ".join(plain(c) for c in columns) + " |", "|" + "---|" * len(columns)]
    return [*made, *("| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows), ""]


def plain(value: Any) -> str:
    """Text that Markdown and HTML leave as it is."""
    text = " ".join(str(value).split())
    for letter in "\\`*_|<>[]#":
        text = text.replace(letter, "&lt;" if letter == "<" else f"\\{letter}")
    return text
