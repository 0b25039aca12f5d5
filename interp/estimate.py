"""What a capture takes before it is made: bytes, time, and in how many pieces it fits into the memory.

The bytes that come back follow from the reads: what a run on a few tokens returns, with the axes of samples, positions
and keys at their real sizes. At its peak a run also holds what its widest layer makes, and the logits; with gradients
what all layers make. What libraries allocate beside is not known: the peak is an estimate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.footprint import axes, held, returned, small, stream_of, tower_of
from interp.reads import Read
from interp.trace import Trace

if TYPE_CHECKING:
    from interp.lens import Lens

KEPT = 0.9
"""The share of the free memory that is counted on."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a capture takes. Made by `Lens.estimate`.

    Attributes:
        samples: how many there are.
        returned: bytes of what comes back, for all samples.
        each: bytes that one sample takes at the peak of a run, what comes back left out.
        free: bytes that are free where the model runs.
        room: bytes that are free where the reads are kept.
        apart: whether that is another memory than the model's.
        seconds: how long the runs take, as far as one sample tells.
        device: where the model runs, in words.
    """

    samples: int
    returned: int
    each: int
    free: int
    room: int
    apart: bool
    seconds: float
    device: str

    @property
    def peak(self) -> int:
        """Bytes at the peak of a run of all samples at once."""
        return self.returned + self.samples * self.each

    @property
    def rows(self) -> int:
        """How many samples fit at once; 0 where not one does."""
        back = -(-self.returned // self.samples)
        free = int(KEPT * self.free)
        if self.returned > KEPT * self.room:
            return 0
        fits = free // (self.each + back) if self.apart else (free - self.returned) // max(1, self.each)
        return max(0, min(self.samples, fits))

    def check(self) -> int:
        """How many samples to run at once.

        Raises:
            InputError: what comes back, or a single sample, does not fit.
        """
        if self.returned > KEPT * self.room:
            raise InputError(
                f"what is asked for is {size(self.returned)}, and {size(self.room)} are free: read fewer layers or "
                "positions, reduce ('|mean'), or take fewer prompts."
            )
        if not self.rows:
            raise InputError(
                f"one prompt takes about {size(self.each)} on {self.device} beside the {size(self.returned)} that come "
                f"back, and {size(self.free)} are free: shorten the prompts, read less, or give to='cpu'."
            )
        return self.rows

    def __str__(self) -> str:
        """In a line."""
        pieces = "" if self.rows in (0, self.samples) else f", {self.rows} prompts at a time"
        fits = "" if self.rows else "; it does not fit"
        return (
            f"{size(self.returned)} come back, {size(self.peak)} at the peak of {size(self.free)} free on "
            f"{self.device}{pieces}; about {self.seconds:.2g} s{fits}"
        )


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def estimate(
    lens: Lens, batch: Batch, reads: Sequence[Read], *, gradients: bool, to: torch.device | str | None
) -> Estimate:
    """See `Lens.estimate`."""
    where = lens.input_device
    kept = torch.device(to) if to is not None else where
    first = batch.part(_first(batch), _first(batch) + 1)
    asked = {read: small(lens, read) for read in reads}
    through = (gradients or not reads) and "logits" not in lens.anatomy.refused
    last = [small(lens, Read("logits"))] if through else []
    start = time.perf_counter()
    trace = lens.run(first, [*asked.values(), *last])
    seconds = time.perf_counter() - start
    streams = {name: stream_of(lens, batch, name) for name in {tower_of(lens, read) for read in reads}}
    back = 0
    for read, little in asked.items():
        found = [value for (one, _), value in trace.values.items() if one == little]
        back += returned(lens, batch, read, found, streams[tower_of(lens, read)])
    each = held(lens, batch, reads or last, streams, gradients=gradients)
    seconds *= len(batch) * (3 if gradients else 1)
    apart = kept.type != where.type
    return Estimate(len(batch), back, each, free_bytes(where), free_bytes(kept), apart, seconds, str(where))


def _first(batch: Batch) -> int:
    """A sample that reaches every tower."""
    return 0 if batch.image_mask is None else int(batch.image_mask.any(1).int().argmax())


def capture(
    lens: Lens,
    batch: Batch,
    reads: Iterable[str | Read] | str | Read,
    edits: Iterable[Any] = (),
    *,
    rows: int | None = None,
    to: torch.device | str | None = None,
) -> Trace:
    """`lens.run`, in as many pieces as the memory asks for.

    Args:
        lens: the model.
        batch: from `prepare`.
        reads: as for `run`.
        edits: as for `run`; each piece gets them as they are, so none may hold a row for each sample.
        rows: samples of a piece; None for as many as fit by `lens.estimate`.
        to: device to keep the reads on.

    Raises:
        InputError: it does not fit, even one sample at a time; or it cannot be told whose the pictures are.
        UnsupportedError: the batch has to be split, and a read's positions differ by sample, or it is no whole stream
            of a tower in which the pictures of all samples lie in one row.
    """
    wanted = [Read.of(r) for r in ([reads] if isinstance(reads, (str, Read)) else reads)]
    rows = lens.estimate(batch, wanted, to=to).check() if rows is None else rows
    if rows < 1:
        raise SettingsError(f"rows is a whole number of at least 1, got {rows!r}.")
    edits = list(edits)
    if rows >= len(batch):
        return lens.run(batch, wanted, edits, to=to)
    if any(isinstance(r.positions, Tensor) for r in wanted):
        raise UnsupportedError("reads at positions that differ by sample are not split: give fewer prompts at once.")
    streams = {name: stream_of(lens, batch, name) for name in {tower_of(lens, r) for r in wanted}}
    for read in wanted:
        if streams[tower_of(lens, read)].joined and not _joinable(read):
            raise UnsupportedError(
                f"{read} is not split: the pictures of all prompts lie in one row of its tower. Read whole streams "
                "there, or give fewer prompts at once."
            )
    pieces = [
        lens.run(
            batch.part(at, min(at + rows, len(batch))),
            [r for r in wanted if _reached(lens, batch, at, rows, r)],
            edits,
            to=to,
        )
        for at in range(0, len(batch), rows)
    ]
    return _joined(lens, pieces, wanted, {n for n, s in streams.items() if s.joined})


def _reached(lens: Lens, batch: Batch, at: int, rows: int, read: Read) -> bool:
    """Whether the prompts of a piece have what a read's tower looks at."""
    if batch.image_mask is None or tower_of(lens, read) == lens.anatomy.main:
        return True
    return bool(batch.image_mask[at : at + rows].any())


