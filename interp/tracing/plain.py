"""A sweep by whole runs, for models whose layers cannot be called alone: each cell in its own copy of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit
from interp.footprint import row_bytes
from interp.reads import Read
from interp.tracing.checkpoint import Checkpoint
from interp.tracing.grid import EVERY, Cell
from interp.tracing.metrics import against, columns_of
from interp.tracing.pair import Found, Pair
from interp.tracing.patching import Patch
from interp.tracing.planning import Limits
from interp.tracing.progress import Bar


def sweep(pair: Pair, limits: Limits, reason: str, checkpoint: Checkpoint, bar: Bar) -> Found:
    """All cells of a pair; `reason` says why it is done this way."""
    lens, size = pair.lens, len(pair.base)
    columns_of(pair.measure, pair.base)
    output = Read("logits", positions=pair.measure.positions)
    every = torch.arange(size, device=pair.base.mask.device)
    measure = pair.measure

    def value(logits: Tensor, samples: Tensor) -> Tensor:
        return measure(logits if measure.ids is None else logits[..., measure.ids], samples).cpu()

    logits = lens.run(pair.source, [output], pair.source_edits).logits
    if measure.relative:
        measure = against(measure, logits)
    source = value(logits, every)
    severed = [] if pair.severed is None else [pair.severed.read(pair.severable)]
    plain = lens.run(pair.base, [output, *severed], pair.base_edits)
    base, held = value(plain.logits, every), {i: plain.values[read, i] for read in severed for i in pair.severable}
    checkpoint.runs(base, source)
    values = base[None].repeat(len(pair.cells), 1)
    copies = 1
    if pair.base.repeatable and not pair.base_edits:
        width = pair.base.mask.shape[1]
        copies = max(1, limits.count(row_bytes(lens, width, width), width) // size)
    # A layer at a time, so that no more of the source run is held.
    by_layers: dict[tuple[int, ...], list[int]] = {}
    for i, cell in enumerate(pair.cells):
        by_layers.setdefault(cell.layers, []).append(i)
    for number, layers in enumerate(sorted(by_layers)):
        numbers = by_layers[layers]
        kept: dict[tuple[int, int], Tensor] = {}
        for first in range(0, len(numbers), copies):
            some = numbers[first : first + copies]
            cells = torch.tensor(some).repeat_interleave(size)
            samples = torch.arange(size).repeat(len(some))
            name = f"{number:03d}-{first // copies:05d}"
            found = checkpoint.get(name, cells, samples)
            if found is None:
                kept = kept or _sources(pair, [pair.cells[i] for i in numbers])
                wide = pair.base.repeat(len(some)) if len(some) > 1 else pair.base
                chosen = [pair.cells[i] for i in some]
                edits = [*pair.base_edits, *_holding(pair, chosen, held), *_edits(pair, chosen, kept)]
                logits = lens.run(wide, [output], edits).logits
                found = value(logits, every.repeat(len(some)))
                checkpoint.put(name, cells, samples, found)
            values[some] = found.reshape(len(some), size)
            bar.advance(len(cells))
    for i, cell in enumerate(pair.cells):
        values[i, ~pair.exists[cell.group]] = torch.nan
    return Found(values, pair.exists, source, base, values.numel(), f"whole runs, since {reason}")


def _sources(pair: Pair, cells: Sequence[Cell]) -> dict[tuple[int, int], Float[Tensor, "batch ..."]]:
    """What the patches take from the source run, by place and layer."""
    numbers = sorted({c.place for c in cells})
    reads = {n: pair.places[n].read(cells[0].layers) for n in numbers}
    run = pair.lens.run(pair.source, list(reads.values()), pair.source_edits)
    return {(n, layer): run.values[reads[n], layer] for n in numbers for layer in cells[0].layers}


def _edits(pair: Pair, cells: Sequence[Cell], sources: dict[tuple[int, int], Tensor]) -> list[Edit]:
    """The cells' patches, each in its own copy of the batch."""
    size, device = len(pair.base), pair.base.mask.device
    out = []
    for (number, layer), source in sources.items():
        some = [j for j, c in enumerate(cells) if c.place == number]
        if not some:
            continue
        place = pair.places[number]
        masks = pair.source_masks(source.shape[1]) if place.of_source else pair.masks
        rows = torch.cat([torch.arange(j * size, (j + 1) * size) for j in some]).to(device)
        samples = torch.arange(size, device=device).repeat(len(some))
        heads = torch.tensor([cells[j].head for j in some], device=device).repeat_interleave(size)
        mask = torch.cat([masks[cells[j].group] for j in some])
        out.append(Patch(place, layer, rows, samples, heads, mask, source).edit())
    return out


def _holding(pair: Pair, cells: Sequence[Cell], held: dict[int, Float[Tensor, "batch pos d_model"]]) -> list[Edit]:
    """What is held beside the cells' patches, each in its own copy of the batch."""
    size, device = len(pair.base), pair.base.mask.device
    out = []
    for layer, source in held.items():
        some = [j for j, c in enumerate(cells) if pair.severs(c.place, c.layers, layer)]
        if not some or pair.severed is None:
            continue
        rows = torch.cat([torch.arange(j * size, (j + 1) * size) for j in some]).to(device)
        samples = torch.arange(size, device=device).repeat(len(some))
        mask = torch.cat([pair.masks[cells[j].group] for j in some])
        out.append(Patch(pair.severed, layer, rows, samples, torch.full_like(rows, EVERY), mask, source).edit())
    return out
