"""Runs over the same images beside each other: each number, and its difference to a base, with paired intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from interp.errors import InputError
from interp.evaluation.intervals import draws, ends, rate
from interp.evaluation.measured import Measured

if TYPE_CHECKING:
    import pandas as pd


def paired(
    runs: Mapping[str, Measured],
    base: str,
    metrics: Sequence[str],
    *,
    nats: Mapping[str, np.ndarray] | None = None,
    confidence: float = 0.95,
) -> "pd.DataFrame":
    """Each metric of each run, and how far it is from that of the base.

    In every draw of images all runs have the same ones, so that what is hard about an image is not part of the interval
    of a difference.

    Args:
        runs: results by name, over the same images in the same order, with the same seed and number of resamples.
        base: the name that the others are compared with.
        metrics: which metrics; those of `all` where there are parts.
        nats: for each run what its texts cost and their numbers of tokens [image, 2], for a metric `perplexity`.
        confidence: of the intervals.

    Returns:
        A row for each run and metric: `run metric value low high change change_low change_high`.

    Raises:
        InputError: the runs are of different images, or drawn differently.
    """
    import pandas as pd

    first = runs[base]
    weights = [np.ones((1, sum(map(len, first._groups()))))]
    for name, one in runs.items():
        same = [first.settings[key] == one.settings[key] for key in ("seed", "resamples")]
        if not all(same) or [list(g) for g in one._groups()] != [list(g) for g in first._groups()]:
            raise InputError(f"{name} is not over the same images and draws as {base}.")
    weights += list(draws(first._groups(), first.settings["resamples"], first.settings["seed"]))
    values = {name: _values(one, weights, metrics, None if nats is None else nats[name]) for name, one in runs.items()}
    rows = []
    for name, found in values.items():
        for metric, value in found.items():
            change = value - values[base][metric]
            low, high = ends(value[1:], confidence)
            less, more = ends(change[1:], confidence)
            row = {"run": name, "metric": metric, "value": value[0], "low": low, "high": high}
            rows.append(row | {"change": change[0], "change_low": less, "change_high": more})
    return pd.DataFrame(rows)


def _values(
    one: Measured, weights: Sequence[np.ndarray], metrics: Sequence[str], nats: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Each metric of the images as they are, and of every draw, [1 + draw]."""
    pieces: dict[str, list[np.ndarray]] = {}
    for some in weights:
        found = one._compute(some)
        parts = {part for part, _ in found}
        part = "all" if "all" in parts else next(iter(parts))
        for metric in metrics:
            if (part, metric) in found:
                pieces.setdefault(metric, []).append(found[part, metric][0])
        if nats is not None:
            cost, tokens = (some @ nats).T
            pieces.setdefault("perplexity", []).append(np.exp(rate(cost, tokens)))
    return {metric: np.concatenate(parts) for metric, parts in pieces.items()}
