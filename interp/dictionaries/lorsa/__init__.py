"""Lorsa: an attention layer as many sparse heads of rank one, with the positions and masks of the layer itself."""

from interp.dictionaries.lorsa.behaviours import Behaviours, behaviours, head_behaviours
from interp.dictionaries.lorsa.config import LorsaConfig
from interp.dictionaries.lorsa.contexts import HeadContexts, HeadExample, head_contexts
from interp.dictionaries.lorsa.files import fold_scales, load, load_reference, save, unit_norm
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.pairs import AttentionPairs
from interp.dictionaries.lorsa.placed import PlacedLorsa
from interp.dictionaries.lorsa.reading import Fired, fired, replace_attention, z_patterns
from interp.dictionaries.lorsa.relation import HeadRelations, head_relations, head_shares
from interp.dictionaries.lorsa.rule import AttentionRule, attention_rule
from interp.dictionaries.lorsa.start import exact_copy, from_heads, patterns, prove, shaped

__all__ = [
    "AttentionPairs",
    "AttentionRule",
    "Behaviours",
    "Fired",
    "HeadContexts",
    "HeadExample",
    "HeadRelations",
    "Lorsa",
    "LorsaConfig",
    "PlacedLorsa",
    "attention_rule",
    "behaviours",
    "exact_copy",
    "fired",
    "fold_scales",
    "from_heads",
    "head_behaviours",
    "head_contexts",
    "head_relations",
    "head_shares",
    "load",
    "load_reference",
    "patterns",
    "prove",
    "replace_attention",
    "save",
    "shaped",
    "unit_norm",
    "z_patterns",
]
