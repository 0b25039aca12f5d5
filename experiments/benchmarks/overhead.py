"""Python's own share of a run: process time on a toy model of 30 layers whose arithmetic costs next to nothing.

OMP_NUM_THREADS=1 python -m experiments.benchmarks.overhead [--rounds 60] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from experiments.benchmarks.capture import SITES, held


def toy_lens() -> interp.Lens:
    """A llama with 30 layers of width 32 and grouped-query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=30,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    return interp.wrap(LlamaForCausalLM(config).eval(), name="toy of 30 layers")


def milliseconds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Process time of each contestant in every round, interleaved in changing order."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contestants), len(contestants)):
            begin = time.process_time_ns()
            contestants[name]()
            times[name].append((time.process_time_ns() - begin) / 1e6)
    return times


def main() -> None:
    """Print process times, and what each run costs above the plain forward and above bare hooks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--profile", action="store_true", help="show where the run with all five reads spends its time")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    lens = toy_lens()
    batch = lens.prepare(input_ids=torch.randint(64, (1, options.tokens)))
    ids = batch.inputs["input_ids"]

    def plain() -> object:
        return lens.model(input_ids=ids, use_cache=False)

    reads = {"4 sites": SITES, "4 sites, pattern@last": [*SITES, "pattern@last"], "pattern@last": ["pattern@last"]}
    contestants: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "bare hooks": lambda: held(lens, plain),
        "no site": lambda: lens.run(batch, ["logits"]),
    } | {name: (lambda r=r: lens.run(batch, [*r, "logits"])) for name, r in reads.items()}
    if options.profile:
        run = contestants["4 sites, pattern@last"]
        run()
        with cProfile.Profile() as profile:
            for _ in range(options.rounds):
                run()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        return
    times = milliseconds(contestants, options.rounds)
    # The fastest tenth: what other processes do to caches and clock shows in the rest.
    middle = {name: statistics.quantiles(t, n=10)[0] for name, t in times.items()}
    print(f"{'':26}{'ms':>8}{'above plain':>13}{'above hooks':>13}")
    for name, value in middle.items():
        over = [value - middle["plain forward"], value - middle["bare hooks"]]
        print(f"{name:26}{value:>8.2f}{over[0]:>13.2f}{over[1]:>13.2f}")


if __name__ == "__main__":
    main()
