"""Lists of heads: read, and checked against a model or a grid."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import UnknownNameError
from interp.headlist import HeadList, Heads, check_model
from interp.lens import Lens

Pairs = list[tuple[int, int]]


def chosen_heads(lens: Lens, heads: Heads, *, tower: str | None = None, what: str = "heads") -> tuple[Pairs, str]:
    """The heads of a list as (layer, head) pairs counted from zero, and the tower that they are in.

    Args:
        lens: the model.
        heads: (layer, head) pairs, or a frame with these columns, such as `scores.top(16)`.
        tower: None for that of the list, or the main one.
        what: what needs them, for errors.

    Raises:
        EditError: no list of heads, or one from another model or tower.
        UnknownNameError: a layer or head does not exist.
        UnsupportedError: the outputs of a layer's heads cannot be reached.
    """
    listed = HeadList.of(heads)
    check_model(listed.model, lens.name, what)
    name = listed.within(tower, what)
    found, kind = lens.anatomy.tower(name)
    pairs = []
    for layer, head in listed.pairs:
        index = found.layer(layer).index
        count = lens.anatomy.attention(name, index, "z").n_heads
        if not -count <= head < count:
            raise UnknownNameError(
                f"head {head} of layer {index} does not exist: the layer has {count} heads (0 to {count - 1})."
            )
        pairs.append((index, head % count))
    return list(dict.fromkeys(pairs)), "cross" if kind == "cross" else found.name


def head_mask(pairs: Pairs, valid: Bool[Tensor, "layer head"]) -> Bool[Tensor, "layer head"]:
    """Which heads of a grid are in a list.

    Raises:
        UnknownNameError: a head of the list is not in the grid.
    """
    mask = torch.zeros_like(valid)
    for layer, head in pairs:
        inside = 0 <= layer < valid.shape[0] and 0 <= head < valid.shape[1]
        if not inside or not bool(valid[layer, head]):
            raise UnknownNameError(
                f"head {head} of layer {layer} is not among the {int(valid.sum())} heads of the grid."
            )
        mask[layer, head] = True
    return mask
