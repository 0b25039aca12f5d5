"""What the experiments share: rows of a table kept as json, the table in its page, means over targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from docs.tables import cell
from docs.tables import main as write_pages
from interp.evaluation import Measured
from interp.files import write_json
from interp.tokens import TokenScores

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def record(name: str, settings: Mapping[str, Any], tables: Mapping[str, Sequence[Row]]) -> None:
    """Write `results/NAME.json`, and its tables into the page `docs/experiments/NAME.md`."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(RESULTS / f"{name}.json", {"settings": {**settings, **versions}, "tables": tables})
    write_pages()
    print(f"written: {RESULTS / name}.json, docs/experiments/{name}.md")


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


def mean_target(scores: TokenScores) -> TokenScores:
    """The mean over a sample's targets, as if it were of its first token."""
    first = scores.source_mask.long().argmax(1, keepdim=True)
    texts = [[row[int(i)]] for row, i in zip(scores.tokens, first, strict=True)]
    mean = scores.scores.nanmean(1, keepdim=True)
    return replace(scores, scores=mean, targets=first, target_tokens=texts, target_mask=None, target_tower=None)
