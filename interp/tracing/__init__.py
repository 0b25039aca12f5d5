"""Which component caused it: patching between runs."""

from interp.tracing.attention_knockout import attention_knockout
from interp.tracing.attribution_patching import attribution_patching
from interp.tracing.causal_map import CausalMap
from interp.tracing.causal_trace import causal_trace
from interp.tracing.cross_modal_trace import cross_modal_trace
from interp.tracing.edge_attribution import edge_attribution
from interp.tracing.edge_scores import EdgeScores
from interp.tracing.joining import join_prompts, join_sites
from interp.tracing.path_patching import path_patching
from interp.tracing.sweep import patch_sweep

__all__ = [
    "CausalMap",
    "EdgeScores",
    "attention_knockout",
    "attribution_patching",
    "causal_trace",
    "cross_modal_trace",
    "edge_attribution",
    "join_prompts",
    "join_sites",
    "patch_sweep",
    "path_patching",
]
