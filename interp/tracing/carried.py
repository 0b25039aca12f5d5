"""A sweep in which every row is computed from its first changed layer and column on, and rows travel together.

The base run is made once. A row (one cell in one prompt) joins the others at the layer behind the one in which it is
patched; columns before its first changed one come from the keys and values of the base run. Rows that cannot differ
from the base run where it is measured are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import UnsupportedError
from interp.footprint import row_bytes
from interp.tracing.base_run import BaseRun
from interp.tracing.bundles import Bundle, Sources, blocks_of, bundles_of, make_streams, read_sources
from interp.tracing.checkpoint import Checkpoint
from interp.tracing.grid import EVERY
from interp.tracing.metrics import against
from interp.tracing.pair import Found, Pair
from interp.tracing.patching import Patch
from interp.tracing.planning import Limits, passes, shared_starts
from interp.tracing.progress import Bar


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Rows to be computed, one for each cell and sample that can differ from the base run; all arrays are [row]."""

    bundle: Int[np.ndarray, " row"]
    group: Int[np.ndarray, " row"]
    sample: Int[np.ndarray, " row"]
    start: Int[np.ndarray, " row"]
    boundary: Int[np.ndarray, " row"]
    cell: Int[np.ndarray, " row"]

    def some(self, chosen: np.ndarray) -> Rows:
        """A part of them."""
        return Rows(*(getattr(self, n)[chosen] for n in self.__dataclass_fields__))


