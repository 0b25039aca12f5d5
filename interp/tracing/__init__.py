"""Which component caused it: patching between runs."""

from interp.tracing.attention_knockout import attention_knockout
from interp.tracing.attribution_patching import attribution_patching
from interp.tracing.causal_map import CausalMap
from interp.tracing.causal_trace import causal_trace
from interp.tracing.cross_modal_trace import cross_modal_trace
from interp.tracing.sweep import patch_sweep

__all__ = [
    "CausalMap",
    "attention_knockout",
    "attribution_patching",
    "causal_trace",
    "cross_modal_trace",
    "patch_sweep",
]
