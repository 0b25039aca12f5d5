"""What each attention head does: rankings of heads by published criteria."""

from interp.heads.ablation import ablation
from interp.heads.direct_effect import direct_effect
from interp.heads.importance import importance
from interp.heads.patterns import patterns

__all__ = ["ablation", "direct_effect", "importance", "patterns"]
