"""A block as a linear map of its heads and of the stream that enters it, norms frozen at the statistics of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.engine.norms import FittedNorm, fit_norm
from interp.errors import UnsupportedError


@dataclass(frozen=True, slots=True, eq=False)
class LinearBlock:
    """What a block makes of its heads and its stream: `scale * sum over heads of z_h weight_h + residual + bias`.

    With z_h = sum over sources j of pattern_h[i, j] v_h[j], each source's part of it follows. What later branches add
    (the MLP) is left out; the statistics of the norms are those of the whole stream, that with them.

    Attributes:
        weight: what each head's output is multiplied with, the same at all positions [head, d_value, d_model].
        scale: what all heads of a position are multiplied with, from the norms [batch, pos, 1].
        residual: what is left of the stream that entered [batch, pos, d_model].
        bias: what comes from neither: biases of the projection and of norms [batch, pos, d_model].
        attention: what attention adds to the stream by this reckoning, before norms of the stream itself.
    """

    weight: Float[Tensor, "head d_value d_model"]
    scale: Float[Tensor, "batch pos 1"]
    residual: Float[Tensor, "batch pos d_model"]
    bias: Float[Tensor, "batch pos d_model"]
    attention: Float[Tensor, "batch pos d_model"]


@dataclass(slots=True, eq=False)
class _Carried:
    """The parts of a vector on its way, and the whole vector, whose statistics the norms take."""

    weight: Tensor
    scale: Tensor
    residual: Tensor
    bias: Tensor
    whole: Tensor

    def norm(self, norm: FittedNorm) -> None:
        scale, shift = norm.scale(self.whole), norm.bias.to(self.whole.device)
        self.weight = norm.linear(self.weight, torch.ones(1, device=self.weight.device))
        self.scale = self.scale * scale
        self.residual = norm.linear(self.residual, scale)
        self.bias = norm.linear(self.bias, scale) + shift
        self.whole = norm.linear(self.whole, scale) + shift

    def times(self, factor: Tensor) -> None:
        self.weight, self.residual = self.weight * factor.to(self.weight.device), self.residual * factor
        self.bias, self.whole = self.bias * factor, self.whole * factor


def linear_block(
    weight: Float[Tensor, "head d_value d_model"],
    bias: Float[Tensor, " d_model"] | None,
    chain: Sequence[Any],
    recipe: Sequence[tuple[str, Any]],
    z: Float[Tensor, "batch pos head d_value"],
    stream: Float[Tensor, "batch pos d_model"],
    branches: Mapping[str, Float[Tensor, "batch pos d_model"]],
    name: str,
) -> LinearBlock:
    """A block, linear in its heads and its stream.

    Args:
        weight: the output projection per head.
        bias: its bias.
        chain: fitted norms and factors between the projection and the stream.
        recipe: how the stream is put together (see `Layer`), as far as it is to be followed.
        z: the heads' outputs.
        stream: what enters the layer.
        branches: what is added before the last norm of the recipe, by kind.
        name: of the layer, for errors.

    Raises:
        UnsupportedError: a norm is neither LayerNorm nor RMSNorm, a factor differs between positions, or the recipe
            does not add attention.
    """
    weight, z, stream = weight.detach().float(), z.float(), stream.float()
    full = torch.einsum("bphv,hvd->bpd", z, weight)
    fixed = torch.zeros_like(full) if bias is None else bias.detach().float().expand_as(full)
    one, nothing = full.new_ones(*full.shape[:2], 1), torch.zeros_like(full)
    heads = _Carried(weight, one, nothing, fixed, full + fixed)
    for step in chain:
        _go(heads, step, name)
    carried = _Carried(torch.zeros_like(weight), one, stream, nothing, stream)
    added = False
    for what, step in recipe:
        if what != "add":
            _go(carried, step, name)
            continue
        for kind in step:
            if kind in branches:
                carried.whole = carried.whole + branches[kind].float()
        if "attn" in step:
            added = True
            carried.weight, carried.scale = heads.weight, heads.scale
            carried.bias = carried.bias + heads.bias
    if not added:
        raise UnsupportedError(f"{name} does not add its attention to the stream as one branch.")
    return LinearBlock(carried.weight, carried.scale, carried.residual, carried.bias, heads.whole)


def _go(carried: _Carried, step: Any, name: str) -> None:
    """Carry through a norm (fitted, or the module itself) or a factor."""
    if isinstance(step, nn.Module):
        carried.norm(_fitted(step, carried.whole, name))
    elif isinstance(step, FittedNorm):
        carried.norm(step)
    else:
        carried.times(_factor(step, carried.whole, name))


def _fitted(module: nn.Module, whole: Tensor, name: str) -> FittedNorm:
    dtype = next((p.dtype for p in module.parameters()), whole.dtype)
    rows = whole.reshape(-1, whole.shape[-1])
    rows = rows[rows.any(-1)]  # fillers are zero
    half = dtype in (torch.float16, torch.bfloat16)
    found = fit_norm(module, rows.to(dtype), tolerance=2e-2 if half else 1e-3)
    if found is None:
        raise UnsupportedError(f"a norm of the stream in {name} ({type(module).__name__}) is no LayerNorm or RMSNorm.")
    return found


def _factor(step: Any, whole: Tensor, name: str) -> Tensor:
    try:
        factor = torch.as_tensor(step({})).detach().to(whole)
    except KeyError:
        raise UnsupportedError(f"a factor in {name} depends on what the layer is called with.") from None
    if factor.numel() not in (1, whole.shape[-1]):
        raise UnsupportedError(f"a factor in {name} differs between positions: {tuple(factor.shape)}.")
    return factor.reshape(-1)
