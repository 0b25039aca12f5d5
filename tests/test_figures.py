import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from interp.errors import InputError, NonFiniteError
from interp.figures import escape, head_heatmap, layer_lines, pattern_heatmap, ranked_bars, show_token
from interp.palette import DIVERGING, SEQUENTIAL, colour_range, thumbnail

EVIL = "<script>alert('$x$')</script> %{x} & <b>"


def test_escape_leaves_no_markup_formula_or_template():
    shown = escape(EVIL)
    assert "<" not in shown
    assert "$" not in shown
    assert "%{" not in shown
    assert shown.startswith("&lt;script&gt;alert('&#36;x&#36;')")
    assert shown.endswith("&#37;{x} &amp; &lt;b&gt;")


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" Mary", "·Mary"), ("a b ", "a b·"), ("\n", "↵"), ("\t", "⇥"), ("  ", "··"), ("", "∅"), ("<s>", "&lt;s&gt;")],
)
def test_tokens_are_visible(token, shown):
    assert show_token(token) == shown


def test_head_heatmap_centres_signed_data_on_zero():
    figure = head_heatmap(torch.tensor([[1.0, -4.0], [2.0, 0.0]]), title=EVIL, unit=EVIL)
    heat = figure.data[0]
    assert (heat.zmin, heat.zmax) == (-4.0, 4.0)
    assert tuple(colour for _, colour in heat.colorscale) == DIVERGING
    assert DIVERGING[len(DIVERGING) // 2] == heat.colorscale[4][1]  # the middle colour lies at zero
    assert figure.layout.yaxis.autorange == "reversed"  # layer 0 at the top
    assert list(figure.layout.yaxis.ticktext) == ["0", "1"]
    for text in (figure.layout.title.text, heat.colorbar.title.text, heat.hovertemplate):
        assert "script>" not in text
        assert "$" not in text
    assert heat.hovertemplate.count("%{") == 3


def test_head_heatmap_of_non_negative_data_is_sequential():
    heat = head_heatmap([[0.0, 1.0], [2.0, 3.0]]).data[0]
    assert (heat.zmin, heat.zmax) == (0.0, 3.0)
    assert tuple(colour for _, colour in heat.colorscale) == SEQUENTIAL
    forced = head_heatmap([[0.0, 1.0], [2.0, 3.0]], diverging=True).data[0]
    assert (forced.zmin, forced.zmax) == (-3.0, 3.0)


@pytest.mark.parametrize(
    ("values", "diverging", "ends"),
    [
        ([0.0, 0.0], True, (-1.0, 1.0)),
        ([0.0, 0.0], False, (0.0, 1.0)),
        ([1.0, 4.0, math.nan], False, (0.0, 4.0)),
        ([3.0, 4.0], False, (3.0, 4.0)),
        ([4.0, 4.0], False, (0.0, 4.0)),
        ([-3.0, -1.0], True, (-3.0, 3.0)),
        ([-3.0, -1.0], False, (-3.0, -1.0)),
    ],
)
def test_colour_range(values, diverging, ends):
    assert colour_range(np.array(values), diverging) == ends


def test_gaps_are_kept_and_infinities_refused():
    heat = head_heatmap([[1.0, math.nan], [2.0, -3.0]]).data[0]
    assert math.isnan(heat.z[0][1])
    assert heat.hoverongaps is False
    with pytest.raises(NonFiniteError, match=r"holds -inf at \[1, 0\]"):
        head_heatmap([[1.0, 2.0], [-math.inf, 3.0]])
    for empty in (np.zeros((0, 3)), [[math.nan]], [1.0, 2.0]):
        with pytest.raises(InputError, match="nothing to draw"):
            head_heatmap(empty)


@pytest.mark.parametrize(("layers", "heads"), [(3, 4), (30, 9), (80, 64), (1, 1), (12, 12)])
def test_sizes_fit_the_page_and_labels_stay_apart(layers, heads):
    figure = head_heatmap(np.zeros((layers, heads)))
    layout = figure.layout
    assert layout.width <= 832  # the width of a report's column
    for axis, count, pixels in (
        (layout.xaxis, heads, layout.width - layout.margin.l - layout.margin.r),
        (layout.yaxis, layers, layout.height - layout.margin.t - layout.margin.b),
    ):
        places = list(axis.tickvals)
        assert places[0] == 0
        assert [str(p) for p in places] == list(axis.ticktext)
        if len(places) > 1:
            assert (places[1] - places[0]) * pixels / count >= 12


def test_ranked_bars_keep_equal_labels_apart():
    figure = ranked_bars(["L0 H1", "L0 H1", EVIL], [3.0, -2.0, 1.0], low=[2, -3, 0], high=[4, -1, 2], unit="logits")
    bars, intervals = figure.data
    assert list(bars.y) == [0, 1, 2]
    assert list(figure.layout.yaxis.ticktext[:2]) == ["L0 H1", "L0 H1"]
    assert "<" not in figure.layout.yaxis.ticktext[2]
    assert bars.marker.color[0] != bars.marker.color[1]
    assert [x for x in intervals.x if not math.isnan(x)] == [2, 4, -3, -1, 0, 2]
    top, bottom = figure.layout.yaxis.range[1], figure.layout.yaxis.range[0]
    assert top < 0 < 2 < bottom  # the first bar is at the top
    with pytest.raises(InputError, match="both ends"):
        ranked_bars(["a"], [1.0], low=[0.0])
    with pytest.raises(InputError, match="differ in length: 2, 1"):
        ranked_bars(["a", "b"], [1.0])
    with pytest.raises(InputError, match=r"interval 1 \('b'\) has low 3 above high 2"):
        ranked_bars(["a", "b"], [1.0, 2.5], low=[0, 3], high=[2, 2])
    with pytest.raises(NonFiniteError, match=r"nan at \[1\]"):
        ranked_bars(["a", "b"], [1.0, math.nan])


def test_pattern_heatmap_keeps_equal_tokens_apart():
    pattern = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    tokens = [" the", " the", "<script>", "\n"]
    figure = pattern_heatmap(pattern, tokens)
    assert np.array_equal(figure.data[0].z, pattern)
    assert list(figure.layout.xaxis.ticktext) == ["·the", "·the", "&lt;script&gt;", "↵"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]
    assert figure.data[0].x is None  # indices, so that plotly merges nothing
    assert list(figure.data[0].customdata[2, 0]) == ["&lt;script&gt;", "·the"]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0.0, 1.0)
    some = pattern_heatmap(pattern[2:], tokens, query_tokens=tokens[2:])
    assert list(some.layout.yaxis.ticktext) == ["&lt;script&gt;", "↵"]


