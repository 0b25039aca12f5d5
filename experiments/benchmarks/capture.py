"""What reading activations costs, beside the plain forward pass and beside the peers, on SmolLM2-135M.

python -m experiments.benchmarks.capture [--tokens 256] [--rounds 24] [--no-peers]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import interp
from experiments.benchmarks.peers import hooked_transformer
from experiments.benchmarks.rounds import interleaved, peak_bytes, record, show
from interp.data.prompts import repeated_tokens

SITES = ["resid_pre", "attn_out", "mlp_out", "z"]
LENS_NAMES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z")


def peers(lens: interp.Lens, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same four sites (and the patterns, where the peer has them) read by other libraries."""
    found: dict[str, Callable[[], object]] = {}
    layers = len(lens.anatomy.towers["text"].layers)
    eager = copy.deepcopy(lens.model)
    eager.set_attn_implementation("eager")
    found["transformers: eager, output_attentions"] = lambda: eager(
        ids, output_attentions=True, output_hidden_states=True, use_cache=False
    )
    import nnsight

    sight: Any = nnsight.NNsight(copy.deepcopy(lens.model))

    def saves() -> object:
        kept: list = []
        with sight.trace(input_ids=ids, use_cache=False):
            for layer in sight.model.layers:
                kept.append(layer.input.save())
                kept.append(layer.self_attn.o_proj.input.save())
                kept.append(layer.self_attn.o_proj.output.save())
                kept.append(layer.mlp.output.save())
        return kept

    found["nnsight: 4 sites of every layer"] = saves
    wanted = {f"blocks.{i}.{n}" for i in range(layers) for n in LENS_NAMES}
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=copy.deepcopy(lens.model),
        tokenizer=lens.processor,
        dtype=lens.dtype,
    )
    found["TransformerLens bridge: 4 sites"] = lambda: bridge.run_with_cache(ids, names_filter=lambda n: n in wanted)
    hooked = hooked_transformer(lens, str(ids.device))
    found["TransformerLens HookedTransformer: 4 sites"] = lambda: hooked.run_with_cache(
        ids, names_filter=lambda n: n in wanted
    )
    return found


def held(lens: interp.Lens, plain: Callable[[], object]) -> list[torch.Tensor]:
    """What no reader can beat: hooks that do nothing but keep a reference to the same tensors."""
    kept: list[torch.Tensor] = []
    handles = []
    for layer in lens.model.model.layers:
        handles.append(layer.register_forward_pre_hook(lambda m, a: kept.append(a[0])))
        handles.append(layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: kept.extend((a[0], o))))
        handles.append(layer.mlp.down_proj.register_forward_hook(lambda m, a, o: kept.append(o)))
    plain()
    for handle in handles:
        handle.remove()
    return kept


def main() -> None:
    """Run the benchmark and write `results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    lens = interp.load("smollm2-135m")
    ids = repeated_tokens(options.batch, options.tokens // 2, vocab_size=40000, seed=0)
    batch = lens.prepare(input_ids=ids)
    ids = batch.inputs["input_ids"]
    rows = [*SITES, "pattern@last"]

    def plain() -> object:
        return lens.model(input_ids=ids, use_cache=False)

    contestants: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "floor: bare hooks that hold the same tensors": lambda: held(lens, plain),
        "interp: 4 sites of every layer, and logits": lambda: lens.run(batch, [*SITES, "logits"]),
        "interp: the same, and last row of every pattern": lambda: lens.run(batch, [*rows, "logits"]),
        "interp: every pattern, and logits": lambda: lens.run(batch, ["pattern", "logits"]),
        "interp: resid_post of layer 4 of 30": lambda: lens.run(batch, ["resid_post.4"]),
    }
    if not options.no_peers:
        contestants |= peers(lens, ids)
    table = interleaved(contestants, rounds=options.rounds)
    show(f"{options.batch} x {options.tokens} tokens, {options.rounds} interleaved rounds", table)
    # Memory: what a run holds at its peak above the plain forward, against the bytes it returns.
    base = peak_bytes(plain)
    memory = {}
    for name, reads in {"4 sites": SITES, "4 sites and last pattern rows": rows}.items():
        returned = lens.run(batch, reads).nbytes
        above = peak_bytes(lambda reads=reads: lens.run(batch, [*reads, "logits"])) - base
        memory[name] = {"returned": returned, "peak_above_plain": above, "ratio": above / returned}
        print(
            f"memory, {name}: {above / 2**20:.1f} MiB above the plain forward for {returned / 2**20:.1f} MiB: "
            f"{above / returned:.3f}x"
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    record(
        Path(__file__).parent / "results" / f"capture-{kind}.json",
        {
            "tokens": options.tokens,
            "batch": options.batch,
            "rounds": options.rounds,
            "time": [asdict(r) for r in table],
            "memory": memory,
        },
    )


if __name__ == "__main__":
    main()
