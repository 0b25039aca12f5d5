"""What a latent writes towards the logits, directly.

Source: nostalgebraist 2020 (logit lens); Bricken et al. 2023, "Towards Monosemanticity", section on logit weights. With
the decoder's row d of a latent, the gain g of the final norm (which takes the mean away where it is a LayerNorm), and
the unembedding U, for each unit of the latent

    effect(t) = s <U_t, g (d - mean d)>, less its mean over all tokens t

where s is the factor by which the norm divides. It depends on the whole stream, so that without a batch the effect is
known up to a positive factor: the order of tokens is right, and s is 1. With a batch s is the mean of it at its tokens.

What it does not see: layers behind the site, which read what the latent writes and may carry it on or undo it; that the
latent changes s; a soft cap of the logits. For sites far from the end it says little: steer with `feature_edits` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attribution.common import token_text
from interp.batch import Batch
from interp.dictionaries.base import Dictionary
from interp.dictionaries.features.common import Latents, chosen, latent_rows, output_read
from interp.dictionaries.features.neighbours import row_of
from interp.dictionaries.placing import placed
from interp.errors import SettingsError, UnsupportedError
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.reads import Read

if TYPE_CHECKING:
    import pandas as pd

    from interp.dictionaries.lorsa.lorsa import Lorsa
    from interp.dictionaries.lorsa.placed import PlacedLorsa

CAVEAT = (
    "Direct effects of decoder rows on the logits, through the final norm alone: layers in between are left out, and "
    "what they make of the latent may be another thing."
)
_TOKENS = 2**14  # columns of the unembedding that are held in float32 at a time


@dataclass(frozen=True, slots=True, eq=False)
class LogitEffects:
    """The tokens that latents promote and suppress most.

    Attributes:
        latents: which [latents].
        promoted: token ids, the strongest first [latents, k].
        promotes: their effects [latents, k].
        suppressed: token ids, the strongest first [latents, k].
        suppresses: their effects [latents, k], the most negative first.
        names: text of each token id that occurs.
        unit: what effects are measured in.
        layers_behind: how many layers lie between the site and the logits, and are not seen.
        caveat: what a reader has to know.
    """

    latents: Int[Tensor, " latents"]
    promoted: Int[Tensor, "latents k"]
    promotes: Float[Tensor, "latents k"]
    suppressed: Int[Tensor, "latents k"]
    suppresses: Float[Tensor, "latents k"]
    names: dict[int, str]
    unit: str
    layers_behind: int
    caveat: str = CAVEAT

    def of(self, latent: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """Promoted and suppressed tokens of one latent, with their effects.

        Raises:
            UnknownNameError: it is not among them.
        """
        row = row_of(self.latents, latent)
        up = zip(self.promoted[row].tolist(), self.promotes[row].tolist(), strict=True)
        down = zip(self.suppressed[row].tolist(), self.suppresses[row].tolist(), strict=True)
        return [(self.names[i], v) for i, v in up], [(self.names[i], v) for i, v in down]

    def frame(self) -> pd.DataFrame:
        """Columns latent, side (`promoted` or `suppressed`), rank, id, token, effect."""
        import pandas as pd

        rows = []
        for n, latent in enumerate(self.latents.tolist()):
            for side, ids, values in (
                ("promoted", self.promoted, self.promotes),
                ("suppressed", self.suppressed, self.suppresses),
            ):
                for rank, (i, value) in enumerate(zip(ids[n].tolist(), values[n].tolist(), strict=True)):
                    rows.append({"latent": latent, "side": side, "rank": rank, "id": i, "token": self.names[i]})
                    rows[-1]["effect"] = value
        return pd.DataFrame(rows, columns=["latent", "side", "rank", "id", "token", "effect"])


def logit_effects(
    dictionary: Dictionary | Lorsa | PlacedLorsa,
    lens: Lens,
    latents: Latents | None = None,
    k: int = 10,
    *,
    read: str | Read | None = None,
    target: str | Read | None = None,
    batch: Batch | None = None,
) -> LogitEffects:
    """Tokens whose logits the decoder's rows raise and lower most, directly.

    Args:
        dictionary: an SAE or transcoder of a site of the main tower's residual stream, or of what is added to it; or a
            Lorsa of that tower.
        lens: the model.
        latents: which; None for all.
        k: how many tokens on each side.
        read: the site, where the metadata do not say it.
        target: the site that a transcoder writes, where the metadata do not say it.
        batch: prompts for the scale of the final norm; None to leave it at 1.

    Returns:
        Effects in logits for each unit of the latent (up to a positive factor without a batch), less their mean over
        the vocabulary, which changes no probability.

    Raises:
        SettingsError: nothing says where the dictionary writes, or k is below 1.
        UnknownNameError: there is no such latent.
        UnsupportedError: the site is not of the main residual stream, or the model's head is no norm and projection.
    """
    if k < 1:
        raise SettingsError(f"k is at least 1, found {k}.")
    at = placed(dictionary, lens, read=read, target=target)
    asked, site = chosen(at, latents), output_read(at, read, target)
    behind = _layers_behind(at, lens, site)
    head = lens.anatomy.unembed
    if head is None:
        raise UnsupportedError(f"{lens.name}: its head is not a final norm and one projection, so nothing is direct.")
    with torch.no_grad():
        device = lens.input_device
        rows, factor = latent_rows(at, asked).to(device), 1.0
        for norm, scale in zip(head.fitted, _scales(lens, batch), strict=True):
            if norm is None:
                raise UnsupportedError(f"{lens.name}: its final norm is neither LayerNorm nor RMSNorm.")
            rows = norm.linear(rows, torch.ones(1, 1, device=device))
            factor *= scale
        width = lens.anatomy.towers[lens.anatomy.main].d_model
        found = _extremes(rows.reshape(-1, width) * factor, head, lens.vocabulary, k)
    tokenizer = tokenizer_of(lens.processor)
    seen = sorted({*found[0].flatten().tolist(), *found[2].flatten().tolist()})
    names = {i: token_text(tokenizer, i) for i in seen}
    unit = "logits per unit of the latent" if batch is not None else "logits, up to a factor"
    return LogitEffects(asked, *found, names, unit, behind)


def _layers_behind(dictionary: Dictionary, lens: Lens, site: Read) -> int:
    main = lens.anatomy.main
    tower = lens.anatomy.towers[main]
    d_model = tower.d_model
    streams = site.row.axes == ("batch", "pos", "d_model")
    if not streams or site.tower not in (None, main) or dictionary.cfg.width_out != d_model:
        raise UnsupportedError(
            f"{site} [{dictionary.cfg.width_out}] is not of the residual stream of {main!r} [{d_model}], so latents "
            "have no direct way to the logits; logit effects are for resid_pre, resid_mid, resid_post, attn_out, "
            "mlp_out and embed."
        )
    depth = len(tower.layers)
    if site.layers is None:
        return depth
    return depth - 1 - tower.layer(site.layers[0]).index + (site.site in ("resid_pre",))


def _scales(lens: Lens, batch: Batch | None) -> Sequence[float]:
    """The mean factor of each norm in front of the logits, at the tokens of a batch."""
    head = lens.anatomy.unembed
    assert head is not None
    if batch is None:
        return [1.0] * len(head.fitted)
    last = len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
    stream = lens.run(batch, f"resid_post.{last}")["resid_post", last][batch.mask].float()
    found: list[float] = []
    for norm in head.fitted:
        if norm is None:
            raise UnsupportedError(f"{lens.name}: its final norm is neither LayerNorm nor RMSNorm.")
        scale = norm.scale(stream)
        found.append(float(scale.mean()))
        stream = norm.linear(stream, scale) + norm.bias.to(stream.device)
    return found


def _extremes(rows: Tensor, head, size: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and effects of the k largest and the k smallest, over parts of the vocabulary."""
    device, k = rows.device, min(k, size)
    total = torch.zeros(len(rows), 1, dtype=torch.float64, device=device)
    ids = [torch.empty(len(rows), 0, dtype=torch.long, device=device)] * 2
    values = [torch.empty(len(rows), 0, device=device)] * 2
    for part in torch.arange(size, device=device).split(_TOKENS):
        effect = rows.float() @ head.direction(part).float().t()
        total += effect.sum(1, keepdim=True, dtype=torch.float64)
        for side, sign in enumerate((1, -1)):
            best = (sign * effect).topk(min(k, len(part)), dim=1)
            both = torch.cat([values[side], best.values], 1)
            kept = both.topk(min(k, both.shape[1]), dim=1)
            ids[side] = torch.cat([ids[side], part[best.indices]], 1).gather(1, kept.indices)
            values[side] = kept.values
    mean = (total / size).float()
    return ids[0].cpu(), (values[0] - mean).cpu(), ids[1].cpu(), (-values[1] - mean).cpu()
