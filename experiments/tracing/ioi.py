"""(b) Indirect objects in SmolLM2: the heads that move the name, by four methods, and the heads that feed them.

    python -m experiments.tracing.ioi [--n 32]

Names are exchanged for three others in the corrupt run (p_ABC), whose values are put into the clean run at the last
token. Effects are shares of what everything together loses: negative as they stand in the paper means that the head
helps, here it is a positive share of the loss.
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer
from scipy.stats import spearmanr

import interp
from experiments.records import Row, record, show
from experiments.tracing.tasks import batches, items
from interp import heads, tracing

TOP, FEEDING = 10, 4


def grid_of(found: tracing.CausalMap, values=None) -> np.ndarray:
    """Effects, or other numbers of the cells, [layer, head]; NaN where there is no cell."""
    layer, head = found.cells[:, 1].numpy(), found.cells[:, 2].numpy()
    grid = np.full((layer.max() + 1, head.max() + 1), np.nan)
    grid[layer, head] = (found.effects if values is None else values).numpy()
    return grid


def top_of(grid: np.ndarray, k: int = TOP) -> list[tuple[int, int]]:
    """The strongest heads by size."""
    order = np.argsort(-np.abs(np.nan_to_num(grid)), axis=None, kind="stable")[:k]
    return [(int(a), int(b)) for a, b in zip(*np.unravel_index(order, grid.shape), strict=True)]


def named(head: tuple[int, int]) -> str:
    return f"{head[0]}.{head[1]}"


def main(n: Annotated[int, typer.Option(min=4)] = 32) -> None:
    begin = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    found, share = items(lens, "indirect object", n)
    clean, corrupt, answers = batches(lens, found)
    direct = heads.direct_effect(lens, clean, **answers)
    same = {**answers, "positions": "last", "direction": "noise"}
    exact = tracing.patch_sweep(lens, clean, corrupt, sites="z", **same)
    gap = float(exact.clean.mean() - exact.corrupt.mean())
    numbers = {
        # What a head writes towards the answer, less what it writes there in the corrupt run: the same question.
        "direct effect": (direct.scores - heads.direct_effect(lens, corrupt, **answers).scores).numpy() / gap,
        "exact": grid_of(exact),
        "attribution": grid_of(tracing.attribution_patching(lens, clean, corrupt, sites="z", **same)),
        "attribution, 5 steps": grid_of(tracing.attribution_patching(lens, clean, corrupt, sites="z", steps=5, **same)),
        "path to the logits": grid_of(tracing.path_patching(lens, clean, corrupt, **same)),
    }
    tables: dict[str, list[Row]] = {"heads": [], "agreement": [], "feeding": []}
    low, high = (grid_of(exact, end) for end in exact.interval())
    for head in top_of(numbers["exact"]):
        row: Row = {"head": named(head), **{name: round(float(grid[head]), 3) for name, grid in numbers.items()}}
        row["exact"] = {"value": row["exact"], "low": float(low[head]), "high": float(high[head])}
        tables["heads"].append(row)
    for one in numbers:
        row = {"method": one}
        for two in numbers:
            rank = spearmanr(np.abs(numbers[one]), np.abs(numbers[two]), axis=None).statistic
            shared = len(set(top_of(numbers[one])) & set(top_of(numbers[two])))
            row[two] = "" if one == two else f"{rank:.2f}, {shared} of {TOP}"
        tables["agreement"].append(row)
    movers = [h for h in top_of(numbers["path to the logits"], TOP) if numbers["path to the logits"][h] > 0][:FEEDING]
    for via in ("q", "k", "v"):
        groups = lens.anatomy.attention(None, movers[0][0], "k")
        to = movers if via == "q" else sorted({(a, b * groups.n_kv_heads // groups.n_heads) for a, b in movers})
        where = "last" if via == "q" else "all"
        fed = tracing.path_patching(lens, clean, corrupt, receivers=to, via=via, **{**same, "positions": where})
        grid = grid_of(fed)
        ends = [grid_of(fed, end) for end in fed.interval()]
        for head in top_of(grid, 5):
            effect = {"value": float(grid[head]), "low": float(ends[0][head]), "high": float(ends[1][head])}
            tables["feeding"].append({"through": via, "sender": named(head), "effect": effect})
    for name, rows in tables.items():
        show(name, rows)
    settings = {"model": lens.name, "prompts": n, "right of those that fit": round(share, 2), "gap": round(gap, 2)}
    settings |= {"receivers": [named(m) for m in movers], "minutes": round((time.process_time() - begin) / 60, 1)}
    print(settings)
    record("tracing", "ioi", settings, tables, page="tracing")


if __name__ == "__main__":
    typer.run(main)
