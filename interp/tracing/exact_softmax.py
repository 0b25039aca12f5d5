"""Queries and keys to first order behind the softmax: the attention of the patched query or key is computed exactly.

A query acts on its own row of the pattern, a key on its column and, through the norm of the softmax, on the rest of
each row. With p the base run's pattern, g = d metric / d p, and s how far the score of key j moves,

    query i:           sum over j of (p'_ij - p_ij) g_ij = (z'_i - z_i) . d metric / d z_i
    keys of a group:   sum over i of (sum over j of p'_ij g_ij) - (sum over j of p_ij g_ij),
                       p'_ij = p_ij exp(s_ij) / (sum over j of p_ij exp(s_ij)),  s_ij = 0 outside the group

Both come from runs in which all queries, or all keys, are those of the source run, while each head's output is held:
the streams are the base run's, so that every layer sees one patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.edits import Edit, Where
from interp.errors import UnsupportedError
from interp.lens import Lens
from interp.tracing.grid import Place
from interp.tracing.pair import Pair

_HELD = 2**28  # bytes of scores and patterns that are held at once
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


def query_shares(
    pair: Pair,
    place: Place,
    source: Mapping[int, Tensor],
    z: Mapping[int, Tensor],
    gradients: Mapping[int, Tensor],
) -> dict[int, Float[Tensor, "batch pos head"]]:
    """What patching each query does to the metric.

    Args:
        pair: the batches.
        place: queries of self- or cross-attention.
        source: the source run's queries, by layer.
        z: the base run's head outputs.
        gradients: the metric's gradient there.
    """
    out: dict[int, Tensor] = {}

    def asked(value: Tensor, where: Where) -> Tensor:
        return source[where.layer].to(value)

    def answered(value: Tensor, where: Where) -> Tensor:
        moved = value.float() - z[where.layer].float()
        out[where.layer] = (moved * gradients[where.layer].float()).sum(-1)
        return z[where.layer].to(value)

    layers = sorted(source)
    queries, outputs = place.read(layers), Place("z", place.tower).read(layers)
    edits = [Edit(queries, asked, "attribution_patching"), Edit(outputs, answered, "attribution_patching")]
    pair.lens.run(pair.base, outputs.but(layers=(layers[-1],), positions="last"), edits)
    return out


def key_shares(
    pair: Pair,
    place: Place,
    source: Mapping[int, Tensor],
    values: Mapping[int, Tensor],
    z: Mapping[int, Tensor],
    gradients: Mapping[int, Tensor],
    masks: Bool[Tensor, "group batch key"],
) -> dict[int, Float[Tensor, "group batch kv_head"]]:
    """What patching the keys of each group does to the metric.

    Args:
        pair: the batches.
        place: keys of self- or cross-attention.
        source: the source run's keys, by layer.
        values: the base run's values.
        z: the base run's head outputs.
        gradients: the metric's gradient there.
        masks: the keys of each group.

    Raises:
        UnsupportedError: something lies between attention and `z`.
    """
    layers, out = sorted(source), {}
    one = z[layers[0]]
    each = 8 * one.shape[0] * one.shape[2] * one.shape[1] * masks.shape[2]  # scores and pattern of a layer
    count = max(1, _HELD // each)
    for first in range(0, len(layers), count):
        some = layers[first : first + count]
        keys, scores, pattern, outputs = (Place(s, place.tower).read(some) for s in ("k", "scores", "pattern", "z"))
        base = pair.lens.run(pair.base, [scores, pattern]).values

        def shown(value: Tensor, where: Where) -> Tensor:
            return source[where.layer].to(value)

        def scored(value: Tensor, where: Where, base=base, scores=scores, pattern=pattern) -> Tensor:
            i = where.layer
            moved = (value.double() - base[scores, i].double()).nan_to_num(0.0, 0.0, 0.0)
            out[i], mixed = _of_groups(base[pattern, i], moved, values[i], gradients[i], masks)
            _check(pair.lens, i, mixed, z[i])
            return value

        def held(value: Tensor, where: Where) -> Tensor:
            return z[where.layer].to(value)

        changes = {keys: shown, scores: scored, outputs: held}
        edits = [Edit(read, change, "attribution_patching") for read, change in changes.items()]
        pair.lens.run(pair.base, outputs.but(layers=(some[-1],), positions="last"), edits)
    return out


def _of_groups(
    pattern: Float[Tensor, "batch head query key"],
    moved: Float[Tensor, "batch head query key"],
    values: Float[Tensor, "batch key kv_head d"],
    gradients: Float[Tensor, "batch query head d"],
    masks: Bool[Tensor, "group batch key"],
) -> tuple[Float[Tensor, "group batch kv_head"], Float[Tensor, "batch query head d"]]:
    """The effect of each group's keys, and what the heads' outputs are by this reckoning."""
    heads, shared = pattern.shape[1], pattern.shape[1] // values.shape[2]
    p, v = pattern.double(), values.double().repeat_interleave(shared, 2)
    g = torch.einsum("bqhd,bkhd->bhqk", gradients.double(), v)
    new = p * moved.clamp(max=600.0).exp()
    rest = 1 - p.sum(-1)  # what a sink takes
    rest = torch.where(rest > 1e-4, rest, 0.0)
    inside, outside = masks.double(), (~masks).double()
    total = rest + torch.einsum("bhqk,gbk->gbhq", new, inside) + torch.einsum("bhqk,gbk->gbhq", p, outside)
    worth = torch.einsum("bhqk,gbk->gbhq", new * g, inside) + torch.einsum("bhqk,gbk->gbhq", p * g, outside)
    # A query of padding may see nothing; nothing depends on it.
    change = torch.where(total > 0, worth / total.clamp_min(1e-300), 0.0) - (p * g).sum(-1)
    by_group = change.sum(-1).unflatten(2, (heads // shared, shared)).sum(-1).float()
    return by_group, torch.einsum("bhqk,bkhd->bqhd", p, v)


def _check(lens: Lens, layer: int, mixed: Tensor, z: Tensor) -> None:
    """Whether the heads' outputs are their patterns times the values, and nothing lies between."""
    error = float((mixed - z.double()).abs().max() / z.double().abs().max().clamp_min(1e-30))
    if not error <= _TOLERANCE.get(lens.dtype, 5e-2):
        raise UnsupportedError(
            f"{lens.name}: in layer {layer} the heads' outputs are not their patterns times the values (off by "
            f"{error:.1e}; a gate behind attention?): use softmax='linear'."
        )


def needed(places: Sequence[Place], wanted: Mapping[int, set[int]]) -> dict[Place, set[int]]:
    """What has to be read beside the sites: head outputs by kind of attention, and the values that keys stand for."""
    found: dict[Place, set[int]] = {}
    for number, layers in wanted.items():
        place = places[number]
        if place.site in ("q", "k"):
            found.setdefault(Place("z", place.tower), set()).update(layers)
        if place.site == "k":
            found.setdefault(Place("v", place.tower), set()).update(layers)
    return found
