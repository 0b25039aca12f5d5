"""The part of a picture to look at again, from a map over its image tokens (ViCrop's window).

Source: Zhang, Khayatkhoei, Chhikara, Ilievski 2025 (arXiv 2502.17422), section 5, and the authors' code. For each ratio
a window of `side` times the ratio slides over the map, token by token; its best place has the largest sum. Of these
the ratio is taken whose sum exceeds the mean of the four neighbouring places by most, for each token of the window.

Departures. Windows are at least one token wide (the code can round to none). Ratios whose window covers the whole map
have no neighbours and are left out, as in the code; where that is so of all, the box is the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from interp.attribution.image_grids import image_grids
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.tokens import TokenScores

RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)


def crop_box(
    scores: TokenScores,
    *,
    side: float,
    ratios: Sequence[float] = RATIOS,
    prompt: int = 0,
    target: int = -1,
    image: int = 0,
) -> tuple[int, int, int, int]:
    """The window around what a map points at: `picture.crop(crop_box(scores, side=336))`.

    Args:
        scores: a map with image tokens, such as that of `relative_attention`.
        side: width and height of the window for ratio 1, in pixels of the original picture. The paper takes the
            resolution that the model works at (336 for LLaVA-1.5), so that the crop is seen at least as sharp as it is.
        ratios: by how much the window may be larger.
        prompt: which sample.
        target: which of its targets, along the target axis; negative ones count from the sample's last.
        image: which image of the sample.

    Returns:
        Left, top, right, bottom in pixels of the original picture, right and bottom excluded.

    Raises:
        UnknownNameError: there is no such sample, target or image.
        SettingsError: a side or ratio is not above zero, or there is no ratio.
        InputError: there is no patch map, or no token of the image has a place.
        UnsupportedError: the tokens of the image fill no rectangle.
    """
    if not side > 0 or not ratios or not all(r > 0 for r in ratios):
        raise SettingsError(f"side and ratios are above zero, found side={side!r}, ratios={tuple(ratios)}.")
    one = scores.select(prompt)
    count = one.scores.shape[1]
    if not -count <= target < count:
        raise UnknownNameError(f"target {target} does not exist: sample {prompt} has {count} targets.")
    if one.patches is None:
        raise InputError(f"these {scores.name} scores have no patch map: no image tokens stand among the sources.")
    if not 0 <= image < len(one.patches.sizes[0]):
        raise UnknownNameError(f"image {image} does not exist: sample {prompt} has {len(one.patches.sizes[0])}.")
    grids = [g for g in image_grids(one.patches) if g.image == image]
    if not grids:
        raise InputError(f"no token of image {image} has a place of its own.")
    grid = max(grids, key=lambda g: g.rows.numel())
    values = one.scores[0, target, one.patches.column[grid.rows]].double()
    box = one.patches.box[grid.rows.flatten()].double()
    left, top = box[:, :2].amin(0).tolist()
    right, bottom = box[:, 2:].amax(0).tolist()
    height, width = values.shape
    cell = (right - left) / width, (bottom - top) / height
    found = _best(values, cell, side, ratios)
    if found is None:
        return int(left), int(top), int(right), int(bottom)
    ratio, row, col, rows, cols = found
    middle = left + (col + cols / 2) * cell[0], top + (row + rows / 2) * cell[1]
    picture = one.patches.sizes[0][image]
    x, y = (_inside(m, side * ratio, size) for m, size in zip(middle, picture, strict=True))
    return x[0], y[0], x[1], y[1]


def _best(
    values: Float[Tensor, "height width"], cell: tuple[float, float], side: float, ratios: Sequence[float]
) -> tuple[float, int, int, int, int] | None:
    """The ratio that stands out most, its best place (row, column) and its window (rows, columns)."""
    height, width = values.shape
    best, found = -float("inf"), None
    for ratio in ratios:
        cols = min(max(int(side * ratio / cell[0]), 1), width)
        rows = min(max(int(side * ratio / cell[1]), 1), height)
        if (rows, cols) == (height, width):
            continue
        sums = values.unfold(0, rows, 1).unfold(1, cols, 1).sum((-1, -2))
        row, col = divmod(int(sums.argmax()), sums.shape[1])
        beside = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
        near = [float(sums[r, c]) for r, c in beside if 0 <= r < sums.shape[0] and 0 <= c < sums.shape[1]]
        excess = (float(sums[row, col]) - sum(near) / len(near)) / (rows * cols)
        if excess > best:
            best, found = excess, (ratio, row, col, rows, cols)
    return found


def _inside(middle: float, length: float, size: int) -> tuple[int, int]:
    """Begin and end of a stretch of that length around `middle`, moved into the picture, and cut where it is longer."""
    start = min(max(middle - length / 2, 0), max(size - length, 0))
    return int(start), min(size, int(start + length))
