"""Patch maps of every family against the model itself: whose features change when a box is painted."""

import pytest
import torch

from tests.painting import cell_sizes, check_painting, core, features, keys, painted, prepared, unmixed
from tests.zoo._images import image

FAMILIES = (
    "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl idefics3 smolvlm paligemma gemma3_vl "
    "mistral3 aya_vision"
).split()
SIZES = [(150, 74), (96, 96), (70, 141)]


@pytest.fixture(scope="module")
def lens_of():
    made = {}

    def get(name):
        if name not in made:
            made[name] = unmixed(name)
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_changes_when_its_box_is_painted_and_no_other_does(lens_of, name):
    pictures = [[image(*SIZES[0], 1), image(*SIZES[1], 2)], [image(*SIZES[2], 3)]]
    patches = check_painting(lens_of(name), pictures, ("patch", "tile", "thumbnail"))
    assert patches.sizes == (((150, 74), (96, 96)), ((70, 141),))
    assert {k[:2] for k in keys(patches)} == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3"])
def test_right_padding_moves_the_columns_only(lens_of, name):
    lens = lens_of(name)
    pictures = [[image(*SIZES[0], 1)], [image(*SIZES[2], 3)]]
    left, right = prepared(lens, pictures, "left"), prepared(lens, pictures, "right")
    assert left.padding == "left"
    assert right.padding == "right"
    assert not torch.equal(left.patches.column, right.patches.column)
    assert torch.equal(left.patches.box, right.patches.box)
    assert torch.equal(features(lens, left), features(lens, right))


@pytest.mark.parametrize("name", FAMILIES)
def test_responsive_pixels_lie_centred_on_the_box(lens_of, name):
    """Paint strips one by one: the ones a token responds to reach as far beyond its box on either side."""
    lens, picture = lens_of(name), image(*SIZES[0], 4)
    patches = prepared(lens, [[picture]]).patches
    key = keys(patches)[-1] if name != "llava_onevision" else (0, 0, "tile")
    key = key if key[2] != "break" else (0, 0, "tile")
    mine = [n for n, k in enumerate(keys(patches)) if k == key]
    width, height = picture.size
    inner = [n for n in mine if patches.box[n, 0] > 8 and patches.box[n, 2] < width - 8]
    inner = inner or mine
    n = inner[len(inner) // 2]
    box, cell = patches.box[n].tolist(), cell_sizes(patches)[n].tolist()
    for low, high, size, limit in ((0, 2, cell[0], width), (1, 3, cell[1], height)):
        first, last = max(0, int(box[low] - 0.5 * size)), min(limit, int(box[high] + 0.5 * size) + 1)
        x0, y0, x1, y1 = core(patches.box[n])
        strips = [(p, y0, p + 1, y1) if low == 0 else (x0, p, x1, p + 1) for p in range(first, last)]
        batch = prepared(lens, [[picture]] + [[painted(picture, s)] for s in strips])
        stream = lens.run(batch, reads=["resid_pre.0"])["resid_pre", 0]
        got = torch.stack([stream[i, batch.patches.sample_rows(i).column[n]] for i in range(len(strips) + 1)])
        hit = ((got[1:] - got[:1]).abs().amax(1) > 0).nonzero()[:, 0]
        begin, end = first + int(hit.min()), first + int(hit.max()) + 1
        assert int(hit.max() - hit.min()) + 1 >= 0.9 * (box[high] - box[low]) - 1
        if begin > first and end < last:  # not cut off by the picture's edge
            assert abs((begin + end) / 2 - (box[low] + box[high]) / 2) <= 1.0, (begin, end, box)


@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_tile_what_the_model_sees_and_every_column_has_one_row(lens_of, name):
    lens = lens_of(name)
    pictures = [[image(*SIZES[0], 1)], [image(*SIZES[2], 2), image(40, 40, 3), image(33, 47, 4)], [image(300, 64, 5)]]
    batch = prepared(lens, pictures)
    patches = batch.patches
    columns = torch.stack([patches.sample, patches.column], 1)
    assert torch.equal(columns, batch.image_mask.nonzero())
    assert patches.box.dtype == torch.float32
    assert patches.box.device.type == "cpu"
    for key in dict.fromkeys(keys(patches)):
        rows = patches.where([k == key for k in keys(patches)])
        box = rows.box.double()
        width, height = patches.sizes[key[0]][key[1]]
        assert bool((box >= 0).all())
        assert bool((box <= torch.tensor([width, height, width, height])).all())
        assert bool((box[:, 2:] >= box[:, :2]).all())
        if key[2] == "break":
            assert bool((rows.col == -1).all())
            continue
        places = set(zip(rows.row.tolist(), rows.col.tolist(), strict=True))
        assert places == {(r, c) for r in range(int(rows.row.max()) + 1) for c in range(int(rows.col.max()) + 1)}
        assert len(places) == len(rows)
        area = (box[:, 2:] - box[:, :2]).prod(1)
        union = torch.cat([box[:, :2].min(0).values, box[:, 2:].max(0).values])
        assert float(area.sum()) == pytest.approx(float((union[2:] - union[:2]).prod()), rel=1e-5)
        if name == "llava":  # the shorter edge is resized to the crop, the middle is kept
            edge = min(width, height)
            assert union[2:].sub(union[:2]).tolist() == pytest.approx([edge, edge], rel=0.05)
            assert union[:2].add(union[2:]).div(2).tolist() == pytest.approx([width / 2, height / 2], abs=edge / 32)
        elif name in ("llava_next", "llava_onevision") and key[2] == "tile":
            # Cells of the canvas: the model leaves out an odd row or column of padding too many or too few.
            assert float((union[2:] - union[:2]).prod()) >= 0.85 * width * height
        else:
            assert union.tolist() == pytest.approx([0, 0, width, height], abs=1e-3)
        ordered = sorted(range(len(rows)), key=lambda n: (int(rows.row[n]), int(rows.col[n])))
        centre = (box[:, :2] + box[:, 2:])[ordered]
        assert bool((centre[1:, 1] - centre[:-1, 1] > -1e-6).all())  # rows go down
    one = patches.sample_rows(1)
    assert set(one.sample.tolist()) == {1}
    assert set(one.image.tolist()) == {0, 1, 2}
    alone = batch[1]  # also where a processor packs the patches of all samples
    assert torch.equal(alone.patches.column, alone.image_mask.nonzero()[:, 1])
    assert torch.equal(alone.patches.box, one.box)


def test_a_sample_alone_keeps_its_rows(lens_of):
    lens = lens_of("llava")
    batch = prepared(lens, [[image(*SIZES[0], 1)], [image(*SIZES[2], 2)]], "left")
    alone = batch[0]
    assert torch.equal(alone.patches.column, alone.image_mask.nonzero()[:, 1])
    assert torch.equal(alone.patches.box, batch.patches.sample_rows(0).box)


def test_pixels_outside_the_crop_change_nothing(lens_of):
    lens, picture = lens_of("llava"), image(150, 74, 1)
    batch = prepared(lens, [[picture]])
    edge = int(batch.patches.box[:, 0].min())
    assert edge > 20
    other = prepared(lens, [[painted(picture, (0, 0, edge - 6, 74))]])
    assert torch.equal(features(lens, batch), features(lens, other))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(150, 110), (100, 140)])
