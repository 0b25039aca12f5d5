"""Training an SAE on a model's activations from end to end, beside SAELens: tokens per second, the model included.

python -m experiments.benchmarks.sae_training [--rounds 3] [--steps 8] [--layer 10] [--threads 2]

SmolLM2 reads text up to the layer, a buffer mixes its activations, and each batch is a training step, as in
`experiments.benchmarks.dictionaries`. Every contestant goes on with its own run in each round: buffers are full before
the first, and a round makes as many tokens as it uses.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import interp
from experiments.benchmarks.activations import DOCS, sae_lens_store
from experiments.benchmarks.dictionaries import D_IN, Step, ours, saelens
from experiments.benchmarks.peers import hooked_transformer
from experiments.benchmarks.rounds import interleaved, record, show
from interp.data import corpus
from interp.dictionaries.activations import ActivationStream, MixingBuffer

CONTEXT, PASS, TOKENS, ROWS = 128, 8, 4096, 16384


def stores(lens: interp.Lens, layer: int) -> dict[str, Iterator[Any]]:
    """Where each contestant's batches of activations come from."""
    read, made = f"resid_post.{layer}", corpus(DOCS)
    texts = [str(d.text) for d in made.documents()]
    from sae_lens.load_model import HookedProxyLM

    def theirs(model: Any, hook: str) -> Iterator[Any]:
        return sae_lens_store(model, hook, texts, D_IN, PASS, CONTEXT, ROWS, TOKENS)

    stream = ActivationStream(lens, made, read, batch=PASS, context=CONTEXT, epochs=None, drop_first=False)
    return {
        "interp": (rows.values[read] for rows in MixingBuffer(stream, rows=ROWS, batch=TOKENS)),
        "SAELens, HookedTransformer": theirs(hooked_transformer(lens), f"blocks.{layer}.hook_resid_post"),
        # It leaves hooks on the modules that it is given, so it is given a copy.
        "SAELens, HookedProxyLM": theirs(
            HookedProxyLM(copy.deepcopy(lens.model), lens.processor), f"model.layers.{layer}"
        ),
    }


def main() -> None:
    """Run the benchmark and write `results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="training steps of each contestant in a round")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch.set_num_threads(options.threads)
    lens = interp.load("smollm2-135m", device="cpu")
    content: dict[str, Any] = {"layer": options.layer, "tokens": options.steps * TOKENS}
    for kind in ("topk", "batchtopk"):

        def run(source: Iterator[Any], step: Step) -> Callable[[], None]:
            def go() -> None:
                for _ in range(options.steps):
                    step(next(source).detach())

            return go

        entrants = {
            name: run(source, (ours if name == "interp" else saelens)(kind)[1])
            for name, source in stores(lens, options.layer).items()
        }
        table = interleaved(entrants, rounds=options.rounds)
        show(f"{kind} on SmolLM2's resid_post.{options.layer}, {options.steps} steps of {TOKENS} tokens", table)
        rates = {row.name: options.steps * TOKENS / row.seconds for row in table}
        print("  tokens/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
        content[kind] = {"tokens_per_second": rates, "time": [asdict(row) for row in table]}
    record(Path(__file__).parent / "results" / "sae_training.json", content)


if __name__ == "__main__":
    main()
