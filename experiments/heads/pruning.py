"""(d) How many heads of SmolLM2 can be removed, and does the ranking matter?

    python -m experiments.heads.pruning [--n 40]

Michel, Levy and Neubig remove heads from the least important up. Here on two tasks: prompts of indirect object
identification (the accuracy is how often the right name is more likely than the other one, so chance is one half) and
the next-token loss of plain sentences. Heads are ranked on other prompts than they are measured on. Rankings: the
gradient of a head mask (`importance`) and the size of the direct effect on the logit difference. Random orders remove
as many heads of each layer in each step as the ranking does, or any heads. A removed head's output becomes zero, or its
mean.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import interp
from experiments.heads.sentences import MEASURED, RANKED
from experiments.records import Row, record, show
from interp import heads
from interp.batch import Batch
from interp.data.prompts import Prompt, indirect_objects
from interp.heads.pruning_curve import RANDOM

STEP = 0.1
BATCH = 20


def asked(lens: interp.Lens, prompts: Sequence[Prompt]) -> tuple[list[Batch], dict[str, Any]]:
    """Prompts as batches of like length, with their answers."""
    ordered = sorted(prompts, key=lambda p: len(p.text))
    batches = [lens.prepare([p.text for p in ordered[i : i + BATCH]]) for i in range(0, len(ordered), BATCH)]
    return batches, {"answers": [p.answer for p in ordered], "wrong": [p.wrong for p in ordered]}


def columns(curves: dict[str, tuple[heads.PruningCurve, bool]], metric: str) -> list[Row]:
    """One row for each step; a column for each curve (or, where said so, for its random orders)."""
    rows: list[Row] = []
    for title, (curve, random) in curves.items():
        frame = curve.frame()
        frame = frame[(frame["metric"] == metric) & ((frame["curve"] == RANDOM) == random)]
        for i, found in enumerate(frame.to_dict("records")):
            if len(rows) == i:
                rows.append({"removed": found["removed"], "share": f"{found['share']:.0%}"})
            rows[i][title] = {key: round(float(found[key]), 3) for key in ("value", "low", "high")}
    return rows


def names(lens: interp.Lens, n: int, *, upto: float, controls: int, seed: int) -> dict[str, list[Row]]:
    """The tables of indirect object identification."""
    rank_on = indirect_objects(n, seed=seed + 1)
    seen = {p.text for p in rank_on}
    test = [p for p in indirect_objects(2 * n, seed=seed) if p.text not in seen][:n]
    batch = lens.prepare([p.text for p in rank_on])
    answers: dict[str, Any] = {"answers": [p.answer for p in rank_on], "wrong": [p.wrong for p in rank_on]}
    rankings = {
        "importance": heads.importance(lens, batch, **answers),
        "direct effect": heads.direct_effect(lens, batch, **answers),
    }
    batches, right = asked(lens, test)
    options: dict[str, Any] = {**right, "step": STEP, "upto": upto, "controls": controls, "seed": seed}
    important = {"ranking": rankings["importance"], **options}
    curve = heads.prune(lens, batches, **important)
    mean = heads.prune(lens, batches, **important, mode="mean")
    free = heads.prune(lens, batches, **important, matched="none")
    direct = heads.prune(lens, batches, ranking=rankings["direct effect"], by="abs", **options)
    curves = {
        "importance": (curve, False),
        "random, same layers": (curve, True),
        "random, any layers": (free, True),
        "size of direct effect": (direct, False),
        "random, its layers": (direct, True),
        "importance, to the mean": (mean, False),
        "random, same layers, to the mean": (mean, True),
    }
    return {f"names, {metric}": columns(curves, metric) for metric in ("accuracy", "logit difference")}


def loss(lens: interp.Lens, n: int, *, upto: float, controls: int, seed: int) -> dict[str, list[Row]]:
    """The table of the next-token loss of sentences."""
    ranking = heads.importance(lens, lens.prepare(RANKED))
    rank_on = indirect_objects(n, seed=seed + 1)
    answers: dict[str, Any] = {"answers": [p.answer for p in rank_on], "wrong": [p.wrong for p in rank_on]}
    other = heads.importance(lens, lens.prepare([p.text for p in rank_on]), **answers)
    batch = lens.prepare(sorted(MEASURED, key=len))
    options: dict[str, Any] = {"step": STEP, "upto": upto, "seed": seed}
    curve = heads.prune(lens, batch, ranking=ranking, controls=controls, **options)
    mean = heads.prune(lens, batch, ranking=ranking, controls=controls, mode="mean", **options)
    of_names = heads.prune(lens, batch, ranking=other, controls=0, **options)
    curves = {
        "importance": (curve, False),
        "random, same layers": (curve, True),
        "importance for names": (of_names, False),
        "importance, to the mean": (mean, False),
        "random, same layers, to the mean": (mean, True),
    }
    return {"sentences, loss": columns(curves, "loss")}


def main(
    n: Annotated[int, typer.Option(help="prompts of indirect objects, to rank on and to measure")] = 40,
    upto: Annotated[float, typer.Option(help="share of heads at which to stop")] = 0.8,
    controls: Annotated[int, typer.Option(help="random orders for each curve")] = 4,
    seed: int = 0,
) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    start = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    options: dict[str, Any] = {"upto": upto, "controls": controls, "seed": seed}
    tables = names(lens, n, **options) | loss(lens, n, **options)
    for name, rows in tables.items():
        show(name, rows)
    settings = {"model": lens.name, "prompts": n, "prompts to rank on": n, "sentences": len(MEASURED)}
    settings |= {"sentences to rank on": len(RANKED), "step": STEP, "upto": upto, "controls": controls, "seed": seed}
    settings["minutes"] = round((time.process_time() - start) / 60, 1)
    record("heads", "pruning", settings, tables, page="heads")


if __name__ == "__main__":
    typer.run(main)
