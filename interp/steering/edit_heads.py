"""Head editing: turn the heads of a ranking around, or make them louder.

Source: Basile, Maiorca, Doimo, Locatello, Cazzaniga 2025, "Head Pursuit: Probing Attention Specialization in Multimodal
Transformers", arXiv 2510.21518, section 5: the outputs of the heads with the highest concept scores are multiplied with
-1 to suppress the concept, or with a number above 1 to strengthen it, at all positions of prompt and generation.

What it does not see: that a concept goes down says little unless random heads of the same layers leave it where it was
(`interp.heads.random_heads`), and the other concepts stay (`interp.heads.effect_of`).
"""

from __future__ import annotations

import math

from interp.edits import Edit, scale_heads
from interp.errors import EditError, SettingsError
from interp.headlist import Heads
from interp.scores import HeadScores

FLIP = -1.0


def edit_heads(heads: HeadScores | Heads, strength: float = FLIP, *, k: int = 16, by: str = "score") -> list[Edit]:
    """Multiply the outputs of the top heads of a ranking.

    Args:
        heads: a ranking, of which the first `k` are taken, or (layer, head) pairs or a frame, all of which are.
        strength: -1 flips (the paper's suppression), 0 removes, 1 changes nothing, above 1 enhances.
        k: how many heads of a ranking.
        by: what of a ranking: `score`, `abs` or an extra column such as `above_floor`.

    Raises:
        EditError: there are no heads, or the strength is not finite.
        SettingsError: `k` is no whole number from 1, or more than there are heads.
        UnknownNameError: the ranking has no column `by`.
    """
    if not math.isfinite(strength):
        raise EditError(f"edit_heads: the strength must be finite, got {strength}.")
    if isinstance(heads, HeadScores):
        top = heads.top(k, by)
        if len(top) < k:
            raise SettingsError(f"edit_heads: k is {k}, but the ranking has {len(top)} heads.")
        heads = top
    return [] if strength == 1 else scale_heads(heads, float(strength))
