"""Latents that point the same way.

    cosine(i, j) = <w_i, w_j> / |w_i| |w_j|

with w the decoder's rows, or the encoder's columns. Latents that write alike need not be active together, nor the other
way round: a split feature has near rows and disjoint contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from interp.dictionaries.base import Dictionary
from interp.dictionaries.features.common import Latents, chosen
from interp.dictionaries.sparse import held
from interp.errors import SettingsError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from interp.dictionaries.lorsa.lorsa import Lorsa
    from interp.dictionaries.lorsa.placed import PlacedLorsa

Side = Literal["decoder", "encoder"]


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The nearest other latents of some latents.

    Attributes:
        latents: whose neighbours these are [latents].
        index: the neighbours, nearest first [latents, k].
        cosine: of each [latents, k].
        by: `decoder` or `encoder`.
    """

    latents: Int[Tensor, " latents"]
    index: Int[Tensor, "latents k"]
    cosine: Float[Tensor, "latents k"]
    by: Side

    def of(self, latent: int) -> list[tuple[int, float]]:
        """Neighbours of one latent and their cosines.

        Raises:
            UnknownNameError: it is not among them.
        """
        row = row_of(self.latents, latent)
        return list(zip(self.index[row].tolist(), self.cosine[row].tolist(), strict=True))

    def frame(self) -> pd.DataFrame:
        """Columns latent, rank, neighbour, cosine."""
        import pandas as pd

        rows = [
            {"latent": latent, "rank": rank, "neighbour": other, "cosine": cosine}
            for latent in self.latents.tolist()
            for rank, (other, cosine) in enumerate(self.of(latent))
        ]
        return pd.DataFrame(rows, columns=["latent", "rank", "neighbour", "cosine"])


def neighbours(
    dictionary: Dictionary | Lorsa | PlacedLorsa, latents: Latents | None = None, k: int = 10, *, by: Side = "decoder"
) -> Neighbours:
    """The latents whose weights point most nearly the same way.

    Args:
        dictionary: an SAE, a transcoder, or a Lorsa (a `PlacedLorsa` with what lies behind the projection).
        latents: whose; None for all.
        k: how many for each; at most d_sae - 1 are given.
        by: rows of the `decoder`, or columns of the `encoder`.

    Returns:
        Neighbours, without the latent itself, nearest first. Latents of no length have cosine 0 with all.

    Raises:
        SettingsError: k is below 1, the dictionary has a single latent, or a latent is named twice.
        UnknownNameError: there is no such latent or side.
    """
    if by not in ("decoder", "encoder"):
        raise unknown("by", by, ("decoder", "encoder"))
    size = dictionary.cfg.d_sae
    if k < 1 or size < 2:
        raise SettingsError(f"k is at least 1 and a neighbour needs a second latent; found k={k}, d_sae={size}.")
    made: Any = dictionary
    asked = chosen(made, latents)
    with torch.no_grad():
        weights = made.W_enc.t() if by == "encoder" else made.W_dec if made.sequences else made.kind.decoder(made)
        unit = normalize(weights.to(torch.promote_types(weights.dtype, torch.float32)), dim=1)
        found, cosines = [], []
        for part in asked.to(unit.device).split(max(1, held(unit.device) // size)):
            near = unit[part] @ unit.t()
            near[torch.arange(len(part), device=unit.device), part] = -torch.inf
            best = near.topk(min(k, size - 1), dim=1)
            found.append(best.indices.cpu())
            cosines.append(best.values.clamp(-1, 1).cpu())
    return Neighbours(asked, torch.cat(found), torch.cat(cosines), by)


def row_of(latents: Int[Tensor, " latents"], latent: int) -> int:
    """At which place a latent stands among some.

    Raises:
        UnknownNameError: it is not among them.
    """
    place = (latents == latent).nonzero()[:, 0].tolist()
    if not place:
        some = latents[:8].tolist()
        raise unknown("latent", latent, [*some, "..."] if len(latents) > len(some) else some, where="this result")
    return place[0]