def test_pattern_heatmap_refuses_what_it_cannot_draw():
    with pytest.raises(InputError, match="2 queries by 4 keys, found 4 query"):
        pattern_heatmap(np.ones((2, 4)), list("abcd"))
    with pytest.raises(InputError, match=r"pattern\[1, 0\] is -1"):
        pattern_heatmap([[1.0, 0.0], [-1.0, 2.0]], ["a", "b"])
    with pytest.raises(InputError, match=r"3 x 3 = 9 cells are more than max_cells=8"):
        pattern_heatmap(np.ones((3, 3)), list("abc"), max_cells=8)
    with pytest.raises(NonFiniteError, match="nan"):
        pattern_heatmap([[1.0, math.nan], [0.5, 0.5]], ["a", "b"])


def test_layer_lines():
    figure = layer_lines({"a <b>": [1.0, 2.0], "c": torch.tensor([0.5, -1.0])}, unit="logits")
    assert [line.name for line in figure.data] == ["a &lt;b&gt;", "c"]
    assert list(figure.data[1].y) == [0.5, -1.0]
    assert figure.layout.showlegend
    assert not layer_lines([1.0, 2.0]).layout.showlegend
    for bad in ({}, {"a": [1.0], "b": [1.0, 2.0]}, {str(i): [1.0] for i in range(20)}):
        with pytest.raises(InputError, match="draws 1 to"):
            layer_lines(bad)


def test_thumbnail_has_one_pixel_for_each_head():
    head = "data:image/png;base64,"
    address = thumbnail([[1.0, -1.0, 0.0], [math.nan, 1.0, 1.0]])
    assert address.startswith(head)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address[len(head) :]))))
    assert image.shape == (2, 3, 4)
    hexes = ["#" + bytes(pixel[:3]).hex() for pixel in image[0]]
    assert hexes == [DIVERGING[-1], DIVERGING[0], DIVERGING[4]]
    assert image[:, :, 3].tolist() == [[255, 255, 255], [0, 255, 255]]
