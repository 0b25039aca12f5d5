"""What the experiments share: rows of a table kept as json, and the table in its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from docs.tables import cell
from docs.tables import main as write_pages
from interp.evaluation import Measured
from interp.files import write_json

ROOT = Path(__file__).parent
Row = dict[str, Any]


def record(
    folder: str, name: str, settings: Mapping[str, Any], tables: Mapping[str, Sequence[Row]], *, page: str | None = None
) -> None:
    """Write `FOLDER/results/NAME.json`, and its tables into the page `docs/experiments/PAGE.md` (NAME if None)."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    content = {"settings": {**settings, **versions}, "tables": tables}
    path = ROOT / folder / "results" / f"{name}.json"
    write_json(path, content if page is None else {"page": page, **content})
    write_pages()
    print(f"written: {path}, docs/experiments/{page or name}.md")


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table."""
    import pandas as pd

    shown = [{key: cell(value) for key, value in row.items()} for row in rows]
    print(f"\n{title}\n{pd.DataFrame(shown).to_string(index=False)}", flush=True)


def interval(result: Measured, metric: str, part: str) -> dict[str, float]:
    """One number of a result with its 95% interval, rounded."""
    frame = result.summary()
    (row,) = frame[(frame["part"] == part) & (frame["metric"] == metric)].to_dict("records")
    return {key: round(float(row[key]), 3) for key in ("value", "low", "high")}
