"""Bootstrap over prompts, and over the random draws that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

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
