"""Which family lays its image tokens out in which way, and the patch map of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.grids import anyres, single, tiles
from interp.patches import Patches, picture_ids

_LAYOUTS: dict[str, Callable[[Any, Any, Batch, single.Sizes], single.Layout]] = {
    "llava": single.fixed,
    "vipllava": single.fixed,
    "paligemma": single.fixed,
    "mistral3": single.sized,
    "qwen2_vl": single.merged,
    "qwen2_5_vl": single.merged,
    "qwen3_vl": single.merged,
    "qwen3_vl_moe": single.merged,
    "gemma3": single.pooled,
    "blip-2": single.queries,
    "instructblip": single.queries,
    "internvl": tiles.internvl,
    "aya_vision": tiles.aya_vision,
    "idefics3": tiles.idefics3,
    "smolvlm": tiles.idefics3,
    "llava_next": anyres.llava_next,
    "llava_onevision": anyres.llava_onevision,
}


def _crosses(config: Any) -> bool:
    """Whether images reach the text through cross-attention layers only."""
    text = getattr(config, "text_config", None)
    return bool(getattr(text, "cross_attention_layers", None))


def image_token_ids(config: Any) -> list[int]:
    """Ids of the tokens that hold image features in the text stream.

    Empty for text models, and for models whose images reach the text through cross-attention (Mllama): there the
    image token is a word like any other.
    """
    if _crosses(config):
        return []
    return picture_ids(config)


def patches_of(config: Any, processor: Any, batch: Batch, sizes: single.Sizes) -> Patches | None:
    """Where each image token of a batch looks.

    Nothing is guessed: what the processor hands out (grids, sizes, token strings) and the functions it computes with
    decide, and the number of tokens found must be the number in the batch. A layout that does not come out right gives
    None with a warning that says what was found; see `explain` for families that are not known.

    Args:
        config: the model's configuration.
        processor: the processor that made the batch.
        batch: the batch, with `image_mask` and token strings.
        sizes: for each sample, the (width, height) of its images as they were given.

    Returns:
        One row for each image token, on the cpu in float32; None where there are none or the layout is not known.
    """
    layout = _LAYOUTS.get(getattr(config, "model_type", ""))
    if layout is None or batch.image_mask is None or not bool(batch.image_mask.any()):
        return None
    try:
        return _rows(layout(config, processor, batch, sizes), batch, sizes)
    except UnsupportedError as error:
        warnings.warn(f"no patch map for this batch of {config.model_type}: {error}", stacklevel=2)
        return None


def _rows(cells: single.Layout, batch: Batch, sizes: single.Sizes) -> Patches:
    assert batch.image_mask is not None
    rows: dict[str, list[torch.Tensor]] = {n: [] for n in ("sample", "column", "image", "box", "row", "col")}
    kind: list[str] = []
    for i, parts in enumerate(cells):
        columns = batch.image_mask[i].nonzero()[:, 0].cpu()
        count = sum(map(len, parts))
        if count != len(columns):
            raise UnsupportedError(f"sample {i} has {len(columns)} image tokens, but its images make {count}.")
        rows["sample"].append(torch.full((count,), i))
        rows["column"].append(columns)
        for n, part in enumerate(parts):
            rows["image"].append(torch.full((len(part),), n))
            rows["box"].append(part.box.float())
            rows["row"].append(part.row)
            rows["col"].append(part.col)
            kind += part.kind
    return Patches(**{name: torch.cat(value) for name, value in rows.items()}, kind=tuple(kind), sizes=sizes)


def explain(config: Any) -> str:
    """Why a batch of this model has no patch map: one sentence to refuse with."""
    name = getattr(config, "model_type", None) or type(config).__name__
    if _crosses(config):
        return (
            f"{name} has no image tokens in its text stream: images reach the text through cross-attention layers "
            f"{list(config.text_config.cross_attention_layers)}; read the patterns of these layers instead."
        )
    if name in _LAYOUTS:
        return (
            f"the image layout of {name} is known, but this batch has no patch map: it was made without images, from "
            "ready tensors (give texts and images to lens.prepare), or its processor disagrees with the model's "
            "configuration (a warning said how)."
        )
    if not image_token_ids(config):
        return f"{name} has no image tokens in its text stream."
    return f"the image layout of {name} is not known here; known: {', '.join(sorted(_LAYOUTS))}."
