"""Lorsa: an attention layer as many sparse heads of rank one, with the positions and masks of the layer itself."""

from interp.dictionaries.lorsa.config import LorsaConfig
from interp.dictionaries.lorsa.files import fold_scales, load, load_reference, save, unit_norm
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.reading import Fired, behaviours, fired, head_shares, replace_attention, z_patterns
from interp.dictionaries.lorsa.rule import AttentionRule, attention_rule
from interp.dictionaries.lorsa.start import exact_copy, from_heads, patterns, prove, shaped
from interp.dictionaries.lorsa.training import AttentionPairs, train_lorsa

__all__ = [
    "AttentionPairs",
    "AttentionRule",
    "Fired",
    "Lorsa",
    "LorsaConfig",
    "attention_rule",
    "behaviours",
    "exact_copy",
    "fired",
    "fold_scales",
    "from_heads",
    "head_shares",
    "load",
    "load_reference",
    "patterns",
    "prove",
    "replace_attention",
    "save",
    "shaped",
    "train_lorsa",
    "unit_norm",
    "z_patterns",
]
