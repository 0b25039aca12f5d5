"""What interventions cost: greedy decoding with each against plain decoding, in interleaved rounds.

    python -m experiments.benchmarks.steering [--rounds 9] [--width 512]

On `scenes` (captions of 8, 16, 32 and 64 pictures at once: its step takes so little that with few pictures every hook
shows), and on a random LLaVA of 12 layers with 576 image tokens. Times hold all: the prompt, every decoding step and,
but for one row, the choice of heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import interp
from experiments.benchmarks.rounds import interleaved, record, show
from interp import evaluation, steering
from interp.batch import Batch
from interp.data import scenes
from interp.steering.representation_injection import plan

NEW = 48


def random_llava(width: int) -> tuple[interp.Lens, Batch]:
    """Twelve layers, 576 image tokens, 24 tokens of text behind them."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    vision.image_size, vision.patch_size, vision.projection_dim = 336, 14, 64
    text = LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=8)
    text.num_key_value_heads, text.vocab_size, text.max_position_embeddings = 8, 1000, 1024
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=576)
    lens = interp.wrap(LlavaForConditionalGeneration(config).eval(), name="random-llava")
    ids = torch.cat([torch.tensor([[1, 10]]), torch.full((1, 576), 5), torch.randint(10, 1000, (1, 24))], 1)
    pixels = torch.randn(1, 3, 336, 336)
    return lens, lens.prepare(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def captions(count: int) -> tuple[interp.Lens, Batch]:
    """Scenes with the caption prompt."""
    lens = interp.load("scenes", device="cpu")
    drawn = list(scenes.scenes("test", count))
    text = evaluation.image_prompt(lens, scenes.CAPTION_PROMPT)
    return lens, lens.prepare([text] * len(drawn), [s.image for s in drawn], padding_side="left")


def bare_injection(lens: interp.Lens, rates: list[float]) -> list:
    """Representation injection as plain hooks on the modules of a LLaVA: what the arithmetic alone costs."""
    norm = partial(torch.linalg.vector_norm, dim=-1, keepdim=True)
    handles = []
    for name, strength in (("self_attn", 0.26), ("mlp", 0.16)):
        sources, targets = plan(torch.tensor(rates), 3, min(10, len(rates)))
        carried: list[torch.Tensor] = []

        def hook(module, args, out, i, sources=sources, targets=targets, carried=carried, strength=strength):
            whole = out[0] if isinstance(out, tuple) else out
            value = whole if whole.shape[1] == 1 else whole[:, -1:]
            new = None
            if i in targets:
                mixed = torch.add(value, carried[0], alpha=strength)
                new = mixed * (norm(value) / norm(mixed))
            if i in sources:
                carried[:] = [rates[i] * value if i == sources[0] else torch.add(carried[0], value, alpha=rates[i])]
            if new is None:
                return None
            if value is not whole:
                whole[:, -1:] = new
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        for i in sorted({*sources, *targets}):
            layer = lens.model.model.language_model.layers[i]
            handles.append(getattr(layer, name).register_forward_hook(partial(hook, i=i)))
    return handles


def contestants(lens: interp.Lens, batch: Batch) -> dict[str, Callable[[], object]]:
    """Plain decoding, and with each intervention; sink dimensions and rates are given, for a random model has none."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    depth = len(lens.anatomy.towers["text"].layers)
    rates = [0.1 * (1 + i % 4) for i in range(depth)]

    def reinforced() -> object:
        chosen = steering.vision_heads(lens, batch)
        return lens.generate(batch, chosen.edits(2.0), prefix=chosen.prefix, **options)

    def injected() -> object:
        made = steering.representation_injection(lens, attn=rates, mlp=rates)
        return lens.generate(batch, made, **options)

    def redistributed() -> object:
        made = steering.attention_redistribution(lens, batch, dimensions=(3,), tau=1.5)
        return lens.generate(batch, made, **options)

    def by_hand() -> object:
        handles = bare_injection(lens, rates)
        try:
            return lens.generate(batch, **options)
        finally:
            for handle in handles:
                handle.remove()

    before = steering.vision_heads(lens, batch)
    return {
        "plain": lambda: lens.generate(batch, **options),
        "VHR": reinforced,
        "VHR, heads chosen before": lambda: lens.generate(batch, before.edits(2.0), **options),
        "VHR, the prompt read twice": lambda: lens.generate(
            batch, steering.vision_reinforcement(lens, batch), **options
        ),
        "IRI": injected,
        "IRI, bare hooks": by_hand,
        "VAR": redistributed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    found = {}
    models: dict[str, Callable[[], tuple[interp.Lens, Batch]]] = {
        f"scenes, {n} captions": partial(captions, n) for n in (8, 16, 32, 64)
    }
    title = f"random LLaVA, 12 layers of {options.width}, 576 image tokens"
    models[title] = partial(random_llava, options.width)
    for title, made in models.items():
        rows = interleaved(contestants(*made()), rounds=options.rounds)
        show(f"{title}, {NEW} new tokens", rows)
        found[title] = [asdict(row) for row in rows]
    record(Path(__file__).parent / "results" / "steering.json", found)


if __name__ == "__main__":
    main()
