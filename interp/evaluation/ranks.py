"""Ranks in which equal values share their mean rank, and the rank correlation of Spearman."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def average_ranks(values: Float[Tensor, "... n"], mask: Bool[Tensor, "... n"] | None = None) -> Float[Tensor, "... n"]:
    """The rank of each value in its row, 1 for the smallest; equal values have the mean of their ranks.

    Args:
        values: numbers; what stands outside the mask does not matter.
        mask: which values count; None for all.

    Returns:
        Ranks in float64, zero outside the mask.
    """
    real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
    filled = values.double().masked_fill(~real, torch.inf).contiguous()
    ordered = filled.sort(-1).values
    below = torch.searchsorted(ordered, filled)
    up_to = torch.searchsorted(ordered, filled, right=True)
    return ((below + up_to + 1).double() / 2).masked_fill(~real, 0)


def standard_ranks(values: Float[Tensor, "... n"], mask: Bool[Tensor, "... n"] | None = None) -> Float[Tensor, "... n"]:
    """Average ranks less their mean, as vectors of length one: their product is the rank correlation.

    Zero outside the mask; NaN in rows of equal values, which have no order.
    """
    real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
    ranks = average_ranks(values, real)
    # The mean of the ranks 1 to n, ties or not; exact, so that a constant row is exactly zero.
    centre = (real.sum(-1, keepdim=True).double() + 1) / 2
    apart = (ranks - centre).masked_fill(~real, 0)
    return (apart / apart.norm(dim=-1, keepdim=True)).masked_fill(~real, 0)


def rank_correlation(
    one: Float[Tensor, "... n"], other: Float[Tensor, "... n"], mask: Bool[Tensor, "... n"] | None = None
) -> Float[Tensor, "..."]:
    """Spearman's correlation of each row, in float64; NaN where one of the two is constant, or the row empty.

    Args:
        one: numbers.
        other: numbers.
        mask: which of them count; None for all.
    """
    real = torch.ones_like(one, dtype=torch.bool) if mask is None else mask
    found = (standard_ranks(one, real) * standard_ranks(other, real)).sum(-1).clamp(-1, 1)
    return found.masked_fill(~real.any(-1), torch.nan)


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Spearman's correlation of two arrays of numbers; NaN where one of them is constant."""
    return float(rank_correlation(*(torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (one, two))))
