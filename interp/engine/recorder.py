"""What happens to a value when the model reaches a place: edit it, put a gradient probe into it, read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.batch import Batch, Selection, select
from interp.edits import Edit, Where
from interp.engine.anatomy import Anatomy
from interp.engine.chosen import Chosen, put_back, selected
from interp.engine.plan import ATTENTION_CALL, Place, Plan, ReadAt
from interp.errors import EditError, HookError, InputError, NonFiniteError
from interp.reads import Read
from interp.sites import SITES

_AXES = {name: (row.position_axis, row.head_axis) for name, row in SITES.items()}


class Stop(BaseException):
    """Raised inside a run once everything asked for has been seen; caught by the run."""


@dataclass(eq=False, slots=True)
class Recorder:
    """The state of one run.

    Attributes:
        plan: what is to be done.
        anatomy: the model's parts.
        batch: the inputs.
        offset: column of the main stream at which the present forward call begins.
        step: number of the present forward call (0 but for generation).
        generating: whether the run is a generation.
        to: device on which reads are kept; None leaves them where they are.
        copies: rows that each sample has in the main tower, one behind the other (beams).
        stop: whether to end the run when nothing is left to do.
        with_graph: whether values are part of a graph for gradients.
        pieces: what was read, one tensor for each forward call.
        copied: devices from which copies may still be on their way.
        every: all columns of the present chunk, and what they are for.
    """

    plan: Plan
    anatomy: Anatomy
    batch: Batch
    offset: int = 0
    step: int = 0
    generating: bool = False
    to: torch.device | str | None = None
    copies: int = 1
    stop: bool = False
    with_graph: bool = False
    pieces: dict[ReadAt, list[Tensor]] = field(default_factory=dict)
    probes: dict[Place, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    valid: dict[Read, Bool[Tensor, "batch n"]] = field(default_factory=dict)
    pending: set[Place] = field(default_factory=set)
    chosen: dict[Any, Chosen] = field(default_factory=dict)
    copied: set[torch.device] = field(default_factory=set)
    every: tuple[Any, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        """Everything in the plan is still to come."""
        self.pending = set(self.plan.work)

    def stream_mask(self, tower: str, size: int, width: int, device: torch.device) -> Tensor:
        """Real positions of a tower's stream [batch, pos], over all columns that exist so far."""
        mask: Tensor | None = None
        if tower in ("model", self.anatomy.main):
            mask = self.batch.mask
        elif tower == "encoder":
            mask = self.batch.source_mask
        if mask is None or (tower not in ("model", self.anatomy.main) and mask.shape != (size, width)):
            mask = torch.ones(size, width, dtype=torch.bool, device=device)
        missing = self._start(tower) + width - mask.shape[1]
        if missing > 0:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], missing)], dim=1)
        self.masks[tower] = mask
        return mask.to(device)

    def _start(self, tower: str) -> int:
        return self.offset if tower in ("model", self.anatomy.main) else 0

    def selection(self, positions: Any, tower: str, size: int, width: int, device: torch.device) -> Chosen | None:
        """Columns of the present chunk that a selection means; None for all of them."""
        if isinstance(positions, str) and positions == "all":
            return None
        start = self._start(tower)
        named = isinstance(positions, str) and positions in ("last", "generated")
        step = self.generating and tower == self.anatomy.main and start >= self.batch.mask.shape[1]
        if named and step and width == 1:
            return None
        key = (
            self.step,
            start,
            tower,
            size,
            width,
            positions if not isinstance(positions, (slice, Tensor)) else id(positions),
        )
        if key in self.chosen:
            return self.chosen[key]
        mask = self.stream_mask(tower, size, width, device)
        main = tower in ("model", self.anatomy.main)
        if mask.shape[0] != size:
            raise InputError(f"positions cannot be chosen in tower {tower!r}: its rows are not the batch's samples.")
        if self.generating and main:
            found = self._generated(positions, mask, start, width)
        else:
            found = select(positions, mask, self.batch if main else None)
        if start and not (self.generating and main and self._of_step(positions, start)):
            inside = (found.index >= start) & (found.index < start + width)
            if bool((found.valid & ~inside).any()):
                raise InputError(f"positions {positions} lie before column {start}, where this run was entered.")
            found = Selection((found.index - start).clamp(0, width - 1), found.valid)
        self.chosen[key] = Chosen.of(Selection(found.index.to(device), found.valid.to(device)))
        return self.chosen[key]

    def _of_step(self, positions: Any, start: int) -> bool:
        """Whether a selection in a generation counts from where the present step begins."""
        named = isinstance(positions, str) and positions in ("last", "generated")
        return named or start >= self.batch.mask.shape[1]

    def _generated(self, positions: Any, mask: Tensor, start: int, width: int) -> Selection:
        size, prompt = mask.shape[0], self.batch.mask.shape[1]
        none = torch.zeros(size, 0, dtype=torch.long, device=mask.device)
        if isinstance(positions, str) and positions in ("last", "generated"):
            if positions == "generated" and start < prompt:
                return Selection(none, none.bool())
            column = torch.full((size, 1), width - 1, dtype=torch.long, device=mask.device)
            return Selection(column, torch.ones_like(column, dtype=torch.bool))
        if start >= prompt:
            return Selection(none, none.bool())
        return select(positions, self.batch.mask, self.batch)

    def key_start(self, place: Place, columns: int, n_keys: int) -> int:
        """Column of the first key of an attention call: a sliding cache has dropped earlier ones."""
        tower, kind, _, _ = place
        if not self.generating or kind == "cross" or tower != self.anatomy.main:
            return 0
        return max(0, self.offset + columns - n_keys)

    def keys_mask(
        self, edit: Edit, place: Place, size: int, columns: int, width: int, device: torch.device
    ) -> Tensor | None:
        """The chosen key columns [batch, key] of an edit of scores or pattern."""
        if edit.keys is None:
            return None
        tower, kind, _, _ = place
        start = self.key_start(place, columns, width)
        source = ("encoder" if "encoder" in self.anatomy.towers else "vision") if kind == "cross" else tower
        if isinstance(edit.keys, str) and edit.keys == "all":
            return torch.ones(size, width, dtype=torch.bool, device=device)
        main = source == self.anatomy.main
        mask = self.batch.mask if main else self.stream_mask(source, size, width, device)
        found = select(edit.keys, mask.to(device), self.batch if main else None)
        out = torch.zeros(size, max(start + width, mask.shape[1]), dtype=torch.bool, device=device)
        out.scatter_(1, found.index, found.valid)
        return out[:, start : start + width]

    def visit(self, place: Place, value: Tensor, copy: bool = False) -> Tensor:
        """Do the work of a place; returns the value that the model goes on with (the same object if unchanged)."""
        work = self.plan.work.get(place)
        if work is None:
            return value
        for edit, heads in work.edits:
            if self.generating or edit.read.positions != "generated":
                value = self._each_copy(place, edit, heads, value)
        if work.probe:
            probe = torch.zeros_like(value, requires_grad=True)
            self.probes[place] = probe
            value = value + probe
        for at in work.reads:
            part, chosen = value, None
            if not at.whole:
                part, chosen = self.take(place, at.read.positions, at.heads, value)
            if place[3] in ("scores", "pattern"):
                part = self.all_keys(place, value.shape[2], part)
            self.keep_part(at, place, part.clone() if copy and part is value else part, chosen)
        self.done(place)
        return value

    def rows(self, place: Place, size: int, width: int, device: torch.device) -> Bool[Tensor, "batch query"] | None:
        """The query rows that edits of scores or a pattern concern; None for all, or where others are read."""
        work = self.plan.work[place]
        if work.reads or work.probe or place[0] != self.anatomy.main:
            return None
        size //= self.copies
        edits = [e for e, _ in work.edits if self.generating or e.read.positions != "generated"]
        found = [self.selection(e.read.positions, place[0], size, width, device) for e in edits]
        if any(chosen is None for chosen in found):
            return None
        rows = torch.zeros(size, width, dtype=torch.bool, device=device)
        for chosen in found:
            if chosen is not None and chosen.index.numel():
                # Fillers stand at columns that may be chosen as well: they add nothing.
                rows |= torch.zeros_like(rows, dtype=torch.int).scatter_add_(1, chosen.index, chosen.valid.int()) > 0
        return rows.repeat_interleave(self.copies, 0) if self.copies > 1 else rows

    @contextmanager
    def narrowed(self, rows: slice) -> Iterator[None]:
        """While open, values hold these rows of the present chunk only."""
        before = self.offset
        self.offset += rows.start
        try:
            yield
        finally:
            self.offset = before

    def all_keys(self, place: Place, columns: int, part: Tensor) -> Tensor:
        """Scores or a pattern with the keys that a sliding cache has dropped put back as never looked at."""
        start = self.key_start(place, columns, part.shape[-1])
        if start == 0:
            return part
        return torch.nn.functional.pad(part, (start, 0), value=0.0 if place[3] == "pattern" else -torch.inf)

    def done(self, place: Place) -> None:
        """A place was reached."""
        self.pending.discard(place)
        if self.stop and not self.pending:
            raise Stop

    def _axes(self, site: str) -> tuple[int, int | None]:
        position, head = _AXES[site]
        assert position is not None
        return position, head

    def take(
        self, place: Place, positions: Any, heads: tuple[int, ...] | None, value: Tensor
    ) -> tuple[Tensor, Chosen | None]:
        """The selected part of a value, and the selection (None for all positions)."""
        position, head = self._axes(place[3])
        chosen = self.selection(positions, place[0], value.shape[0], value.shape[position], value.device)
        return selected(value, chosen, heads, position, head), chosen

    def keep_part(self, at: ReadAt, place: Place, part: Tensor, chosen: Chosen | None) -> None:
        """Pad, reduce and store the selected part of a value, without its graph, on the device asked for."""
        if not at.whole:
            part = self.reduced(at.read, place, part, chosen)
        if part.requires_grad:
            part = part.detach()
        if self.to is not None:
            self.copied.add(part.device)
            part = part.to(self.to, non_blocking=True)
        self.pieces.setdefault(at, []).append(part)

    def reduced(self, read: Read, place: Place, part: Tensor, chosen: Chosen | None) -> Tensor:
        """The selected part of a value as the read reduces it, without padding."""
        if chosen is not None and not chosen.uniform:
            keep = chosen.valid
        elif chosen is None and read.reduce in ("mean", "sum", "max"):
            keep = self._real(place, part)
        else:
            keep = None
        part = reduce_part(part, read, self._axes(place[3])[0], keep)
        if chosen is not None and not chosen.uniform and (read.reduce is None or read.over_heads):
            self.valid[read] = chosen.valid
        return part

    def _real(self, place: Place, value: Tensor) -> Tensor | None:
        position = self._axes(place[3])[0]
        size, width = value.shape[0], value.shape[position]
        mask = self.stream_mask(place[0], size, width, value.device)
        start = self._start(place[0])
        mask = mask[:, start : start + width]
        return None if mask.shape[0] != size or bool(mask.all()) else mask

    def _each_copy(self, place: Place, edit: Edit, heads: tuple[int, ...] | None, value: Tensor) -> Tensor:
        """An edit knows one row for each sample: with several, it acts on the first of every sample, and so on."""
        if self.copies == 1:
            return self._edit(place, edit, heads, value)
        old = [value[copy :: self.copies] for copy in range(self.copies)]
        new = [self._edit(place, edit, heads, part, copy) for copy, part in enumerate(old)]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return value
        return torch.stack(new, 1).flatten(0, 1)

    def _edit(self, place: Place, edit: Edit, heads: tuple[int, ...] | None, value: Tensor, copy: int = 0) -> Tensor:
        tower, _, layer, site = place
        position, head = self._axes(site)
        size, width, start = value.shape[0], value.shape[position], self._start(tower)
        chosen = self.selection(edit.read.positions, tower, size, width, value.device)
        if width == 0 or (chosen is not None and chosen.index.shape[1] == 0):
            return value
        if chosen is None:
            columns, valid = self._columns(start, size, width, value.device)
        else:
            columns, valid = chosen.index + start, chosen.valid
        part = selected(value, chosen, heads, position, head)
        named = heads if heads is not None or head is None else tuple(range(value.shape[head]))
        keys = edit.keys
        if keys is not None:
            keys = self.keys_mask(edit, place, size, width, part.shape[-1], value.device)
        new = edit.change(part, Where(layer, columns, valid, named, keys, copy))
        if new is part:
            return value
        check_edit(edit, place, part, new)
        # What changed nothing spares a new attention: the kernel's own result stays. Elsewhere it is put back as it is.
        if site in ATTENTION_CALL and not self.with_graph and torch.equal(new, part):
            return value
        return put_back(value, new, chosen, heads, position, head)

    def _columns(self, start: int, size: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """All columns of a chunk, and that all of them are real choices: made once for the edits of a forward call."""
        key = start, size, n, device
        if self.every is None or self.every[0] != key:
            columns = torch.arange(start, start + n, device=device).expand(size, n)
            self.every = key, columns, torch.ones(size, n, dtype=torch.bool, device=device)
        return self.every[1:]

    def finish(self) -> tuple[dict[tuple[Read, int], Tensor], dict[Read, Tensor]]:
        """The stored parts, joined over forward calls.

        Raises:
            HookError: something asked for never happened.
            NonFiniteError: a read holds NaN.
        """
        if self.pending:
            missing = sorted(f"{t}:{s} of layer {i}" if i >= 0 else s for t, _, i, s in self.pending)
            raise HookError(
                f"{len(missing)} sites that were asked for were never reached in this run: {', '.join(missing[:6])}"
                f"{', ...' if len(missing) > 6 else ''}. Does the batch hold what this tower needs (images, decoder "
                "input)?"
            )
        for device in self.copied:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        out = {at: join(parts, at.read) for at, parts in self.pieces.items()}
        edited = any(w.edits for w in self.plan.work.values())
        check_all(out, self.anatomy.main, thorough=edited)
        return {(at.read, at.layer): tensor for at, tensor in out.items()}, self.valid


def check_edit(edit: Edit, place: Place, old: Tensor, new: Any) -> None:
    """Refuse a replacement of another shape, or one that brings NaN in."""
    where = f"{edit.name} at {place[3]!r} of layer {place[2]}"
    if not isinstance(new, Tensor) or new.shape != old.shape:
        found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise EditError(f"{where} returned {found} instead of a tensor of shape {tuple(old.shape)}.")
    # Nearly always this is all: only the sum of finite numbers that are huge overflows.
    if place[3] != "scores" and math.isfinite(new.sum().item()):
        return
    bad = new.isnan() if place[3] == "scores" else ~new.isfinite()
    if bool(bad.any()) and bool((bad & old.isfinite()).any()):
        raise EditError(f"{where} made NaN or infinity, first at index {bad.nonzero()[0].tolist()} of its selection.")


def check_all(values: dict[ReadAt, Tensor], main: str, *, thorough: bool) -> None:
    """Raise NonFiniteError at the first NaN of a run's reads.

    A NaN in the stream, or in anything that is made from or added to it position by position, is in everything of the
    same tower and position above it. So of whole reads only those of the highest layer need a look, unless an edit may
    have taken a NaN away in between.
    """
    top: dict[str, int] = {}
    for at in values:
        if at.spread:
            tower = at.read.tower or main
            top[tower] = max(at.layer, top.get(tower, -1))
    looked_at = [
        tensor for at, tensor in values.items() if thorough or not at.spread or at.layer == top[at.read.tower or main]
    ]
    if any_nan(looked_at):
        for at, tensor in sorted(values.items(), key=lambda item: item[0].layer):
            check_no_nan(tensor, at.read, at.layer)


def any_nan(tensors: list[Tensor]) -> bool:
    """Whether a sum of one of the tensors is NaN: one of its numbers is, or it holds infinities of both signs.

    All sums are looked at together, since each look would wait for the device.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sums.setdefault(tensor.device, []).append(tensor.sum(dtype=torch.float32))
    return any(bool(torch.stack(s).isnan().any()) for s in sums.values())


def check_no_nan(tensor: Tensor, read: Read, layer: int) -> None:
    """Raise NonFiniteError at the first NaN of a read (minus infinity is what masked scores are)."""
    # One sum finds a NaN without a second tensor; infinities of both signs make one too, so look twice.
    if any_nan([tensor]) and bool(tensor.isnan().any()):
        place = tensor.isnan().nonzero()[0].tolist()
        raise NonFiniteError(f"{read} of layer {layer} holds NaN, first at index {place}; the model itself made it.")


def reduce_part(part: Tensor, read: Read, axis: int, keep: Tensor | None) -> Tensor:
    """Apply a read's reduction, over the real positions `keep` [batch, n] (None for all), in float32 or wider."""
    if read.over_heads:
        part, axis = fuse_heads(part, read), position_axis(read)
    if read.reduce is None or read.over_heads:
        if keep is None:
            return part
        shape = [keep.shape[0]] + [1] * (part.ndim - 1)
        shape[axis] = keep.shape[1]
        return part.masked_fill(~keep.reshape(shape), 0)
    wide = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
    if read.reduce == "norm":
        wide = wide.norm(dim=-1)
        if keep is None:
            return wide
        shape = [keep.shape[0]] + [1] * (wide.ndim - 1)
        shape[axis] = keep.shape[1]
        return wide.masked_fill(~keep.reshape(shape), 0)
    if keep is None:
        reducer: dict[str, Callable[[], Tensor]] = {
            "mean": lambda: wide.mean(axis),
            "sum": lambda: wide.sum(axis),
            "max": lambda: wide.amax(axis),
        }
        return reducer[read.reduce]()
    shape = [keep.shape[0]] + [1] * (part.ndim - 1)
    shape[axis] = keep.shape[1]
    real = keep.reshape(shape)
    if read.reduce == "max":
        return wide.masked_fill(~real, -torch.inf).amax(axis)
    total = wide.masked_fill(~real, 0).sum(axis)
    if read.reduce == "sum":
        return total
    return total / keep.sum(1).reshape([-1] + [1] * (total.ndim - 1)).clamp_min(1)


def fuse_heads(part: Tensor, read: Read) -> Tensor:
    """The mean, maximum or minimum over heads, in float32 or wider; nothing is done where it was taken already."""
    axis = read.row.head_axis
    assert axis is not None
    if part.ndim < len(read.row.axes):
        return part
    wide = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
    if read.reduce == "head_mean":
        return wide.mean(axis)
    return wide.amax(axis) if read.reduce == "head_max" else wide.amin(axis)


def position_axis(read: Read) -> int:
    """The position axis of what a read returns."""
    axis, head = read.row.position_axis, read.row.head_axis
    assert axis is not None
    return axis - 1 if read.over_heads and head is not None and head < axis else axis


def join(parts: list[Tensor], read: Read) -> Tensor:
    """One tensor from the parts of several forward calls (generation), joined along positions."""
    if len(parts) == 1:
        return parts[0]
    axis = position_axis(read)
    if read.reduce in ("mean", "sum", "max"):
        return torch.stack(parts, 1)
    if read.row.axes[-1] == "key":
        width = max(p.shape[-1] for p in parts)
        parts = [torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
    if read.site in ("k", "v"):
        return parts[-1]  # the cache grows: the last call holds all keys
    return torch.cat([p for p in parts if p.shape[axis]], dim=axis)