def test_a_padded_canvas(lens_of, name, size):
    """Padding of 8 and of 9 processed pixels on either side, of which the model leaves out a whole cell of 8."""
    patches = check_painting(lens_of(name), [[image(*size, 1)]], ("tile",))
    tiles = patches.where([k == "tile" for k in patches.kind])
    assert len(tiles) == 6 * 8
    cell = max(size) / 8
    first = tiles.box[0, 2:].tolist()
    inner = (min(size) - 4 * cell) / 2  # six cells; the padding cuts the outer two
    assert min(first) == pytest.approx(inner, abs=1.5)
    assert max(first) == pytest.approx(cell, abs=0.1)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_newlines_stand_for_their_row(lens_of, name):
    lens = lens_of(name)
    patches = prepared(lens, [[image(150, 74, 1)]]).patches
    rows = [n for n, k in enumerate(patches.kind) if k == "break"]
    assert len(rows) == int(patches.row.max()) + 1
    for n in rows:
        assert patches.kind[n - 1] == "tile"
        assert patches.row[n - 1] == patches.row[n]
        mine = patches.where(
            [k == "tile" and r == int(patches.row[n]) for k, r in zip(patches.kind, patches.row.tolist(), strict=True)]
        )
        assert patches.box[n, 0] == mine.box[:, 0].min()
        assert patches.box[n, 2] == mine.box[:, 2].max()
        assert torch.equal(patches.box[n, [1, 3]], mine.box[0, [1, 3]])


def test_several_images_of_onevision_are_squares_with_one_newline(lens_of):
    patches = prepared(lens_of("llava_onevision"), [[image(80, 40, 1), image(64, 64, 2)]]).patches
    first = patches.where(patches.image == 0)
    assert first.kind == ("patch",) * 16 + ("break",)
    assert first.box[:4, 1].tolist() == first.box[:4, 3].tolist() == [0.0] * 4  # padding above the image
    assert first.box[5].tolist() == [20.0, 0.0, 40.0, 20.0]
    assert first.box[16].tolist() == [0, 0, 80, 40]
    assert int(first.row[16]) == -1
