"""Published interventions on the generation of vision-language models, as edits for `lens.run` and `lens.generate`."""

from interp.steering.attention_redistribution import attention_redistribution
from interp.steering.edit_heads import edit_heads
from interp.steering.representation_injection import representation_injection
from interp.steering.sinks import sink_dimensions
from interp.steering.vision_reinforcement import VisionHeads, vision_heads, vision_reinforcement

__all__ = [
    "VisionHeads",
    "attention_redistribution",
    "edit_heads",
    "representation_injection",
    "sink_dimensions",
    "vision_heads",
    "vision_reinforcement",
]
