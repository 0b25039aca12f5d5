"""Top-k dictionaries.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093). Of every token the k largest
pre-activations are kept, after a ReLU. With `rescale_acts_by_decoder_norm` (SAELens's default) they are ranked, and
reported, times the length of their decoder row, and divided by it again in the decoder; otherwise, with
`unit_norm_decoder`, rows are held at length one as in the paper.

Dead latents: with the residual r = target - y (held fixed), the largest min(d/2, n_dead) pre-activations among the dead
reconstruct it without bias as r^,

    paper     auxiliary_reconstruction_loss = c min(n_dead / (d/2), 1) sum |r - r^|^2 / sum |r - mean r|^2,  c = 1/32
    saelens                                 = c min(n_dead / (d/2), 1) mean |r - r^|^2,                      c = 1

and the paper's has a ReLU before. `paper` does not depend on the units of the activations, while `mse_loss` does; under
Adam this matters little, for dead latents have no other gradient.

Departures: encoder and decoder touch active latents only (see `sparse`); selection holds a part of the batch at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.dictionaries.base import Architecture, Pass, mse
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.sparse import Pattern, Reduce, Sparse, affine, decode, product, selected, topk_rows
from interp.errors import SettingsError

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

_TINY = 1e-12


def _variance(x: Tensor, reduce: Reduce | None) -> Tensor:
    """Mean over tokens of the squared distance from their mean, of all processes together."""
    if reduce is None:
        return mse(x, x.mean(0, keepdim=True))
    count = reduce(torch.tensor(len(x), device=x.device), "sum")
    mean = reduce(x.sum(0, dtype=torch.float64), "sum") / count
    return (reduce((x - mean).square().sum(), "sum") / count).to(torch.promote_types(x.dtype, torch.float32))


class TopK(Architecture):
    """The k largest pre-activations of every token."""

    absolute = False

    def check(self, cfg: DictionaryConfig) -> None:
        """k is a whole number from 1 to d_sae."""
        if cfg.k != int(cfg.k) or not 1 <= cfg.k <= cfg.d_sae:
            raise SettingsError(f"k is a whole number from 1 to d_sae={cfg.d_sae}, not {cfg.k}.")

    def unit_norm(self, cfg: DictionaryConfig) -> bool:
        """Where the settings ask for it."""
        return cfg.unit_norm_decoder

    def norms(self, sae: Dictionary) -> Tensor | None:
        """Lengths of the decoder's rows where latents are multiplied by them, or None."""
        return sae.W_dec.norm(dim=1).clamp_min(_TINY) if sae.cfg.rescale_acts_by_decoder_norm else None

    def decoder(self, sae: Dictionary) -> Tensor:
        """Rows of the decoder, divided by their lengths where latents are multiplied by them."""
        norms = self.norms(sae)
        return sae.W_dec if norms is None else sae.W_dec / norms[:, None]

    def choose(self, sae: Dictionary, batch: Pass, norms: Tensor | None) -> tuple[Tensor, Pattern]:
        """Pre-activations that are kept, before ReLU, and which they are."""
        options = {"scale": norms, "absolute": self.absolute, "low": batch.low}
        return topk_rows(self._centred(sae, batch), sae.W_enc, sae.b_enc, int(sae.cfg.k), **options)

    def _centred(self, sae: Dictionary, batch: Pass) -> Tensor:
        return batch.x if sae.input_bias is None else batch.x - sae.input_bias

    def active(self, sae: Dictionary, batch: Pass) -> tuple[Tensor, Sparse]:
        """Active pre-activations after the ReLU, with their graph; and the latents as they are reported."""
        norms = self.norms(sae)
        found, pattern = self.choose(sae, batch, None if norms is None else norms.detach())
        values = selected(found, pattern, batch.x, sae.input_bias, sae.W_enc, sae.b_enc)
        values = values if self.absolute else values.relu()
        return values, Sparse(values if norms is None else values * norms[pattern.latents], pattern)

    def latents(self, sae: Dictionary, batch: Pass) -> Tensor | Sparse:
        """The active latents."""
        return self.active(sae, batch)[1]

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Sparse, Tensor]:
        """`mse_loss` and `auxiliary_reconstruction_loss`."""
        values, latents = self.active(sae, batch)
        # The length of a row multiplies its latent and divides it again: left out on the way to the reconstruction.
        y = sae.finish(decode(values, sae.W_dec, latents.pattern) + sae.b_dec, batch)
        parts = {"mse_loss": mse(y, batch.target), "auxiliary_reconstruction_loss": self.dead_loss(sae, batch, y)}
        return parts, latents, y

    def dead_loss(self, sae: Dictionary, batch: Pass, y: Tensor) -> Tensor:
        """The loss that lets dead latents reconstruct the residual; zero where none is dead."""
        index = None if batch.dead is None else batch.dead.nonzero()[:, 0]
        if index is None or not len(index):
            return y.new_zeros(())
        residual = (batch.target - y).detach()
        enough = max(sae.cfg.width_out // 2, 1)
        encoder, bias, rows = sae.W_enc[:, index], sae.b_enc[index], sae.W_dec[index]
        paper = sae.cfg.aux_loss == "paper"
        cut = torch.relu if paper and not self.absolute else lambda acts: acts
        if len(index) <= enough:
            acts = cut(affine(batch.x, sae.input_bias, encoder, bias, batch.low))
            guess = product(acts, rows, batch.low)
        else:
            norms = self.norms(sae)
            options = {"scale": None if norms is None else norms[index], "absolute": self.absolute, "low": batch.low}
            found, pattern = topk_rows(self._centred(sae, batch), encoder, bias, enough, **options)
            guess = decode(cut(selected(found, pattern, batch.x, sae.input_bias, encoder, bias)), rows, pattern)
        loss = mse(guess if batch.scale is None else guess * batch.scale, residual)
        if paper:
            loss = loss / _variance(residual, batch.reduce).clamp_min(_TINY)
        return sae.cfg.aux_weight * min(len(index) / enough, 1.0) * loss

    def fold_norms(self, sae: Dictionary, norms: Tensor) -> DictionaryConfig:
        """Latents are no longer multiplied by lengths that are one.

        Raises:
            SettingsError: the ranking knows nothing of the lengths, and folding would change it.
        """
        if not sae.cfg.rescale_acts_by_decoder_norm:
            raise SettingsError(
                "folding the decoder's norms would change which latents are among the top k; only dictionaries with "
                "rescale_acts_by_decoder_norm=True can be folded (once)."
            )
        return super().fold_norms(sae, norms).changed(rescale_acts_by_decoder_norm=False)
