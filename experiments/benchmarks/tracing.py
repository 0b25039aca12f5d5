"""What a patching sweep costs, beside the loop that makes one whole run for each cell, here and in other libraries.

python -m experiments.benchmarks.tracing [--rounds 5] [--cells 96] [--rows 32] [--threads 2] [--no-peers]

A loop costs the same for every cell, so only some cells of a loop are run in each round and its time for the grid is
reckoned from them. The sweep runs whole.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp
from experiments.benchmarks.peers import hooked_transformer
from experiments.benchmarks.rounds import Row, interleaved, peak_bytes, record, show
from interp import edits
from interp.batch import Batch
from interp.tracing import patch_sweep

SITES = ("resid_pre", "attn_out", "mlp_out")
# As many tokens in both prompts of a pair: one differs at its first token, so that no position can be left out, the
# other in the middle.
PAIRS = {
    "differs from the first token on": (
        "The Eiffel Tower, which was built over a hundred years ago, is located in the city of",
        "Our Eiffel Tower, which was built over a hundred years ago, is located in the city of",
        (" Paris", " London"),
    ),
    "differs from the middle on": (
        "Then, Mary and John were working at the old store. After lunch John gave a drink to",
        "Then, Mary and John were working at the old store. After lunch Mary gave a drink to",
        (" Mary", " John"),
    ),
}
Place = tuple[str, int, int]


def grid(lens: interp.Lens, width: int, count: int) -> list[Place]:
    """Some cells of the grid, spread evenly over it."""
    every = [(s, i, p) for s in SITES for i in lens.layers_with(s) for p in range(width)]
    return [every[int(n * len(every) / count)] for n in range(count)]


def loop(
    lens: interp.Lens, clean: Batch, corrupt: Batch, cells: Sequence[Place], rows: int, good: int, bad: int
) -> list[float]:
    """One whole run for each cell, several in a batch: the clean run is made once, logits at the last token only."""
    source = lens.run(clean, [interp.Read(s) for s in SITES])
    out: list[float] = []
    for first in range(0, len(cells), rows):
        some = cells[first : first + rows]
        changes = []
        for site, layer in dict.fromkeys((s, i) for s, i, _ in some):
            here = [j for j, (s, i, _) in enumerate(some) if (s, i) == (site, layer)]

            def change(value: Tensor, site: str = site, layer: int = layer, here: list[int] = here, some: Any = some):
                value = value.clone()
                for j in here:
                    value[j, some[j][2]] = source[site, layer][0, some[j][2]]
                return value

            changes.append(edits.splice(change, site=site, layers=layer))
        wide = corrupt.repeat(len(some)) if corrupt.repeatable and len(some) > 1 else corrupt
        logits = lens.run(wide, "logits@last", changes).logits[:, -1]
        out += (logits[:, good] - logits[:, bad]).tolist()
    return out


def transformer_lens(
    lens: interp.Lens, ids: dict[str, Tensor], cells: Sequence[Place], good: int, bad: int
) -> Callable:
    """`transformer_lens.patching` on a HookedTransformer with the same weights, which patches one cell in a run."""
    import pandas as pd
    from transformer_lens import patching

    hooked = hooked_transformer(lens)

    def run() -> dict[Place, float]:
        found: dict[Place, float] = {}
        _, cache = hooked.run_with_cache(ids["clean"], names_filter=lambda n: any(n.endswith(s) for s in SITES))
        for site in SITES:
            some = [(i, p) for s, i, p in cells if s == site]
            values = patching.generic_activation_patch(
                hooked,
                ids["corrupt"],
                cache,
                lambda logits: logits[0, -1, good] - logits[0, -1, bad],
                patch_setter=patching.layer_pos_patch_setter,
                activation_name=site,
                index_df=pd.DataFrame(some, columns=["layer", "pos"]),
            )
            found |= {(site, *place): float(v) for place, v in zip(some, values, strict=True)}
        return found

    return run


def nnsight_loop(lens: interp.Lens, ids: dict[str, Tensor], cells: Sequence[Place], good: int, bad: int) -> Callable:
    """A trace for each cell."""
    import nnsight

    sight: Any = nnsight.NNsight(copy.deepcopy(lens.model))

    def run() -> dict[Place, float]:
        found: dict[Place, float] = {}
        kept: dict[str, list] = {s: [] for s in SITES}
        with sight.trace(input_ids=ids["clean"], use_cache=False):
            for layer in sight.model.layers:
                kept["resid_pre"].append(layer.input.save())
                kept["attn_out"].append(layer.self_attn.output[0].save())
                kept["mlp_out"].append(layer.mlp.output.save())
        for site, number, position in cells:
            value = kept[site][number][0, position]
            with sight.trace(input_ids=ids["corrupt"], use_cache=False, logits_to_keep=1):
                layer = sight.model.layers[number]
                if site == "resid_pre":
                    layer.input[0, position] = value
                elif site == "attn_out":
                    layer.self_attn.output[0][0, position] = value
                else:
                    layer.mlp.output[0, position] = value
                last = sight.output.logits[0, -1].save()
            found[site, number, position] = float(last[good] - last[bad])
        return found

    return run


def text(lens: interp.Lens, name: str, rounds: int, count: int, rows: int, peers: bool) -> dict:
    """The grid layers x positions x three sites of SmolLM2."""
    first, second, (right, wrong) = PAIRS[name]
    good, bad = (lens.processor(x, add_special_tokens=False)["input_ids"][0] for x in (right, wrong))
    clean, corrupt = lens.prepare([first]), lens.prepare([second])
    width = clean.mask.shape[1]
    cells = grid(lens, width, count)
    ids = {"clean": clean.inputs["input_ids"], "corrupt": corrupt.inputs["input_ids"]}

    def sweep(**more: Any):
        return patch_sweep(lens, clean, corrupt, sites=SITES, answers=[good], wrong=[bad], **more)

    def looped(some: Sequence[Place], rows: int) -> list[float]:
        return loop(lens, clean, corrupt, some, rows, good, bad)

    found = sweep()
    total = len(found.cells)
    places = [(found.sites[s], i, int(found.groups[g])) for s, i, _, g in found.cells.tolist()]
    values = dict(zip(places, found.values[:, 0].tolist(), strict=True))
    error = max(abs(values[c] - v) for c, v in zip(cells, looped(cells, rows), strict=True))
    few = cells[:: count // 12]
    contestants: dict[str, Callable[[], object]] = {
        f"interp, {total} cells": sweep,
        f"interp, {total} cells, {rows} rows in a pass": lambda: sweep(rows=rows),
        f"loop, {rows} cells in a run, {count} cells": lambda: looped(cells, rows),
        f"loop, 1 cell in a run, {len(few)} cells": lambda: looped(few, 1),
    }
    parts = [1.0, 1.0, total / count, total / len(few)]
    if peers:
        for peer, make in {"TransformerLens": transformer_lens, "nnsight": nnsight_loop}.items():
            run = make(lens, ids, few, good, bad)
            off = max(abs(values[c] - v) for c, v in run().items())
            print(f"{peer}: largest difference {off:.1e}")
            contestants[f"{peer}, 1 cell in a run, {len(few)} cells"] = run
            parts.append(total / len(few))
    table = interleaved(contestants, rounds=rounds)
    title = f"SmolLM2, {width} tokens, {name}: {total} cells, {found.settings['computed']} computed"
    memory = {
        f"interp, {rows} rows": peak_bytes(lambda: sweep(rows=rows, positions=[0, width // 2])),
        f"loop, {rows} cells": peak_bytes(lambda: looped(cells[:rows], rows)),
    }
    return {title: shown(title, error, table, parts, memory)}


def shown(title: str, error: float, table: list[Row], parts: Sequence[float], memory: dict[str, int]) -> dict:
    """Print the outcome, and return what is recorded: each ratio is multiplied by the part of the grid that was run."""
    show(f"{title}; largest difference {error:.1e}", table)
    for row, part in zip(table, parts, strict=True):
        low, high = row.low * part, row.high * part
        print(f"  {row.name}: {row.ratio * part:.2f} times for the grid ({low:.2f} to {high:.2f})")
    print(f"  peak memory, MiB: { {k: round(v / 2**20, 1) for k, v in memory.items()} }")
    time = [asdict(r) | {"ratio_for_grid": r.ratio * p} for r, p in zip(table, parts, strict=True)]
    return {"difference": error, "peak_bytes": memory, "time": time}


def llava(layers: int, width: int) -> interp.Lens:
    """A random LLaVA that makes 576 tokens of a picture."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64,
            "max_position_embeddings": 1024,
        },
        image_token_index=999,
        image_seq_length=576,
    )
    model = LlavaForConditionalGeneration(config).eval()  # type: ignore[arg-type]
    return interp.wrap(model, name=f"random LLaVA, {layers} layers of {width}")


