"""(d) Cross-modal tracing on `scenes`: by which tokens, layers and components an object gets to the answer.

    python -m experiments.tracing.scenes [--n 96]

"Is there a ... in the image?", of objects that are there, against the same picture without the object (exact
counterfactuals and masks). Then attention is cut: from the image to the text, from the text to the last token, from the
image to the last token.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

import interp
from experiments.records import Row, record, show
from interp import evaluation, tracing
from interp.data import scenes
from interp.tracing.cross_modal_trace import token_groups

SITES = ("resid_pre", "attn_out", "mlp_out")


def rows_of(found: tracing.CausalMap, site: str | None = None) -> list[Row]:
    """A row for each layer, a column for each group: effects with their intervals."""
    frame = found.frame()
    rows: list[Row] = []
    for layer in sorted(frame["layer"].unique()):
        row: Row = {"layer": int(layer)}
        mine = frame[(frame["layer"] == layer) & ((frame["site"] == site) if site else True)]
        for one in mine.to_dict("records"):
            row[one["group"]] = {"value": one["effect"], "low": one["low"], "high": one["high"]}
        rows.append(row)
    return rows


def questions(n: int) -> list[tuple[scenes.Scene, str]]:
    """Scenes with one of their objects each, in turn the first, second, ..."""
    return [(one, one.names[i % len(one.names)]) for i, one in enumerate(scenes.scenes("test", n))]


def main(n: Annotated[int, typer.Option(min=4)] = 96) -> None:
    begin = time.process_time()
    lens = interp.load("scenes", device="cpu")
    asked = questions(n)
    texts = [evaluation.image_prompt(lens, scenes.exists(one, name).text) for one, name in asked]
    clean = lens.prepare(texts, [one.image for one, _ in asked], padding_side="left")
    corrupt = lens.prepare(texts, [one.without(name).image for one, name in asked], padding_side="left")
    named = {"objects": [one.mask(name) for one, name in asked], "names": [name for _, name in asked]}
    answers = {"answers": ["yes"] * n, "wrong": ["no"] * n}
    found = tracing.cross_modal_trace(lens, clean, corrupt, **named, **answers, components=SITES)
    tables: dict[str, list[Row]] = {site: rows_of(found, site) for site in SITES}
    tables["groups"] = [{"group": g, "tokens, mean": round(size, 2)} for g, size in found.settings["tokens"].items()]
    noisy = tracing.cross_modal_trace(lens, clean, "noise", **named, **answers, components=("resid_pre",))
    tables["resid_pre, noise"] = rows_of(noisy, "resid_pre")
    groups = token_groups(lens, clean, **named)
    text = groups["text, early"] | groups["text, object"] | groups["text, late"]
    edges = {
        "image to text": ("image", text),
        "text to last": (text, "last"),
        "image to last": ("image", "last"),
        "object to last": (groups["image, object"], "last"),
    }
    for window in (1, 3):
        cut = tracing.attention_knockout(lens, clean, edges, window=window, **answers)
        tables[f"knock-out, window of {window}"] = rows_of(cut)
    gaps = {"counterfactual": found, "noise": noisy}
    tables["runs"] = [
        {
            "corrupt run": name,
            "questions": n,
            "logit difference, clean": round(float(one.clean.mean()), 2),
            "corrupt": round(float(one.corrupt.mean()), 2),
            "yes, clean": round(float((one.clean > 0).float().mean()), 3),
            "yes, corrupt": round(float((one.corrupt > 0).float().mean()), 3),
            "left out of the mean of ratios": one.left_out,
        }
        for name, one in gaps.items()
    ]
    for name, rows in tables.items():
        show(name, rows)
    settings = {"model": lens.name, "questions": n, "minutes": round((time.process_time() - begin) / 60, 1)}
    record("tracing", "cross_modal", settings, tables, page="tracing")


if __name__ == "__main__":
    typer.run(main)
