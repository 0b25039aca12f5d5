"""How large a run is: the stream of each tower, what reads return, and what is held beside while layers are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.batch import Batch, select
from interp.engine.plan import layers_of
from interp.reads import Read

if TYPE_CHECKING:
    from interp.lens import Lens

_INPUTS = ("pixel", "input_features", "input_values")


@dataclass(frozen=True, slots=True)
class Stream:
    """The stream of a tower.

    Attributes:
        rows: of the whole batch: its samples, or the pictures or tiles of them all.
        columns: of each row.
        joined: whether the pictures of all samples lie in one row (Qwen-VL, Pixtral).
        each: rows and columns of one sample, the largest.
    """

    rows: int
    columns: int
    joined: bool
    each: tuple[int, int]


def stream_of(lens: Lens, batch: Batch, name: str, *, exact: bool = True) -> Stream:
    """The stream of a tower. Where pictures stand in a text, their sizes are seen by embedding each sample's alone.

    Args:
        lens: the model.
        batch: the batch.
        name: the tower.
        exact: whether every sample is looked at; else the first that has pictures stands for them all.
    """
    size, main = len(batch), lens.anatomy.main
    if name == main and main != "vision":
        width = batch.mask.shape[1]
        return Stream(size, width, False, (1, width))
    if name == "encoder" and batch.source_mask is not None:
        width = batch.source_mask.shape[1]
        return Stream(size, width, False, (1, width))
    read = Read("resid_pre", layers=(lens.layers_with("resid_pre", tower=name)[0],), tower=name)

    def shape(first: int, stop: int) -> tuple[int, int]:
        (value,) = lens.run(batch.part(first, stop), read).values.values()
        return value.shape[0], value.shape[1]

    if batch.image_mask is None or name == main:
        rows, columns = shape(0, 1)
        return Stream(rows * size, columns, lens.anatomy.towers[name].packed, (rows, columns))
    with_pictures = batch.image_mask.any(1).nonzero()[:, 0].tolist()
    seen = [shape(i, i + 1) for i in (with_pictures if exact else with_pictures[:1])]
    largest = max(seen, key=lambda one: one[0] * one[1])
    joined = lens.anatomy.towers[name].packed
    if not joined and exact and len(seen) > 1 and all(rows == 1 for rows, _ in seen):
        joined = shape(with_pictures[0], with_pictures[1] + 1)[0] == 1
    rows, columns = 1 if joined else sum(r for r, _ in seen), (sum if joined else max)(c for _, c in seen)
    return Stream(rows, columns, joined, largest)


def small(lens: Lens, read: Read) -> Read:
    """A read of the same axes that returns one position, so that its shape can be looked at for little."""
    where = (0,)
    if read.site == "logits":  # a classifier's have no positions
        where = "all" if lens.anatomy.unembed is None else "last"
    return Read(read.site, read.layers, read.heads, where, read.tower, read.reduce if read.over_heads else None)


def tower_of(lens: Lens, read: Read) -> str:
    """The tower whose positions a read has."""
    return lens.anatomy.tower(read.tower)[0].name if read.row.per_layer else lens.anatomy.main


def returned(lens: Lens, batch: Batch, read: Read, found: Sequence[Tensor], stream: Stream) -> int:
    """Bytes that come back from one read of a batch.

    Args:
        lens: the model.
        batch: the batch.
        read: the read.
        found: what its `small` gave for one sample.
        stream: of the tower whose positions it has.
    """
    everywhere = isinstance(read.positions, str) and read.positions == "all"
    main = tower_of(lens, read) == lens.anatomy.main
    count = stream.columns
    if not everywhere:
        mask = batch.mask if main else batch.mask.new_ones(stream.rows, stream.columns)
        count = select(read.positions, mask, batch if main else None).index.shape[1]
    names = axes(read)
    total = 0
    for tensor in found:
        if tensor.ndim != len(names):  # a classifier's logits
            total += len(batch) * tensor.numel() * tensor.element_size()
            continue
        shape = dict(zip(names, tensor.shape, strict=True))
        shape["batch"] = stream.rows
        for name in {"pos", "query"} & set(shape):
            shape[name] = count if read.over_heads or read.reduce in (None, "norm") else 1
        if "key" in shape and stream.joined:
            shape["key"] = stream.columns
        if read.reduce == "norm":
            shape[names[-1]] = 1
        total += torch.Size(shape.values()).numel() * tensor.element_size()
    return total


def axes(read: Read) -> list[str]:
    """The axes of what a read returns; one that it is reduced over is there where it is of positions."""
    return [a for a in read.row.axes if not (read.over_heads and a in ("head", "kv_head"))]


def held(lens: Lens, batch: Batch, reads: Sequence[Read], streams: Mapping[str, Stream], *, gradients: bool) -> int:
    """Bytes that one sample takes at the peak of a run, what comes back left out.

    Counted is what is run: the towers that come before what is read, and no layer where nothing behind one is read.

    Args:
        lens: the model.
        batch: the batch.
        reads: what is read.
        streams: of the towers that reads are in.
        gradients: whether gradients are asked for: then what all layers behind what is read make is held.
    """
    anatomy, item = lens.anatomy, _item(lens)
    through = gradients or any(r.site == "logits" for r in reads)
    layered = {tower_of(lens, r) for r in reads if r.row.per_layer}
    behind = {
        tower_of(lens, r)
        for r in reads
        if r.row.per_layer and (r.site != "resid_pre" or max(layers_of(anatomy, r)) > 0)
    }
    if through:
        layered, behind = {*layered, anatomy.main}, {*behind, anatomy.main}
    main = anatomy.towers[anatomy.main]
    seen = [v.nbytes for n, v in batch.inputs.items() if n.startswith(_INPUTS) and isinstance(v, Tensor)]
    # Pictures enter behind the embeddings, but what is looked at by cross-attention is there before.
    crossed = any("cross" in x.attention for x in main.layers) and main.name in {tower_of(lens, r) for r in reads}
    if (seen or batch.source_mask is not None) and (crossed or main.name in layered):
        behind |= set(anatomy.towers) - {main.name}
    source = 0 if batch.source_mask is None else batch.source_mask.shape[1]
    width = batch.mask.shape[1]
    # Ids, masks and positions; the embeddings, and what they are added to or copied into; pixels, unfolded.
    most = 32 * width + (3 if main.name in layered else 1) * item * width * main.d_model
    if {*layered, *behind} - {main.name} or main.name == "vision":
        most += 2 * sum(seen) // len(batch)
    for name in layered - {main.name}:
        rows, columns = streams[name].each
        most += 3 * item * rows * columns * anatomy.towers[name].d_model
    graph = 0
    for name in behind:
        stream = streams[name] if name in streams else stream_of(lens, batch, name, exact=False)
        rows, columns = stream.each
        layer = rows * row_bytes(lens, columns, columns, source, tower=name)
        most = max(most, layer)
        graph += layer * len(anatomy.towers[name].layers) if gradients and name in layered else 0
    most = max(most, graph)
    logits = [_logits(lens, batch, r) for r in reads if r.site == "logits"]
    # A metric makes further tensors of the size of the logits on its way there and back.
    most += 4 * width * _words(lens) * item if gradients else max(logits, default=0)
    return most + max([_served(lens, batch, r, streams) for r in reads], default=0)


def row_bytes(lens: Lens, columns: int, keys: int, sources: int = 0, *, tower: str | None = None) -> int:
    """Bytes that one row of a layer's call takes at its peak, from the widths of the widest layer.

    Args:
        lens: the model.
        columns: columns that are computed.
        keys: keys that they look at, themselves included.
        sources: positions of the encoder.
        tower: which tower; None for the main one.
    """
    found = lens.anatomy.towers[tower or lens.anatomy.main]
    most = 0
    for layer in found.layers:
        weight = getattr(layer.down_proj, "weight", None)
        wide = 0
        if isinstance(weight, Tensor) and weight.is_floating_point():
            wide = weight.numel() // found.d_model
        each = columns * (8 * found.d_model + 3 * max(wide, 4 * found.d_model))
        for one in layer.attention.values():
            seen = sources if one.cross else keys
            each += columns * 3 * one.n_heads * (one.d_head + one.d_value)
            # Keys and values are joined to those of the prefix, and eager attention repeats them for every head.
            each += 2 * seen * one.n_heads * (one.d_head + one.d_value)
            each += 2 * columns * seen * one.n_heads if columns * seen > 2**16 else 0
        most = max(most, each)
    return _item(lens) * most


def _item(lens: Lens) -> int:
    return torch.empty(0, dtype=lens.dtype).element_size()


def _words(lens: Lens) -> int:
    """How many logits a position has, as far as the head says."""
    weight = getattr(getattr(lens.anatomy.unembed, "module", None), "weight", None)
    return max(weight.shape) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def _logits(lens: Lens, batch: Batch, read: Read) -> int:
    """Bytes of one sample's logits that do not come back."""
    whole = isinstance(read.positions, str) and read.positions == "all" and read.reduce is None
    kept = isinstance(read.positions, str) and read.positions == "last" and batch.padding in (None, "left")
    return 0 if whole or kept else batch.mask.shape[1] * _words(lens) * _item(lens)


def _served(lens: Lens, batch: Batch, read: Read, streams: Mapping[str, Stream]) -> int:
    """Bytes that serving a read takes for one sample, beside what it returns."""
    if read.row.scope != "attention" or read.site not in ("scores", "pattern", "result"):
        return 0
    tower, _ = lens.anatomy.tower(read.tower)
    rows, width = streams[tower.name].each
    most = max(p.n_heads for i in layers_of(lens.anatomy, read) for p in tower.layers[i].attention.values())
    heads = most if read.heads is None else len(read.heads)
    count = width
    if tower.name == lens.anatomy.main and tower.name != "vision":
        count = select(read.positions, batch.mask, batch).index.shape[1]
    return 4 * rows * heads * count * (2 * tower.d_model if read.site == "result" else 2 * width)
