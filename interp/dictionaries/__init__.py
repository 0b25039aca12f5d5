"""Sparse dictionaries: SAEs and transcoders on plain tensors of activations, files, training, evaluation, features."""

from interp.dictionaries.base import SAE, Architecture, Dictionary, Loss, Pass, Transcoder
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.evaluation import (
    DictionaryScores,
    evaluate,
    feature_absorption,
    separation_scores,
    single_token_words,
    sparse_probing,
)
from interp.dictionaries.features import (
    FeatureContexts,
    LocalChat,
    OpenAIChat,
    detection_score,
    explain,
    feature_edits,
    fuzzing_score,
    logit_effects,
    neighbours,
    top_contexts,
)
from interp.dictionaries.fidelity import Fidelity, FidelityScores
from interp.dictionaries.files import load, save
from interp.dictionaries.folding import fold_activation_scale, fold_batchtopk, fold_decoder_norms
from interp.dictionaries.foreign import from_saelens
from interp.dictionaries.lorsa import Lorsa, LorsaConfig
from interp.dictionaries.registry import architecture, register
from interp.dictionaries.sparse import Sparse
from interp.dictionaries.training import Job, Trained, TrainSettings, train

__all__ = [
    "SAE",
    "Architecture",
    "Dictionary",
    "DictionaryConfig",
    "DictionaryScores",
    "FeatureContexts",
    "Fidelity",
    "FidelityScores",
    "Job",
    "LocalChat",
    "Lorsa",
    "LorsaConfig",
    "Loss",
    "OpenAIChat",
    "Pass",
    "Sparse",
    "TrainSettings",
    "Trained",
    "Transcoder",
    "architecture",
    "detection_score",
    "evaluate",
    "explain",
    "feature_absorption",
    "feature_edits",
    "fold_activation_scale",
    "fold_batchtopk",
    "fold_decoder_norms",
    "from_saelens",
    "fuzzing_score",
    "load",
    "logit_effects",
    "neighbours",
    "register",
    "save",
    "separation_scores",
    "single_token_words",
    "sparse_probing",
    "top_contexts",
    "train",
]
