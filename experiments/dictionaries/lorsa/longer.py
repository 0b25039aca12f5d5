"""Two starts of a Lorsa of layer 17 of SmolLM2, trained five times as long as in `smollm2`.

python -m experiments.dictionaries.lorsa.longer texts/ runs/lorsa-longer [--tokens 1000000]

The random start has the larger learning rate, which suits it. Both see the same batches once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import interp
from experiments.dictionaries.lorsa.smollm2 import (
    BATCH,
    CONTEXT,
    LAYER,
    LR,
    STARTS,
    WIDTH,
    K,
    fidelity,
    named,
    reached,
    sampled,
    settings,
    started,
    stores,
)
from experiments.records import Row, record, show
from interp.dictionaries import Job, lorsa, train

RATES = {STARTS[0]: 3 * LR, STARTS[-1]: LR}
LEVELS = (0.5, 0.3, 0.25)


def main(
    texts: Path,
    out: Path,
    tokens: Annotated[int, typer.Option(min=2000)] = 1_000_000,
    held: Annotated[int, typer.Option(min=500)] = 16_000,
) -> None:
    begin = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    rule = lorsa.attention_rule(lens, LAYER, context=CONTEXT)
    kept = stores(lens, rule, texts, out, {"test": held, "train": tokens})
    steps = sum(kept["train"].counts("contexts")) // BATCH
    rows: list[Row] = []
    for start, lr in RATES.items():
        one = started(rule, start, sampled(kept["train"], rule), n_ov=WIDTH, k=K, seed=0)
        pairs = lorsa.AttentionPairs(kept["train"].contexts(batch=BATCH, seed=0), rule)
        made = {named(start): Job(one, f"x.{LAYER}", f"y.{LAYER}")}
        trained = train(made, pairs, settings(steps, lr), folder=out / named(start), progress=True)
        row: Row = {"start": start, "lr": f"{lr:g}"}
        for level in LEVELS:
            count = reached(trained, named(start), level)
            row[f"tokens to FVU {level:g}"] = "not reached" if count is None else f"{round(count, -3):,}"
        rows.append({**row, **fidelity(trained.dictionaries[named(start)], kept["test"], rule)})
    show("longer", rows)
    about = {"model": lens.name, "layer": LAYER, "tokens": kept["train"].used, "held out": kept["test"].used}
    about |= {"context": CONTEXT, "steps": steps, "heads": WIDTH, "k": K, "seed": 0}
    about["minutes"] = round((time.process_time() - begin) / 60, 1)
    record("dictionaries", "lorsa_longer", about, {"longer": rows}, page="lorsa")


if __name__ == "__main__":
    typer.run(main)
