"""Pointing, overlap and Otsu's threshold by hand and against plain searches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.attribution import rollout
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.evaluation import Localisation, iou, joined, otsu, pointing
from interp.patches import Patches
from interp.tokens import TokenScores
from tests import zoo

SIDE = 2  # pixels of a patch


def grid_scores(grids, name="map", gap=0):
    """Scores of pictures cut into patches of 2 x 2 pixels; `gap` columns of pixels on the right have no patch."""
    grids = torch.tensor(grids, dtype=torch.float64)
    size, high, wide = grids.shape
    row, col = (x.flatten().repeat(size) for x in torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"))
    box = torch.stack([col, row, col + 1, row + 1], 1).float() * SIDE
    sample = torch.arange(size).repeat_interleave(high * wide)
    column = torch.arange(high * wide).repeat(size) + 1
    sizes = (((wide * SIDE + gap, high * SIDE),),) * size
    patches = Patches(sample, column, torch.zeros_like(row), box, row, col, ("patch",) * len(row), sizes)
    width = high * wide + 1
    scores = torch.cat([torch.full((size, 1), 99.0), grids.flatten(1)], 1)[:, None]
    spans = {"image": torch.arange(width).expand(size, width) > 0}
    tokens = [[str(i) for i in range(width)]] * size
    targets = torch.zeros(size, 1, dtype=torch.long)
    mask = torch.ones(size, width, dtype=torch.bool)
    more = {"settings": {"model": "tiny"}, "spans": spans, "patches": patches}
    return TokenScores(scores, targets, mask, tokens, [["0"]] * size, name, **more)


def mask_of(shape, top, left, bottom, right):
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


GRIDS = [[[0.1, 0.9], [0.2, 0.3]], [[0.5, 0.5], [0.0, 0.0]]]
# Sample 0: three of the four pixels of the second patch; sample 1: the left half.
MASKS = [mask_of((4, 4), 0, 2, 2, 4), mask_of((4, 4), 0, 0, 4, 2)]
MASKS[0][0, 2] = False


def naive(value, inside, threshold):
    chosen = value >= threshold
    return (chosen & inside).sum() / (chosen | inside).sum()


# Otsu --------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=15))
def test_otsu_is_the_best_of_all_thresholds(values):
    array = np.array(values)
    levels = np.unique(array)
    found = otsu(array)
    if len(levels) == 1:
        assert found == levels[0]
        return

    def within(threshold):
        """What Otsu minimises: the variance within the two classes."""
        parts = array[array < threshold], array[array >= threshold]
        return sum(len(part) * part.var() for part in parts)

    assert found in levels[1:]
    assert within(found) == pytest.approx(min(within(t) for t in levels[1:]), abs=1e-9)
    assert otsu(3 * array + 1000) == pytest.approx(3 * found + 1000)
    assert otsu(levels, np.array([(array == x).sum() for x in levels])) == found


def test_otsu_by_hand():
    assert otsu(np.array([0.0, 0.1, 0.2, 5.0, 5.1])) == 5.0
    assert otsu(np.array([1.0, 1.0, 1.0])) == 1.0
    base = 1e8  # small differences of large numbers
    assert otsu(base + np.array([0.0, 1.0, 10.0, 11.0])) == base + 10


# By hand -----------------------------------------------------------------------------------------------------------


def test_pointing_by_hand():
    """Sample 0: the largest patch has three of its four pixels in the object; sample 1: of two largest, one."""
    found = pointing(grid_scores(GRIDS), MASKS)
    assert found.values[0].tolist() == [[0.75, 0.5], [3 / 16, 0.5], [0.75 - 3 / 16, 0.0]]
    assert found.metrics == ("pointing", "chance", "gain")
    assert found.value("pointing") == 0.625
    row = found.summary().set_index("metric").loc["pointing"]
    assert row[["low", "high"]].tolist() == [0.5, 0.75]
    frame = found.frame()
    assert list(frame.columns) == ["map", "sample", "pointing", "chance", "gain"]
    assert frame["pointing"].tolist() == [0.75, 0.5]
    flat = pointing(grid_scores([[[1.0, 1.0], [1.0, 1.0]]] * 2), MASKS)
    assert flat.value("gain") == 0  # a map that says nothing is at chance, exactly


def test_iou_by_hand():
    found = iou(grid_scores(GRIDS), MASKS, threshold=0.5)
    at = {m: found.values[0, i].tolist() for i, m in enumerate(found.metrics)}
    # Sample 0 keeps the second patch: 3 of 4 pixels. Sample 1 the upper half: 4 of 8, of 12 in all.
    assert at["iou"] == [3 / 4, 4 / 12]
    assert at["kept"] == [4 / 16, 8 / 16]
    assert at["area"] == [3 / 16, 8 / 16]
    assert at["best_iou"] == [3 / 4, 1 / 2]  # of sample 1: the whole picture
    # Sample 0: 13 others, one of them in the same patch (a tie counts half).
    assert at["auroc"] == pytest.approx([12.5 / 13, 0.5])
    assert at["average_precision"] == pytest.approx([3 / 4, 0.5 * 0.5 + 0.5 * 0.5])
    assert iou(grid_scores(GRIDS), MASKS, threshold=0).values[0, 0].tolist() == at["area"]
    assert iou(grid_scores(GRIDS), MASKS, threshold=1.0).values[0, 0].tolist() == [3 / 4, 4 / 12]
    assert iou(grid_scores(GRIDS), MASKS, threshold="area").values[0, 1].tolist() == [4 / 16, 8 / 16]
    flat = iou(grid_scores([[[1.0, 1.0], [1.0, 1.0]]] * 2), MASKS)
    assert flat.values[0, 0].tolist() == at["area"]  # nothing stands out: everything is kept


@pytest.mark.parametrize("threshold", ["otsu", "area", 0.15, 0.7])
def test_iou_equals_a_search(threshold):
    """Random maps with ties, against counting every threshold."""
    draw = np.random.default_rng(0)
    grids = draw.integers(-3, 4, (30, 3, 4)).astype(float) / 7
    masks = draw.random((30, 6, 8)) < 0.3
    found = iou(grid_scores(grids.tolist()), torch.from_numpy(masks), threshold=threshold)
    for i in range(30):
        value, inside = np.kron(grids[i], np.ones((2, 2))).ravel(), masks[i].ravel()
        levels = np.unique(value)
        t = {
            "otsu": otsu(value),
            "area": max(x for x in levels if (value >= x).sum() >= inside.sum()),
        }.get(threshold)
        if t is None:
            t = levels[0] + threshold * (levels[-1] - levels[0])
        pairs = value[inside][:, None] - value[~inside][None]
        precision = [inside[value >= x].mean() for x in levels[::-1]]
        recall = [0] + [(inside & (value >= x)).sum() / inside.sum() for x in levels[::-1]]
        expected = [
            naive(value, inside, t),
            (value >= t).mean(),
            inside.mean(),
            max(naive(value, inside, x) for x in levels),
            (pairs > 0).mean() + (pairs == 0).mean() / 2,
            (np.diff(recall) * precision).sum(),
        ]
        np.testing.assert_allclose(found.values[0, :, i], expected, rtol=1e-12)


def test_pixels_without_a_patch_are_left_out():
    scores = grid_scores(GRIDS, gap=2)
    masks = [np.pad(m, ((0, 0), (0, 2)), constant_values=True) for m in MASKS]
    for f in (pointing, iou):
        assert torch.equal(f(scores, masks).values, f(grid_scores(GRIDS), MASKS).values)


def test_several_maps_and_batched_is_single():
    named = {"a": grid_scores(GRIDS), "b": grid_scores(GRIDS[::-1])}
    for f in (pointing, iou):
        both = f(named, MASKS)
        for n, one in enumerate(named.values()):
            assert torch.equal(both.values[n : n + 1], f(one, MASKS).values)
            for i in range(2):
                alone = f(one.select(i), MASKS[i : i + 1])
                assert torch.equal(alone.values, both.values[n : n + 1, :, i : i + 1])
        assert {n.part for n in both.numbers} == {"a", "b"}


def test_files_figure_and_joining(tmp_path):
    found = iou({"<b>": grid_scores(GRIDS)}, MASKS)
    found.save(tmp_path / "x")
    assert Localisation.load(tmp_path / "x").equals(found)
    assert interp.scores.load(tmp_path / "x").equals(found)
    assert "<b>: " not in found._repr_html_()
    assert "iou · tiny · 2 images" in repr(found)
    assert "over images" in found._repr_html_()
    assert len(found.plot().data[0].x) == 6
    assert found.settings["threshold"] == "otsu"
    parts = [iou({"<b>": grid_scores(GRIDS[i : i + 1])}, MASKS[i : i + 1]) for i in range(2)]
    both = joined(parts)
    assert torch.equal(both.values, found.values)
    assert both.summary().equals(found.summary())
    with pytest.raises(InputError, match="differ in kind"):
        joined([found, pointing({"<b>": grid_scores(GRIDS)}, MASKS)])


def test_what_is_wrong_is_said():
    scores = grid_scores(GRIDS)
    with pytest.raises(InputError, match="1 masks were given for 2 samples"):
        pointing(scores, MASKS[:1])
    with pytest.raises(InputError, match=r"mask 1 is bool \[4, 5\]; the picture of sample 1 needs bools \[4, 4\]"):
        pointing(scores, [MASKS[0], np.ones((4, 5), dtype=bool)])
    with pytest.raises(InputError, match=r"mask 0 is float64 \[4, 4\]"):
        iou(scores, [m.astype(float) for m in MASKS])
    with pytest.raises(InputError, match="mask 1 marks none of the pixels"):
        iou(scores, [MASKS[0], np.zeros((4, 4), dtype=bool)])
    with pytest.raises(InputError, match="mask 0 marks all of the pixels"):
        pointing(scores, [np.ones((4, 4), dtype=bool), MASKS[1]])
    with pytest.raises(UnknownNameError, match="threshold 'best'"):
        iou(scores, MASKS, threshold="best")
    for share in (-0.1, 1.5, math.nan, True):
        with pytest.raises(SettingsError, match="share from 0 to 1"):
            iou(scores, MASKS, threshold=share)
    with pytest.raises(UnknownNameError, match="target 1 does not exist"):
        pointing(scores, MASKS, target=1)
    with pytest.raises(UnknownNameError, match="image 1 does not exist"):
        pointing(scores, MASKS, image=1)
    with pytest.raises(SettingsError, match="resamples"):
        pointing(scores, MASKS, resamples=0)
    llama = interp.wrap(zoo.build("llama"), zoo.processor("llama"), name="llama")
    batch = llama.prepare(**zoo.inputs("llama", batch=1))
    with pytest.raises(InputError, match="have no patch map"):
        pointing(rollout(llama, batch, target="last"), MASKS[:1])
    with pytest.raises(InputError, match="values are"):
        Localisation("iou", ("a",), ("iou",), torch.zeros(1, 1))


# A real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_exact_masks_of_scenes():
    """Maps drawn from the masks themselves point at the object; the negative of such a map never does."""
    lens = interp.load("scenes")
    drawn = list(scenes.scenes("test", 6))
    batch = lens.prepare(["<image> a photo of a"] * 6, [s.image for s in drawn])
    scores = rollout(lens, batch, target="last")
    masks = [s.mask(s.names[0]) for s in drawn]
    plain = pointing(scores, masks)
    assert plain.metrics[0] == "pointing"
    assert 0 <= plain.value("pointing") <= 1
    truth = scores.scores.clone()
    for i, mask in enumerate(masks):
        assert scores.image_map(i).shape == mask.shape
        rows = scores.patches.sample_rows(i)
        for box, column in zip(rows.box.round().long().tolist(), rows.column.tolist(), strict=True):
            truth[i, 0, column] = float(mask[box[1] : box[3], box[0] : box[2]].mean())
    maps = {"truth": replace(scores, scores=truth), "not": replace(scores, scores=-truth)}
    best, overlap = pointing(maps, masks), iou(maps, masks, threshold="area")
    assert best.value("pointing", "truth") > 0.5 > 20 * best.value("chance", "truth")
    assert best.value("pointing", "not") == 0
    assert overlap.value("auroc", "truth") > 0.95
    assert overlap.value("iou", "truth") > 0.4 > 0.05 > overlap.value("iou", "not")
    assert overlap.value("auroc", "truth") + overlap.value("auroc", "not") == pytest.approx(1)
