"""Batch-top-k dictionaries.

Source: Bussmann, Leask and Nanda 2024, "BatchTopK Sparse Autoencoders" (arXiv 2412.06410). In training, the k n largest
positive pre-activations of a batch of n tokens are kept; a running mean of the smallest one kept (float64, over steps)
is the threshold by which single tokens are encoded in evaluation, like a JumpReLU. Ranking, norms and dead latents are
as in `topk`.

Departures: values equal to the smallest kept are all kept; with `reduce` the batch is that of all processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.dictionaries.base import Pass
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.sparse import Pattern, Sparse, topk_batch
from interp.dictionaries.topk import TopK
from interp.errors import SettingsError

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary


class BatchTopK(TopK):
    """The k n largest pre-activations of n tokens together."""

    def check(self, cfg: DictionaryConfig) -> None:
        """k lies above 0 and at most at d_sae."""
        if not 0 < cfg.k <= cfg.d_sae:
            raise SettingsError(f"k lies above 0 and at most at d_sae={cfg.d_sae}, not at {cfg.k}.")

    def build(self, sae: Dictionary) -> None:
        """`b_enc`, and the buffer `topk_threshold` in float64, zero until a step was made."""
        super().build(sae)
        sae.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64))

    def latents(self, sae: Dictionary, batch: Pass) -> Tensor | Sparse:
        """In evaluation, once it is known, by the threshold; otherwise by the batch."""
        threshold = sae.topk_threshold
        if sae.training or not threshold > 0:
            return super().latents(sae, batch)
        pre, norms = sae.pre_activations(batch), self.norms(sae)
        pre = pre if norms is None else pre * norms
        return pre * (pre > threshold.to(pre.dtype))

    def choose(self, sae: Dictionary, batch: Pass, norms: Tensor | None) -> tuple[Tensor, Pattern]:
        """Pre-activations that are kept, all positive, and which they are."""
        centred = self._centred(sae, batch)
        count = int(sae.cfg.k * len(centred))
        return topk_batch(centred, sae.W_enc, sae.b_enc, count, scale=norms, low=batch.low, reduce=batch.reduce)

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Sparse, Tensor]:
        """`mse_loss` and `auxiliary_reconstruction_loss`; moves the threshold."""
        parts, latents, y = super().losses(sae, batch)
        self.move_threshold(sae, latents, batch)
        return parts, latents, y

    @torch.no_grad()
    def move_threshold(self, sae: Dictionary, latents: Sparse, batch: Pass) -> None:
        """Let the threshold follow the smallest value that was kept, where any was."""
        threshold = sae.topk_threshold
        values = latents.values
        least = values.min() if len(values) else values.new_tensor(torch.inf)
        if batch.reduce is not None:
            least = batch.reduce(least, "min")
        moved = torch.lerp(threshold, least.double(), sae.cfg.topk_threshold_lr)
        threshold.copy_(torch.where(least.isfinite(), moved, threshold))

    def fold_scale(self, sae: Dictionary, target_scale: float) -> None:
        """The threshold is in units of the decoder's rows where latents are multiplied by their lengths."""
        if sae.cfg.rescale_acts_by_decoder_norm:
            sae.topk_threshold.div_(target_scale)
