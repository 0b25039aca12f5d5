"""What a training step of a Lorsa costs, beside the authors' implementation where it imports.

python -m experiments.benchmarks.lorsa [--rounds 5] [--threads 2] [--sequences 4] [--length 256]

A step is the loss of four sequences of 256 positions, its gradient, and Adam, with 4,608 OV heads of width 576, top-k
64, and the same first weights. Once with 72 QK heads of 64 that are trained, here and there; once here with one QK
head for each of nine heads of a layer, frozen at them (`from_heads(...).freeze_qk()`). The peak is that of a step,
above the weights and Adam's means. llamascopium (2.0.0b34) is no dependency, and holds transformer-lens below 4: put
the packages of an environment of its own on PYTHONPATH to have it timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.rounds import interleaved, peak_bytes, record, show
from interp.dictionaries import Lorsa

D_IN, D_QK, QK, OV, K, OWN, LR = 576, 64, 72, 4608, 64, 9, 1e-4
NAMES = ("W_Q", "W_K", "b_Q", "b_K", "W_V", "b_V", "W_O", "b_D")
Step = Callable[[], object]


def weights(n_qk: int, length: int) -> Lorsa:
    """A Lorsa with first weights that all contestants share."""
    return Lorsa(d_in=D_IN, n_qk=n_qk, n_ov=OV, d_qk=D_QK, k=K, rotary_dim=D_QK, context=length)


def ours(n_qk: int, x: Tensor, y: Tensor, frozen: bool = False) -> tuple[Lorsa, Step]:
    """A step of this package."""
    lorsa = weights(n_qk, x.shape[1]).train().freeze_qk(frozen)
    optimiser = torch.optim.Adam([p for p in lorsa.parameters() if p.requires_grad], lr=LR, fused=True)

    def step() -> None:
        lorsa.loss(x, y).total.backward()
        optimiser.step()
        optimiser.zero_grad()

    return lorsa, step


def reference(x: Tensor, y: Tensor) -> tuple[torch.nn.Module, Step]:
    """A step of llamascopium's module, whose loss is its own: the squared error, summed over d."""
    from llamascopium.models.lorsa import LorsaConfig, LowRankSparseAttention  # type: ignore[import-not-found]

    lorsa: Any = LowRankSparseAttention(
        LorsaConfig(
            hook_point_in="in", hook_point_out="out", d_model=D_IN, expansion_factor=OV // D_IN, n_qk_heads=QK,
            d_qk_head=D_QK, rotary_dim=D_QK, rotary_base=10_000, rotary_adjacent_pairs=False, n_ctx=x.shape[1],
            act_fn="topk", top_k=K, norm_activation="inference", dtype=torch.float32, device="cpu",
        )
    )  # fmt: skip
    lorsa.init_parameters()
    first = weights(QK, x.shape[1])
    with torch.no_grad():
        for name in NAMES:
            getattr(lorsa, name).copy_(getattr(first, name))
    optimiser = torch.optim.Adam(lorsa.parameters(), lr=LR, fused=True)

    def step() -> None:
        (lorsa.decode(lorsa.encode(x)) - y).square().sum(-1).mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return lorsa, step


def difference(ours: Any, theirs: Any, x: Tensor) -> float:
    """The largest difference of what both write, relative to the largest number."""
    with torch.no_grad():
        for name in NAMES:
            getattr(theirs, name).copy_(getattr(ours, name))
        mine, other = ours(x), theirs.decode(theirs.encode(x))
    return float((mine - other).abs().max() / other.abs().max())


def main() -> None:
    """Run the benchmark and write `results/lorsa.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(options.sequences, options.length, D_IN, generator=random) for _ in range(2))
    made: dict[str, tuple[torch.nn.Module, Step]] = {
        f"interp, {QK} QK heads": ours(QK, x, y),
        f"interp, {QK} QK heads, frozen": ours(QK, x, y, frozen=True),
        f"interp, {OWN} QK heads, frozen": ours(OWN, x, y, frozen=True),
    }
    content: dict[str, Any] = {"sequences": options.sequences, "length": options.length, "n_ov": OV, "k": K}
    try:
        theirs, step = reference(x, y)
    except ImportError as error:
        print(f"left out: llamascopium ({str(error)[:80]})")
    else:
        made[f"llamascopium, {QK} QK heads"] = theirs, step
        content["largest relative difference of outputs"] = difference(weights(QK, options.length).eval(), theirs, x)
        print(f"largest relative difference of outputs: {content['largest relative difference of outputs']:.1e}")
    rows = interleaved({name: step for name, (_, step) in made.items()}, rounds=options.rounds)
    show(f"a training step, {options.sequences} x {options.length} positions, {options.threads} threads", rows)
    peaks = {name: peak_bytes(step) for name, (_, step) in made.items()}
    print("\n".join(f"{name:46}{value / 2**20:>8.0f} MiB above the weights" for name, value in peaks.items()))
    content |= {"time": [asdict(row) for row in rows], "peak above the weights": peaks}
    record(Path(__file__).parent / "results" / "lorsa.json", content)


if __name__ == "__main__":
    main()