class Carried:
    """A pair whose base run is made.

    Raises:
        UnsupportedError: as `BaseRun`.
    """

    def __init__(self, pair: Pair, limits: Limits) -> None:
        self.pair, self.limits = pair, limits
        self.base = BaseRun(pair)
        self.measure = pair.measure
        self.held: dict[int, Tensor] = {}

    def _held(self) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """What is held beside patches, by layer, from the first column that any cell changes on."""
        pair = self.pair
        if pair.severed is None:
            return {}
        read = pair.severed.read(pair.severable, self.base.where)
        run = pair.lens.run(pair.base, read, pair.base_edits, to=self.base.finals.device)
        return {i: run.values[read, i] for i in pair.severable}

    def sweep(self, checkpoint: Checkpoint, bar: Bar) -> Found:
        """All cells."""
        pair, base, size = self.pair, self.base, len(self.pair.base)
        # Half of the memory holds what is read of the source run and the streams that are made of it.
        blocks = blocks_of(bundles_of(pair), max(1, self.limits.memory // max(1, 4 * base.streams[0].nbytes)))
        more = [base.input, base.measured]
        sources, (first, finals) = read_sources(base, blocks[0], more)
        if self.measure.relative:
            self.measure = against(self.measure, pair.lens.unembed(finals))
        unlike = base.unlike(first)
        self.held = self._held()
        every, none = torch.arange(size, device=finals.device), np.zeros(size, dtype=int)
        plain, reached = self.plain(), self.value(finals, every, none).cpu()
        checkpoint.runs(plain, reached)
        values = plain[None].repeat(len(pair.cells), 1)
        computed = 0
        for number, bundles in enumerate(blocks):
            if number:
                sources, _ = read_sources(base, bundles)
            make_streams(base, bundles, sources, unlike, self.limits, self.held)
            computed += self.block(f"{number:03d}", bundles, sources, values, checkpoint, bar)
            for bundle in bundles:
                bundle.stream = bundle.differs = None
        for i, cell in enumerate(pair.cells):
            values[i, ~pair.exists[cell.group]] = torch.nan
        return Found(values, pair.exists, reached, plain, computed, "carried")

    def plain(self) -> Float[Tensor, " batch"]:
        """The metric of the base run."""
        size = len(self.base.finals)
        every = torch.arange(size, device=self.base.finals.device)
        return self.value(self.base.finals, every, np.zeros(size, dtype=int)).cpu()

    def block(
        self, name: str, bundles: Sequence[Bundle], sources: Sources, values: Tensor, checkpoint: Checkpoint, bar: Bar
    ) -> int:
        """The rows of some bundles, pass by pass; their values are put into `values`."""
        pair, base = self.pair, self.base
        rows = self._rows(bundles)
        bar.advance(sum(int((b.cells >= 0).sum()) for b in bundles) * len(pair.base) - len(rows.cell))
        starts = shared_starts(rows.start, pair.depth - rows.boundary, base.width, base.finals.device.type)

        def count(start: int) -> int:
            columns = base.width - start
            return self.limits.count(row_bytes(pair.lens, columns, base.width, base.sources), columns)

        for number, (start, chosen) in enumerate(passes(starts, rows.boundary, count)):
            some, part = rows.some(chosen), f"{name}-{number:05d}"
            cells, samples = self._index(some.cell).cpu(), self._index(some.sample)
            found = checkpoint.get(part, cells, samples.cpu())
            if found is None:
                found = self.value(self._pass(bundles, some, start, sources), samples, some.cell).cpu()
                checkpoint.put(part, cells, samples.cpu(), found)
            values[cells, samples.cpu()] = found
            bar.advance(len(chosen))
        return len(rows.cell)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.base.finals.device)

    def _rows(self, bundles: Sequence[Bundle]) -> Rows:
        """The rows that can differ from the base run where it is measured."""
        base, found = self.base, []
        reach, masks = base.reach[:, base.first :], self.pair.masks[:, :, base.first :]
        measured = torch.zeros_like(self.pair.base.mask).scatter_(1, base.columns, True)[:, base.first :]
        for number, bundle in enumerate(bundles):
            assert bundle.differs is not None
            groups = np.flatnonzero(bundle.cells >= 0)
            changed = masks[self._index(groups)] & bundle.differs
            if bundle.boundary == self.pair.depth:
                changed = changed & measured  # behind the last layer nothing moves on
            begins = torch.where(changed, reach, base.width).amin(2)
            if self.pair.places[bundle.place].of_source:
                begins = torch.full_like(begins, base.first)
            at, sample = (begins < base.width).nonzero(as_tuple=True)
            group = groups[at.cpu().numpy()]
            columns = (np.full(len(group), number), group, sample.cpu().numpy(), begins[at, sample].cpu().numpy())
            found.append((*columns, np.full(len(group), bundle.boundary), bundle.cells[group]))
        return Rows(*(np.concatenate(x) for x in zip(*found, strict=True)))

    def _pass(
        self, bundles: Sequence[Bundle], rows: Rows, start: int, sources: Sources
    ) -> Float[Tensor, "row n d_model"]:
        """Rows on their way through the layers, each joining at its own; returns the last streams that are measured."""
        base, depth = self.base, self.pair.depth
        samples = self._index(rows.sample)
        moving = int((rows.boundary < depth).sum())
        carriage = base.stepper.rows(samples[:moving], start) if moving else None
        stream, joined = base.streams[0][:0, start - base.first :], 0
        for layer in range(int(rows.boundary.min()), depth + 1):
            until = int((rows.boundary <= layer).sum())
            if until > joined:
                stream = torch.cat([stream, self._joining(bundles, rows, joined, until, layer, start)])
                joined = until
            if layer < depth:
                assert carriage is not None
                changes = [p.edit() for p in self._on_the_way(bundles, rows, joined, layer, sources)]
                end = self._end(carriage, stream) if layer == depth - 1 and not changes else None
                if end is None:
                    stream = carriage.step(layer, stream, changes)
                else:
                    stream, start = end, base.width - end.shape[1]
        columns = base.columns[samples]
        index = (columns - start).clamp_min(0)[:, :, None].expand(-1, -1, stream.shape[-1])
        return torch.where((columns >= start)[:, :, None], stream.gather(1, index), base.finals[samples])

    def _end(self, carriage: Any, stream: Tensor) -> Tensor | None:
        """The last layer at the measured columns only, where these are the last ones; its other outputs go nowhere."""
        base, layer = self.base, self.pair.depth - 1
        if base.tail is None or base.tail <= carriage.start:
            return None
        keys = carriage.keys(layer, stream)
        if keys is None:
            return None
        before = [x[:, :, : base.tail] for x in keys]
        rows = base.stepper.rows(carriage.samples[: len(stream)], base.tail)
        return rows.step(layer, stream[:, base.tail - carriage.start :], keys=(before[0], before[1]))

    def _joining(
        self, bundles: Sequence[Bundle], rows: Rows, first: int, stop: int, layer: int, start: int
    ) -> Float[Tensor, "row pos d_model"]:
        """The streams of rows that join at a layer: the base run's, patched."""
        skip, out = start - self.base.first, []
        edges = first + 1 + np.flatnonzero(np.diff(rows.bundle[first:stop]))
        for a, b in pairwise([first, *edges.tolist(), stop]):
            sample, group = self._index(rows.sample[a:b]), self._index(rows.group[a:b])
            stream = self.base.streams[layer][sample, skip:]
            new = bundles[rows.bundle[a]].stream
            if new is not None:
                mask = self.pair.masks[group, sample][:, start:, None]
                stream = torch.where(mask, new[sample, skip:].to(stream), stream)
            out.append(stream)
        return torch.cat(out)

    def _on_the_way(
        self, bundles: Sequence[Bundle], rows: Rows, count: int, layer: int, sources: Sources
    ) -> list[Patch]:
        """What is patched (or held) inside a layer in the first rows, by place."""
        places: dict[int, list[int]] = {}
        severed: list[int] = []
        for number in np.unique(rows.bundle[:count]).tolist():
            bundle = bundles[number]
            if layer in bundle.later:
                places.setdefault(bundle.place, []).append(number)
            if self.pair.severs(bundle.place, bundle.layers, layer):
                severed.append(number)
        out = []
        if severed and self.pair.severed is not None:
            at = self._index(np.flatnonzero(np.isin(rows.bundle[:count], severed)))
            sample, group = self._index(rows.sample)[at], self._index(rows.group)[at]
            every, masks = torch.full_like(at, EVERY), self.pair.masks[group, sample]
            out.append(Patch(self.pair.severed, layer, at, sample, every, masks, self.held[layer]))
        for number, some in places.items():
            at = np.flatnonzero(np.isin(rows.bundle[:count], some))
            place, source = self.pair.places[number], sources[number, layer]
            heads = self._index(np.array([bundles[i].head for i in rows.bundle[at]]))
            sample, group = self._index(rows.sample[at]), self._index(rows.group[at])
            masks = self.pair.source_masks(source.shape[1]) if place.of_source else self.pair.masks
            out.append(Patch(place, layer, self._index(at), sample, heads, masks[group, sample], source))
        return out

    def _logits(self, finals: Float[Tensor, "row n d_model"]) -> Float[Tensor, "row n id"]:
        """The logits that the metric reads."""
        head, ids = self.pair.lens.anatomy.unembed, self.measure.ids
        if ids is None:
            return self.pair.lens.unembed(finals)
        assert head is not None
        try:
            with torch.no_grad():
                return head.columns(finals, ids)
        except UnsupportedError:
            return self.pair.lens.unembed(finals)[..., ids]

    def value(
        self, finals: Float[Tensor, "row n d_model"], samples: Int[Tensor, " row"], cells: Int[np.ndarray, " row"]
    ) -> Float[Tensor, " row"]:
        """The metric of rows, from their last streams."""
        measure, size = self.measure, len(self.base.finals)
        ids = self.pair.lens.vocabulary if measure.ids is None else len(measure.ids)
        count = max(1, self.limits.memory // (3 * 4 * finals.shape[1] * ids))
        if not measure.whole:
            pieces = zip(finals.split(count), samples.split(count), strict=True)
            return torch.cat([measure(self._logits(f), s) for f, s in pieces])
        # A function of the caller's sees whole copies of the batch, in which the other samples are the base run's.
        kinds, where = np.unique(cells, return_inverse=True)
        place, copies, values = self._index(where), max(1, count // size), []
        for first in range(0, len(kinds), copies):
            some = min(copies, len(kinds) - first)
            here = (place >= first) & (place < first + some)
            full = self.base.finals[None].repeat(some, 1, 1, 1)
            full[place[here] - first, samples[here]] = finals[here]
            every = torch.arange(size, device=samples.device).repeat(some)
            values.append(measure(self.pair.lens.unembed(full.flatten(0, 1)), every).reshape(some, size))
        return torch.cat(values)[place, samples]
