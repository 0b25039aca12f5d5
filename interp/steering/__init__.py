"""Published interventions on the generation of vision-language models.

Most are edits for `lens.run` and `lens.generate`; contrastive decoding comes as `LogitsProcessor`s of transformers.
"""

from interp.steering.attention_redistribution import attention_redistribution
from interp.steering.contrast import M3ID, BlindTokenContrast, Contrast, VisualContrast, blind_tokens
from interp.steering.edit_heads import edit_heads
from interp.steering.negative import NegativeBranch
from interp.steering.representation_injection import representation_injection
from interp.steering.sinks import sink_dimensions
from interp.steering.vision_reinforcement import VisionHeads, vision_heads, vision_reinforcement

__all__ = [
    "M3ID",
    "BlindTokenContrast",
    "Contrast",
    "NegativeBranch",
    "VisionHeads",
    "VisualContrast",
    "attention_redistribution",
    "blind_tokens",
    "edit_heads",
    "representation_injection",
    "sink_dimensions",
    "vision_heads",
    "vision_reinforcement",
]
