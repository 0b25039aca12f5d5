"""Dictionaries whose truth is known: features in superposition, and the residual stream of compiled programs.

    python -m experiments.dictionaries.toy [--steps 3000]

Superposition: 64 random directions in 32 dimensions, each active in one token of twenty with a size from 0 to 1.
Programs: the streams of the three tracr programs, whose every dimension has a name; the basis to find are the
dimensions that are used. Recovery is the mean over true directions of the largest cosine with a decoder row; beside it
that of as many random rows.
"""

from __future__ import annotations

import itertools
import time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import interp
from experiments.records import Row, record, show
from interp.dictionaries import SAE, TrainSettings, train
from interp.dictionaries.activations import Rows, State

FEATURES, WIDTH, DENSITY, BATCH = 64, 32, 0.05, 512
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka_batchtopk": {"k": 3, "matryoshka_widths": (16, 32)},
    "standard": {"l1_coefficient": 0.2},
    "gated": {"l1_coefficient": 0.5},
    "jumprelu": {"l0_coefficient": 0.02},
}


class Drawn:
    """A source that makes its rows by a function of the step's random numbers."""

    def __init__(self, make, width: int) -> None:
        self._make, self.at, self.d_in = make, 0, {"x": width}

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __iter__(self):
        return self

    def __next__(self) -> Rows:
        self.at += 1
        x = self._make(torch.Generator().manual_seed(self.at))
        return Rows({"x": x}, torch.full((len(x),), self.at), torch.arange(len(x)))

    def state(self) -> State:
        return State({"at": self.at})

    def restore(self, state: State) -> None:
        self.at = state.values["at"]

    def close(self) -> None:
        pass


def recovery(true: Tensor, rows: Tensor) -> float:
    """The mean over true directions of the largest cosine with a row."""
    true, rows = (torch.nn.functional.normalize(x.detach(), dim=1) for x in (true, rows))
    return float((true @ rows.T).max(1).values.mean())


def random_rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_chance(true: Tensor, latents: int) -> float:
    """The recovery of random rows."""
    return float(np.mean([recovery(true, random_rows(latents, true.shape[1], seed)) for seed in range(1, 10)]))


def mean_of(make, true: Tensor, latents: int, steps: int, seeds: int, **settings: Any) -> tuple[Row, float]:
    """The numbers of a kind of dictionary, means over seeds; and the lowest recovery."""
    found = np.array([learnt(make, true, latents, steps, seed, **settings) for seed in range(seeds)])
    recovered, fvu, l0 = found.mean(0)
    row = {"recovery": f"{recovered:.3f}", "random rows": f"{by_chance(true, latents):.3f}"}
    return {**row, "FVU": f"{fvu:.3f}", "L0": f"{l0:.1f}"}, float(found[:, 0].min())


def learnt(make, true: Tensor, latents: int, steps: int, seed: int, **settings: Any) -> tuple[float, float, float]:
    """Recovery, FVU and L0 of one dictionary."""
    sae = SAE(d_in=true.shape[1], d_sae=latents, seed=seed, **settings)
    how = TrainSettings(
        steps=steps, lr=3e-3, lr_warm_up_steps=100, lr_decay_steps=steps // 4, sparsity_warm_up_steps=steps // 4,
        log_every=steps,
    )  # fmt: skip
    last = train(sae, Drawn(make, true.shape[1]), how, read="x").metrics.iloc[-1]
    return recovery(true, sae.W_dec), float(last["fvu"]), float(last["l0"])


def superposition() -> tuple[Any, Tensor]:
    true = torch.nn.functional.normalize(random_rows(FEATURES, WIDTH, 0), dim=1)

    def make(random: torch.Generator) -> Tensor:
        size = torch.rand(BATCH, FEATURES, generator=random)
        return (size * (torch.rand(BATCH, FEATURES, generator=random) < DENSITY)) @ true

    return make, true


def program(name: str, letters: str) -> tuple[Any, Tensor]:
    """The stream of a program behind each layer, over all inputs of five letters; the dimensions that are used."""
    lens = interp.load(name, device="cpu")
    depth = len(lens.anatomy.towers["text"].layers)
    words = list(itertools.product(letters, repeat=5))
    some = np.random.default_rng(0).permutation(len(words))[:200]
    batch = lens.prepare([" ".join(words[i]) for i in some])
    trace = lens.run(batch, [f"resid_post.{layer}" for layer in range(depth)])
    pool = torch.cat([trace["resid_post", layer][:, 1:].flatten(0, 1) for layer in range(depth)])
    used = (pool.std(0) > 1e-3).nonzero()[:, 0]
    true = torch.eye(pool.shape[1])[used]

    def make(random: torch.Generator) -> Tensor:
        return pool[torch.randint(len(pool), (BATCH,), generator=random)]

    return make, true


def main(steps: Annotated[int, typer.Option(min=200)] = 3000, seeds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    begin = time.process_time()
    tables: dict[str, list[Row]] = {"superposition": [], "programs": []}
    make, true = superposition()
    for kind, settings in KINDS.items():
        row, least = mean_of(make, true, 2 * FEATURES, steps, seeds, architecture=kind, **settings)
        about = {"architecture": kind.replace("_", " "), **row, "lowest of the seeds": f"{least:.3f}"}
        tables["superposition"].append(about)
    for name, letters in (("tracr-reverse", "abc"), ("tracr-sort", "1234"), ("tracr-hist", "abc")):
        make, true = program(name, letters)
        width = true.shape[1]
        for kind, settings in (("topk", {"k": 4}), ("standard", {"l1_coefficient": 0.2})):
            row, _ = mean_of(make, true, 2 * width, steps, seeds, architecture=kind, **settings)
            head = {"program": name.removeprefix("tracr-"), "dimensions used": f"{len(true)} of {width}"}
            tables["programs"].append({**head, "architecture": kind, **row})
    for name, rows in tables.items():
        show(name, rows)
    about = {"steps": steps, "batch": BATCH, "seeds": seeds, "minutes": round((time.process_time() - begin) / 60, 1)}
    record("dictionaries", "toy", about, tables, page="dictionaries")


if __name__ == "__main__":
    typer.run(main)
