"""`CausalMap`: its numbers by hand, its tables and pictures, and that it comes back as it was saved."""

import math

import numpy as np
import pytest
import torch

import interp
from interp.errors import InputError, NonFiniteError, SettingsError, UnknownNameError
from interp.scores import load
from interp.tracing import CausalMap

NAN = float("nan")


def make(**changes):
    """Two sites with three layers and two positions; the third prompt is too short for the second position."""
    cells = [(s, layer, -1, g) for s in range(2) for layer in (0, 2, 5) for g in range(2)]
    values = torch.arange(36, dtype=torch.float32).reshape(12, 3) / 10
    values[1::2, 2] = NAN
    fields = {
        "values": values,
        "clean": torch.tensor([4.0, 2.0, 1.0]),
        "corrupt": torch.tensor([0.0, 1.0, 0.95]),
        "cells": torch.tensor(cells),
        "exists": torch.tensor([[True, True, True], [True, True, False]]),
        "sites": ("attn_out", "<b>"),
        "groups": ("3", "7"),
        "direction": "denoise",
        "metric": "logit",
        "unit": "logits",
        "single": True,
        "tokens": (" the", "<i>"),
        "settings": {"model": "m<1>"},
    }
    return CausalMap(**{**fields, **changes})


def test_effects_by_hand():
    found = make()
    # Cell 0 has values 0, 0.1, 0.2: moved -0, -0.9, -0.75 of gaps 4, 1, 0.05.
    assert found.gaps.tolist() == pytest.approx([4, 1, 0.05], abs=1e-6)
    assert float(found.effects[0]) == pytest.approx((0 - 0.9 - 0.75) / 5.05, abs=1e-6)
    # Cell 1 has 0.3, 0.4 and no third prompt.
    assert float(found.effects[1]) == pytest.approx((0.3 - 0.6) / 5, abs=1e-6)
    # The third gap is below a tenth of the mean of 5.05 / 3.
    assert found.left_out == 1
    assert float(found.mean_ratios[0]) == pytest.approx((0 / 4 - 0.9 / 1) / 2, abs=1e-6)
    assert make(min_gap=0.0).left_out == 0
    assert float(make(min_gap=0.0).mean_ratios[0]) == pytest.approx((0 - 0.9 - 0.75 / 0.05) / 3, abs=1e-4)
    noise = make(direction="noise")
    assert float(noise.effects[0]) == pytest.approx((-4 - 1.9 - 0.8) / -5.05, abs=1e-6)
    assert torch.equal(noise.base, found.clean)


def test_interval_holds_the_effect_and_resamples_prompts():
    torch.manual_seed(0)
    clean, corrupt = torch.randn(40) + 5, torch.randn(40)
    values = torch.stack([corrupt + (clean - corrupt) * 0.3, corrupt + (clean - corrupt) * torch.rand(40)])
    found = CausalMap(
        values=values,
        clean=clean,
        corrupt=corrupt,
        cells=torch.tensor([[0, 0, -1, 0], [0, 1, -1, 0]]),
        exists=torch.ones(1, 40, dtype=torch.bool),
        sites=("z",),
        groups=("all",),
        direction="denoise",
        metric="logit",
    )
    low, high = found.interval()
    assert float(low[0]) == pytest.approx(0.3, abs=1e-5)
    assert float(high[0]) == pytest.approx(0.3, abs=1e-5)
    assert float(low[1]) < float(found.effects[1]) < float(high[1])
    # An independent bootstrap of the same ratio.
    random = np.random.default_rng(5)
    draws = random.integers(40, size=(4000, 40))
    moved, gap = (values[1] - corrupt).double().numpy(), (clean - corrupt).double().numpy()
    ends = np.quantile(moved[draws].sum(1) / gap[draws].sum(1), [0.025, 0.975])
    assert [float(low[1]), float(high[1])] == pytest.approx(ends.tolist(), abs=0.02)
    assert torch.equal(found.interval(seed=1)[0], found.interval(seed=1)[0])
    one = make(values=make().values[:, :1], clean=torch.ones(1), corrupt=torch.zeros(1), exists=torch.ones(2, 1).bool())
    assert one.frame()["low"].isna().all()
    with pytest.raises(SettingsError):
        found.interval(confidence=1.0)


