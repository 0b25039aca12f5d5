"""Write the generated tables of the documentation into its pages, between their markers.

    python -m docs.tables            # rewrites the pages

The table of families takes longer and has a script of its own: docs/families.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs import backends

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "experiments" / "benchmarks" / "results"


def sites() -> str:
    """The table of sites."""
    from interp.sites import markdown_table

    return markdown_table()


def models() -> str:
    """The packaged models with their packages and licences."""
    from interp.models import catalogue

    lines = ["| name | kind | parameters | package | licence | what it is |", "|---|---|---|---|---|---|"]
    for row in catalogue():
        package = "comes with interp" if row.bundled else f"`{row.package}` {row.version}"
        size = f"{row.parameters:,}"
        lines.append(f"| `{row.name}` | {row.kind} | {size} | {package} | {row.licence} | {row.description} |")
    return "\n".join(lines)


def benchmarks() -> str:
    """Time and memory of capture, one table for each kind of machine that was measured."""
    parts = [_benchmark(path) for path in sorted(RESULTS.glob("capture-*.json"))]
    return "\n\n".join(parts) or "No results are recorded in this checkout."


def _benchmark(path: Path) -> str:
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"**{found['hardware']}**; torch {found['torch']}, transformers {found['transformers']}; SmolLM2-135M, "
        f"{found['batch']} x {found['tokens']} tokens, {found['rounds']} interleaved rounds "
        f"(`experiments/benchmarks/results/{path.name}`).",
        "",
        "| what runs | time / plain forward | quartiles | median seconds |",
        "|---|---|---|---|",
    ]
    for row in found["time"]:
        low, high = row["low"], row["high"]
        lines.append(f"| {row['name']} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {row['seconds']:.3f} |")
    lines += ["", "| what is read | bytes returned | peak above the plain forward | ratio |", "|---|---|---|---|"]
    for name, row in found["memory"].items():
        returned, above = (f"{row[key] / 2**20:.1f} MiB" for key in ("returned", "peak_above_plain"))
        lines.append(f"| {name} | {returned} | {above} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def scenes() -> str:
    """The measured quality of the bundled scenes model."""
    path = DOCS.parent / "interp" / "models" / "scenes" / "quality.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"| on {found['n']:,} scenes | value | 95 % interval |", "|---|---|---|"]
    for row in found["numbers"]:
        lines.append(f"| {row['metric']} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} |")
    return "\n".join(lines)


def experiments() -> dict[str, tuple[str, Callable[[], str]]]:
    """The tables of the experiments that were run, by `experiment: table`, each with its page."""
    found: dict[str, tuple[str, Callable[[], str]]] = {}
    for path in sorted((DOCS.parent / "experiments").glob("*/results/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            continue
        page = f"experiments/{content.get('page', path.stem)}.md"
        for name, rows in content.get("tables", {}).items():
            found[f"{path.stem}: {name}"] = (page, lambda rows=rows: markdown(rows))
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; numbers with an interval as value and half its width."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows)])


def cell(found: Any) -> str:
    """What stands in one cell."""
    if isinstance(found, Mapping):
        return f"{found['value']:.2f} ± {(found['high'] - found['low']) / 2:.2f}"
    return f"{found:.2f}" if isinstance(found, float) else str(found)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "sites": ("sites.md", sites),
    "models": ("api/models.md", models),
    "benchmarks": ("benchmarks.md", benchmarks),
    "scenes": ("scenes.md", scenes),
    "backends: gives": ("backends.md", backends.gives),
    "backends: refuses": ("backends.md", backends.refuses),
    **experiments(),
}


def markers(name: str) -> tuple[str, str]:
    """The lines between which a table stands."""
    return f"<!-- {name}: begin (written by docs/tables.py) -->", f"<!-- {name}: end -->"


def between(text: str, name: str) -> str:
    """What stands between the markers of a table."""
    begin, end = markers(name)
    return text.partition(begin)[2].partition(end)[0].strip()


def filled(text: str, name: str, table: str) -> str:
    """The page with a table between its markers."""
    begin, end = markers(name)
    if begin not in text:
        raise SystemExit(f"the page has no place for the table {name!r}: put the lines {begin!r} and {end!r} into it.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    """Rewrite the pages."""
    for name, (page, make) in {**TABLES, **experiments()}.items():
        path = DOCS / page
        path.write_text(filled(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
