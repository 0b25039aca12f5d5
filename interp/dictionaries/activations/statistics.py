"""Means and norms of activations over a sample, in float64 and in one pass (Chan, Golub and LeVeque 1983)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.activations.batches import Contexts, Rows, Source
from interp.errors import InputError, SettingsError


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What a sample of the activations of one read says.

    Attributes:
        count: tokens in the sample.
        mean: their mean [d], float64.
        mean_norm: mean of their Euclidean norms.
        variance: mean squared distance to the mean, summed over coordinates: what FVU divides by.
    """

    count: int
    mean: Float[Tensor, " d"]
    mean_norm: float
    variance: float

    @property
    def scale(self) -> float:
        """The factor that brings the mean norm to sqrt(d): SAELens's `expected_average_only_in`."""
        return math.sqrt(len(self.mean)) / self.mean_norm

    def __repr__(self) -> str:
        """The numbers."""
        return f"Statistics({self.count} tokens, mean norm {self.mean_norm:.4g}, variance {self.variance:.4g})"


def statistics(source: Source[Any], *, rows: int = 100_000) -> dict[str, Statistics]:
    """Measure the next tokens of a source, and put it back where it was.

    Args:
        source: of contexts or rows.
        rows: how many tokens at least, if the source has so many.

    Returns:
        For each read what was found.

    Raises:
        SettingsError: `rows` is below 1.
        InputError: the source has no tokens left, or all of them are zero.
    """
    if rows < 1:
        raise SettingsError(f"rows counts the tokens to measure, from 1 on; found {rows}.")
    before = source.state()
    count = 0
    mean: dict[str, Tensor] = {}
    square: dict[str, float] = {}
    norm: dict[str, float] = {}
    try:
        while count < rows and (item := next(source, None)) is not None:
            batch: Rows = item.rows() if isinstance(item, Contexts) else item
            n = len(batch)
            if n == 0:
                continue
            for name, value in batch.values.items():
                x = value.double()
                own = x.mean(0)
                old = mean.get(name, torch.zeros_like(own))
                step = own - old
                mean[name] = old + step * (n / (count + n))
                between = float(step.square().sum()) * count * n / (count + n)
                square[name] = square.get(name, 0.0) + float((x - own).square().sum()) + between
                norm[name] = norm.get(name, 0.0) + float(x.norm(dim=-1).sum())
            count += n
    finally:
        source.restore(before)
    if not count:
        raise InputError("there are no activations to measure: the source has no tokens left.")
    zero = [name for name in norm if norm[name] == 0]
    if zero:
        raise InputError(f"all activations of {zero[0]} are zero: nothing can be scaled to them.")
    return {k: Statistics(count, mean[k].cpu(), norm[k] / count, square[k] / count) for k in mean}
