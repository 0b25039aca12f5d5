"""The page of a training run: the curves, the last numbers, the settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.figures import interval_lines
from interp.report import Figure, KeyValues, Provenance, Section, Table, Text, write_report

if TYPE_CHECKING:
    import pandas as pd

CURVES = {
    "fvu": ("Unexplained variance", "share of the variance of the batch that is not explained (FVU)"),
    "l0": ("Active latents", "mean number of active latents of a token (L0)"),
    "dead": ("Dead latents", "latents that were active in no token of the window"),
    "loss": ("Loss", "sum over dimensions, mean over tokens, penalties within"),
}
MOST_LINES = 7
SIZES = (
    "QK heads and OV heads (each QK head is shared by as many OV heads), width of queries and keys, first weights, and "
    "whether queries and keys stay as the layer has them."
)
TITLES = {"sae": "Sparse autoencoders", "transcoder": "Transcoders", "lorsa": "Low-rank sparse attention"}


def write_page(folder: Path, record: Mapping[str, Any], metrics: "pd.DataFrame") -> Path:
    """Write `report.html`."""
    import pandas as pd

    settings = record["settings"]
    last: Any = metrics.groupby("dictionary", sort=False).last().reset_index()
    shown = ["dictionary", "step", "fvu", "l0", "dead", "loss"]
    target = {name: row["target"] for name, row in record["dictionaries"].items() if row["target"]}
    text = (
        f"{len(last)} dictionaries, trained on the same {int(last['tokens'].max()):,} tokens. The numbers are those of "
        "single batches, whose tokens were trained on in the same step: for numbers to report, measure on other text."
    )
    blocks: list[Any] = [Text(text), Table(last[shown], "The last logged batch.")]
    if record["kind"] == "lorsa":
        columns = ("n_qk", "n_ov", "d_qk", "init", "freeze_qk")
        sizes = [[name, *(row[c] for c in columns)] for name, row in record["dictionaries"].items()]
        blocks.append(Table(pd.DataFrame(sizes, columns=["dictionary", *columns]), SIZES))
    elif target:
        blocks.append(KeyValues({name: f"reconstructs {what}" for name, what in target.items()}))
    sections = [Section("Summary", blocks), Section("Curves", curves(metrics))]
    source = Provenance(**{**record["provenance"], "settings": settings})
    title = f"{TITLES[record['kind']]} of {settings['model']}"
    return write_report(folder, title=title, subtitle="Training", sections=sections, provenance=source)


def curves(metrics: "pd.DataFrame") -> list[Any]:
    """A figure for each number, a line for each dictionary; several figures where there are many dictionaries."""
    names = list(dict.fromkeys(metrics["dictionary"]))
    blocks: list[Any] = []
    for column, (title, caption) in CURVES.items():
        for start in range(0, len(names), MOST_LINES):
            some = names[start : start + MOST_LINES]
            mine: Any = metrics[metrics["dictionary"].isin(some)]
            table = mine.pivot_table(index="step", columns="dictionary", values=column, aggfunc="last", dropna=False)
            series = {name: (table[name].to_numpy(dtype=float), None, None) for name in some}
            figure = interval_lines(table.index.to_numpy(), series, title=title, x_title="step", unit=column)
            blocks.append(Figure(figure, caption))
    return blocks
