"""How far back a change reaches: the first column that has to be computed again when a column changes."""

from __future__ import annotations

from contextlib import suppress
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from interp.batch import Batch
from interp.edits import splice
from interp.errors import InputError, UnsupportedError
from interp.lens import Lens
from interp.reads import Read

Kind = tuple[str, ...]
_CAUSAL: WeakKeyDictionary[Lens, dict[Kind, bool]] = WeakKeyDictionary()
"""For each model and kind of batch, whether every position sees what is before it only, and under `keys` whether keys
and values are kept: looked at once."""


def first_columns(lens: Lens, batch: Batch) -> Int[Tensor, "batch pos"]:
    """For each column, the first one that differs when it and any columns behind it are changed.

    That is the column itself where attention is causal; 0 up to the end of what is seen in both directions (images, a
    prompt), and everywhere in towers that see everything, carry a state that is not kept by column, or keep no keys and
    values, behind which later columns could be computed alone.
    """
    size, width = batch.mask.shape
    columns = torch.arange(width, device=batch.mask.device).expand(size, width)
    tower = lens.anatomy.towers[lens.anatomy.main]
    if any("mixer" in layer.branches for layer in tower.layers) or not _is_causal(lens, batch):
        return torch.zeros_like(columns)
    if not keeps_keys(lens, batch):
        return torch.zeros_like(columns)
    known, marks = _CAUSAL.setdefault(lens, {}), [n for n in batch.inputs if n.endswith("token_type_ids")]
    if batch.image_mask is None and not marks:
        return columns
    kind = ("images", *marks)
    if known.get(kind):
        return columns
    try:
        some = sorted({0, len(tower.layers) // 2, len(tower.layers) - 1})
        trace = lens.run(batch, Read("pattern", layers=tuple(some), reduce="head_max"))
    except UnsupportedError:
        return torch.zeros_like(columns)
    seen = torch.stack([x > 0 for x in trace.values.values()]).any(0)
    # The first query that sees each key; a query of padding does not count.
    query = torch.where(seen & batch.mask[:, :, None], columns[:, :, None], width).amin(1)
    behind = torch.minimum(columns, query).flip(1).cummin(1).values.flip(1)
    # Models that see a stretch in both directions do so from the first column on only, and not behind cached keys.
    both = behind < columns
    known[kind] = not bool(both.any())
    last = torch.where(both, columns, -1).amax(1, keepdim=True)
    return torch.where(columns <= last, 0, columns)


def keeps_keys(lens: Lens, batch: Batch) -> bool:
    """Whether a run leaves the keys and values of its layers behind, as one sample shows."""
    known = _CAUSAL.setdefault(lens, {})
    if ("keys",) not in known:
        with suppress(InputError):  # images that are packed over samples
            batch = batch[int(batch.lengths.argmax())]
        try:
            cache = lens.run(batch, Read("resid_pre", layers=(0,)), cache=True).cache
        except UnsupportedError:
            cache = None
        known["keys",] = cache is not None and cache.key_values.get_seq_length() > 0
    return known["keys",]


def _is_causal(lens: Lens, batch: Batch) -> bool:
    """Whether a change of the last token changes nothing before it, as one sample shows."""
    known = _CAUSAL.setdefault(lens, {})
    kind = ("last token", "images" if batch.image_mask is not None else "text")
    if kind not in known:
        with suppress(InputError):  # images that are packed over samples
            batch = batch[int(batch.lengths.argmax())]
        last = len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
        read = Read("resid_post", layers=(last,))
        change = splice(lambda x: 1 - 2 * x, site="resid_pre", layers=0, positions="last")
        one, two = (lens.run(batch, read, edits)["resid_post", last] for edits in ((), change))
        before = batch.mask & ~batch.span("last")
        if not bool(before.any()):
            return False  # a single token says nothing
        gap = (one[before].double() - two[before].double()).abs().max()
        known[kind] = bool(gap <= 1e-3 * one[before].double().abs().max())
    return known[kind]
