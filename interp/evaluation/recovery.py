"""How far one layer's output at the last token brings an answer back: the rates by which injection chooses its layers.

The same questions are asked about two pictures: one with what is asked after (clean), and one without it. With P the
mean of p(yes) over the questions (`interp.evaluation.answer_questions`), and one layer's attention (or MLP) at the last
token of the second run replaced by that of the first,

    RR = (P_patched - P_without) / (P_clean - P_without)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, patch
from interp.errors import InputError
from interp.evaluation.answering import answer_tokens
from interp.lens import Lens
from interp.reads import Read

SITES = {"attention": "attn_out", "MLP": "mlp_out"}


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """p(yes) of every question, float64.

    Attributes:
        clean: of the picture with the object [question].
        without: of the picture without it [question].
        patched: of the picture without it, one layer's output at the last token put in from the other run
            [site, layer, question]; the sites are those of `SITES`. NaN for a layer that has no such site.
    """

    clean: Float[Tensor, " question"]
    without: Float[Tensor, " question"]
    patched: Float[Tensor, "site layer question"]

    @property
    def rates(self) -> Float[Tensor, "site layer"]:
        """RR, a ratio of means; 0 for a layer that has no such site.

        Raises:
            InputError: the answers do not differ between the pictures, so that nothing can come back.
        """
        over = (self.clean - self.without).mean()
        if abs(float(over)) < 1e-6:
            raise InputError("p(yes) is the same with and without the object: no rate of recovery can be given.")
        return ((self.patched - self.without).mean(-1) / over).nan_to_num(0.0)


def recovery_rates(lens: Lens, pairs: Iterable[tuple[Batch, Batch]]) -> Recovery:
    """Patch every layer's attention and MLP at the last token.

    Args:
        lens: a vision-language model with its processor.
        pairs: batches of the same questions, about the pictures with the object and about those without it, padded on
            the left.

    Raises:
        InputError: there are no questions.
        UnsupportedError: yes and no cannot be told apart by their first token.
    """
    yes, no = answer_tokens(lens)
    depth = len(lens.anatomy.towers[lens.anatomy.main].layers)
    reads = {
        site: Read(site, layers=tuple(able), positions="last")
        for site in SITES.values()
        if (able := lens.layers_with(site))
    }
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def chance(batch: Batch, change: Iterable[Edit] = ()) -> Tensor:
        last = lens.run(batch, "logits@last", change).logits[:, -1].double()
        return torch.sigmoid(last[:, yes].logsumexp(-1) - last[:, no].logsumexp(-1)).cpu()

    for clean, without in pairs:
        trace = lens.run(clean, list(reads.values()))
        patched = torch.full((len(SITES), depth, len(clean)), torch.nan, dtype=torch.float64)
        for i, site in enumerate(SITES.values()):
            for layer in reads[site].layers or () if site in reads else ():
                change = patch(site, trace[reads[site], layer], layer=layer, positions="last")
                patched[i, layer] = chance(without, change)
        found.append((chance(clean), chance(without), patched))
    if not found:
        raise InputError("no questions were given.")
    return Recovery(*(torch.cat(parts, -1) for parts in zip(*found, strict=True)))
