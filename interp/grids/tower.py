"""Which pixels each token of a vision tower's own stream stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError, UnsupportedError
from interp.grids.cells import axis, grid
from interp.grids.pixels import pair


@dataclass(frozen=True, slots=True)
class TowerGrid:
    """One row for each token of a vision tower's stream [batch, pos, d_model], batch by batch.

    Attributes:
        sequence: index in the first axis of the stream [n].
        position: index in the second axis [n].
        image: the picture that the token belongs to, counted as the tower takes them [n]: a tile where the processor
            cuts tiles, an image of the packed sequence in Qwen-VL and Pixtral.
        row: row of the patch in its picture [n]; -1 for tokens that are no patch.
        col: column of the patch in its picture [n]; -1 for tokens that are no patch.
        box: pixels of the processed picture: left, top, right, bottom [n, 4]; the whole picture for tokens that are
            no patch.
        kind: `patch`, `class`, `distillation` or `register`, one for each token.
    """

    sequence: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    image: Int[Tensor, " n"]
    row: Int[Tensor, " n"]
    col: Int[Tensor, " n"]
    box: Float[Tensor, "n 4"]
    kind: tuple[str, ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.kind)


# What stands in front of the patches.
_FRONT: dict[str, tuple[str, ...]] = {
    "vit": ("class",),
    "deit": ("class", "distillation"),
    "beit": ("class",),
    "dinov2": ("class",),
    "dinov2_with_registers": ("class", "register"),
    "dinov3_vit": ("class", "register"),
    "clip_vision_model": ("class",),
    "internvl_vision": ("class",),
    "siglip_vision_model": (),
    "idefics3_vision": (),
    "smolvlm_vision": (),
}
_QWEN = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision")
_REFUSED = {
    "swin": "its stages merge patches, and its windows are shifted",
    "swinv2": "its stages merge patches, and its windows are shifted",
    "mllama_vision_model": "its stream holds tiles padded to a multiple of 8 tokens",
}


def tower_patches(config: Any, inputs: Mapping[str, Any]) -> TowerGrid:
    """Where each token of the vision tower looks, in pixels of the pictures that the tower is given.

    Args:
        config: the model's configuration: a vision model's, or one with a `vision_config`.
        inputs: the model's inputs (`batch.inputs`).

    Returns:
        One row for each token, on the cpu. Qwen2.5-VL's tower works on its patches window by window: there `position`
        is the place in that order, the one in which the tower's streams and patterns are read.

    Raises:
        UnsupportedError: the tower's layout is not known.
        InputError: the inputs hold no pictures.
    """
    vision = getattr(config, "vision_config", config)
    name = getattr(vision, "model_type", type(vision).__name__)
    if name in _REFUSED:
        raise UnsupportedError(f"tokens of {name} have no fixed patch: {_REFUSED[name]}.")
    if name not in _FRONT and name not in _QWEN and name != "pixtral":
        raise UnsupportedError(f"the layout of the vision tower {name} is not known here.")
    if not isinstance(inputs.get("pixel_values"), Tensor):
        raise InputError(f"the inputs hold no pixel_values: {sorted(inputs)}.")
    if name in _QWEN:
        return _packed(_merged(vision, inputs))
    high, wide = pair(vision.patch_size)
    if name == "pixtral":
        sizes = inputs.get("image_sizes")
        shapes = [inputs["pixel_values"].shape[-2:]] * len(inputs["pixel_values"]) if sizes is None else sizes.tolist()
        return _packed([_patches(h // high, w // wide, high, wide) for h, w in shapes])
    height, width = inputs["pixel_values"].shape[-2:]
    front: list[str] = []
    for kind in _FRONT[name]:
        front += [kind] * (vision.num_register_tokens if kind == "register" else 1)
    row, col, box = _patches(height // high, width // wide, high, wide)
    none = torch.full((len(front),), -1)
    lead = torch.tensor([[0.0, 0.0, width, height]], dtype=box.dtype).expand(len(front), 4)
    row, col, box = torch.cat([none, row]), torch.cat([none, col]), torch.cat([lead, box])
    n, size = _pictures(config, inputs), len(row)
    image = torch.arange(n).repeat_interleave(size)
    kinds = (*front, *["patch"] * (size - len(front))) * n
    return TowerGrid(image, torch.arange(size).repeat(n), image, row.repeat(n), col.repeat(n), box.repeat(n, 1), kinds)


def _patches(rows: int, cols: int, high: int, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    cells = grid("patch", axis(1, rows, high, rows * high), axis(1, cols, wide, cols * wide))
    return cells.row, cells.col, cells.box.float()


def _packed(parts: list[tuple[Tensor, Tensor, Tensor]]) -> TowerGrid:
    """Pictures one after the other in a single sequence."""
    row, col, box = (torch.cat([p[k] for p in parts]) for k in range(3))
    image = torch.cat([torch.full((len(p[0]),), n) for n, p in enumerate(parts)])
    return TowerGrid(torch.zeros_like(image), torch.arange(len(image)), image, row, col, box, ("patch",) * len(image))


def _merged(vision: Any, inputs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Qwen-VL: patches in blocks that are merged later; in Qwen2.5-VL the blocks are ordered by windows."""
    grids = inputs.get("image_grid_thw")
    if not isinstance(grids, Tensor):
        raise InputError("the inputs hold no image_grid_thw.")
    side, merge = pair(vision.patch_size)[0], vision.spatial_merge_size
    parts = []
    for thw in grids.cpu():
        frames, rows, cols = thw.tolist()
        order = torch.arange(rows * cols).view(rows // merge, merge, cols // merge, merge).transpose(1, 2)
        order = order.reshape(-1, merge * merge).repeat(frames, 1)
        if vision.model_type == "qwen2_5_vl_vision":
            from transformers.vision_utils import get_vision_window_index

            order = order[get_vision_window_index(thw[None], merge, vision.window_size, side)[0]]
        row, col, box = _patches(rows, cols, side, side)
        order = order.flatten()
        parts.append((row[order], col[order], box[order]))
    return parts


def _pictures(config: Any, inputs: Mapping[str, Any]) -> int:
    """How many pictures the tower is given: padding pictures left out, as the models do."""
    pixels = inputs["pixel_values"]
    if pixels.ndim == 4:
        return len(pixels)
    if config.model_type in ("idefics3", "smolvlm"):
        return int((pixels.flatten(0, 1) != 0).flatten(1).any(1).sum())
    if config.model_type in ("llava_next", "llava_onevision") and isinstance(inputs.get("image_sizes"), Tensor):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        counts = inputs.get("batch_num_images")
        sizes = inputs["image_sizes"].tolist()
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        side = pair(config.vision_config.image_size)[0]
        made = [image_size_to_num_patches(s, config.image_grid_pinpoints, side) for s in sizes]
        return sum(n if a else 1 for n, a in zip(made, alone, strict=True))
    raise UnsupportedError(f"pixel_values {tuple(pixels.shape)} of {config.model_type} are not known here.")
