"""Sparse dictionaries: SAEs and transcoders on plain tensors of activations, their files and their fidelity."""

from interp.dictionaries.base import SAE, Architecture, Dictionary, Loss, Pass, Transcoder
from interp.dictionaries.config import DictionaryConfig
from interp.dictionaries.fidelity import Fidelity, FidelityScores
from interp.dictionaries.files import load, save
from interp.dictionaries.folding import fold_activation_scale, fold_batchtopk, fold_decoder_norms
from interp.dictionaries.registry import architecture, register
from interp.dictionaries.sparse import Sparse
from interp.dictionaries.training import Job, Trained, TrainSettings, train

__all__ = [
    "SAE",
    "Architecture",
    "Dictionary",
    "DictionaryConfig",
    "Fidelity",
    "FidelityScores",
    "Job",
    "Loss",
    "Pass",
    "Sparse",
    "TrainSettings",
    "Trained",
    "Transcoder",
    "architecture",
    "fold_activation_scale",
    "fold_batchtopk",
    "fold_decoder_norms",
    "load",
    "register",
    "save",
    "train",
]
