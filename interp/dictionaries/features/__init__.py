"""Reading the latents of dictionaries: where they are active, what they write, what is near, and changing them.

found = top_contexts(sae, lens, corpus, k=10)           # contexts, activations, density
logit_effects(sae, lens, [3, 17]).frame()               # tokens that a latent promotes and suppresses directly
neighbours(sae, [3, 17], k=5).frame()
lens.generate(batch, feature_edits(sae, 17, value=20.0))
explanations = explain(found, OpenAIChat("http://localhost:8000/v1", "a-model"))
detection_score(found, explanations, chat).frame()
"""

from interp.dictionaries.features.chat import Chat, LocalChat, OpenAIChat
from interp.dictionaries.features.contexts import Example, FeatureContexts, Places
from interp.dictionaries.features.edits import feature_edits
from interp.dictionaries.features.explain import explain
from interp.dictionaries.features.logits import LogitEffects, logit_effects
from interp.dictionaries.features.neighbours import Neighbours, neighbours
from interp.dictionaries.features.scoring import ExplanationScores, Interval, detection_score, fuzzing_score
from interp.dictionaries.features.search import top_contexts

__all__ = [
    "Chat",
    "Example",
    "ExplanationScores",
    "FeatureContexts",
    "Interval",
    "LocalChat",
    "LogitEffects",
    "Neighbours",
    "OpenAIChat",
    "Places",
    "detection_score",
    "explain",
    "feature_edits",
    "fuzzing_score",
    "logit_effects",
    "neighbours",
    "top_contexts",
]
