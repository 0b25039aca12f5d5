"""(e) Do tasks share components? Overlap of the heads that matter for four tasks in SmolLM2.

    python -m experiments.tracing.reuse [--n 24]

After Merullo et al. 2024 (arXiv 2310.08744), who find 78 % of the heads of one task in the circuit of another. The
effect of a head is exact: its output in the corrupt run is put into the clean run, at all positions. The top tenth of
the heads is compared between tasks, between the halves of a task's prompts (what sampling alone leaves), and with
chance: as many heads drawn from the same layers.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer
from scipy.stats import spearmanr

import interp
from experiments.records import Row, record, show
from experiments.tracing.ioi import grid_of, named, top_of
from experiments.tracing.tasks import TASKS, batches, items
from interp import tracing

DRAWS = 1000


def effects(lens: interp.Lens, found: list, start: int, step: int) -> np.ndarray:
    """Effects of the heads on every `step`-th item [layer, head]."""
    clean, corrupt, answers = batches(lens, found[start::step])
    same = {**answers, "positions": "all", "direction": "noise"}
    return grid_of(tracing.patch_sweep(lens, clean, corrupt, sites="z", **same))


def chance(one: set, two: set, width: int, random: np.random.Generator) -> float:
    """How many of the heads two sets share when the second is drawn anew within its layers."""
    counts = np.zeros(DRAWS)
    for layer in {a for a, _ in two}:
        mine = sum(a == layer for a, _ in two)
        held = np.array([(layer, h) in one for h in range(width)])
        for draw in range(DRAWS):
            counts[draw] += held[random.permutation(width)[:mine]].sum()
    return float(counts.mean())


def main(n: Annotated[int, typer.Option(min=4)] = 24) -> None:
    begin = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    whole, halves, tables = {}, {}, {"tasks": [], "overlap": [], "shared": []}
    for task in TASKS:
        found, share = items(lens, task, n)
        halves[task] = [effects(lens, found, i, 2) for i in (0, 1)]
        whole[task] = effects(lens, found, 0, 1)
        tables["tasks"].append(
            {
                "task": task,
                "prompt": found[0].clean,
                "answer": found[0].answer.strip(),
                "right": round(share, 2),
                "prompts": len(found),
                "strongest heads": ", ".join(named(h) for h in top_of(whole[task], 5)),
            }
        )
    shape = next(iter(whole.values())).shape
    k = round(0.1 * shape[0] * shape[1])
    sets = {task: set(top_of(grid, k)) for task, grid in whole.items()}
    random = np.random.default_rng(0)
    names = list(TASKS)
    for i, one in enumerate(names):
        split = [set(top_of(g, k)) for g in halves[one]]
        tables["overlap"].append(
            {
                "tasks": f"{one}, two halves",
                "shared": f"{len(split[0] & split[1])} of {k}",
                "chance": round(chance(split[0], split[1], shape[1], random), 1),
                "rank correlation": round(float(spearmanr(*map(np.abs, halves[one]), axis=None).statistic), 2),
            }
        )
        for two in names[i + 1 :]:
            rank = spearmanr(np.abs(whole[one]), np.abs(whole[two]), axis=None).statistic
            tables["overlap"].append(
                {
                    "tasks": f"{one} and {two}",
                    "shared": f"{len(sets[one] & sets[two])} of {k}",
                    "chance": round(chance(sets[one], sets[two], shape[1], random), 1),
                    "rank correlation": round(float(rank), 2),
                }
            )
    counts = {h: sum(h in s for s in sets.values()) for s in sets.values() for h in s}
    for head in sorted(h for h, c in counts.items() if c == len(names)):
        row: Row = {"head": named(head)}
        tables["shared"].append(row | {task: round(float(whole[task][head]), 3) for task in names})
    for name, rows in tables.items():
        show(name, rows)
    minutes = round((time.process_time() - begin) / 60, 1)
    record("tracing", "reuse", {"model": lens.name, "prompts": n, "top": k, "minutes": minutes}, tables, page="tracing")


if __name__ == "__main__":
    typer.run(main)
