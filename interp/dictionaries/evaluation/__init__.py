"""How good a dictionary is: fidelity and loss recovered, probing, absorption of features, separation of entities."""

from interp.dictionaries.evaluation.absorption import feature_absorption
from interp.dictionaries.evaluation.letters import single_token_words
from interp.dictionaries.evaluation.probing import sparse_probing
from interp.dictionaries.evaluation.recovered import evaluate
from interp.dictionaries.evaluation.scores import DictionaryScores, density_classes
from interp.dictionaries.evaluation.separation import separation_scores

__all__ = [
    "DictionaryScores",
    "density_classes",
    "evaluate",
    "feature_absorption",
    "separation_scores",
    "single_token_words",
    "sparse_probing",
]
