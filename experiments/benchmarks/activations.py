"""What streaming activations costs beside the bare model, how well the buffer mixes, and SAELens's store beside both.

python -m experiments.benchmarks.activations [--rounds 5] [--layer 10] [--threads 2] [--no-peers]

Every contestant makes the activations of as many tokens of the same documents in each round. The mixing of the buffer
is measured on numbered rows, without a model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp
from experiments.benchmarks.peers import hooked_transformer
from experiments.benchmarks.rounds import interleaved, record, show
from interp.data import corpus
from interp.dictionaries.activations import (
    ActivationStream,
    Contexts,
    MixingBuffer,
    Prefetch,
    Rows,
    State,
    harvest,
)

DOCS = Path(__file__).parents[2] / "docs"


def sae_lens_store(
    model: Any, hook: str, texts: list[str], width: int, batch: int, context: int, rows: int, tokens: int | None = None
) -> Any:
    """SAELens's store on the same documents, contexts and buffer."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    return ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"text": texts}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=context,
        d_in=width,
        n_batches_in_buffer=rows // context,
        total_training_tokens=10**9,
        store_batch_size_prompts=batch,
        train_batch_size_tokens=tokens or batch * context,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        sequence_separator_token="eos",
        exclude_special_tokens=torch.tensor(model.tokenizer.all_special_ids),
    )


def speed(
    lens: interp.Lens, layer: int, rounds: int, batch: int, context: int, passes: int, peers: bool, cpu: bool = False
) -> dict:
    """Seconds of `passes` passes of the model, bare and through each source."""
    read = f"resid_post.{layer}"
    made = corpus(DOCS)
    texts = [str(d.text) for d in made.documents()]

    def stream(**more: Any) -> ActivationStream:
        return ActivationStream(lens, made, read, batch=batch, context=context, epochs=None, **more)

    plain = stream()
    ready = [lens.prepare(input_ids=next(plain).ids) for _ in range(passes)]
    rows = 32 * context
    mixed = MixingBuffer(stream(drop_first=False, separator="none"), rows=rows, batch=batch * context)
    folder = tempfile.TemporaryDirectory()
    store = harvest(stream(), folder.name, tokens=4 * batch * context)
    stored = store.rows(batch=batch * context, epochs=None)
    contestants: dict[str, Callable[[], object]] = {
        "lens.run on ready batches": lambda: [lens.run(b, read) for b in ready],
        "ActivationStream": lambda: [next(plain) for _ in range(passes)],
        "MixingBuffer": lambda: [next(mixed) for _ in range(passes)],
        "a store, read again": lambda: [next(stored) for _ in range(passes)],
    }
    if peers:
        from sae_lens.load_model import HookedProxyLM

        for name, model, hook in (
            ("SAELens, HookedTransformer", hooked_transformer(lens), f"blocks.{layer}.hook_resid_post"),
            (
                "SAELens, HookedProxyLM",
                # It leaves hooks on the modules that it is given, so it is given a copy.
                HookedProxyLM(copy.deepcopy(lens.model), lens.processor),
                f"model.layers.{layer}",
            ),
        ):
            width = plain.d_in[read]
            theirs = sae_lens_store(model, hook, texts, width, batch, context, rows)
            contestants[name] = lambda theirs=theirs: [next(theirs) for _ in range(passes)]
    table = interleaved(contestants, rounds=rounds, clock=time.process_time if cpu else time.perf_counter)
    tokens = passes * batch * context
    show(f"SmolLM2, {read}, {passes} passes of {batch} contexts of {context} tokens", table)
    rates = {r.name: tokens / r.seconds for r in table}
    print("  tokens/s: " + ", ".join(f"{k} {v:,.0f}" for k, v in rates.items()))
    folder.cleanup()
    return {"tokens": tokens, "tokens_per_second": rates, "time": [asdict(r) for r in table]}


def ahead(lens: interp.Lens, layer: int, rounds: int, batch: int, context: int) -> dict:
    """A training step of stand-in products on each batch, the next batch made before, or meanwhile by the thread."""
    read = f"resid_post.{layer}"
    weight = torch.randn(576, 9216) / 24

    def steps(depth: int) -> Callable[[], object]:
        stream = ActivationStream(lens, corpus(DOCS), read, batch=batch, context=context, epochs=None)
        source = Prefetch(stream, depth=depth)

        def run() -> None:
            x = next(source).rows()[read]
            for _ in range(3):
                x = (x @ weight).relu() @ weight.T

        return run

    table = interleaved({f"read ahead by {d}": steps(d) for d in (0, 1)}, rounds=rounds)
    show("a step of stand-in products beside the model", table)
    return {"time": [asdict(r) for r in table]}


