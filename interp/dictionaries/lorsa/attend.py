"""Attention of QK heads that are shared by many values: positions, masks, rotation, and the sum over sources.

No tensor [n_ov, pos, pos] is ever made. Where a QK head has not many more OV heads than coordinates, one call of the
fused kernel does it all (queries, keys or values are filled up with zeros to one width, which changes nothing).
Otherwise patterns are made for a few QK heads at a time, and made again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

_HELD = 2**24  # elements of patterns that are held at a time


def positions_of(
    real: Bool[Tensor, "batch pos"] | None, segments: Int[Tensor, "batch pos"] | None, shape: torch.Size
) -> Int[Tensor, "batch pos"] | None:
    """Position of each token in its sequence, or in its segment; None where columns are positions."""
    if real is None and segments is None:
        return None
    device = (real if real is not None else segments).device  # type: ignore[union-attr]
    real = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real
    rank = real.long().cumsum(1) - 1
    if segments is not None:
        fresh = torch.ones_like(real)
        fresh[:, 1:] = segments[:, 1:] != segments[:, :-1]
        rank = rank - torch.where(fresh, rank, 0).cummax(1).values
    return rank.clamp_min(0)


def visible(
    pos: int,
    *,
    causal: bool,
    window: int | None,
    real: Bool[Tensor, "batch pos"] | None = None,
    segments: Int[Tensor, "batch pos"] | None = None,
    device: torch.device | str = "cpu",
    explicit: bool = False,
) -> Bool[Tensor, "batch query key"] | None:
    """Which keys a query sees; unless `explicit`, None where that is all, or all up to it in a causal layer.

    Each position sees itself, padding too: a row without any key has no softmax.
    """
    if not explicit and real is None and segments is None and (window is None or window >= pos):
        return None
    column = torch.arange(pos, device=device)
    away = column[:, None] - column
    seen = torch.ones(1, pos, pos, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (away >= 0)
    if window is not None:
        seen = seen & (away.abs() < window)
    if real is not None:
        seen = seen & real[:, None, :]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
    return seen | (away == 0)


def rotate(
    x: Float[Tensor, "batch pos head d_qk"],
    cos: Float[Tensor, "#batch pos pair"],
    sin: Float[Tensor, "#batch pos pair"],
    pairing: str,
) -> Float[Tensor, "batch pos head d_qk"]:
    """Turn the pairs of coordinates by their angles."""
    n = cos.shape[-1]
    if not n:
        return x
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    if pairing == "half":
        a, b, *rest = x.split([n, n, x.shape[-1] - 2 * n] if x.shape[-1] > 2 * n else n, -1)
        return torch.cat([*_turned(a, b, cos, sin), *rest], -1)
    turned, *rest = x.split([2 * n, x.shape[-1] - 2 * n], -1) if x.shape[-1] > 2 * n else [x]
    a, b = turned.unflatten(-1, (n, 2)).unbind(-1)
    return torch.cat([torch.stack(_turned(a, b, cos, sin), -1).flatten(-2), *rest], -1)


def _turned(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)


def scores_of(q: Float[Tensor, "... d"], k: Float[Tensor, "... d"], scale: float, softcap: float | None) -> Tensor:
    """Scores [..., query, key] of queries [..., query, d] and keys [..., key, d], in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def pattern_of(
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch head key d"],
    seen: Bool[Tensor, "batch query key"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "batch head query key"]:
    """Attention probabilities in float32 or wider."""
    return torch.softmax(scores_of(q, k, scale, softcap).masked_fill(~seen[:, None], -torch.inf), -1)


def attend(
    q: Float[Tensor, "batch pos head d_qk"],
    k: Float[Tensor, "batch pos head d_qk"],
    v: Float[Tensor, "batch pos head group"],
    seen: Bool[Tensor, "batch query key"] | None,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "batch pos head group"]:
    """Sum of the values of the OV heads of each QK head over the sources, weighted by its pattern."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    group, width = v.shape[-1], q.shape[-1]
    if softcap is None and group <= 2 * width:
        wide = max(group, width)
        filled: Any = [pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v)]
        mask = None if seen is None else seen[:, None]
        out = scaled_dot_product_attention(*filled, attn_mask=mask, is_causal=causal and mask is None, scale=scale)
        return out[..., :group].transpose(1, 2)
    if seen is None:
        seen = visible(q.shape[2], causal=causal, window=None, device=q.device, explicit=True)

    def part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pattern_of(q, k, seen, scale, softcap).to(v.dtype) @ v  # type: ignore[arg-type]

    step = max(1, _HELD // (len(q) * q.shape[2] ** 2))
    if step >= q.shape[1]:
        return part(q, k, v).transpose(1, 2)
    pieces = zip(*(t.split(step, 1) for t in (q, k, v)), strict=True)
    out = torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces], 1)  # type: ignore[list-item]
    return out.transpose(1, 2)
