"""Vision-language models; their inputs come out of the family's own processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import transformers
from torch import Tensor

from ._entry import GQA, VISION, Entry, builder
from ._images import images
from ._processors import GRID, IMAGE_TEXT, PATCH, PINPOINTS, PIXELS, pixtral_pixels, processor
from ._tokenizer import IDS, VOCAB, tokenizer

_TEXT = GQA | {"max_position_embeddings": 1024}
_LLAMA = _TEXT | {"model_type": "llama"}
_QWEN2 = _TEXT | {"model_type": "qwen2"}
_CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
_SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
_SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
_PIXTRAL = VISION | {"model_type": "pixtral", "image_size": 2 * PIXELS}
_QWEN_VISION = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)} | more}


_MISTRAL = _TEXT | {"model_type": "mistral", "sliding_window": None}

# name -> (config class, model class, config arguments)
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "LlavaConfig", "LlavaForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": _LLAMA, "image_token_index": IDS["<image>"],
         "image_seq_length": GRID},
    ),
    "llava_next": (
        "LlavaNextConfig", "LlavaNextForConditionalGeneration",
        {"vision_config": _CLIP, "text_config": _LLAMA, "image_token_index": IDS["<image>"],
         "image_seq_length": GRID, "image_grid_pinpoints": PINPOINTS},
    ),
    "llava_onevision": (
        "LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": _QWEN2, "image_token_index": IDS["<image>"],
         "video_token_index": IDS["<video>"], "image_grid_pinpoints": PINPOINTS},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration",
        _QWEN_IDS | {
            "vision_config": _QWEN_VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            "text_config": _TEXT | _mrope(2, 1, 1),
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
        _QWEN_IDS | {
            "vision_config": _QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
                                             "window_size": 16, "fullatt_block_indexes": [1]},
            "text_config": _TEXT | _mrope(2, 1, 1),
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig", "Qwen3VLForConditionalGeneration",
        _QWEN_IDS | {
            "vision_config": _QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
                                             "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            "text_config": _TEXT | {"head_dim": 16} | _mrope(4, 2, 2, mrope_interleaved=True),
        },
    ),
    "internvl": (
        "InternVLConfig", "InternVLForConditionalGeneration",
        {"vision_config": VISION | {"image_size": [PIXELS, PIXELS], "patch_size": [PATCH, PATCH],
                                    "use_qk_norm": True, "attention_bias": True},
         "text_config": _QWEN2, "image_token_id": IDS["<IMG_CONTEXT>"], "image_seq_length": GRID // 4},
    ),
    "idefics3": (
        "Idefics3Config", "Idefics3ForConditionalGeneration",
        {"vision_config": VISION, "text_config": _LLAMA, "image_token_id": IDS["<image>"], "scale_factor": 2},
    ),
    "smolvlm": (
        "SmolVLMConfig", "SmolVLMForConditionalGeneration",
        {"vision_config": VISION, "text_config": _LLAMA, "image_token_id": IDS["<image>"], "scale_factor": 2},
    ),
    "paligemma": (
        "PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": _TEXT | {"model_type": "gemma", "head_dim": 16},
         "image_token_index": IDS["<image>"], "vocab_size": VOCAB, "projection_dim": 32, "hidden_size": 32},
    ),
    "gemma3_vl": (
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": _TEXT | _SLIDING | _GEMMA, "mm_tokens_per_image": GRID // 4,
         "image_token_index": IDS["<image_soft_token>"], "boi_token_index": IDS["<start_of_image>"],
         "eoi_token_index": IDS["<end_of_image>"]},
    ),
    "mllama": (
        "MllamaConfig", "MllamaForConditionalGeneration",
        {"vision_config": {"hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 4,
                           "intermediate_size": 48, "vision_output_dim": 96, "image_size": PIXELS,
                           "patch_size": PATCH, "intermediate_layers_indices": [0, 1]},
         "text_config": _TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
         "image_token_index": IDS["<|image|>"]},
    ),
    "mistral3": (
        "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"vision_config": _PIXTRAL, "text_config": _MISTRAL, "image_token_index": IDS["[IMG]"],
         "spatial_merge_size": 2},
    ),
    "aya_vision": (
        "AyaVisionConfig", "AyaVisionForConditionalGeneration",
        {"vision_config": _SIGLIP, "text_config": _TEXT | _SLIDING | {"model_type": "cohere2", "logit_scale": 0.5},
         "image_token_index": IDS["<|IMG_PATCH|>"], "downsample_factor": 2},
    ),
}  # fmt: skip
_SIZES = [(60, 30), (40, 40), (32, 64)]
_FIRST = {"paligemma"}  # families whose processor wants the image at the start of the prompt
_DROP = {"labels", "num_crops"}


def _words(count: int, rng: np.random.Generator) -> str:
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz ,."), count))


def _pixtral(images: list[Any], text: list[str], **kwargs: Any) -> dict[str, Any]:
    """What ``PixtralProcessor`` does, which cannot be imported without torchvision."""
    pixels = pixtral_pixels()([row[0] for row in images], return_tensors="pt")
    filled = []
    for prompt, (height, width) in zip(text, pixels["image_sizes"].tolist(), strict=True):
        row = "[IMG]" * (width // (2 * PATCH)) + "[IMG_BREAK]"
        grid = row * (height // (2 * PATCH))
        filled.append(prompt.replace("[IMG]", grid.removesuffix("[IMG_BREAK]") + "[IMG_END]"))
    return dict(tokenizer()(filled, **kwargs)) | dict(pixels)


def lvlm_inputs(name: str, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Images of unequal sizes, and as much text per row as makes all rows equally long."""
    rng = np.random.default_rng(seed)
    process = _pixtral if name == "mistral3" else processor(name)
    pictures = images(batch, _SIZES, seed)
    starts = [("" if name in _FIRST else _words(3, rng)) + IMAGE_TEXT.get(name, "<image>") for _ in range(batch)]

    def run(texts: list[str], pictures: list[Any], **kwargs: Any) -> Any:
        return process(images=[[p] for p in pictures], text=texts, **kwargs)

    bare = [len(run([s], [p])["input_ids"][0]) for s, p in zip(starts, pictures, strict=True)]
    tail = max(2, length - 3)
    texts = [s + _words(max(bare) - n + tail, rng) for s, n in zip(starts, bare, strict=True)]
    made = run(texts, pictures, return_tensors="pt", padding=True)
    return {key: value for key, value in made.items() if key not in _DROP and isinstance(value, Tensor)}


def _entry(name: str) -> Entry:
    config, model, kwargs = _TABLE[name]
    make: Callable[[], Any] = lambda: getattr(transformers, config)(**kwargs)  # noqa: E731
    return Entry(name, "lvlm", builder(model, make), partial(lvlm_inputs, name), partial(processor, name))


ENTRIES: list[Entry] = [_entry(name) for name in _TABLE]
