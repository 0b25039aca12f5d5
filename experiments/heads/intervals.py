"""Means with a 95% bootstrap interval, as cells of a table."""

from __future__ import annotations

import numpy as np

from interp.bootstrap import ends
from interp.heads.resampled import double_means, means

RESAMPLES = 1000


def mean_interval(values: np.ndarray, *, seed: int = 0, digits: int = 3) -> dict[str, float]:
    """The mean of numbers of prompts, or of random draws x prompts, with its interval.

    Args:
        values: [prompt], or [draw, prompt], whose draws are resampled as the prompts are.
        seed: of the bootstrap.
        digits: of the result.
    """
    resample = means if values.ndim == 1 else double_means
    low, high = ends(resample(values, RESAMPLES, seed), 0.95)
    found = {"value": values.mean(), "low": low, "high": high}
    return {key: round(float(number), digits) for key, number in found.items()}