def test_frame_top_and_grid():
    found = make()
    frame = found.frame()
    wanted = ["site", "layer", "position", "token", "head", "value", "effect", "low", "high", "mean_ratio", "prompts"]
    assert list(frame.columns) == wanted
    assert frame["prompts"].tolist() == [3, 2] * 6
    assert frame["position"].tolist() == [3, 7] * 6
    assert frame["value"][1] == pytest.approx(0.35)
    assert frame.attrs == {"model": "m<1>"}
    top = found.top(3)
    assert top["effect"].tolist() == sorted(frame["effect"], reverse=True)[:3]
    assert found.top(2, by="abs", largest=False)["effect"].abs().max() <= frame["effect"].abs().median()
    assert set(found.top(4, site="attn_out")["site"]) == {"attn_out"}
    assert len(found.top(99)) == 12
    grid = found.grid("<b>", of="value")
    assert grid.index.tolist() == [0, 2, 5]
    assert grid.columns.tolist() == [3, 7]
    assert grid[3][2] == pytest.approx(float(found.values[8].mean()))
    named = make(single=False, groups=("subject", "last"), tokens=())
    assert list(named.frame().columns[:3]) == ["site", "layer", "group"]
    assert named.grid("attn_out").columns.tolist() == ["subject", "last"]


def by_heads(groups=1):
    cells = torch.tensor([(0, layer, h, g) for layer in (1, 3) for h in range(3) for g in range(groups)])
    names = tuple("ab"[:groups])
    return make(
        values=torch.rand(len(cells), 2),
        clean=torch.ones(2),
        corrupt=torch.zeros(2),
        cells=cells,
        exists=torch.ones(groups, 2, dtype=torch.bool),
        sites=("z",),
        groups=names,
        single=False,
        tokens=(),
    )


def test_heads_are_columns_where_there_is_one_group():
    found = by_heads()
    grid = found.grid()
    assert grid.columns.tolist() == [0, 1, 2]
    assert grid[2][3] == pytest.approx(float(found.effects[5]))
    both = by_heads(2)
    with pytest.raises(InputError, match="choose a head"):
        both.grid()
    grid = both.grid(head=1)
    assert grid.columns.tolist() == ["a", "b"]
    assert grid["b"][1] == pytest.approx(float(both.effects[3]))
    both.plot(head=1)
    assert "choose" not in both._repr_html_()
    with pytest.raises(UnknownNameError, match="head"):
        both.grid(head=7)


def test_pictures_show_text_as_text():
    found = make()
    figure = found.plot()
    assert [len(x.z) for x in figure.data] == [3, 3]
    assert figure.data[0].zmin == figure.data[1].zmin
    text = figure.to_json()
    assert "<i>" not in text
    assert "&lt;i&gt;" in text
    assert figure.layout.xaxis.ticktext == ("·the", "&lt;i&gt;")
    assert len(found.plot("attn_out").data) == 1
    assert found.plot("attn_out", of="value").data[0].z[0][0] == pytest.approx(0.1)
    page = found._repr_html_()
    assert "<b>" not in page.replace("<b>denoise", "")
    assert "&lt;b&gt;" in page
    assert page.count("<img") == 2
    assert repr(found).startswith("CausalMap(denoise · logit · m<1>: 12 cells, 3 prompts; strongest <b> L")


def test_it_comes_back_as_it_was_saved(tmp_path):
    found = make()
    found.save(tmp_path / "map")
    for again in (CausalMap.load(tmp_path / "map"), load(tmp_path / "map")):
        assert again.equals(found)
        assert again.frame().equals(found.frame())
        assert again.tokens == found.tokens
    assert interp.CausalMap is CausalMap


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"direction": "up"}, UnknownNameError, "up"),
        ({"min_gap": -1.0}, SettingsError, "min_gap"),
        ({"cells": torch.zeros(12, 3)}, InputError, "cells are"),
        ({"exists": torch.ones(2, 2).bool()}, InputError, "exists is"),
        ({"groups": ("3",), "exists": torch.ones(1, 3).bool()}, InputError, "name a site or group"),
        ({"tokens": ("a",)}, InputError, "one token for each"),
        ({"clean": torch.tensor([4.0, math.inf, 1.0])}, NonFiniteError, "clean is inf at prompt 1"),
        ({"values": torch.full((12, 3), NAN)}, NonFiniteError, "values is nan at cell 0, prompt 0"),
        ({"settings": {"a": {1}}}, SettingsError, "settings"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_unknown_names():
    found = make()
    with pytest.raises(UnknownNameError, match="attn"):
        found.grid("attn")
    with pytest.raises(InputError, match="several sites"):
        found.grid()
    with pytest.raises(UnknownNameError, match="ranking"):
        found.top(by="size")
    with pytest.raises(SettingsError, match="k is"):
        found.top(0)
    with pytest.raises(UnknownNameError, match="number"):
        found.grid("attn_out", of="size")
