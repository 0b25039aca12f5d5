"""Bootstrap over prompts, and over the random draws that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from interp.errors import SettingsError

CHUNK = 256


def shares(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """What each of `count` items weighs in each resample, [draw, item] with rows that sum to one, in pieces."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(CHUNK, resamples - start))
        yield drawn / count


def means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over the last axis, its items resampled: [draw, ...]."""
    return np.concatenate([np.moveaxis(values @ w.T, -1, 0) for w in shares(values.shape[-1], resamples, seed)])


def double_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over the last two axes (random draws, prompts), each resampled on its own: [draw, ...].

    The prompts are drawn as `means` draws them with the same seed, so that differences are between the same prompts.
    """
    orders, prompts = values.shape[-2:]
    pairs = zip(shares(orders, resamples, seed + 1), shares(prompts, resamples, seed), strict=True)
    return np.concatenate([np.einsum("do,...od->d...", o, values @ w.T) for o, w in pairs])


def ends(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval of resampled values [draw, ...]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def check_options(confidence: float, resamples: int, seed: int) -> None:
    """Whether the options of a bootstrap make sense.

    Raises:
        SettingsError: one lies outside its range.
    """
    if not 0 < confidence < 1 or resamples < 1 or seed < 0:
        raise SettingsError(
            f"confidence lies between 0 and 1, resamples from 1 and seed from 0: found {confidence}, {resamples}, "
            f"{seed}."
        )
