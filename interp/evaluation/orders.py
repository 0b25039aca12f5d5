"""The order in which sources are taken away: by their scores, and at random."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.common import Stream
from interp.batch import Batch

Order = Literal["most", "least"]


def fingerprints(batch: Batch, stream: Stream) -> list[int]:
    """A number for each sample that depends on its own content, not on the batch around it."""
    found = []
    values = [v for v in batch.inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    for i, (row, real) in enumerate(zip(stream.tokens, stream.mask.tolist(), strict=True)):
        text = "\0".join(token for token, there in zip(row, real, strict=True) if there)
        number = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        for value in values:
            if len(value) == len(batch):
                number = zlib.crc32(value[i].float().cpu().numpy().tobytes(), number)
        found.append(number)
    return found


def places_in_order(
    scores: Float[Tensor, "curve batch source"],
    chosen: Bool[Tensor, "batch source"],
    *,
    order: Order,
    random: int,
    seeds: Sequence[tuple[int, int]],
) -> tuple[Int[Tensor, "order batch source"], list[float]]:
    """Each source's place in each order, 0 for the first.

    Args:
        scores: the scores; equal ones stand in a random order, which all share.
        chosen: the sources that have a place; the others get 0.
        order: `most`, from the largest score down; or `least`, the exact reverse.
        random: how many random orders are added.
        seeds: the seed of each sample; more random orders leave the first ones as they are.

    Returns:
        The places, random orders behind those of the scores; and for each score the share of sources whose score
        another source of the sample has too.
    """
    places = torch.zeros(len(scores) + random, *chosen.shape, dtype=torch.long)
    tied = np.zeros(len(scores))
    for i, mine in enumerate(chosen):
        count = int(mine.sum())
        source = np.random.default_rng(seeds[i])
        ties = source.permutation(count)
        orders = []
        for n, row in enumerate(scores[:, i, mine].double().numpy()):
            found = np.lexsort((ties, -row))
            orders.append(found if order == "most" else found[::-1])
            _, sizes = np.unique(row, return_counts=True)
            tied[n] += sizes[sizes > 1].sum()
        orders += [source.permutation(count) for _ in range(random)]
        places[:, i, mine] = torch.from_numpy(np.argsort(np.stack(orders), axis=1))
    return places, (tied / int(chosen.sum())).tolist()
