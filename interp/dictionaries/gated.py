"""Gated dictionaries.

Source: Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders" (arXiv 2404.16014).
With x~ = x - b_dec and weights shared but for a factor,

    gate = x~ W_enc + b_gate        magnitude = ReLU(x~ (W_enc exp(r_mag)) + b_mag)        f = 1[gate > 0] magnitude
    l1_loss = l1_coefficient mean of sum ReLU(gate) |W_dec rows|
    auxiliary_reconstruction_loss = mean of || ReLU(gate) W_dec + b_dec - target ||^2

With `aux_loss="paper"` the last does not train the decoder, whose rows are kept at length one (`before_step` and
`after_step`), for nothing else would hold the penalty from shrinking them. With `aux_loss="saelens"` it trains the
decoder, and lengths are free.

Departure: x~ W_enc is computed once; the paper's second product is the first one times exp(r_mag).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from interp.dictionaries.base import Architecture, Pass, mse
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.sparse import affine, product

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary


class Gated(Architecture):
    """A gate that chooses and a magnitude that says how much."""

    encoder_biases = ("b_gate", "b_mag")

    def unit_norm(self, cfg: DictionaryConfig) -> bool:
        """In the paper's form."""
        return cfg.aux_loss == "paper"

    def build(self, sae: Dictionary) -> None:
        """`b_gate`, `b_mag` and `r_mag`, all zero."""
        for name in ("b_gate", "b_mag", "r_mag"):
            setattr(sae, name, nn.Parameter(sae.W_enc.new_zeros(sae.cfg.d_sae)))

    def _both(self, sae: Dictionary, batch: Pass) -> tuple[Tensor, Tensor]:
        gate = affine(batch.x, sae.input_bias, sae.W_enc, sae.b_gate, batch.low)
        magnitude = (gate - sae.b_gate) * sae.r_mag.exp() + sae.b_mag
        return gate, (gate > 0) * magnitude.relu()

    def latents(self, sae: Dictionary, batch: Pass) -> Tensor:
        """Magnitudes where the gate is open."""
        return self._both(sae, batch)[1]

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`mse_loss`, `l1_loss` and `auxiliary_reconstruction_loss`."""
        gate, f = self._both(sae, batch)
        y = sae.finish(product(f, sae.W_dec, batch.low) + sae.b_dec, batch)
        opened = gate.relu()
        size = opened.mean(0) @ sae.W_dec.norm(dim=1)
        rows, bias = (sae.W_dec, sae.b_dec)
        if sae.cfg.aux_loss == "paper":
            rows, bias = rows.detach(), bias.detach()
        through_gate = sae.finish(product(opened, rows, batch.low) + bias, batch)
        parts = {
            "mse_loss": mse(y, batch.target),
            "l1_loss": sae.cfg.l1_coefficient * batch.sparsity * size,
            "auxiliary_reconstruction_loss": mse(through_gate, batch.target),
        }
        return parts, f, y
