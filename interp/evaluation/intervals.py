"""Bootstrap over images: how often each image is drawn, percentile intervals, and rates with a defined zero."""

from collections.abc import Iterator, Sequence

import numpy as np

from interp.bootstrap import check_options, ends

__all__ = ["auroc", "check_options", "draws", "ends", "rate"]

CHUNK = 256


def draws(groups: Sequence[np.ndarray], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn in each resample, [draw, image], in pieces.

    Args:
        groups: indices of images; each group is resampled within itself, with replacement, to its own size.
        resamples: how many draws.
        seed: seed of the draws.
    """
    random = np.random.default_rng(seed)
    total = sum(len(group) for group in groups)
    for start in range(0, resamples, CHUNK):
        weights = np.zeros((min(CHUNK, resamples - start), total))
        for group in groups:
            even = np.full(len(group), 1 / len(group))
            weights[:, group] = random.multinomial(len(group), even, size=len(weights))
        yield weights


def rate(part: np.ndarray, whole: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    """`part / whole`, and `otherwise` where `whole` is zero."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, otherwise), where=whole > 0)


def auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance that a positive item scores higher than a negative one (a tie counts half), for each row of weights.

    Args:
        score: [item].
        positive: bool [item].
        weights: how often each item counts, [draw, item].

    Returns:
        The values [draw], 0.5 where there is no pair, and the number of pairs [draw].
    """
    _, level = np.unique(score, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.diff(level[order], prepend=-1))
    yes = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    no = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    below = no.cumsum(1) - no
    pairs = yes.sum(1) * no.sum(1)
    return rate((yes * (below + no / 2)).sum(1), pairs, 0.5), pairs
