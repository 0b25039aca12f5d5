"""Tiny inputs for any model, made from its configuration: what the anatomy is found and proved on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from interp.errors import InputError
from interp.patches import picture_ids

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "image_token_index", "video_token_id")


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def vocabulary(config: Any) -> int:
    """How many ids the model reads (not more than it embeds)."""
    text = text_config(config)
    for owner in (text, config):
        for name in ("input_vocab_size", "vocab_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 0:
                return size
    raise InputError(
        f"{type(config).__name__} does not say how large its vocabulary is; give wrap(..., sample=inputs)."
    )


def longest(config: Any) -> int | None:
    """How many positions the model can take, if its configuration says so."""
    for owner in (text_config(config), config):
        for name in ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len"):
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return None


def tokens(config: Any, size: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [size, length] without special tokens."""
    text = text_config(config)
    forbidden = {getattr(c, n, None) for c in (config, text) for n in _SPECIAL_IDS}
    limit = longest(config)
    length = min(length, limit) if limit else length
    allowed = [i for i in range(min(vocabulary(config), 4096)) if i not in forbidden]
    pick = torch.randint(len(allowed), (size, length), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(allowed)[pick]


def probe_inputs(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of one small forward pass, by what the model's forward takes.

    Raises:
        InputError: no inputs can be made for this kind of model; a sample has to be given.
    """
    config: Any = model.config
    takes = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    random = torch.Generator().manual_seed(0)
    out: dict[str, Any] = {}
    # CLIP and its kin: two towers side by side, no image tokens in the text.
    dual = hasattr(config, "text_config") and hasattr(config, "vision_config") and not picture_ids(config)
    dual = dual and not hasattr(model, "generate")
    if "input_ids" in takes and main != "pixel_values":
        out["input_ids"] = tokens(config, 2, 6)
        if "attention_mask" in takes:
            out["attention_mask"] = torch.ones_like(out["input_ids"])
    if ("pixel_values" in takes and main == "pixel_values") or dual:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        channels = getattr(vision, "num_channels", 3)
        if size is None:
            raise InputError(f"{type(config).__name__} names no image size; give wrap(..., sample=inputs).")
        height, width = (size, size) if isinstance(size, int) else size
        out["pixel_values"] = torch.randn(1 if "input_ids" not in out else 2, channels, height, width, generator=random)
        if "input_ids" in takes and "input_ids" not in out:
            out["input_ids"] = tokens(config, 2, 6)
    if "input_features" in takes and main == "input_features":
        frames = 2 * config.max_source_positions
        out["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=random)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        out["decoder_input_ids"] = tokens(config, 1 if "input_features" in out else 2, 5, seed=1)
    if not out:
        raise InputError(
            f"{type(model).__name__} takes {sorted(takes)[:8]}...: no probe can be made for it; "
            "give wrap(..., sample=inputs)."
        )
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in out.items()}
