"""Folding a scale of heads into the weights, and back.

A head reaches the stream through its columns of the output projection alone, so

    W_O^h  ->  scale * W_O^h

is the same model as one whose head outputs are multiplied in every run: without an edit, at full speed, ready to be
saved or handed to other code. The bias of the projection belongs to no head and stays. This is the one place where a
model is changed; leaving the block puts the old columns back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import EditError, UnsupportedError
from interp.headlist import HeadList, Heads
from interp.heads.chosen import chosen_heads
from interp.lens import Lens


@contextmanager
def fold(lens: Lens, heads: Heads, scale: float, *, tower: str | None = None) -> Iterator[None]:
    """While open, the model's own weights hold the scaled heads: the model IS changed.

    Whatever else uses this model sees the change too. Folds may be nested; what is written to these columns inside the
    block (training) is lost at its end.

    Args:
        lens: a model whose output projections are ordinary matrices.
        heads: (layer, head) pairs, or a frame with these columns, such as `scores.top(16)`.
        scale: what their columns of the output projection are multiplied with.
        tower: None for that of the list, or the main one.

    Raises:
        EditError: no list of heads, one from another model or tower, or a scale that is not finite.
        UnknownNameError: a head does not exist.
        UnsupportedError: a projection was not found, is quantised, is no plain linear map (adapters), or shares its
            weight with another place of the model, which would change too.
    """
    if not -float("inf") < scale < float("inf"):
        raise EditError(f"fold: the scale must be finite, got {scale}.")
    pairs, name = chosen_heads(lens, heads, tower=tower, what="fold")
    found = {}
    for layer, mine in HeadList(tuple(pairs)).by_layer.items():
        found[layer] = _columns(lens, name, layer), list(mine)
    old = {layer: columns[mine].clone() for layer, (columns, mine) in found.items()}
    try:
        with torch.no_grad():
            for layer, (columns, mine) in found.items():
                columns[mine] = old[layer] * scale
        yield
    finally:
        with torch.no_grad():
            for layer, (columns, mine) in found.items():
                columns[mine] = old[layer]


def _columns(lens: Lens, tower: str, layer: int) -> Tensor:
    """A layer's output projection [head, d_value, d_model]: a view of the parameter, to be written into."""
    part = lens.anatomy.attention(tower, layer, "z")
    view, where = part.weight().detach(), part.out_name
    module: Any = part.out_proj
    weight = module.weight
    plain = type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"
    bare = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and not weight.is_meta
    if not plain or not bare or view.data_ptr() != weight.data_ptr():
        raise UnsupportedError(
            f"fold: {where} ({type(module).__name__}) is no plain linear map on a weight of its own (quantised, "
            "offloaded or with an adapter); scale the heads with edits.scale_heads."
        )
    first, last = _span(weight)
    spans = {n: _span(p) for n, p in lens.model.named_parameters(remove_duplicate=False) if p.device == weight.device}
    tied = [n for n, (start, end) in spans.items() if start < last and first < end]
    layers = [x for x in lens.anatomy.tower(tower)[0].layers for p in x.attention.values() if p.out_proj is module]
    if len(tied) > 1 or len(layers) > 1:
        others = ", ".join(tied if len(tied) > 1 else [x.name for x in layers])
        raise UnsupportedError(
            f"fold: the weight of {where} is used in several places ({others}), all of which would change; scale the "
            "heads with edits.scale_heads."
        )
    return view


def _span(weight: Tensor) -> tuple[int, int]:
    """Where a tensor lies in memory."""
    return weight.data_ptr(), weight.data_ptr() + weight.nbytes
