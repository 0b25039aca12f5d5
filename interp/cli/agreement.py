"""How far rankings agree: between methods, and of one method between halves of the prompts."""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from interp.evaluation.ranks import spearman

if TYPE_CHECKING:
    import pandas as pd

    from interp.scores import HeadScores


def top_set(values: np.ndarray, k: int) -> set[int]:
    """Indices of the k largest values; the first of equal ones."""
    return set(np.argsort(-values, kind="stable")[:k].tolist())


def agreement(results: Mapping[str, "HeadScores"], k: int) -> "pd.DataFrame":
    """Each pair of methods: rank correlation of sizes and of signed scores, and how many of the k strongest they share.

    Only heads that exist in both are compared. `by chance` is what two random rankings share on average.
    """
    import pandas as pd

    rows = []
    for (first, a), (second, b) in combinations(results.items(), 2):
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
    return pd.DataFrame(rows)


def halves(scores: "HeadScores", k: int = 10) -> tuple[int, int] | None:
    """How many of the k strongest heads two halves of the prompts share, and k; None with one prompt."""
    if scores.per_prompt is None or len(scores.per_prompt) < 2:
        return None
    exists = ~scores.scores.isnan()
    even, odd = (scores.per_prompt[start::2].mean(0)[exists].abs().numpy() for start in (0, 1))
    k = min(k, len(even))
    return len(top_set(even, k) & top_set(odd, k)), k
