"""Layouts of tiles: the image is stretched over a canvas of tiles, and the whole image is shown beside them."""

from __future__ import annotations

import re
import sys
from typing import Any

from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.grids.cells import Cells, Size, axis, join, tiled
from interp.grids.pixels import image_processor, pair, runs, tensor, text_before
from interp.grids.single import Layout, Sizes


def _cut(config: Any, batch: Batch, factor: int, size: Size, rows: int, cols: int) -> Cells:
    """An image cut into rows x cols tiles (none of them: shown whole), with the thumbnail behind the tiles."""
    height, width = tensor(batch, "pixel_values").shape[-2:]
    high, wide = pair(config.vision_config.patch_size)
    n, m = height // high // factor, width // wide // factor
    ys, xs = axis(1, n, high * factor, height) / height, axis(1, m, wide * factor, width) / width
    if rows * cols <= 1:
        return join(tiled("patch", size, 1, 1, ys, xs), size)
    canvas_y = axis(rows, n, high * factor, height) / (rows * height)
    canvas_x = axis(cols, m, wide * factor, width) / (cols * width)
    return join([*tiled("tile", size, rows, cols, canvas_y, canvas_x), *tiled("thumbnail", size, 1, 1, ys, xs)], size)


def _canvas(inner: Any, size: Size, tiles: int) -> tuple[int, int]:
    """Rows and columns of the canvas that GOT-OCR's processor chooses, held against the tiles that were made."""
    if tiles == 1:
        return 1, 1
    choose = sys.modules[type(inner).__module__].get_optimal_tiled_canvas
    sides = dict(inner.size) if isinstance(inner.size, dict) else vars(inner.size)
    width, height = size
    cols, rows = choose((height, width), (sides["height"], sides["width"]), inner.min_patches, inner.max_patches)
    if rows * cols + 1 != tiles:
        raise UnsupportedError(f"an image of {size} has {tiles - 1} tiles, but {rows} x {cols} were expected.")
    return rows, cols


def internvl(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """InternVL: tiles row by row, then the thumbnail, as one run of tokens for each image."""
    inner = image_processor(processor, "GotOcr2ImageProcessor")
    factor = round(1 / config.downsample_ratio)
    one = len(_cut(config, batch, factor, (1, 1), 1, 1))
    layout: Layout = []
    for i, row in enumerate(sizes):
        found = runs(batch, i)
        if len(found) != len(row):
            raise UnsupportedError(f"sample {i} holds {len(found)} runs of image tokens for {len(row)} images.")
        shapes = [_canvas(inner, size, (b - a) // one) for size, (a, b) in zip(row, found, strict=True)]
        layout.append([_cut(config, batch, factor, size, *shape) for size, shape in zip(row, shapes, strict=True)])
    return layout


def aya_vision(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """Aya Vision: a run of tokens for each tile, named TILE_1, TILE_2, ..., and TILE_GLOBAL for the thumbnail."""
    inner = image_processor(processor, "GotOcr2ImageProcessor")
    layout: Layout = []
    for i, row in enumerate(sizes):
        found, counts, tiles = runs(batch, i), [], 0
        for n in range(len(found)):
            tiles += 1
            if text_before(batch, i, found, n).endswith(processor.tile_global_token):
                counts.append(tiles)
                tiles = 0
        shapes = [_canvas(inner, s, n) for s, n in zip(row, _as_many(counts, row, i), strict=True)]
        layout.append(
            [_cut(config, batch, config.downsample_factor, s, *shape) for s, shape in zip(row, shapes, strict=True)]
        )
    return layout


def idefics3(config: Any, processor: Any, batch: Batch, sizes: Sizes) -> Layout:
    """Idefics 3 and SmolVLM: a run for each tile, named <row_r_col_c>, and one for the whole image behind them."""
    image_processor(processor, "Idefics3ImageProcessor", "SmolVLMImageProcessor")
    layout: Layout = []
    for i, row in enumerate(sizes):
        found, shapes, seen = runs(batch, i), [], []
        for n in range(len(found)):
            name = re.search(r"<row_(\d+)_col_(\d+)>$", text_before(batch, i, found, n))
            if name is not None:
                seen.append((int(name[1]), int(name[2])))
                continue
            rows, cols = (max(s[0] for s in seen), max(s[1] for s in seen)) if seen else (0, 0)
            if seen != [(r + 1, c + 1) for r in range(rows) for c in range(cols)]:
                raise UnsupportedError(f"sample {i} names its tiles {seen}.")
            shapes.append((rows, cols))
            seen = []
        layout.append(
            [
                _cut(config, batch, config.scale_factor, s, *shape)
                for s, shape in zip(row, _as_many(shapes, row, i), strict=True)
            ]
        )
    return layout


def _as_many(found: list[Any], row: tuple[Size, ...], sample: int) -> list[Any]:
    if len(found) != len(row):
        raise UnsupportedError(f"sample {sample} shows {len(found)} images in its tokens, but {len(row)} were given.")
    return found
