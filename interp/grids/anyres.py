"""LLaVA-NeXT and LLaVA-OneVision: the whole image, then a padded canvas of tiles without its padding, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.grids.cells import Cells, Size, axis, grid, join, whole
from interp.grids.pixels import Placement, image_processor, pair, shape_only, stretched, tensor
from interp.grids.single import Layout, Sizes


def llava_next(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """LLaVA-NeXT: a thumbnail, then the tiles' rows, each ended by the learned newline (kind `break`).

    Rows and columns of the canvas that hold padding only are left out, as `unpad_image` of the model does; `row` and
    `col` count what is left.
    """
    image_processor(processor, "LlavaNextImageProcessor")
    return [[_anyres(config, processor, batch, size) for size in row] for row in sizes]


def llava_onevision(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """LLaVA-OneVision: as LLaVA-NeXT for the only image of a prompt; several are padded to squares, without tiles.

    A canvas with more patches than `vision_aspect_ratio` ("anyres_max_9") allows is shrunk by interpolation: boxes then
    divide the same area evenly, but a token reads the two by two patches nearest to the middle of its box.
    """
    image_processor(processor, "LlavaOnevisionImageProcessor")
    return [
        [_anyres(config, processor, batch, size) if len(row) == 1 else _square(config, batch, size) for size in row]
        for row in sizes
    ]


def _tile(config: Any, batch: Batch) -> tuple[int, int]:
    """Pixels of a tile and of a patch."""
    tall, wide = tensor(batch, "pixel_values").shape[-2:]
    side, patch = pair(config.vision_config.image_size)[0], pair(config.vision_config.patch_size)[0]
    if (tall, wide) != (side, side):
        raise UnsupportedError(f"tiles of {(tall, wide)} pixels do not fit a tower for {side} x {side}.")
    return side, patch


def _square(config: Any, batch: Batch, size: Size) -> Cells:
    side, patch = _tile(config, batch)
    longest = max(size)
    scale = longest / side
    place = Placement((scale, scale), (-float((longest - size[0]) // 2), -float((longest - size[1]) // 2)))
    spans = axis(1, side // patch, patch, side)
    return join([grid("patch", place.ys(spans), place.xs(spans)), whole("break", size)], size)


def _anyres(config: Any, processor: Any, batch: Batch, size: Size) -> Cells:
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side, patch = _tile(config, batch)
    width, height = size
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    chosen = select_best_resolution((height, width), processor.image_processor.image_grid_pinpoints)
    if best is None or tuple(best) != tuple(chosen) or best[0] % side or best[1] % side:
        raise UnsupportedError(f"the processor fits {size} to {chosen}, the model to {best}, with tiles of {side}.")
    tall, wide = get_patch_output_size(shape_only(height, width), best, ChannelDimension.FIRST)
    scale = (width / wide, height / tall)
    place = Placement(scale, (-((best[1] - wide) // 2) * scale[0], -((best[0] - tall) // 2) * scale[1]))
    per = side // patch
    ys = place.ys(axis(best[0] // side, per, patch, side))
    xs = place.xs(axis(best[1] // side, per, patch, side))
    # The model's own function cuts a canvas of cell numbers.
    left = unpad_image(torch.arange(len(ys) * len(xs)).view(1, len(ys), len(xs)), (height, width))[0]
    ys, xs = ys[left[:, 0] // len(xs)], xs[left[0] % len(xs)]
    ratio = 0.0
    if config.model_type == "llava_onevision":
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(len(ys) * len(xs) / (most * per**2))
    if ratio > 1.1:
        ys, xs = _shrunk(ys, int(len(ys) // ratio)), _shrunk(xs, int(len(xs) // ratio))
    small, spans = stretched(size, (side, side)), axis(1, per, patch, side)
    return join(
        [grid("thumbnail", small.ys(spans), small.xs(spans)), grid("tile", ys, xs, breaks=True)],
        size,
    )


def _shrunk(spans: Tensor, count: int) -> Tensor:
    """The same stretch of the image in fewer, equal spans."""
    edges = torch.cat([spans[:, 0], spans[-1:, 1]]).numpy()
    at = np.linspace(0, len(spans), count + 1)
    cuts = torch.from_numpy(np.interp(at, np.arange(len(spans) + 1), edges))
    return torch.stack([cuts[:-1], cuts[1:]], 1)
