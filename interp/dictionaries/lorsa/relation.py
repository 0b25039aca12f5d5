"""Which of the layer's own heads the heads of a Lorsa do the work of.

    share(i, h) = sum over t of z_i[t] <w_o,i, out_h[t]>, over its sum over all heads h

with out_h[t] = z_h[t] W_O^h, what head h of the layer writes, and sums over the tokens where Lorsa head i fires. Shares
of a Lorsa head sum to one; a negative one says that the layer's head writes against it there. How many of the layer's
heads a Lorsa head draws on is the smallest number whose |shares| make up a given part of all.

What it does not see: heads that write along w_o without being what the Lorsa head stands for count, too. A QK head of a
Lorsa that was started from a head of the layer says where it looks, not what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.data.corpora import Corpus
from interp.dictionaries.activations import ActivationStream
from interp.dictionaries.activations.packing import Separator, Special, Tokens
from interp.dictionaries.features.common import reading
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.placed import PlacedLorsa
from interp.dictionaries.lorsa.rule import AttentionRule
from interp.dictionaries.placing import placed
from interp.errors import SettingsError
from interp.lens import Lens

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class HeadRelations:
    """What the heads of a Lorsa and the layer's heads have to do with each other.

    Attributes:
        shares: of each of the layer's heads in each Lorsa head [n_ov, head]; NaN where it never fired.
        active: at how many tokens each fired [n_ov].
        tokens: how many tokens were seen.
        settings: model, layer, corpus and options.
    """

    shares: Float[Tensor, "n_ov head"]
    active: Int[Tensor, " n_ov"]
    tokens: int
    settings: Mapping[str, Any]

    def of(self, head: int, count: int = 3) -> list[tuple[int, float]]:
        """The layer's heads with the largest |shares| in a Lorsa head, and these; none where it never fired."""
        mine = self.shares[head]
        if bool(mine.isnan().any()):
            return []
        order = mine.abs().argsort(descending=True, stable=True)[:count].tolist()
        return [(h, float(mine[h])) for h in order]

    def drawn_on(self, mass: float = 0.5) -> Int[Tensor, " n_ov"]:
        """On how many of the layer's heads each Lorsa head draws; 0 where it never fired.

        Args:
            mass: which part of the summed |shares| these have to make up.
        """
        if not 0 < mass <= 1:
            raise SettingsError(f"mass lies above 0 and at most at 1, not at {mass}.")
        size = self.shares.abs().sort(dim=1, descending=True).values.double()
        part = size.cumsum(1) / size.sum(1, keepdim=True)
        needed = (part < mass - 1e-9).sum(1) + 1
        return needed.masked_fill(self.shares.isnan().any(1), 0)

    def several(self, mass: float = 0.5) -> float:
        """The share of Lorsa heads, of those that fired, that draw on more than one of the layer's heads."""
        needed = self.drawn_on(mass)
        return float((needed > 1).sum() / (needed > 0).sum()) if bool(needed.any()) else float("nan")

    def frame(self, mass: float = 0.5) -> pd.DataFrame:
        """A row for each Lorsa head: head, active, main (the layer's head with the largest share), share, drawn_on."""
        import pandas as pd

        best = [self.of(n, 1) for n in range(len(self.shares))]
        return pd.DataFrame(
            {
                "head": range(len(best)),
                "active": self.active.numpy(),
                "main": [row[0][0] if row else -1 for row in best],
                "share": [row[0][1] if row else float("nan") for row in best],
                "drawn_on": self.drawn_on(mass).numpy(),
            }
        )


@torch.no_grad()
def head_shares(
    lorsa: Lorsa,
    rule: AttentionRule,
    x: Float[Tensor, "batch pos d_in"],
    z: Float[Tensor, "batch pos head_value"],
    *,
    real: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "n_ov head"]:
    """Which of the layer's heads each Lorsa head does the work of, on some activations.

    Args:
        lorsa: the Lorsa.
        rule: of the layer.
        x: what the attention reads.
        z: the layer's site `z` on the same text, heads side by side.
        real: which positions are no padding; None for all.

    Returns:
        Shares that sum to one for each head; NaN where it never fired or the layer writes nothing along its direction.
    """
    used = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    return _shares(lorsa, rule, _moments(lorsa.encode(x, real=real)[used], z[used]))


@torch.no_grad()
def head_relations(
    lorsa: Lorsa | PlacedLorsa,
    lens: Lens,
    corpus: Corpus,
    *,
    contexts: int | None = 64,
    batch: int = 8,
    context: int = 256,
    packed: bool = True,
    special: Special = "tokenizer",
    separator: Separator = "eos",
    tokens: Tokens = "all",
    drop_first: bool = True,
) -> HeadRelations:
    """The same on the tokens of a corpus.

    Args:
        lorsa: a Lorsa, or one at its layer.
        lens: the model.
        corpus: texts, or pictures with prompts.
        contexts: how many contexts at most; None for the whole corpus.
        batch: contexts in a pass of the model.
        context: tokens of a context, at most those that the Lorsa was made for (see `ActivationStream` for this and
            the options that follow).
        packed: fill contexts with one document after the other.
        special: tokens around each context.
        separator: token behind each document of packed contexts.
        tokens: use `all`, `text` or `image` tokens.
        drop_first: leave out the first position of each context.

    Raises:
        SettingsError: contexts is below 1.
        InputError, UnsupportedError: see `PlacedLorsa` and `ActivationStream`.
    """
    if contexts is not None and contexts < 1:
        raise SettingsError(f"contexts is at least 1, found {contexts}.")
    at: PlacedLorsa = placed(lorsa, lens, corpus)
    options: dict[str, Any] = {"context": context, "packed": packed, "special": special, "separator": separator}
    options |= {"tokens": tokens, "drop_first": drop_first}
    stream = ActivationStream(lens, corpus, list(at.rule.reads), batch=batch, **options)
    resid, z = stream.reads
    cfg, left, seen = at.cfg, contexts, 0
    moments, active = None, torch.zeros(cfg.n_ov, dtype=torch.long)
    with reading(at):  # type: ignore[arg-type]
        for found in stream:
            mask = found.mask.clone()
            if left is not None:
                mask[left:] = False
                left = max(left - len(found), 0)
            latents = at.encode_contexts(found[resid], mask, found.real)
            added = _moments(latents, found[z][mask])
            moments = added if moments is None else moments + added
            active, seen = active + (latents != 0).sum(0).cpu(), seen + len(latents)
            if left == 0:
                break
    assert moments is not None
    settings = {"model": lens.name, "layer": at.layer, "tower": at.tower, "corpus": corpus.identity, **options}
    return HeadRelations(_shares(at.lorsa, at.rule, moments).float().cpu(), active, seen, settings)


def _moments(
    latents: Float[Tensor, "token n_ov"], z: Float[Tensor, "token head_value"]
) -> Float[Tensor, "n_ov head_value"]:
    return latents.T @ z.to(latents)


def _shares(lorsa: Lorsa, rule: AttentionRule, moments: Float[Tensor, "n_ov head_value"]) -> Float[Tensor, "n_ov head"]:
    heads, d_value, _ = rule.W_O.shape
    parts = moments.unflatten(1, (heads, d_value)).unbind(1)
    w_o = lorsa.W_O.detach()
    along = torch.stack([((part @ rule.W_O[h].to(part)) * w_o.to(part)).sum(1) for h, part in enumerate(parts)], 1)
    return along / along.sum(1, keepdim=True)