def picture(rounds: int, layers: int, width: int) -> dict:
    """All layers and three sites at the last token, behind 576 image tokens."""
    lens = llava(layers, width)
    ids = torch.randint(5, 900, (1, 600), generator=torch.Generator().manual_seed(0))
    ids[:, 5:581] = 999
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    clean, corrupt = (
        lens.prepare(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=p[None]) for p in pixels
    )
    last = ids.shape[1] - 1
    cells = [(s, i, last) for s in SITES for i in range(layers)]
    some = cells[:: len(cells) // 8][:8]

    def sweep():
        return patch_sweep(lens, clean, corrupt, sites=SITES, positions="last", answers=[7], wrong=[8])

    found = sweep()
    places = [(found.sites[s], i, last) for s, i, _, _ in found.cells.tolist()]
    values = dict(zip(places, found.values[:, 0].tolist(), strict=True))
    wanted = loop(lens, clean, corrupt, some, 1, 7, 8)
    error = max(abs(values[c] - v) for c, v in zip(some, wanted, strict=True))
    table = interleaved(
        {
            f"interp, {len(cells)} cells": sweep,
            "loop, 8 cells": lambda: loop(lens, clean, corrupt, some, 1, 7, 8),
            "two plain runs": lambda: [lens.run(b, "logits@last") for b in (clean, corrupt)],
        },
        rounds=rounds,
    )
    title = f"{lens.name}, 576 image tokens, last token: {len(cells)} cells"
    memory = {"interp": peak_bytes(sweep), "one run": peak_bytes(lambda: lens.run(clean, "logits@last"))}
    return {title: shown(title, error, table, [1.0, len(cells) / len(some), 1.0], memory)}


def main() -> None:
    """Run the benchmark and write `results/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=96, help="cells of the loop that are timed")
    parser.add_argument("--rows", type=int, default=32, help="cells in one run of the loop, and rows of a pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32, help="layers of the random vision-language model")
    parser.add_argument("--width", type=int, default=256, help="width of its stream")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-text", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # of TransformerLens
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    content: dict = {"rounds": options.rounds}
    content["picture"] = picture(options.rounds, options.layers, options.width)
    if not options.no_text:
        lens = interp.load("smollm2-135m", device="cpu")
        content["text"] = {}
        for name in PAIRS:
            content["text"] |= text(lens, name, options.rounds, options.cells, options.rows, not options.no_peers)
    record(Path(__file__).parent / "results" / "tracing.json", content)


if __name__ == "__main__":
    main()
