"""What every bootstrap shares: its options, and the percentile interval."""

import numpy as np

from interp.errors import SettingsError


def ends(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval of resampled values [draw, ...]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def check_options(confidence: float, resamples: int, seed: int) -> None:
    """Whether the options of a bootstrap make sense.

    Raises:
        SettingsError: `confidence`, `resamples` or `seed` lies outside its range.
    """
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (resamples, seed))
    if not whole or not 0 < confidence < 1 or resamples < 1 or seed < 0:
        raise SettingsError(
            "confidence lies between 0 and 1, resamples is a whole number from 1 and seed one from 0: found "
            f"{confidence}, {resamples!r}, {seed!r}."
        )
