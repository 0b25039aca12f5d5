"""How far the methods of a run agree: rank correlation of their scores within each target, over prompts."""

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from interp.cli.attribution.folder import AttributionFolder
from interp.cli.attribution.texts import SIGNED
from interp.errors import InputError
from interp.evaluation.agreement import Agreement
from interp.evaluation.agreement import agreement as correlation
from interp.evaluation.joined import joined

if TYPE_CHECKING:
    import pandas as pd

    from interp.tokens import TokenScores

SHUFFLES = 100
IMAGES_ALONE = ("relative_attention",)
"""Methods that say nothing of text: they are compared over image tokens."""
COLUMNS = ("method", "other", "sizes", "low", "high", "chance_low", "chance_high", "signed", "prompts")


def agreement(folder: AttributionFolder) -> "pd.DataFrame":
    """A row for each pair of methods with the same sources, by `interp.evaluation.agreement`.

    Columns: `method`, `other`; `sizes`, the mean over prompts of Spearman's correlation of the scores' sizes, with the
    ends `low` and `high` of its 95% interval over prompts (missing for one prompt) and of where chance puts it;
    `signed`, the same of the scores themselves where both methods have a sign; `prompts`, how many were compared.
    """
    import pandas as pd

    by_pair: dict[tuple[str, str], list[tuple[Agreement, Agreement]]] = {}
    for _, found in folder.results():
        for pair in combinations(found, 2):
            one = compared(found, *pair, seed=folder.settings.seed)
            if one is not None:
                by_pair.setdefault(pair, []).append(one)
    rows = []
    for pair, results in by_pair.items():
        sizes, signed = (joined(some) for some in zip(*results, strict=True))
        row = sizes.summary().iloc[0]
        count = int((~sizes.per_sample.isnan()).sum())
        if count:
            ends = [row["low"], row["high"]] if count > 1 else [None, None]
            both = signed.value("spearman") if set(pair) <= set(SIGNED) else None
            rows.append([*pair, row["value"], *ends, row["null_low"], row["null_high"], both, count])
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(COLUMNS[2:8], float) | {"prompts": int})


def compared(
    found: "Mapping[str, TokenScores]", method: str, other: str, *, seed: int = 0
) -> tuple[Agreement, Agreement] | None:
    """The agreement of two methods on one prompt, of sizes and of the scores themselves; None where there is none."""
    one, two = found[method], found[other]
    sources = "image" if {method, other} & set(IMAGES_ALONE) else "all"
    try:
        sizes = correlation({method: one}, two, sources=sources, sizes=True, shuffles=SHUFFLES, seed=seed)
        return sizes, correlation({method: one}, two, sources=sources, shuffles=0, seed=seed)
    except InputError:  # other sources or targets
        return None
