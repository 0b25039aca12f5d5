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

from interp.batch import Batch, select
from interp.engine.plan import layers_of
from interp.engine.probe import tokens
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.reads import Read
from interp.trace import Trace

if TYPE_CHECKING:
    from interp.lens import Lens

_PROBE = 4
_KEPT = 0.9
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
        free = int(_KEPT * self.free)
        if self.returned > _KEPT * self.room:
            return 0
        fits = free // (self.each + back) if self.apart else (free - self.returned) // max(1, self.each)
        return max(0, min(self.samples, fits))

    def check(self) -> int:
        """How many samples to run at once.

        Raises:
            InputError: what comes back, or a single sample, does not fit.
        """
        if self.returned > _KEPT * self.room:
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
    first = batch if len(batch) == 1 else part(batch, 0, 1)
    where = lens.input_device
    kept = torch.device(to) if to is not None else where
    returned = sum(_bytes(lens, batch, first, read) for read in reads)
    width = batch.mask.shape[1]
    if lens.anatomy.main == "vision":
        width = lens.run(first, "resid_pre.0")["resid_pre", 0].shape[1]
    source = 0 if batch.source_mask is None else batch.source_mask.shape[1]
    each = row_bytes(lens, width, width, source) * (_depth(lens) if gradients else 1)
    each += max([_beside(lens, batch, read) for read in reads], default=0)
    seconds = _seconds(lens, first, reads) * len(batch) * (3 if gradients else 1)
    apart = kept.type != where.type
    return Estimate(len(batch), returned, each, free_bytes(where), free_bytes(kept), apart, seconds, str(where))


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
        InputError: it does not fit, even one sample at a time; or images are packed over samples.
        UnsupportedError: a read has as many positions as a sample has, and the batch has to be split.
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
    pieces = [
        lens.run(part(batch, at, min(at + rows, len(batch))), wanted, edits, to=to) for at in range(0, len(batch), rows)
    ]
    if any(p.valid for p in pieces):
        raise UnsupportedError("reads at as many positions as a sample has are not split: give fewer prompts at once.")
    values = {key: torch.cat([p.values[key] for p in pieces]) for key in pieces[0].values}
    known = [name for name, mask in pieces[0].masks.items() if mask is not None]
    joined: dict[str, Any] = {name: torch.cat([p.masks[name] for p in pieces]) for name in known}  # pyright: ignore
    masks = {**pieces[0].masks, **joined}
    return replace(pieces[0], values=values, masks=masks)


