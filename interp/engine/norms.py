"""Norms as data: gain, bias, whether the mean is taken away, and the small number under the root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class FittedNorm:
    """A LayerNorm or RMSNorm, fitted to what a module does rather than read from its attributes.

    `norm(x) = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * gain + bias`, without the mean for RMSNorm.

    Attributes:
        module: the norm module.
        center: whether the mean is taken away (LayerNorm).
        eps: the number under the root.
        gain: [d_model].
        bias: [d_model].
        error: largest relative error of the fit on the tensor it was fitted to.
    """

    module: nn.Module
    center: bool
    eps: float
    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    error: float

    def scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """The number that the norm multiplies `x` with, per position (before the gain)."""
        x = x.float()
        if self.center:
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def linear(self, part: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... d"]:
        """The norm as a linear map with its scale frozen: what a part of the input contributes (without bias)."""
        part = part.float()
        if self.center:
            part = part - part.mean(-1, keepdim=True)
        return part * scale * self.gain.to(part.device)


def fit_norm(module: nn.Module, x: Float[Tensor, "... d"], tolerance: float = 1e-3) -> FittedNorm | None:
    """Fit a norm module on an input; None if it is neither LayerNorm nor RMSNorm.

    Args:
        module: the norm.
        x: an input with at least two different positions.
        tolerance: largest accepted relative error.
    """
    eps = next((float(getattr(module, n)) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(module, n)), 0.0)
    probe = torch.randn(64, x.shape[-1], generator=torch.Generator().manual_seed(0))
    probe = torch.cat([x.detach().reshape(-1, x.shape[-1])[:64].float().cpu(), probe])
    with torch.no_grad():
        y = module(probe.to(x)).float().cpu()
    best: FittedNorm | None = None
    for center in (False, True):
        u = probe - probe.mean(-1, keepdim=True) if center else probe
        u = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
        # Per channel: least squares of y on u with an intercept.
        um, ym = u.mean(0), y.mean(0)
        gain = ((u - um) * (y - ym)).sum(0) / (u - um).pow(2).sum(0).clamp_min(1e-12)
        bias = ym - gain * um
        size = float(y.abs().max())
        if float(bias.abs().max()) < 1e-4 * size:
            bias, gain = torch.zeros_like(bias), (u * y).sum(0) / u.pow(2).sum(0).clamp_min(1e-12)
        error = float((u * gain + bias - y).abs().max()) / max(size, 1e-12)
        if best is None or error < best.error:
            best = FittedNorm(module, center, eps, gain, bias, error)
    return best if best is not None and best.error < tolerance else None


def through_chain(
    x: Tensor, full: Tensor, chain: Sequence[FittedNorm | Any], arguments: Mapping[Any, Any], *, bias: bool
) -> Tensor:
    """Carry a part of the projection's output to the stream, with norms frozen at the scale of the full output.

    Args:
        x: the part [..., d_model].
        full: the projection's whole output, broadcastable to `x`.
        chain: what lies between projection and stream.
        arguments: the layer call's arguments.
        bias: whether the norms' biases are added (for the full output, not for parts).
    """
    for step in chain:
        if isinstance(step, FittedNorm):
            scale = step.scale(full)
            x, full = step.linear(x, scale), step.linear(full, scale) + step.bias.to(full.device)
            if bias:
                x = x + step.bias.to(x.device)
        else:
            factor = step(arguments)
            x, full = x * factor, full * factor
    return x
