"""Matryoshka batch-top-k dictionaries.

Source: Bussmann, Nabeshima, Karvonen and Nanda 2025, "Learning Multi-Level Features with Matryoshka SAEs" (arXiv
2503.17547). Latents are chosen once, over all widths together; every nested width m_1 < ... < d_sae reconstructs with
its first latents alone, and the losses of all are added:

    inner_mse_loss_m = mean of || f[:m] W_dec[:m] + b_dec - target ||^2        for every width but the last (`mse_loss`)

Departures: each active latent is decoded once, for the reconstructions are running sums over the widths. A transcoder's
skip is in every one. Dead latents reconstruct the residual of the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from interp.dictionaries.base import Pass, mse
from interp.dictionaries.batchtopk import BatchTopK
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.sparse import Sparse, decode
from interp.errors import SettingsError

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary


class MatryoshkaBatchTopK(BatchTopK):
    """Batch-top-k with nested reconstructions."""

    def check(self, cfg: DictionaryConfig) -> None:
        """There are widths, too."""
        super().check(cfg)
        if not cfg.matryoshka_widths:
            raise SettingsError(
                "matryoshka_batchtopk needs matryoshka_widths, such as (d_sae // 4, d_sae // 2, d_sae)."
            )

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Sparse, Tensor]:
        """`mse_loss`, `auxiliary_reconstruction_loss` and one `inner_mse_loss` for each width but the last."""
        values, latents = self.active(sae, batch)
        widths = sae.cfg.matryoshka_widths
        starts = (0, *widths[:-1])
        rows = sae.W_dec.split([end - first for first, end in zip(starts, widths, strict=True)])
        inner, running, y = {}, sae.b_dec, batch.raw
        for first, end, part in zip(starts, widths, rows, strict=True):
            inside, pattern = latents.pattern.part(first, end)
            running = decode(values[inside], part, pattern) + running
            y = sae.finish(running, batch)
            inner[f"inner_mse_loss_{end}"] = mse(y, batch.target)
        whole = inner.pop(f"inner_mse_loss_{widths[-1]}")
        self.move_threshold(sae, latents, batch)
        return {"mse_loss": whole, "auxiliary_reconstruction_loss": self.dead_loss(sae, batch, y), **inner}, latents, y
