"""Chosen columns and heads of a value: taken out of it, and put back into it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interp.batch import Selection


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Chosen columns of one stream. What is to be known of them is asked once for all layers.

    Attributes:
        index: columns [batch, n]; where `valid` is False the entry is a filler.
        valid: which entries are real [batch, n].
        uniform: whether every entry is real.
        span: the columns as a slice, if they adjoin and are the same in every sample: then nothing is gathered.
    """

    index: Tensor
    valid: Tensor
    uniform: bool
    span: slice | None

    @staticmethod
    def of(found: Selection) -> Chosen:
        """A selection, looked at."""
        index, uniform = found.index, found.uniform
        span = None
        if uniform and index.numel():
            first, n = int(index[0, 0]), index.shape[1]
            row = torch.arange(first, first + n, device=index.device)
            span = slice(first, first + n) if bool((index == row).all()) else None
        return Chosen(index, found.valid, uniform, span)


def selected(
    value: Tensor, chosen: Chosen | None, heads: tuple[int, ...] | None, position: int, head: int | None
) -> Tensor:
    """Some heads and columns of a value; the value itself where that is all of them."""
    if head is not None and heads is not None:
        value = value.index_select(head, _index(heads, value))
    return value if chosen is None else gather_positions(value, chosen, position)


def gather_positions(value: Tensor, chosen: Chosen, axis: int) -> Tensor:
    """The chosen columns of `value` along `axis`; always a copy."""
    index, span = chosen.index, chosen.span
    if span is not None and index.shape[0] == value.shape[0]:
        return value.narrow(axis, span.start, index.shape[1]).clone(memory_format=torch.contiguous_format)
    shape = [index.shape[0]] + [1] * (value.ndim - 1)
    shape[axis] = index.shape[1]
    wanted = list(value.shape)
    wanted[axis] = index.shape[1]
    return value.gather(axis, index.reshape(shape).expand(wanted))


def put_back(
    value: Tensor, new: Tensor, chosen: Chosen | None, heads: tuple[int, ...] | None, position: int, head: int | None
) -> Tensor:
    """`value` with its selected part replaced."""
    if new.dtype != value.dtype:
        new = new.to(value.dtype)
    if chosen is None and heads is None:
        return new
    target = value if heads is None or head is None else value.index_select(head, _index(heads, value))
    if chosen is not None:
        shape = [chosen.index.shape[0]] + [1] * (value.ndim - 1)
        shape[position] = chosen.index.shape[1]
        index = chosen.index.reshape(shape).expand_as(new)
        if not chosen.uniform:
            # Fillers point at columns that are not chosen: they get their own value back.
            keep = chosen.valid.reshape(shape)
            new = torch.where(keep, new, target.gather(position, index))
            spare = ~chosen.valid
            if bool(spare.any()):
                return _scatter_valid(value, target, new, chosen, heads, position, head)
        target = target.scatter(position, index, new)
    else:
        target = new
    if heads is None or head is None:
        return target
    return value.index_copy(head, _index(heads, value), target)


def _scatter_valid(
    value: Tensor,
    target: Tensor,
    new: Tensor,
    chosen: Chosen,
    heads: tuple[int, ...] | None,
    position: int,
    head: int | None,
) -> Tensor:
    out = target.clone()
    for b in range(new.shape[0]):
        index = chosen.index[b][chosen.valid[b]]
        rows = new[b].movedim(position - 1, 0)[: len(index)].movedim(0, position - 1)
        out[b] = out[b].index_copy(position - 1, index, rows)
    return out if heads is None or head is None else value.index_copy(head, _index(heads, value), out)


def _index(heads: tuple[int, ...], value: Tensor) -> Tensor:
    return torch.tensor(heads, device=value.device)
