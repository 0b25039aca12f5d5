"""TokenScores: frames, maps and pictures by hand, saving, and what is refused."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import interp
from interp.errors import FileError, InputError, NonFiniteError, SettingsError, UnknownNameError
from interp.patches import Patches
from interp.tokens import TokenScores

EVIL = "<script>alert('$x$')</script> %{x} & <b>"
NAN = math.nan
# Sample 0 is padded by one column on the left; sample 1 has two targets, the image at columns 1 to 4.
SCORES = torch.tensor(
    [
        [[9.0, 0.1, 0.4, 0.4, 0.1, 0.0], [9.0, 9.0, 9.0, 9.0, 9.0, 9.0]],
        [[0.5, 0.1, 0.2, 0.3, 0.4, -1.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]],
    ]
)
MASK = torch.tensor([[False, True, True, True, True, True], [True] * 6])
TOKENS = [["<pad>", "<s>", " a", EVIL, "\n", " b"], ["<s>", "<i>", "<i>", "<i>", "<i>", " cat"]]
IMAGE = torch.tensor([[False] * 6, [False, True, True, True, True, False]])
SPECIAL = torch.tensor([[True, True, False, False, False, False], [True, False, False, False, False, False]])
# A thumbnail over 4 x 2 pixels, a tile over its left half, a finer one within, a row break.
BOXES = torch.tensor([[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 4.0, 2.0]])


def patches(kind=("thumbnail", "tile", "tile", "break")):
    row = torch.zeros(4, dtype=torch.long)
    return Patches(row + 1, torch.arange(1, 5), row, BOXES, row, row, kind, ((), ((4, 2),)))


def make(**changes):
    given = {"scores": SCORES, "targets": torch.tensor([[5, -1], [4, 5]]), "source_mask": MASK, "tokens": TOKENS}
    given |= {"target_tokens": [[" b", ""], ["<i>", " cat"]], "name": "rollout", "unit": "share"}
    given |= {"spans": {"image": IMAGE, "text": ~IMAGE, "special": SPECIAL}, "patches": patches()}
    given |= {"settings": {"model": "tiny", "layers": (0, 1)}}
    return TokenScores(**(given | changes))


def test_padding_and_fillers_are_nan_whatever_stood_there():
    scores = make()
    assert scores.scores[0, 0].isnan().tolist() == [True] + [False] * 5
    assert scores.scores[0, 1].isnan().all()
    assert scores.scores[1].isfinite().all()
    assert not scores.spans["special"][0, 0]
    assert SCORES[0, 0, 0] == 9  # what was given is not changed


def test_frame_by_hand():
    frame = make().frame()
    columns = "prompt target target_token source token kind score rank image left top right bottom"
    assert list(frame.columns) == columns.split()
    assert len(frame) == 5 + 2 * 6
    first = frame[frame["prompt"] == 0]
    assert first["target"].tolist() == [4] * 5  # counted in the sample's own tokens
    assert first["source"].tolist() == [0, 1, 2, 3, 4]
    assert first["token"].tolist() == TOKENS[0][1:]
    assert first["kind"].tolist() == ["special", "text", "text", "text", "text"]
    assert first["rank"].tolist() == [3, 1, 2, 4, 5]  # ties in the order of sources
    assert first["left"].isna().all()
    assert first["image"].isna().all()
    last = frame[(frame["prompt"] == 1) & (frame["target"] == 5)]
    assert last["target_token"].tolist() == [" cat"] * 6
    assert last["kind"].tolist() == ["special", *["image"] * 4, "text"]
    assert last["rank"].tolist() == [6, 5, 4, 3, 2, 1]
    assert last[["left", "top", "right", "bottom"]].to_numpy()[1:5].tolist() == BOXES.tolist()
    assert last["image"].tolist()[1:5] == [0] * 4
    assert "left" not in make(patches=None).frame()


def test_top_by_hand():
    scores = make()
    top = scores.top(2)
    assert list(top.columns) == "rank source token kind score image left top right bottom".split()
    assert top["source"].tolist() == [1, 2]
    assert scores.top(3, prompt=1, target=0)["source"].tolist() == [0, 4, 3]
    assert scores.top(1, prompt=-1)["source"].tolist() == [5]
    assert len(scores.top(99)) == 5
    for k in (0, 1.0, True):
        with pytest.raises(SettingsError, match="k is a whole number"):
            scores.top(k)
    for where in ({"prompt": 2}, {"prompt": 0, "target": 1}, {"prompt": 1, "target": -3}):
        with pytest.raises(UnknownNameError, match="does not exist"):
            scores.top(1, **where)


def test_image_map_by_hand():
    # Tiles lie above the thumbnail, the finer one above the larger; the break has no place.
    assert make().image_map(1).tolist() == [[2.0, 3.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0]]
    assert make().image_map(1, 0)[0].tolist() == pytest.approx([0.2, 0.3, 0.1, 0.1])
    bare = make(patches=patches(("whole", "tile", "tile", "break"))).image_map(1)
    assert bare[:, :2].tolist() == [[2.0, 3.0], [2.0, 2.0]]
    assert bare[:, 2:].isnan().all()
    # A thumbnail stays below even where its cells are finer than the tile's.
    fine = make(patches=patches(("tile", "tile", "thumbnail", "break"))).image_map(1)
    assert fine.tolist() == [[2.0, 2.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0]]
    with pytest.raises(InputError, match="no token of image 0 has a place"):
        make(patches=patches(("whole",) * 4)).image_map(1)
    with pytest.raises(InputError, match="no patch map"):
        make(patches=None).image_map(1)
    with pytest.raises(UnknownNameError, match="image 1 does not exist"):
        make().image_map(1, image=1)
    with pytest.raises(UnknownNameError, match="image 0 does not exist"):
        make().image_map(0)


def test_boxes_between_pixels_fill_the_picture_once():
    """Every pixel has the value of the one box that holds its centre, at any ratio of patches to pixels."""
    for cells, width in [(3, 10), (7, 5), (4, 4)]:
        edge = torch.linspace(0, width, cells + 1)
        box = torch.stack([edge[:-1], torch.zeros(cells), edge[1:], torch.ones(cells)], 1)
        none = torch.zeros(cells, dtype=torch.long)
        map_ = Patches(none, torch.arange(cells), none, box, none, none, ("patch",) * cells, (((width, 1),),))
        scores = TokenScores(
            scores=torch.arange(cells).float()[None, None],
            targets=torch.tensor([[0]]),
            source_mask=torch.ones(1, cells, dtype=torch.bool),
            tokens=[["<i>"] * cells],
            target_tokens=[["<i>"]],
            name="x",
            patches=map_,
        )
        wanted = [int((x + 0.5) / width * cells) for x in range(width)]
        assert scores.image_map()[0].tolist() == wanted


def test_select_drops_padding_and_fillers():
    one = make().select(0)
    assert one.scores.shape == (1, 1, 5)
    assert one.targets.tolist() == [[4]]
    assert one.tokens == [TOKENS[0][1:]]
    assert one.patches.sizes == ((),)
    same = ["source", "token", "score", "rank"]
    whole = make().frame()
    assert one.frame()[same].equals(whole[whole["prompt"] == 0][same].reset_index(drop=True))
    picture = make().select(1)
    assert picture.patches.column.tolist() == [1, 2, 3, 4]
    assert torch.equal(picture.image_map(), make().image_map(1))
    with pytest.raises(InputError, match="sample 0 has no target"):
        make(targets=torch.tensor([[-1, -1], [4, 5]])).select(0)


def test_targets_of_another_stream():
    there = torch.tensor([[True, True, False], [True, True, True]])
    scores = make(targets=torch.tensor([[1, -1], [0, 2]]), target_mask=there, target_tower="decoder", tower="encoder")
    assert scores.frame()["target"].unique().tolist() == [1, 0, 2]
    assert "decoder to encoder" in repr(scores)
    assert scores.select(0).targets.tolist() == [[1]]
    with pytest.raises(InputError, match="columns of real tokens"):
        make(targets=torch.tensor([[2, -1], [0, 2]]), target_mask=there)


def test_normalised_rows_sum_to_one_in_size():
    shares = make().normalised()
    sums = shares.scores.abs().nansum(-1)
    assert sums[shares.targets >= 0].tolist() == pytest.approx([1.0] * 3)
    assert shares.scores[1, 0, 5] == pytest.approx(-1 / 2.5)
    assert shares.unit == "share"
    with pytest.raises(InputError, match="target 0 of sample 0"):
        make(scores=torch.zeros_like(SCORES)).normalised()


@pytest.mark.parametrize("changes", [{}, {"patches": None, "spans": {}}, {"scores": SCORES.double(), "caveat": "x"}])
def test_saved_scores_come_back_equal(changes, tmp_path):
    scores = make(**changes)
    scores.save(tmp_path / "a")
    for back in (TokenScores.load(tmp_path / "a"), interp.scores.load(tmp_path / "a")):
        assert type(back) is TokenScores
        assert back.equals(scores)
        assert back.scores.dtype == scores.scores.dtype
        assert back.frame().equals(scores.frame())
        if scores.patches is not None:
            assert torch.equal(back.image_map(1), scores.image_map(1))
    assert not scores.equals(make(**changes, name="other"))
    fields = (tmp_path / "a" / "scores.json").read_text().replace('"thumbnail",', "").replace('"share"', "3")
    (tmp_path / "a" / "scores.json").write_text(fields.replace('"tokens"', '"tokes"'))
    with pytest.raises(FileError, match="damaged"):
        TokenScores.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": SCORES[0]}, r"scores are \[batch, target, source\]"),
        ({"scores": SCORES.int()}, "scores must be floats"),
        ({"name": ""}, "name of the method"),
        ({"targets": torch.tensor([[0, -1], [4, 5]])}, "columns of real tokens"),  # padding
        ({"targets": torch.tensor([[6, -1], [4, 5]])}, "columns of real tokens"),
        ({"targets": torch.full((2, 2), -1)}, "at least one"),
        ({"targets": torch.zeros(2, 2)}, "targets must be ints"),
        ({"source_mask": MASK.int()}, "source_mask must be bools"),
        ({"source_mask": torch.zeros_like(MASK)}, "sample 0 is empty"),
        ({"tokens": TOKENS[:1]}, "tokens must be 2 rows of 6"),
        ({"tokens": [[1] * 6] * 2}, "tokens must be 2 rows"),
        ({"target_tokens": [["a"], ["b"]]}, "target_tokens must be 2 rows of 2"),
        ({"spans": {"image": IMAGE[:1]}}, "span 'image' must be bools"),
        ({"patches": patches().sample_alone(1, range(6))}, "patch map does not fit"),
    ],
)
def test_misshapen_scores_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_numbers_that_are_not_finite_are_refused_where_they_count():
    bad = SCORES.clone()
    bad[0, 1], bad[0, 0, 0] = NAN, math.inf
    assert make(scores=bad).equals(make())
    bad[1, 1, 3] = NAN
    with pytest.raises(NonFiniteError, match="sample 1, target 1, source 3"):
        make(scores=bad)
    with pytest.raises(SettingsError, match="settings"):
        make(settings={"a": NAN})


def test_plot_writes_every_token_and_escapes_it():
    figure = make().plot(0)
    text = figure.data[0].text
    assert list(text[:2]) == ["&lt;s&gt;", "·a"]
    assert "script>" not in text[2].replace("/script&gt;", "")
    assert "<script" not in figure.to_json()
    assert text[3] == "↵"
    assert figure.data[0].y[3] == 0
    assert figure.data[0].y[4] == 1  # the line ends there
    assert figure.layout.title.text == "rollout · tiny →  b"
    assert [d.type for d in figure.data] == ["bar", "scatter"]
    # The colours end at the largest score of a plain token that is not the first; the bar says what lies beyond.
    marker = figure.data[1].marker
    assert (marker.cmin, marker.cmax) == pytest.approx((0.0, 0.4))
    beyond = make(scores=SCORES + torch.tensor([0, 1.0, 0, 0, 0, 0])).plot(0).data[1].marker
    assert beyond.cmax == pytest.approx(0.4)
    assert beyond.colorbar.ticktext[-1].startswith("≥")
    assert make().plot(0, largest=2.0).data[1].marker.cmax == 2.0


def test_plot_draws_the_map_over_the_picture():
    picture = Image.new("RGB", (4, 2), "red")
    figure = make().plot(1, 0, picture)
    kinds = [d.type for d in figure.data]
    assert kinds == ["bar", "bar", "scatter", "heatmap"]
    assert list(figure.data[1].text) == ["[4 image tokens]"]
    heat = figure.data[3]
    assert heat.z.shape == (2, 4)
    assert np.allclose(heat.z, make().image_map(1, 0))
    assert figure.layout.images[0].source.startswith("data:image/png;base64,")
    assert "rgba" in heat.colorscale[0][1]
    assert len(make().plot(1, 0).layout.images) == 0
    array = np.zeros((2, 4, 3), dtype=np.uint8)
    tensor = torch.rand(3, 2, 4)
    assert len(make().plot(1, 0, array).layout.images) == len(make().plot(1, 0, tensor).layout.images) == 1
    with pytest.raises(InputError, match="2 x 4 pixels, the patch map 4 x 2"):
        make().plot(1, 0, Image.new("RGB", (2, 4)))
    with pytest.raises(InputError, match="a picture is"):
        make().plot(1, 0, np.zeros((2, 4, 7)))
    with pytest.raises(InputError, match="no patch map"):
        make(patches=None).plot(1, picture=picture)


def test_signed_scores_have_a_signed_scale():
    figure = make().plot(1, 0)
    assert figure.data[2].marker.cmin == -figure.data[2].marker.cmax
    assert make(scores=SCORES.abs() - 3).plot(1).data[3].zmin < 0


def test_representations_are_escaped_and_small():
    scores = make(caveat=EVIL, name=EVIL, target_tokens=[[EVIL, ""], [EVIL, EVIL]])
    page = scores._repr_html_()
    assert "<script" not in page
    assert "http" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "caveat: " + EVIL in repr(scores)
    assert "2 samples, 2 targets x 6 sources" in repr(make())
    second = make(targets=torch.tensor([[-1, -1], [4, 5]]))._repr_html_()
    assert "sample 1" in second
    assert "data:image/png;base64," in second
    long = torch.rand(1, 1, 5000)
    many = TokenScores(
        long, torch.tensor([[0]]), torch.ones(1, 5000, dtype=torch.bool), [["a"] * 5000], [["a"]], name="x"
    )
    assert len(many._repr_html_()) < 200_000
    assert "4400 more" in many._repr_html_()


def test_a_single_token_can_be_drawn():
    one = TokenScores(
        torch.zeros(1, 1, 1), torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool), [[""]], [[""]], name="x"
    )
    assert one.plot().data[0].text == ("∅",)
    assert "∅" in one._repr_html_()