def part(batch: Batch, first: int, stop: int) -> Batch:
    """Some samples of a batch, with its padding.

    Raises:
        InputError: its images are packed over samples.
    """
    if not batch.repeatable:
        raise InputError("this batch cannot be split: its images are packed over samples. Prepare fewer at a time.")

    def some(x: Any) -> Any:
        return None if x is None else x[first:stop]

    names = ("mask", "source_mask", "texts", "tokens", "offsets", "image_mask")
    inputs = {k: v[first:stop] if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
    return replace(batch, inputs=inputs, **{name: some(getattr(batch, name)) for name in names})


def _bytes(lens: Lens, batch: Batch, first: Batch, read: Read) -> int:
    """Bytes that come back from one read of a batch: those of a small run, its axes at their real sizes."""
    plain = read.tower in (None, lens.anatomy.main) and batch.source_mask is None and lens.anatomy.main == "text"
    plain = plain and "input_ids" in batch.inputs
    probe = lens.prepare(input_ids=tokens(lens.model.config, 1, _PROBE)) if plain else first
    small = replace(read, positions="all", reduce=read.reduce if read.over_heads else None)
    found = lens.run(probe, [small])
    row, short, width = read.row, probe.mask.shape[1], batch.mask.shape[1]
    count = width
    if not (isinstance(read.positions, str) and read.positions == "all"):
        whole = next(iter(found.values.values())).shape[row.position_axis or 1]
        main = read.tower in (None, lens.anatomy.main)
        mask = batch.mask if main else batch.mask.new_ones(len(batch), whole)
        count = select(read.positions, mask, batch if main else None).index.shape[1]
    total = 0
    for tensor in found.values.values():
        names = [a for a in row.axes if not (read.over_heads and a in ("head", "kv_head"))]
        shape = dict(zip(names, tensor.shape, strict=True))
        shape["batch"] = len(batch)
        for name in ("pos", "query"):
            if name in shape:
                chosen = not (isinstance(read.positions, str) and read.positions == "all")
                shape[name] = count if chosen else shape[name] if probe is first else shape[name] // short * width
                if read.reduce is not None and not read.over_heads and read.reduce != "norm":
                    shape[name] = 1
        if "key" in shape and probe is not first:
            shape["key"] = width
        if read.reduce == "norm":
            shape[names[-1]] = 1
        total += torch.Size(shape.values()).numel() * tensor.element_size()
    return total


def _beside(lens: Lens, batch: Batch, read: Read) -> int:
    """Bytes that serving a read takes for one sample, beside what it returns."""
    width, tower = batch.mask.shape[1], lens.anatomy.tower(read.tower)[0]
    if read.site == "logits":
        whole = isinstance(read.positions, str) and read.positions in ("all", "last")
        return 0 if whole else width * lens.vocabulary * torch.empty(0, dtype=lens.dtype).element_size()
    if read.row.scope != "attention" or read.site not in ("scores", "pattern", "result"):
        return 0
    most = max(p.n_heads for i in layers_of(lens.anatomy, read) for p in tower.layers[i].attention.values())
    heads = most if read.heads is None else len(read.heads)
    count = select(read.positions, batch.mask, batch).index.shape[1] if tower.name == lens.anatomy.main else width
    return 4 * heads * count * (2 * tower.d_model if read.site == "result" else 2 * width)


def _depth(lens: Lens) -> int:
    return len(lens.anatomy.towers[lens.anatomy.main].layers)


def _seconds(lens: Lens, first: Batch, reads: Iterable[Read]) -> float:
    """How long a plain run of one sample takes as far as the reads go, the faster of two."""
    reads, main = list(reads), lens.anatomy.main
    mine = [i for r in reads if r.row.per_layer and r.tower in (None, main) for i in layers_of(lens.anatomy, r)]
    through = not mine or any(r.site == "logits" for r in reads)
    able = lens.layers_with("resid_post")
    last = _depth(lens) - 1 if through else max(mine)
    read = "logits@last" if through and lens.anatomy.unembed is not None else f"resid_post.{min(last, able[-1])}@last"
    times = []
    for _ in range(2):
        start = time.perf_counter()
        lens.run(first, read)
        times.append(time.perf_counter() - start)
    return min(times)


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


def row_bytes(lens: Lens, columns: int, keys: int, sources: int = 0) -> int:
    """Bytes that one row of a layer's call takes at its peak, from the widths of the widest layer.

    Args:
        lens: the model.
        columns: columns that are computed.
        keys: keys that they look at, themselves included.
        sources: positions of the encoder.
    """
    tower = lens.anatomy.towers[lens.anatomy.main]
    item = torch.empty(0, dtype=lens.dtype).element_size()
    most = 0
    for layer in tower.layers:
        weight = getattr(layer.down_proj, "weight", None)
        wide = 0
        if isinstance(weight, Tensor) and weight.is_floating_point():
            wide = weight.numel() // tower.d_model
        each = columns * (8 * tower.d_model + 3 * max(wide, 4 * tower.d_model))
        for one in layer.attention.values():
            seen = sources if one.cross else keys
            each += columns * 3 * one.n_heads * (one.d_head + one.d_value)
            # Keys and values are joined to those of the prefix, and eager attention repeats them for every head.
            each += 2 * seen * one.n_heads * (one.d_head + one.d_value)
            each += 2 * columns * seen * one.n_heads if columns * seen > 2**16 else 0
        most = max(most, each)
    return item * most