def _joinable(read: Read) -> bool:
    """Whether parts of one long row can be put one behind the other."""
    whole = isinstance(read.positions, str) and read.positions == "all"
    return whole and "key" not in read.row.axes and (read.over_heads or read.reduce in (None, "norm"))


def _joined(lens: Lens, pieces: Sequence[Trace], wanted: Sequence[Read], long: set[str]) -> Trace:
    """One trace from those of the pieces; `long` are the towers whose pictures lie in one row."""
    values, valid = {}, {}
    for read in dict.fromkeys(wanted):
        mine = [p for p in pieces if any(one == read for one, _ in p.values)]
        layers = [layer for one, layer in mine[0].values if one == read]
        place = next((i for i, a in enumerate(axes(read)) if a in ("pos", "query")), 0)
        if tower_of(lens, read) in long:
            values |= {(read, i): torch.cat([p.values[read, i] for p in mine], place) for i in layers}
            continue
        counts = [p.values[read, layers[0]].shape[place] for p in mine]
        most = max(counts)
        for i in layers:
            values[read, i] = torch.cat([_filled(p.values[read, i], place, most) for p in mine])
        if min(counts) < most or any(read in p.valid for p in mine):
            found = [p.valid.get(read) for p in mine]
            rows = [p.values[read, layers[0]] for p in mine]
            every = [
                torch.ones(len(x), n, dtype=torch.bool, device=x.device) if v is None else v
                for v, x, n in zip(found, rows, counts, strict=True)
            ]
            valid[read] = torch.cat([_filled(v, 1, most) for v in every])
    masks: dict[str, Any] = {}
    for name in pieces[0].masks:
        found = [p.masks[name] for p in pieces if isinstance(p.masks.get(name), Tensor)]
        masks[name] = torch.cat(found, int(name in long)) if found else None  # pyright: ignore
    return replace(pieces[0], values=values, valid=valid, masks=masks)


def _filled(value: Tensor, axis: int, count: int) -> Tensor:
    """The tensor with zeros behind, so that it has as many entries along an axis."""
    missing = count - value.shape[axis]
    if not missing:
        return value
    shape = list(value.shape)
    shape[axis] = missing
    return torch.cat([value, value.new_zeros(shape)], axis)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**31
