"""Where the pixels of a processed picture come from: what the image processor resized, cropped and padded.

Sizes come from the very functions that the image processors of transformers call, given a picture's size only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.grids.cells import Size


@dataclass(frozen=True, slots=True)
class Placement:
    """How a processed picture lies over the original: original = processed * scale + shift, for x and for y."""

    scale: tuple[float, float]
    shift: tuple[float, float] = (0.0, 0.0)

    def xs(self, spans: Tensor) -> Tensor:
        """Spans of processed columns in columns of the original image."""
        return spans * self.scale[0] + self.shift[0]

    def ys(self, spans: Tensor) -> Tensor:
        """Spans of processed rows in rows of the original image."""
        return spans * self.scale[1] + self.shift[1]


def pair(value: Any) -> tuple[int, int]:
    """A side length or a (height, width) as (height, width)."""
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def tensor(batch: Batch, name: str) -> Tensor:
    """An input of the batch.

    Raises:
        UnsupportedError: the processor did not make it.
    """
    value = batch.inputs.get(name)
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"the processor gave no {name!r} (it gave {sorted(batch.inputs)}).")
    return value


def image_processor(processor: Any, *names: str) -> Any:
    """The image processor, if its preprocessing is one of those named.

    Raises:
        UnsupportedError: it is of another class.
    """
    inner = getattr(processor, "image_processor", processor)
    if not any(c.__name__.startswith(names) for c in type(inner).__mro__):
        raise UnsupportedError(f"{type(inner).__name__} preprocesses images in a way that is not known here.")
    return inner


def setting(processor: Any, name: str) -> Any:
    """An image setting: the processor's own, else its image processor's."""
    own = getattr(processor, "images_kwargs", None)
    if isinstance(own, dict) and name in own:
        return own[name]
    return getattr(getattr(processor, "image_processor", processor), name, None)


def shape_only(height: int, width: int) -> np.ndarray:
    """A picture [1, height, width] of which only the shape is real: it takes no memory."""
    return np.broadcast_to(np.uint8(0), (1, height, width))


def resized(inner: Any, height: int, width: int) -> tuple[int, int]:
    """(height, width) after an image processor's own `resize`, for the sizes that transformers knows."""
    from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
    from transformers.image_utils import ChannelDimension, get_image_size_for_max_height_width

    size = dict(inner.size) if isinstance(inner.size, dict) else vars(inner.size)
    short, long = size.get("shortest_edge"), size.get("longest_edge")
    if short and long:
        made = get_size_with_aspect_ratio((height, width), short, long)
    elif short:
        made = get_resize_output_image_size(
            shape_only(height, width), short, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
    elif size.get("max_height") and size.get("max_width"):
        made = get_image_size_for_max_height_width((height, width), size["max_height"], size["max_width"])
    elif size.get("height") and size.get("width"):
        made = (size["height"], size["width"])
    else:
        raise UnsupportedError(f"{type(inner).__name__} resizes to {size}, which is not known here.")
    return int(made[0]), int(made[1])


def _cropped(inner: Any, have: int, want: int) -> int:
    """First pixel that a centre crop keeps; below zero where it pads."""
    if have < want and any(c.__name__ == "TorchvisionBackend" for c in type(inner).__mro__):
        return -((want - have) // 2)
    return (have - want) // 2


def plain(processor: Any, size: Size, processed: tuple[int, int]) -> Placement:
    """The placement of a picture that was resized and centre-cropped (and padded to a square first, in LLaVA's own).

    Args:
        processor: the processor.
        size: (width, height) of the original.
        processed: (height, width) of the processed picture, to hold the answer against.

    Raises:
        UnsupportedError: the image processor does something else, or gives another size.
    """
    inner = getattr(processor, "image_processor", processor)
    llava = any(c.__name__.startswith("LlavaImageProcessor") for c in type(inner).__mro__)
    own = getattr(getattr(type(inner), "_preprocess", None), "__module__", "")
    if not llava and own != "transformers.image_processing_backends":
        raise UnsupportedError(f"{type(inner).__name__} preprocesses images in a way that is not known here.")
    if not llava and getattr(inner, "do_pad", False):
        raise UnsupportedError(f"{type(inner).__name__} pads its pictures (do_pad=True), which is not known here.")
    width, height = size
    shift = (0.0, 0.0)
    if llava and getattr(inner, "do_pad", False):
        side = max(size)
        shift = (-float((side - width) // 2), -float((side - height) // 2))
        width = height = side
    tall, wide = resized(inner, height, width) if inner.do_resize else (height, width)
    scale = (width / wide, height / tall)
    if getattr(inner, "do_center_crop", False):
        crop = dict(inner.crop_size) if isinstance(inner.crop_size, dict) else vars(inner.crop_size)
        left, top = _cropped(inner, wide, crop["width"]), _cropped(inner, tall, crop["height"])
        shift = (shift[0] + left * scale[0], shift[1] + top * scale[1])
        tall, wide = crop["height"], crop["width"]
    if (tall, wide) != processed:
        raise UnsupportedError(
            f"{type(inner).__name__} gave a picture of {processed} (height, width) where {(tall, wide)} was expected."
        )
    return Placement(scale, shift)


def stretched(size: Size, processed: tuple[float, float]) -> Placement:
    """The placement of a picture that was resized as a whole to `processed` (height, width)."""
    return Placement((size[0] / processed[1], size[1] / processed[0]))


def runs(batch: Batch, sample: int) -> list[tuple[int, int]]:
    """First column and end of each unbroken run of image tokens in a sample."""
    assert batch.image_mask is not None
    mask = batch.image_mask[sample].cpu().int()
    edge = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).diff()
    return list(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))


def text_before(batch: Batch, sample: int, found: list[tuple[int, int]], n: int) -> str:
    """The token strings between the run before run `n` (or the beginning) and run `n`."""
    if batch.tokens is None:
        raise UnsupportedError("the batch holds no token strings.")
    return "".join(batch.tokens[sample][found[n - 1][1] if n else 0 : found[n][0]])
