"""Which input tokens and image patches mattered for a position: several methods side by side."""

from interp.attribution.attention_times_gradient import attention_times_gradient
from interp.attribution.blank_out import blank_out
from interp.attribution.flow import flow
from interp.attribution.input_gradient import gradient_x_input, input_gradient
from interp.attribution.integrated_gradients import integrated_gradients
from interp.attribution.raw_attention import raw_attention
from interp.attribution.relevance import relevance
from interp.attribution.rollout import rollout

__all__ = [
    "attention_times_gradient",
    "blank_out",
    "flow",
    "gradient_x_input",
    "input_gradient",
    "integrated_gradients",
    "raw_attention",
    "relevance",
    "rollout",
]
