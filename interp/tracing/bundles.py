"""Cells that differ in their groups of positions only, and the streams with which their rows begin.

Up to the layer in which it is patched a row is the base run. What is patched behind the mixing of positions
(`attn_out`, `mlp_out`, `z`, ...) changes a layer's output at the patched columns only: one call of the layer, patched
at all columns, gives the streams of all groups. Keys and values change what other positions see: their rows go through
the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.footprint import row_bytes
from interp.reads import Read
from interp.tracing.base_run import BaseRun
from interp.tracing.grid import EVERY, Cell, Place
from interp.tracing.pair import Pair
from interp.tracing.patching import Patch
from interp.tracing.planning import Limits

MIXING = ("k", "v")
Sources = dict[tuple[int, int], Tensor]
"""What patches take from the source run, by place and layer."""


@dataclass(eq=False, slots=True)
class Bundle:
    """Some cells.

    Attributes:
        place: number of the place.
        head: the head.
        layers: the patched layers, from below.
        cells: number of the cell of each group [group], -1 for none.
        boundary: the layer that the rows enter first; the depth if none.
        later: the layers at which the rows are patched on their way.
        made: whether the stream has to be made by the first patched layer.
        stream: what takes the base stream's place in the group's columns at the boundary, or None.
        differs: the columns in which the rows may differ from the base run; like the stream from the first column kept.
    """

    place: int
    head: int
    layers: tuple[int, ...]
    cells: Int[np.ndarray, " group"]
    boundary: int
    later: tuple[int, ...]
    made: bool = False
    stream: Float[Tensor, "batch pos d_model"] | None = None
    differs: Bool[Tensor, "batch pos"] | None = None


def bundles_of(pair: Pair) -> list[Bundle]:
    """The cells of a pair, in the order of their first layers."""
    found: dict[tuple[int, int, int], Bundle] = {}
    for number, cell in enumerate(pair.cells):
        key = (cell.place, cell.layer, cell.head)
        if key not in found:
            found[key] = _bundle(pair, pair.places[cell.place], cell)
        found[key].cells[cell.group] = number
    return sorted(found.values(), key=lambda b: b.layers[0])


def _bundle(pair: Pair, place: Place, cell: Cell) -> Bundle:
    first, cells = cell.layers[0], np.full(len(pair.groups), -1)
    common = (cell.place, cell.head, cell.layers, cells)
    if place.site == "resid_pre":
        return Bundle(*common, first, cell.layers[1:])
    if place.site == "resid_post":
        return Bundle(*common, first + 1, cell.layers[1:])
    if place.site in MIXING or "mixer" in pair.layers[first].branches:
        return Bundle(*common, first, cell.layers)
    return Bundle(*common, first + 1, cell.layers[1:], made=True)


def blocks_of(bundles: Sequence[Bundle], room: int) -> list[list[Bundle]]:
    """Bundles whose streams are held together: whole first layers, no more than `room` where that can be."""
    blocks: list[list[Bundle]] = [[]]
    for bundle in bundles:
        block = blocks[-1]
        if len(block) >= room and block[-1].layers[0] != bundle.layers[0]:
            blocks.append(block := [])
        block.append(bundle)
    return blocks


def read_sources(base: BaseRun, bundles: Sequence[Bundle], more: Sequence[Read] = ()) -> tuple[Sources, list[Tensor]]:
    """What the bundles take from the source run, and what else is read there of a single layer each."""
    pair = base.pair
    wanted: dict[int, set[int]] = {}
    for bundle in bundles:
        wanted.setdefault(bundle.place, set()).update(bundle.layers)
    reads = {}
    for number, layers in wanted.items():
        place = pair.places[number]
        reads[number] = place.read(sorted(layers), "all" if place.site in MIXING else base.where)
    run = pair.lens.run(pair.source, [*reads.values(), *more], pair.source_edits, to=base.finals.device)
    found = {(number, layer): run.values[reads[number], layer] for number, ls in wanted.items() for layer in ls}
    return found, [run.values[read, (read.layers or (0,))[0]] for read in more]


def make_streams(
    base: BaseRun,
    bundles: Sequence[Bundle],
    sources: Sources,
    unlike: Bool[Tensor, "batch pos"],
    limits: Limits,
    held: Mapping[int, Tensor],
) -> None:
    """Give bundles their streams, and say where their rows may differ from the base run."""
    by_layer: dict[int, list[Bundle]] = {}
    for bundle in bundles:
        if bundle.made:
            by_layer.setdefault(bundle.layers[0], []).append(bundle)
        elif bundle.later != bundle.layers:
            bundle.stream = sources[bundle.place, bundle.layers[0]]
    columns = base.width - base.first
    fits = limits.count(row_bytes(base.pair.lens, columns, base.width, base.sources), columns)
    count = max(1, fits // len(base.pair.base))
    rows = {}
    for layer, some in by_layer.items():
        for i in range(0, len(some), count):
            piece = some[i : i + count]
            samples = torch.arange(len(base.pair.base), device=base.finals.device).repeat(len(piece))
            if len(piece) not in rows:
                rows[len(piece)] = base.stepper.rows(samples, base.first)
            changes = [p.edit() for p in _everywhere(base, layer, piece, samples, sources, held)]
            out = rows[len(piece)].step(layer, base.streams[layer][samples], changes)
            for bundle, stream in zip(piece, out.split(len(base.pair.base)), strict=True):
                bundle.stream = stream
    for bundle in bundles:
        bundle.differs = unlike
        if bundle.stream is not None and not bundle.later:
            bundle.differs = unlike & (bundle.stream != base.streams[bundle.boundary]).any(-1)


def _everywhere(
    base: BaseRun,
    layer: int,
    bundles: Sequence[Bundle],
    samples: Tensor,
    sources: Sources,
    held: Mapping[int, Tensor],
) -> list[Patch]:
    """Each bundle's site, patched (and what is held beside it) at all columns in its own copy of the batch."""
    size, device, pair = len(base.pair.base), base.finals.device, base.pair
    copies = torch.arange(len(bundles), device=device).repeat_interleave(size)
    heads = torch.tensor([b.head for b in bundles], device=device)
    number = torch.tensor([b.place for b in bundles], device=device)[copies]

    def patch(where: Place, rows: Tensor, head: Tensor, source: Tensor) -> Patch:
        mask = torch.ones(len(rows), base.width, dtype=torch.bool, device=device)
        return Patch(where, layer, rows, samples[rows], head, mask, source)

    out = []
    severed = torch.tensor([pair.severs(b.place, b.layers, layer) for b in bundles], device=device)[copies]
    if pair.severed is not None and bool(severed.any()):
        rows = severed.nonzero()[:, 0]
        out.append(patch(pair.severed, rows, torch.full_like(rows, EVERY), held[layer]))
    for place in number.unique().tolist():
        rows = (number == place).nonzero()[:, 0]
        out.append(patch(pair.places[place], rows, heads[copies[rows]], sources[place, layer]))
    return out
