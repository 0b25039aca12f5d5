"""One row for each text: latents and activations of its tokens, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp.data import TextCorpus
from interp.dictionaries.activations import ActivationStream
from interp.dictionaries.base import Dictionary
from interp.dictionaries.evaluation.applied import in_use, pieces
from interp.errors import InputError, unknown
from interp.lens import Lens

Pool = Literal["max", "mean", "last"]


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """Texts as rows, float32 on the CPU.

    Attributes:
        latents: [text, d_sae].
        dense: the activations themselves [text, d_in]; their mean where latents are pooled by `max`.
    """

    latents: Float[Tensor, "text d_sae"]
    dense: Float[Tensor, "text d_in"]


def pooled(
    dictionary: Dictionary, lens: Lens, texts: Sequence[str], *, read: str, pool: Pool, **options: Any
) -> Pooled:
    """Latents and activations of texts.

    Args:
        dictionary: whose latents.
        lens: the model.
        texts: each has contexts of its own; of one that is longer than a context the parts are pooled together.
        read: what the dictionary reads.
        pool: over the tokens of a text: `max`, `mean`, or the `last` one.
        options: of `ActivationStream`.

    Raises:
        InputError: a text has no token to use, or the site another width than the dictionary.
        UnknownNameError: there is no such pool.
    """
    if pool not in get_args(Pool):
        raise unknown("pool", pool, get_args(Pool))
    stream = ActivationStream(lens, TextCorpus(texts), read, packed=False, **options)
    (name,) = stream.reads
    cfg = dictionary.cfg
    if stream.d_in[name] != cfg.d_in:
        raise InputError(f"{name} is {stream.d_in[name]} wide, but the dictionary has d_in={cfg.d_in}.")
    latents = torch.full((len(texts), cfg.d_sae), -torch.inf if pool == "max" else 0.0)
    dense = torch.zeros(len(texts), cfg.d_in)
    count = torch.zeros(len(texts))
    with in_use(dictionary):
        for contexts in stream:
            owner = contexts.document[contexts.mask]
            x = contexts[name][contexts.mask]
            for where, found, rows in pieces(dictionary, x.to(dictionary.W_dec.device)):
                at, f, own = owner[where].cpu(), found.float().cpu(), rows.float().cpu()
                count.index_add_(0, at, torch.ones(len(at)))
                if pool == "last":
                    # Rows come in order: of equal places the last one stays.
                    ends = torch.cat([at[1:] != at[:-1], torch.ones(1, dtype=torch.bool)])
                    latents[at[ends]], dense[at[ends]] = f[ends], own[ends]
                    continue
                if pool == "max":
                    latents.scatter_reduce_(0, at[:, None].expand_as(f), f, "amax")
                else:
                    latents.index_add_(0, at, f)
                dense.index_add_(0, at, own)
    if not bool((count > 0).all()):
        i = int((count == 0).nonzero()[0])
        raise InputError(
            f"text {i} has no token to use: {texts[i][:80]!r} (special tokens and first positions are none)."
        )
    if pool != "last":
        dense /= count[:, None]
        latents = latents / count[:, None] if pool == "mean" else latents
    return Pooled(latents, dense)
