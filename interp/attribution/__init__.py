"""Which input tokens and image patches mattered for a position: several methods side by side."""

from interp.attribution.attention_times_gradient import attention_times_gradient
from interp.attribution.blank_out import blank_out
from interp.attribution.continued import continued
from interp.attribution.crop import crop_box
from interp.attribution.flow import flow
from interp.attribution.globenc import globenc
from interp.attribution.input_gradient import gradient_x_input, input_gradient
from interp.attribution.integrated_gradients import integrated_gradients
from interp.attribution.raw_attention import raw_attention
from interp.attribution.relative_attention import relative_attention
from interp.attribution.relevance import relevance
from interp.attribution.rollout import rollout
from interp.attribution.token_activation_map import token_activation_map

__all__ = [
    "attention_times_gradient",
    "blank_out",
    "continued",
    "crop_box",
    "flow",
    "globenc",
    "gradient_x_input",
    "input_gradient",
    "integrated_gradients",
    "raw_attention",
    "relative_attention",
    "relevance",
    "rollout",
    "token_activation_map",
]
