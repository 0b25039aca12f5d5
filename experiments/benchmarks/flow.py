"""What exact attention flow costs, beside the loop over networkx, and all targets of SmolLM2.

python -m experiments.benchmarks.flow [--rounds 5] [--pairs 2] [--no-model]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import networkx as nx
import numpy as np
from networkx.algorithms.flow import edmonds_karp, preflow_push

import interp
from experiments.benchmarks.rounds import interleaved, record, show
from interp.attribution.flow import bounds, capacities, flow, largest_flows

TEXT = "The old lighthouse keeper, who had lived alone on the island for years, was surprised when a small boat "


def random_pipes(depth: int, size: int, causal: bool, seed: int) -> np.ndarray:
    """Attention with logits of spread 2, mixed with the identity."""
    logits = 2 * np.random.default_rng(seed).normal(size=(depth, size, size))
    if causal:
        logits = np.where(np.tril(np.ones((size, size), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return capacities(weights / weights.sum(-1, keepdims=True), 0.5)


def graph_of(pipes: np.ndarray) -> nx.DiGraph:
    """The graph of the reference code."""
    graph = nx.DiGraph()
    for layer, above, below in zip(*np.nonzero(pipes), strict=True):
        graph.add_edge((layer + 1, above), (layer, below), capacity=float(pipes[layer, above, below]))
    return graph


def random_graphs(rounds: int, pairs: int) -> dict[str, list[dict]]:
    """Seconds for each pair, 12 layers and 32 tokens: ours over all inputs of one target, networkx over some."""
    found, last = {}, np.array([31])
    for causal in (False, True):
        pipes = random_pipes(12, 32, causal, 0)
        graph = graph_of(pipes)
        ceiling = bounds(pipes, last)
        some = np.linspace(0, 30, pairs).astype(int)
        repeats = 32 // pairs  # so that every contestant answers for the same number of pairs

        def loop(solver: Callable, graph: nx.DiGraph = graph, some: np.ndarray = some) -> list[float]:
            return [nx.maximum_flow_value(graph, (12, 31), (0, v), flow_func=solver) for v in some]

        exact = largest_flows(pipes, last, ceiling)[0, some]
        error = np.abs(exact - loop(preflow_push)).max()
        contestants = {
            "interp, 32 pairs": lambda p=pipes, c=ceiling: largest_flows(p, last, c),
            f"networkx preflow_push, {pairs} pairs": lambda f=loop: f(preflow_push),
            f"networkx edmonds_karp, {pairs} pairs": lambda f=loop: f(edmonds_karp),
        }
        rows = interleaved(contestants, rounds=rounds)
        title = f"12 layers, 32 tokens, {'causal' if causal else 'both directions'}; largest difference {error:.1e}"
        show(title, rows)
        for row in rows[1:]:
            print(
                f"  for each pair: {row.ratio * repeats:.0f} times (quartiles {row.low * repeats:.0f} to "
                f"{row.high * repeats:.0f})"
            )
        found[title] = [asdict(r) | {"ratio_for_each_pair": r.ratio * repeats} for r in rows[1:]]
    return found


def smollm2() -> dict[str, float]:
    """All targets of 64 tokens in 30 layers."""
    lens = interp.load("smollm2-135m", device="cpu")
    batch = lens.prepare(input_ids=[lens.processor(TEXT * 4)["input_ids"][:64]])
    out: dict[str, float] = {}
    for method in ("exact", "bound"):
        begin, cpu = time.perf_counter(), time.process_time()
        scores = flow(lens, batch, target="all", method=method)
        out[f"{method}, seconds"] = round(time.perf_counter() - begin, 2)
        out[f"{method}, cpu seconds"] = round(time.process_time() - cpu, 2)
        if method == "exact":
            out |= {k: scores.settings[k] for k in ("pairs", "first_layer", "bound")}
    print(f"\nSmolLM2, 30 layers, 64 tokens, all targets: {out}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=2, choices=(1, 2, 4, 8, 16, 32))
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    content: dict = {"graphs": random_graphs(options.rounds, options.pairs)}
    if not options.no_model:
        content["smollm2"] = smollm2()
    record(Path(__file__).parent / "results" / "flow.json", content)


if __name__ == "__main__":
    main()
