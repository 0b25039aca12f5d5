"""How far rankings of heads agree: those of several methods, and one method's on two halves of the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.scores import HeadScores

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Any


def agreement(rankings: Mapping[str, HeadScores], k: int = 10) -> pd.DataFrame:
    """Each pair of rankings: the correlation of their ranks, and how many of the k strongest heads they share.

    Strong is what is large, whatever its sign. Only heads that exist in both are compared, and pairs of other towers or
    grids are left out.

    Args:
        rankings: scores by name.
        k: how many heads count as the strongest.

    Returns:
        A frame with a row for each pair: `method`, `other method`, `Spearman of sizes`, `Spearman of signed scores`
        (NaN unless both have scores of either sign), `shared of top k`, and `by chance`, what two random rankings share
        on average.
    """
    import pandas

    rows = []
    for (first, a), (second, b) in combinations(rankings.items(), 2):
        if a.scores.shape != b.scores.shape or a.tower != b.tower:
            continue
        both = (~a.scores.isnan() & ~b.scores.isnan()).numpy()
        x, y = a.scores.numpy()[both], b.scores.numpy()[both]
        n = min(k, len(x))
        signed = spearman(x, y) if (x < 0).any() and (y < 0).any() else float("nan")
        rows.append(
            {
                "method": first,
                "other method": second,
                "Spearman of sizes": spearman(abs(x), abs(y)),
                "Spearman of signed scores": signed,
                f"shared of top {n}": len(top_set(abs(x), n) & top_set(abs(y), n)),
                "by chance": n * n / len(x),
            }
        )
    return pandas.DataFrame(rows)


def halves(scores: HeadScores, k: int = 10) -> tuple[int, int] | None:
    """How many of the k strongest heads two halves of the prompts share, and k; None with one prompt."""
    if scores.per_prompt is None or len(scores.per_prompt) < 2:
        return None
    exists = ~scores.scores.isnan()
    even, odd = (scores.per_prompt[start::2].mean(0)[exists].abs().numpy() for start in (0, 1))
    k = min(k, len(even))
    return len(top_set(even, k) & top_set(odd, k)), k


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN where one of the two is constant."""
    import pandas

    return float(pandas.DataFrame({"one": one, "two": two}).corr(method="spearman").iloc[0, 1])


def top_set(values: np.ndarray, k: int) -> set[int]:
    """Indices of the k largest values; the first of equal ones."""
    return set(np.argsort(-values, kind="stable")[:k].tolist())