class Numbered:
    """Contexts of rows that hold nothing but their number: a source without a model."""

    d_in = {"x": 1}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, contexts: int, context: int, batch: int) -> None:
        self.left = iter(torch.arange(contexts).split(batch))
        self.context = context

    def __iter__(self) -> Numbered:
        return self

    def __next__(self) -> Contexts:
        number = next(self.left)
        document = number[:, None].expand(-1, self.context)
        mask = torch.ones_like(document, dtype=torch.bool)
        place = number[:, None] * self.context + torch.arange(self.context)
        return Contexts({"x": place[..., None].float()}, mask, mask, None, document, number)

    def state(self) -> State:
        return State({})

    def restore(self, state: State) -> None:
        raise NotImplementedError

    def close(self) -> None:
        return None


def quality(batches: Iterator[Tensor], context: int, rows: int, skip: int) -> dict[str, float]:
    """How mixed batches of row numbers are.

    Returns:
        `contexts`: from how many contexts a batch would come if each gave as many rows (one over the chance that two of
        its rows share one); `spread`: standard deviation of where its rows stood in the source, over that of a window
        of the buffer's size; `again`: chance that a row and one of the batch before share a context, over that of two
        rows of the batch.
    """
    effective, spread, again = [], [], []
    before: np.ndarray | None = None
    for i, batch in enumerate(batches):
        number = batch.double().numpy()
        _, counts = np.unique(number // context, return_counts=True)
        share = float((counts * (counts - 1)).sum()) / (len(number) * (len(number) - 1))
        held = np.bincount((number // context).astype(int), minlength=1)
        if i >= skip and before is not None:
            effective.append(1 / share)
            spread.append(float(number.std()) / (rows / 12**0.5))
            size = min(len(held), len(before))
            again.append(float((held[:size] * before[:size]).sum()) / len(number) ** 2 / share)
        before = held
    return {"contexts": float(np.mean(effective)), "spread": float(np.mean(spread)), "again": float(np.mean(again))}


def mixing(rows: int, batch: int, context: int, passes: int) -> dict:
    """The buffer and SAELens's, with the same room, on the same numbered rows."""
    total = 12 * rows // context
    skip = 3 * rows // batch
    until = 9 * rows // batch

    def few(found: Iterator[Any]) -> Iterator[Tensor]:
        for i, x in enumerate(found):
            if i >= until:
                return
            yield (x["x"] if isinstance(x, Rows) else x)[:, 0]

    out = {
        "MixingBuffer": quality(
            few(MixingBuffer(Numbered(total, context, passes), rows=rows, batch=batch)), context, rows, skip
        )
    }
    try:
        from sae_lens.training.mixing_buffer import mixing_buffer
    except ImportError as error:
        print(f"left out: SAELens ({error})")
    else:
        torch.manual_seed(0)
        source = (c.rows()["x"] for c in Numbered(total, context, passes))
        out["SAELens"] = quality(few(mixing_buffer(rows, batch, source)), context, rows, skip)
    print(f"\nmixing over {rows} rows ({rows // context} contexts of {context}), {passes} a pass, batches of {batch}")
    for name, found in out.items():
        print(f"  {name:14}" + "".join(f"{k} {v:8.2f}   " for k, v in found.items()))
    return {"rows": rows, "batch": batch, "context": context, "contexts_a_pass": passes, **out}


def main() -> None:
    """Run the benchmark and write `results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="contexts in a pass of the model")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="time of the process, for a busy machine; 1 thread")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    torch.set_grad_enabled(False)
    content: dict = {"mixing": [mixing(rows, 4096, 128, options.batch) for rows in (16_384, 65_536, 262_144)]}
    lens = interp.load("smollm2-135m", device="cpu")
    sizes = (options.batch, options.context)
    peers = not options.no_peers
    content["cpu_time"] = options.cpu_time
    content["speed"] = speed(lens, options.layer, options.rounds, *sizes, options.passes, peers, options.cpu_time)
    if not options.cpu_time:
        content["ahead"] = ahead(lens, options.layer, options.rounds, *sizes)
    record(Path(__file__).parent / "results" / "activations.json", content)


if __name__ == "__main__":
    main()
