"""ReLU dictionaries with a penalty on the latents.

Source: Bricken et al. 2023; Templeton et al. 2024 for the form of the penalty, which leaves the decoder free:

    f = ReLU(pre)        l1_loss = l1_coefficient mean over tokens of || f |W_dec rows| ||_p        (p = 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from interp.dictionaries.base import Architecture, Pass, mse
from interp.dictionaries.sparse import product

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary


class Standard(Architecture):
    """ReLU and an L1 penalty."""

    def latents(self, sae: Dictionary, batch: Pass) -> Tensor:
        """ReLU of the pre-activations."""
        return sae.pre_activations(batch).relu()

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`mse_loss` and `l1_loss`."""
        f = self.latents(sae, batch)
        y = sae.finish(product(f, sae.W_dec, batch.low) + sae.b_dec, batch)
        norms = sae.W_dec.norm(dim=1)
        # The mean of sums of f |row|, taken over tokens first, never holds the product.
        p = sae.cfg.lp_norm
        size = f.mean(0) @ norms if p == 1 else (f * norms).norm(p=p, dim=1).mean()
        return {"mse_loss": mse(y, batch.target), "l1_loss": sae.cfg.l1_coefficient * batch.sparsity * size}, f, y
