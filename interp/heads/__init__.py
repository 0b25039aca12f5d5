"""What each attention head does: rankings of heads by published criteria."""

from interp.heads.ablation import ablation
from interp.heads.agreement import agreement
from interp.heads.answer_scores import AnswerScores
from interp.heads.concepts import Keywords, keyword_tokens
from interp.heads.controls import norm_matched, random_heads
from interp.heads.direct_effect import direct_effect
from interp.heads.displacements import Displacements
from interp.heads.effect import effect_of, extremes
from interp.heads.fold import fold
from interp.heads.head_effects import HeadEffects
from interp.heads.importance import importance
from interp.heads.moments import HeadMoments, head_moments
from interp.heads.patterns import patterns
from interp.heads.prune import prune
from interp.heads.pruning_curve import PruningCurve
from interp.heads.pursuit import logit_lens_ranking, pursuit, topics
from interp.heads.pursuit_interval import pursuit_interval
from interp.heads.token_divergence import token_divergence
from interp.heads.topic import HeadTopic
from interp.heads.vision_divergence import vision_divergence
from interp.heads.vision_patterns import displacements, vision_patterns
from interp.heads.visual_concentration import visual_concentration

__all__ = [
    "AnswerScores",
    "Displacements",
    "HeadEffects",
    "HeadMoments",
    "HeadTopic",
    "Keywords",
    "PruningCurve",
    "ablation",
    "agreement",
    "direct_effect",
    "displacements",
    "effect_of",
    "extremes",
    "fold",
    "head_moments",
    "importance",
    "keyword_tokens",
    "logit_lens_ranking",
    "norm_matched",
    "patterns",
    "prune",
    "pursuit",
    "pursuit_interval",
    "random_heads",
    "token_divergence",
    "topics",
    "vision_divergence",
    "vision_patterns",
    "visual_concentration",
]
