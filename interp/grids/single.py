"""Layouts of one picture for each image: a fixed grid, a grid as large as the picture, query tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.grids.cells import Cells, Size, axis, grid, join, whole
from interp.grids.pixels import image_processor, pair, plain, setting, stretched, tensor

Sizes = tuple[tuple[Size, ...], ...]
Layout = list[list[Cells]]

CLASS_TOWERS = ("clip_vision_model", "internvl_vision", "vit", "dinov2", "dinov2_with_registers", "dinov3_vit")


def fixed(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """LLaVA and PaliGemma: the picture is brought to a fixed size; each of the tower's patches is a token.

    LLaVA's `vision_feature_select_strategy="full"` keeps the class token of towers that have one: kind `whole`.
    A LLaVA with a Pixtral tower keeps the picture's shape: see `sized`.
    """
    if "image_sizes" in batch.inputs:
        return sized(config, processor, batch, sizes)
    height, width = tensor(batch, "pixel_values").shape[-2:]
    high, wide = pair(config.vision_config.patch_size)
    rows, cols = height // high, width // wide
    ys, xs = axis(1, rows, high, height), axis(1, cols, wide, width)
    kept = getattr(config, "vision_feature_select_strategy", None) == "full"
    first = kept and config.vision_config.model_type in CLASS_TOWERS

    def one(size: Size) -> Cells:
        place = plain(processor, size, (height, width))
        parts = [whole("whole", size)] if first else []
        return join([*parts, grid("patch", place.ys(ys), place.xs(xs))], size)

    return [[one(size) for size in row] for row in sizes]


def sized(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """Pixtral and Mistral 3: resized to a multiple of the (merged) patch; `image_sizes` holds (height, width).

    [IMG_BREAK] and [IMG_END] are words of the vocabulary and carry no image features: they are not in the mask.
    """
    image_processor(processor, "PixtralImageProcessor")
    given = tensor(batch, "image_sizes").tolist()
    merge = getattr(config, "spatial_merge_size", 1) or 1
    side = pair(config.vision_config.patch_size)[0] * merge
    return _in_order(sizes, [(h // side, w // side, side / h, side / w) for h, w in given], "image_sizes")


def merged(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """Qwen-VL: resized to a multiple of the merged patch; `image_grid_thw` counts patches: frames, rows, columns."""
    image_processor(processor, "Qwen2VLImageProcessor", "Qwen3VLImageProcessor")
    merge = config.vision_config.spatial_merge_size
    grids = []
    for frames, rows, cols in tensor(batch, "image_grid_thw").tolist():
        if frames != 1:
            raise UnsupportedError(f"an image has {frames} frames.")
        grids.append((rows // merge, cols // merge, merge / rows, merge / cols))
    return _in_order(sizes, grids, "image_grid_thw")


def _in_order(sizes: Sizes, grids: list[tuple[int, int, float, float]], name: str) -> Layout:
    """Images of all samples in order, each with its grid: rows, columns, and a cell's share of the height and width."""
    total = sum(map(len, sizes))
    if total != len(grids):
        raise UnsupportedError(f"{name} describes {len(grids)} images, but {total} were given.")
    left = iter(grids)

    def one(size: Size) -> Cells:
        rows, cols, high, wide = next(left)
        ys, xs = axis(1, rows, high, 1) * size[1], axis(1, cols, wide, 1) * size[0]
        return join([grid("patch", ys, xs)], size)

    return [[one(size) for size in row] for row in sizes]


def queries(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """BLIP-2 and InstructBLIP: learned queries, each of which looks at the whole picture."""
    return [[whole("whole", size, config.num_query_tokens) for size in row] for row in sizes]


def pooled(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """Gemma 3: squeezed to a fixed square, patches averaged in blocks; pan and scan adds crops behind the whole."""
    inner = image_processor(processor, "Gemma3ImageProcessor")
    height, width = tensor(batch, "pixel_values").shape[-2:]
    patch = pair(config.vision_config.patch_size)[0]
    side = int(config.mm_tokens_per_image**0.5)
    cell = pair(config.vision_config.image_size)[0] // patch // side * patch
    ys, xs = axis(1, side, cell, height), axis(1, side, cell, width)

    def one(size: Size) -> Cells:
        crops = _pan_and_scan(inner, processor, size)
        place = stretched(size, (height, width))
        parts = [grid("thumbnail" if crops else "patch", place.ys(ys), place.xs(xs))]
        tops, lefts = sorted({c[1] for c in crops}), sorted({c[0] for c in crops})
        for left, top, right, bottom in crops:
            place = stretched((right - left, bottom - top), (height, width))
            down, across = tops.index(top) * side, lefts.index(left) * side
            parts.append(grid("tile", place.ys(ys) + top, place.xs(xs) + left, top=down, left=across))
        return join(parts, size)

    return [[one(size) for size in row] for row in sizes]


def _pan_and_scan(inner: Any, processor: Any, size: Size) -> list[tuple[int, int, int, int]]:
    """Crops of an image: left, top, right, bottom. The image processor itself cuts two pictures of coordinates."""
    if not setting(processor, "do_pan_and_scan"):
        return []
    names = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")
    limits = [setting(processor, name) for name in names]
    cut = inner.pan_and_scan if hasattr(inner, "pan_and_scan") else inner.pan_and_scan_batched
    width, height = size
    xs = cut(np.broadcast_to(np.arange(width), (1, height, width)), *limits)
    ys = cut(np.broadcast_to(np.arange(height)[:, None], (1, height, width)), *limits)
    return [
        (int(x[0, 0, 0]), int(y[0, 0, 0]), int(x[0, 0, -1]) + 1, int(y[0, -1, 0]) + 1)
        for x, y in zip(xs, ys, strict=True)
    ]
