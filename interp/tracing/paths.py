"""Paths from heads to receivers: runs in which a sender's change reaches what it adds to and nothing else.

Frozen attention moves nothing between positions: a sender's change stays in its own column, so that one row (a sender
in one prompt) that is changed in every column serves all groups of positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit, Where
from interp.footprint import row_bytes
from interp.reads import Read
from interp.tracing.carried import Carried
from interp.tracing.grid import Place
from interp.tracing.metrics import against
from interp.tracing.pair import Found, Pair
from interp.tracing.planning import Limits
from interp.tracing.progress import Bar

Sender = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Route:
    """Where paths go.

    Attributes:
        senders: (layer, head), lowest layers first.
        receivers: heads by layer (key/value heads for keys and values); None for the logits.
        via: `q`, `k` or `v`.
        frozen: whether MLPs are frozen.
    """

    senders: tuple[Sender, ...]
    receivers: Mapping[int, tuple[int, ...]] | None
    via: str
    frozen: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a pass: a sender in a prompt each, lowest layers first; all are [row]."""

    sender: np.ndarray
    layer: np.ndarray
    head: np.ndarray
    sample: Tensor

    def joined(self, layer: int) -> int:
        """How many senders are in this layer or below."""
        return int((self.layer <= layer).sum())


def held_sites(pair: Pair, layer: int, frozen: bool) -> list[Place]:
    """What of a layer is held at its value in the base run."""
    found = []
    for kind in pair.layers[layer].branches:
        if kind == "mlp" and not frozen:
            continue
        tower = "cross" if kind == "cross" else None
        site = "attn_out" if kind == "cross" else f"{kind}_out"
        if kind == "attn" and pair.lens.refusal("z", layer) is None:
            site = "z"
        found.append(Place(site, tower))
    return found


