"""ViCrop's window: by hand, against a plain search, on the scenes model."""

import numpy as np
import pytest
import torch

import interp
from interp.attribution import crop_box, relative_attention
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.patches import Patches
from interp.tokens import TokenScores

RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)


def scores_of(values, cell=(10.0, 10.0), size=None):
    """A map over one picture whose cells are `cell` wide and high, behind one token of text."""
    values = torch.as_tensor(values, dtype=torch.float32)
    height, width = values.shape
    row, col = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    box = torch.stack([col * cell[0], row * cell[1], (col + 1) * cell[0], (row + 1) * cell[1]], 1).float()
    n = height * width
    size = (int(width * cell[0]), int(height * cell[1])) if size is None else size
    zeros = torch.zeros(n, dtype=torch.long)
    patches = Patches(zeros, torch.arange(1, n + 1), zeros, box, row, col, ("patch",) * n, ((size,),))
    row_scores = torch.cat([torch.zeros(1), values.flatten()])
    tokens = [["a", *["<image>"] * n]]
    spans = {"image": torch.arange(n + 1)[None] > 0}
    return TokenScores(
        row_scores[None, None],
        torch.tensor([[0]]),
        torch.ones(1, n + 1, dtype=torch.bool),
        tokens,
        [["a"]],
        "test",
        spans=spans,
        patches=patches,
    )


def plain_box(values, cell, size, side, ratios=RATIOS):
    """The search, place by place."""
    height, width = values.shape
    best = None
    for ratio in ratios:
        wide, high = (min(max(int(side * ratio / c), 1), n) for c, n in zip(cell, (width, height), strict=True))
        if (wide, high) == (width, height):
            continue
        sums = {
            (y, x): values[y : y + high, x : x + wide].sum()
            for y in range(height - high + 1)
            for x in range(width - wide + 1)
        }
        y, x = max(sums, key=sums.get)
        near = [sums[p] for p in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if p in sums]
        excess = (sums[y, x] - np.mean(near)) / (wide * high)
        if best is None or excess > best[0]:
            best = (excess, ratio, (x + wide / 2) * cell[0], (y + high / 2) * cell[1])
    if best is None:
        return (0, 0, *size)
    out = []
    for middle, limit in zip(best[2:], size, strict=True):
        length = min(side * best[1], limit)
        start = min(max(middle - side * best[1] / 2, 0), limit - length)
        out.append((int(start), int(start + length)))
    return out[0][0], out[1][0], out[0][1], out[1][1]


def test_a_single_peak():
    values = np.zeros((8, 8))
    values[5, 2] = 1
    # A window of two cells exceeds its neighbours by half the peak; larger ones by less for each cell.
    left, top, right, bottom = crop_box(scores_of(values), side=20)
    assert (right - left, bottom - top) == (20, 20)
    assert left <= 20 < 30 <= right
    assert top <= 50 < 60 <= bottom


def test_the_ratio_fits_the_object():
    """A plate of 3 x 3 cells with a faint peak: one cell of it exceeds its neighbours by .1, the plate by a third."""
    values = np.zeros((8, 8))
    values[2:5, 4:7] = 1
    values[3, 5] = 1.1
    assert crop_box(scores_of(values), side=10, ratios=(1, 3)) == (40, 20, 70, 50)
    assert crop_box(scores_of(values), side=10, ratios=(1,)) == (50, 30, 60, 40)


def test_the_window_stays_in_the_picture():
    values = np.zeros((4, 6))
    values[0, 5] = 1
    assert crop_box(scores_of(values), side=15, ratios=(1,)) == (45, 0, 60, 15)
    # Higher than the picture: as high as the picture.
    assert crop_box(scores_of(values), side=45, ratios=(1,)) == (15, 0, 60, 40)
    assert crop_box(scores_of(values), side=60) == (0, 0, 60, 40)
    # Smaller than a cell: one cell's middle.
    assert crop_box(scores_of(values), side=4, ratios=(1,)) == (53, 3, 57, 7)


def test_it_is_the_plain_search():
    draw = np.random.default_rng(0)
    for n in range(40):
        height, width = draw.integers(2, 12, 2)
        cell = (4.0, 7.0) if n % 2 else (6.5, 6.5)
        values = draw.random((height, width)) ** 3
        size = (int(width * cell[0]), int(height * cell[1]))
        side = float(draw.uniform(2, 1.2 * max(size)))
        scores = scores_of(values, cell, size)
        expected = plain_box(scores.scores[0, 0, 1:].view(height, width).double().numpy(), cell, size, side)
        assert crop_box(scores, side=side) == expected
        assert 0 <= expected[0] < expected[2] <= size[0]


def test_the_crop_of_a_scene():
    """From the map to the picture that is shown again."""
    lens, scene = interp.load("scenes"), scenes.scene("test", 0)
    asked = lens.prepare([f"<image> {scenes.existence(scene.names[0])}"] * 2, images=[scene.image] * 2)
    general = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * 2, images=[scene.image] * 2)
    found = relative_attention(lens, asked, general=general)
    box = crop_box(found, side=20, prompt=1)
    assert box == crop_box(found, side=20)
    crop = scene.image.crop(box)
    assert 19 <= crop.size[0] <= 41
    assert crop.size[0] == pytest.approx(crop.size[1], abs=1)


def test_what_is_wrong_is_said():
    scores = scores_of(np.eye(3))
    for side, ratios in ((0, RATIOS), (-1, RATIOS), (10, ()), (10, (1, 0)), (float("nan"), RATIOS)):
        with pytest.raises(SettingsError, match="side and ratios are above zero"):
            crop_box(scores, side=side, ratios=ratios)
    with pytest.raises(UnknownNameError, match="image 1 does not exist"):
        crop_box(scores, side=10, image=1)
    with pytest.raises(UnknownNameError, match="target 3 does not exist"):
        crop_box(scores, side=10, target=3)
    with pytest.raises(UnknownNameError, match="sample 1 does not exist"):
        crop_box(scores, side=10, prompt=1)
    text = TokenScores(
        torch.ones(1, 1, 2), torch.tensor([[1]]), torch.ones(1, 2, dtype=torch.bool), [["a", "b"]], [["b"]], "x"
    )
    with pytest.raises(InputError, match="no patch map"):
        crop_box(text, side=10)
