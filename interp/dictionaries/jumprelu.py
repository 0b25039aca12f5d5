"""JumpReLU dictionaries.

Source: Rajamanoharan et al. 2024, "Jumping Ahead" (arXiv 2407.14435), loss `step`; Anthropic 2025 (circuits updates,
January), loss `tanh` and the pull on dead latents; `quadratic` is Gemma Scope 2's. With thresholds t >= 0,

    f = pre 1[pre > t]
    step        l0_coefficient mean of sum 1[pre > t]
    tanh        l0_coefficient mean of sum tanh(c f |W_dec rows|)
    quadratic   l0_coefficient mean of 2 (sum 1[pre > t] - target)^2 / target
    pre_act     pre_act_loss_coefficient mean of the sum over dead latents of ReLU(t - pre) |W_dec rows|

Jumps have no derivative: with r = 1[|pre - t| < e/2] / e, the gradient for t is -r (step) and -t r (f), and, where
`jumprelu_ste_to_input`, that for pre has r and t r added.

Departures from the first paper, as in SAELens 6.54: t is trained itself, not its logarithm (which Adam hardly moves),
is held in float32 or wider, and is brought back to zero from below; the pull is on dead latents only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from interp.dictionaries.base import Architecture, Pass, mse
from interp.dictionaries.sparse import product

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary


class _Jump(torch.autograd.Function):
    """1[pre > t], times pre where `linear`."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float, linear: bool, to_input: bool):
        ctx.save_for_backward(pre, threshold)
        ctx.width, ctx.linear, ctx.to_input = width, linear, to_input
        return pre * (pre > threshold) if linear else (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        (grad,) = grads
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2) * grad / ctx.width
        if ctx.linear:
            near = near * threshold
        smooth = (pre > threshold) * grad if ctx.linear else None
        if ctx.to_input:
            smooth = near if smooth is None else smooth + near
        return smooth, -near.sum(0), None, None, None


class JumpReLU(Architecture):
    """Pre-activations where they exceed a trained threshold."""

    encoder_biases = ("b_enc", "threshold")

    def build(self, sae: Dictionary) -> None:
        """`b_enc`, and `threshold` [d_sae] in float32 or wider."""
        super().build(sae)
        wide = torch.promote_types(sae.W_enc.dtype, torch.float32)
        sae.threshold = nn.Parameter(torch.full((sae.cfg.d_sae,), sae.cfg.jumprelu_init_threshold, dtype=wide))

    def latents(self, sae: Dictionary, batch: Pass) -> Tensor:
        """Pre-activations above their thresholds."""
        pre = sae.pre_activations(batch)
        return pre.relu() * (pre > sae.threshold)

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`mse_loss`, `l0_loss`, and `pre_act_loss` where its coefficient is set."""
        self.after_step(sae)
        cfg, threshold = sae.cfg, sae.threshold.to(sae.W_enc.dtype)
        pre = sae.pre_activations(batch)
        options = (cfg.jumprelu_bandwidth, cfg.jumprelu_ste_to_input)
        f: Tensor = _Jump.apply(pre, threshold, options[0], True, options[1])  # type: ignore[assignment]
        y = sae.finish(product(f, sae.W_dec, batch.low) + sae.b_dec, batch)
        norms = sae.W_dec.norm(dim=1)
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            size = torch.tanh(cfg.jumprelu_tanh_scale * f * norms).sum(1)
        else:
            size = _Jump.apply(pre, threshold, options[0], False, options[1]).sum(1)  # type: ignore[union-attr]
            if cfg.target_l0 is not None and cfg.jumprelu_sparsity_loss_mode == "quadratic":
                size = 2 / cfg.target_l0 * (size - cfg.target_l0).square()
        parts = {"mse_loss": mse(y, batch.target), "l0_loss": cfg.l0_coefficient * batch.sparsity * size.mean()}
        if cfg.pre_act_loss_coefficient is not None:
            pull = pre.new_zeros(())
            if batch.dead is not None and batch.dead.any():
                below = (threshold[batch.dead] - pre[:, batch.dead]).relu()
                pull = below.mean(0) @ norms[batch.dead]
            parts["pre_act_loss"] = cfg.pre_act_loss_coefficient * pull
        return parts, f, y

    @torch.no_grad()
    def after_step(self, sae: Dictionary) -> None:
        """Thresholds are not negative: below zero, negative pre-activations would pass."""
        sae.threshold.clamp_(min=0)