class Paths:
    """One pair of batches, whose base run is made.

    Raises:
        UnsupportedError: as `BaseRun`.
    """

    def __init__(self, pair: Pair, route: Route, limits: Limits) -> None:
        self.pair, self.route, self.limits = pair, route, limits
        self.carried = Carried(pair, limits)
        self.base = self.carried.base
        last = pair.depth - 1 if route.receivers is None else max(route.receivers)
        self.above = range(route.senders[0][0], last + 1)
        self.start = self.base.first
        if route.receivers is None and not any("mixer" in layer.branches for layer in pair.layers):
            self.start = max(self.start, int(self.base.columns.min()))
        self.columns = self.base.width - self.start
        self.product = route.frozen and self._adds()
        self._read()

    def _adds(self) -> bool:
        """Whether what a sender gives is simply added to every stream above it."""
        for i in self.above:
            layer = self.pair.layers[i]
            if layer.adjusted or any(what != "add" for what, _ in layer.recipe):
                return False
        own = {layer for layer, _ in self.route.senders}
        if any(hasattr(step, "gain") for i in own for step in self._chain(i)):  # a norm
            return False
        try:
            for i in own:
                self._factor(i)
        except KeyError:  # a factor that depends on what the layer is called with
            return False
        return True

    def _chain(self, layer: int) -> tuple[Any, ...]:
        """What lies between a layer's output projection and the stream."""
        return self.pair.lens.anatomy.attention(None, layer, "z").chain

    def _factor(self, layer: int) -> Tensor | float:
        factor: Tensor | float = 1.0
        for step in self._chain(layer):
            factor = factor * step({})
        return factor

    def _read(self) -> None:
        """What is held at the base run's values, and what senders take from the source run."""
        pair, base, route = self.pair, self.base, self.route
        kept = torch.zeros_like(pair.base.mask)
        kept[:, self.start :] = True
        where = kept if self.start else "all"
        own = sorted({layer for layer, _ in route.senders})
        wanted: dict[Place, list[int]] = {Place("z", None): list(own)}
        for layer in () if self.product else self.above:
            for place in held_sites(pair, layer, route.frozen):
                if layer not in wanted.setdefault(place, []):
                    wanted[place].append(layer)
        reads = {place: place.read(sorted(layers), where) for place, layers in wanted.items()}
        z = Place("z", None).read(own, where)
        device = base.finals.device
        run = pair.lens.run(pair.base, list(reads.values()), pair.base_edits, to=device)
        self.held = {(place, i): run.values[read, i] for place, read in reads.items() for i in wanted[place]}
        run = pair.lens.run(pair.source, [z, base.measured], pair.source_edits, to=device)
        self.source = {i: run.values[z, i] for i in own}
        self.reached = run.values[base.measured, pair.depth - 1]

    def patched(self, bar: Bar) -> Found:
        """All senders and groups."""
        pair, base, carried = self.pair, self.base, self.carried
        size, groups = len(pair.base), len(pair.groups)
        if carried.measure.relative:
            carried.measure = against(carried.measure, pair.lens.unembed(self.reached))
        every = torch.arange(size, device=base.finals.device)
        plain = carried.plain()
        reached = carried.value(self.reached, every, np.zeros(size, dtype=int)).cpu()
        values = plain[None, None].repeat(len(self.route.senders), groups, 1)
        number = np.repeat(np.arange(len(self.route.senders)), size)
        layer, head = (np.array([s[i] for s in self.route.senders])[number] for i in (0, 1))
        sample = torch.arange(size, device=base.finals.device).repeat(len(self.route.senders))
        count = self.limits.count(row_bytes(pair.lens, self.columns, base.width, base.sources), self.columns)
        for first in range(0, len(number), count):
            some = slice(first, first + count)
            rows = Rows(number[some], layer[some], head[some], sample[some])
            for group, found in enumerate(self._pass(rows)):
                values[rows.sender, group, rows.sample.cpu()] = found.cpu()
            bar.advance(len(rows.sender) * groups)
        values = values.flatten(0, 1)
        for i, cell in enumerate(pair.cells):
            values[i, ~pair.exists[cell.group]] = torch.nan
        way = "one product" if self.product else "frozen runs"
        return Found(values, pair.exists, reached, plain, values.numel(), way)

    def _pass(self, rows: Rows) -> list[Float[Tensor, " row"]]:
        """The metric of some rows, for each group of positions."""
        if self.route.receivers is None:
            streams, base = self._frozen(rows, {}), self.base
            index = (base.columns[rows.sample] - self.start).clamp_min(0)
            ends = streams.gather(1, index[:, :, None].expand(-1, -1, streams.shape[-1]))
            out = []
            for group in range(len(self.pair.groups)):
                mask = self.pair.masks[group][rows.sample].gather(1, base.columns[rows.sample])
                finals = torch.where(mask[..., None], ends, base.finals[rows.sample])
                out.append(self.carried.value(finals, rows.sample, rows.sender))
            return out
        received: dict[int, Tensor] = {}
        self._frozen(rows, received)
        return [self._received(rows, group, received) for group in range(len(self.pair.groups))]

    def _frozen(self, rows: Rows, received: dict[int, Tensor]) -> Float[Tensor, "row pos d_model"]:
        """Senders changed, everything else held; returns the last streams, or notes what receivers then get."""
        base, low = self.base, int(rows.layer.min())
        skip = self.start - base.first
        carriage = base.stepper.rows(rows.sample, self.start)
        if self.product:
            added = torch.cat([self._given(rows, layer) for layer in np.unique(rows.layer).tolist()])
            for layer in sorted(self.route.receivers or ()):
                count = rows.joined(layer - 1)
                if count:
                    stream = base.streams[layer][rows.sample[:count], skip:]
                    carriage.step(layer, (stream.float() + added[:count]).to(stream), [self._noting(layer, received)])
            last = base.streams[-1][rows.sample, skip:]
            return (last.float() + added).to(last)
        stream, joined = base.streams[0][:0, skip:], 0
        for layer in range(low, self.above.stop):
            until = rows.joined(layer)
            if until > joined:
                stream = torch.cat([stream, base.streams[layer][rows.sample[joined:until], skip:]])
                joined = until
            edits = [self._noting(layer, received)] if layer in (self.route.receivers or ()) else []
            edits += [
                self._holding(place, layer, rows, joined) for place in held_sites(self.pair, layer, self.route.frozen)
            ]
            stream = carriage.step(layer, stream, edits)
        for layer in received:
            received[layer] = received[layer][: rows.joined(layer - 1)]
        return stream

    def _given(self, rows: Rows, layer: int) -> Float[Tensor, "row pos d_model"]:
        """What the senders of a layer add to the stream, source run minus base run."""
        at = np.flatnonzero(rows.layer == layer)
        device = self.base.finals.device
        head, sample = torch.from_numpy(rows.head[at]).to(device), rows.sample[torch.from_numpy(at).to(device)]
        moved = self.source[layer].float() - self.held[Place("z", None), layer].float()
        weight = self.pair.lens.anatomy.attention(None, layer, "z").weight().detach().float().to(device)
        out = torch.bmm(moved[sample, :, head], weight[head])
        factor = self._factor(layer)
        return out * (factor.to(out) if isinstance(factor, Tensor) else factor)

    def _holding(self, place: Place, layer: int, rows: Rows, count: int) -> Edit:
        """The base run's value in the first rows, but for the heads that send."""
        held, sample = self.held[place, layer], rows.sample[:count]

        def change(value: Tensor, where: Where) -> Tensor:
            new = held.to(value)[sample.to(value.device)]
            at = np.flatnonzero(rows.layer[:count] == layer)
            if place.site == "z" and place.tower is None and len(at):
                head, row = torch.from_numpy(rows.head[at]).to(value.device), torch.from_numpy(at).to(value.device)
                new[row, :, head] = self.source[layer].to(value)[sample.to(value.device)[row], :, head]
            return new

        return Edit(place.read([layer]), change, "path_patching")

    def _noting(self, layer: int, received: dict[int, Tensor]) -> Edit:
        """Keep what the receivers of a layer get; change nothing."""
        assert self.route.receivers is not None
        heads = self.route.receivers[layer]

        def change(value: Tensor, where: Where) -> Tensor:
            received[layer] = value[:, -self.columns :, list(heads)].clone()
            return value

        return Edit(Read(self.route.via, layers=(layer,)), change, "path_patching")

    def _received(self, rows: Rows, group: int, received: Mapping[int, Tensor]) -> Float[Tensor, " row"]:
        """The metric where receivers get what was noted, in a group of positions, and all else is computed."""
        base, depth = self.base, self.pair.depth
        mask = self.pair.masks[group][rows.sample]
        start = int(torch.where(mask, base.reach[rows.sample], base.width - 1).amin())
        low, skip = min(received, default=depth), start - base.first
        if low == depth:
            return self.carried.value(base.finals[rows.sample], rows.sample, rows.sender)
        carriage, stream = base.stepper.rows(rows.sample, start), base.streams[low][rows.sample, skip:]
        for layer in range(low, depth):
            stream = carriage.step(layer, stream, self._giving(layer, received, mask, start))
        finals = carried_ends(stream, base.columns[rows.sample], base.finals[rows.sample], start)
        return self.carried.value(finals, rows.sample, rows.sender)

    def _giving(self, layer: int, received: Mapping[int, Tensor], mask: Tensor, start: int) -> list[Edit]:
        if layer not in received or self.route.receivers is None:
            return []
        heads, new = list(self.route.receivers[layer]), received[layer][:, start - self.start :]

        def change(value: Tensor, where: Where) -> Tensor:
            out, count = value.clone(), new.shape[1]
            part = out[: len(new), -count:]
            keep = mask[: len(new), start:, None, None].to(value.device)
            part[:, :, heads] = torch.where(keep, new.to(value), part[:, :, heads])
            return out

        return [Edit(Read(self.route.via, layers=(layer,)), change, "path_patching")]


def carried_ends(stream: Tensor, columns: Tensor, finals: Tensor, start: int) -> Float[Tensor, "row n d_model"]:
    """The last streams at the measured columns; the base run's where these lie before the computed ones."""
    index = (columns - start).clamp_min(0)[:, :, None].expand(-1, -1, stream.shape[-1])
    return torch.where((columns >= start)[:, :, None], stream.gather(1, index), finals)
