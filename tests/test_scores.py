import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import interp.files
import interp.scores
from interp.errors import FileError, InputError, NonFiniteError, SettingsError, UnknownNameError
from interp.files import replacing, write_json, write_parquet, write_text
from interp.scores import HeadScores

GRID = torch.tensor([[1.0, -3.0, 2.0], [0.5, 2.0, -1.0]])


def make(**changes):
    per_prompt = torch.stack([GRID - 1, GRID + 1])
    given = {"scores": GRID, "name": "direct_effect", "unit": "logits", "per_prompt": per_prompt}
    given |= {"settings": {"model": "tiny", "seed": 3, "layers": (0, 1), "deep": {"a": [None, True, 0.1]}}}
    return HeadScores(**(given | changes))


def ragged(**changes):
    valid = torch.tensor([[True, True, True], [True, True, False]])
    return make(valid=valid, **changes)


def test_frame_has_one_row_for_each_head_with_ranks():
    frame = make(extra={"previous": GRID * 10}).frame()
    assert list(frame.columns) == ["layer", "head", "score", "previous", "rank"]
    assert frame["layer"].tolist() == [0, 0, 0, 1, 1, 1]
    assert frame["head"].tolist() == [0, 1, 2, 0, 1, 2]
    assert frame["score"].tolist() == [1.0, -3.0, 2.0, 0.5, 2.0, -1.0]
    assert frame["previous"].tolist() == [10.0, -30.0, 20.0, 5.0, 20.0, -10.0]
    assert frame["rank"].tolist() == [3, 6, 1, 4, 2, 5]  # the tie at 2.0 goes to the earlier layer


def test_frame_per_prompt():
    frame = ragged().frame(per_prompt=True)
    assert list(frame.columns) == ["prompt", "layer", "head", "score", "rank"]
    assert len(frame) == 2 * 5
    second = frame[(frame["prompt"] == 1) & (frame["layer"] == 1) & (frame["head"] == 1)]
    assert second["score"].tolist() == [3.0]
    assert sorted(frame[frame["prompt"] == 0]["rank"]) == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="without per_prompt"):
        make(per_prompt=None).frame(per_prompt=True)


def test_top_ranks_by_score_size_and_extra_columns():
    scores = make(extra={"previous": -GRID})
    heads = lambda frame: list(zip(frame["layer"], frame["head"], strict=True))  # noqa: E731
    assert heads(scores.top(2)) == [(0, 2), (1, 1)]
    assert heads(scores.top(2, by="abs")) == [(0, 1), (0, 2)]
    assert heads(scores.top(1, by="abs", largest=False)) == [(1, 0)]
    assert heads(scores.top(1, largest=False)) == [(0, 1)]
    assert heads(scores.top(1, by="previous")) == [(0, 1)]
    assert scores.top(2)["rank"].tolist() == [1, 2]
    assert len(scores.top(100)) == 6
    with pytest.raises(UnknownNameError, match=r"'prev' does not exist.*previous"):
        scores.top(2, by="prev")
    for k in (0, -1, 2.0, True):
        with pytest.raises(SettingsError, match="k is a whole number"):
            scores.top(k)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-5, 5, width=16)), st.booleans(), st.booleans())
def test_ranking_is_a_sorted_permutation(values, largest, size):
    scores = HeadScores(torch.from_numpy(values), name="random")
    top = scores.top(12, by="abs" if size else "score", largest=largest)
    key = top["score"].abs() if size else top["score"]
    steps = np.diff(key.to_numpy())
    assert (steps <= 0).all() if largest else (steps >= 0).all()
    assert sorted(zip(top["layer"], top["head"], strict=True)) == [(x, y) for x in range(3) for y in range(4)]
    places = (top["layer"] * 4 + top["head"]).to_numpy()
    assert (np.diff(places)[steps == 0] > 0).all()  # equal scores keep the order of layers and heads
    frame = scores.frame()
    assert sorted(frame["rank"]) == list(range(1, 13))
    assert (np.diff(frame.sort_values("rank")["score"]) <= 0).all()


def test_non_finite_numbers_are_refused_with_their_first_place():
    bad = GRID.clone()
    bad[1, 2], bad[1, 1] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match=r"scores is inf at layer 1, head 1 \(first of 2"):
        make(scores=bad)
    with pytest.raises(NonFiniteError, match="previous is inf at layer 1, head 1"):
        make(extra={"previous": bad})
    prompts = torch.stack([GRID, bad])
    with pytest.raises(NonFiniteError, match="per_prompt is inf at prompt 1, layer 1, head 1"):
        make(per_prompt=prompts)


def test_heads_that_do_not_exist_are_nan_and_left_out():
    scores = ragged(extra={"previous": GRID})
    for tensor in (scores.scores, scores.extra["previous"], *scores.per_prompt):
        assert tensor.isnan().tolist() == [[False] * 3, [False, False, True]]
    assert len(scores.frame()) == 5
    assert (1, 2) not in set(zip(scores.top(9)["layer"], scores.top(9)["head"], strict=True))
    low, high = scores.interval()
    assert low.isnan().sum() == high.isnan().sum() == 1
    hole = GRID.clone()
    hole[1, 2] = math.nan
    assert ragged(scores=hole).equals(ragged())
    with pytest.raises(NonFiniteError, match="layer 1, head 2"):
        make(scores=hole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(3)}, r"\[layer, head\]"),
        ({"scores": torch.zeros(0, 3)}, r"\[layer, head\]"),
        ({"scores": GRID.int(), "per_prompt": None}, "floats.*found int32"),
        ({"per_prompt": GRID}, "per_prompt must be floats"),
        ({"per_prompt": torch.zeros(0, 2, 3)}, "per_prompt"),
        ({"extra": {"previous": GRID.T}}, r"previous must be floats \[layer 2, head 3\]"),
        ({"extra": {"rank": GRID}}, "cannot be named 'rank'"),
        ({"valid": torch.zeros(2, 3, dtype=torch.bool)}, "valid must be bools"),
        ({"valid": GRID}, "valid must be bools"),
        ({"name": ""}, "name of the method"),
    ],
)
def test_misshapen_scores_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": math.nan}, r"settings\['lr'\] is nan"),
        ({"a": {"b": [1, torch.float32]}}, r"settings\['a'\]\['b'\]\[1\]"),
        ({1: "x"}, "key 1"),
    ],
)
def test_settings_that_json_cannot_hold_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        make(settings=settings)


def test_low_precision_is_widened_and_the_input_is_not_shared():
    given = GRID.to(torch.bfloat16)
    assert make(scores=given).scores.dtype == torch.float32
    assert make(scores=GRID.double()).scores.dtype == torch.float64
    mine = GRID.clone().requires_grad_()
    kept = make(scores=mine).scores
    mine.data[0, 0] = 99
    assert kept[0, 0] == 1.0
    assert not kept.requires_grad


def test_interval_agrees_with_the_normal_formula_and_repeats():
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(400, 2, 3, generator=generator) * torch.tensor([1.0, 2.0, 4.0]) + 5
    scores = make(scores=prompts.mean(0), per_prompt=prompts)
    low, high = scores.interval(0.95, resamples=4000, seed=7)
    error = 1.96 * prompts.std(0) / math.sqrt(400)
    assert torch.allclose(high - scores.scores, error, rtol=0.08)
    assert torch.allclose(scores.scores - low, error, rtol=0.08)
    again = scores.interval(0.95, resamples=4000, seed=7)
    assert torch.equal(low, again[0])
    assert torch.equal(high, again[1])
    assert not torch.equal(low, scores.interval(0.95, resamples=4000, seed=8)[0])
    narrow = scores.interval(0.5, resamples=4000)
    assert (narrow[0] > low).all()
    assert (narrow[1] < high).all()


def test_interval_of_two_prompts_by_hand():
    # Two prompts give the means -1, 0 (half of the time) and 1: the outer quarter on each side.
    low, high = make(scores=torch.zeros(1, 1), per_prompt=torch.tensor([-1.0, 1.0]).view(2, 1, 1)).interval()
    assert (low.item(), high.item()) == (-1.0, 1.0)
    low, high = make(scores=torch.zeros(1, 1), per_prompt=torch.tensor([-1.0, 1.0]).view(2, 1, 1)).interval(0.2)
    assert (low.item(), high.item()) == (0.0, 0.0)


def test_interval_refuses_what_it_cannot_answer():
    with pytest.raises(InputError, match="without per_prompt"):
        make(per_prompt=None).interval()
    with pytest.raises(InputError, match="two prompts"):
        make(per_prompt=GRID[None]).interval()
    with pytest.raises(InputError, match="not the mean"):
        make(scores=GRID.abs()).interval()
    for options in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(SettingsError):
            make().interval(**options)


@pytest.mark.parametrize("build", [make, ragged])
def test_saved_scores_come_back_equal(build, tmp_path):
    scores = build(extra={"previous": GRID.double() * 3}, tower="vision")
    folder = scores.save(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["scores.json", "scores.safetensors"]
    for back in (HeadScores.load(folder), interp.scores.load(folder)):
        assert type(back) is HeadScores
        assert back.equals(scores)
        assert torch.equal(back.valid, scores.valid)
        assert back.settings == {"model": "tiny", "seed": 3, "layers": [0, 1], "deep": {"a": [None, True, 0.1]}}
        assert back.extra["previous"].dtype == torch.float64
    assert not scores.equals(build(tower="vision"))
    assert not scores.equals(build(extra={"previous": GRID.double() * 3 + 1e-9}, tower="vision"))


def edit_json(folder, **changes):
    path = folder / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_files_are_refused(tmp_path):
    folder = make().save(tmp_path / "run")
    tensors = folder / "scores.safetensors"
    whole = tensors.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        tensors.write_bytes(damaged)
        with pytest.raises(FileError, match=r"damaged.*not the file"):
            HeadScores.load(folder)
    tensors.unlink()
    with pytest.raises(FileError, match="no such file"):
        HeadScores.load(folder)
    tensors.write_bytes(whole)
    assert HeadScores.load(folder).equals(make())

    document = (folder / "scores.json").read_text()
    for changes, message in [
        ({"class": "TokenScores"}, "TokenScores"),
        ({"class": None}, "lacks its version or class"),
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "does not hold interp results"),
        ({"fields": {}}, "damaged"),
        ({"fields": {"name": "x", "extra": ["gone"]}}, r"damaged.*gone"),
    ]:
        edit_json(folder, **changes)
        with pytest.raises(FileError, match=message):
            interp.scores.load(folder)
        with pytest.raises(FileError, match=message):
            HeadScores.load(folder)
        (folder / "scores.json").write_text(document)
    (folder / "scores.json").write_text(document[:40])
    with pytest.raises(FileError, match="not json"):
        interp.scores.load(folder)
    with pytest.raises(FileError, match="cannot read"):
        interp.scores.load(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    old = make()
    folder = old.save(tmp_path / "run")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interp.results.write_json", fail)
    with pytest.raises(FileError, match="No space left"):
        make(scores=GRID + 1).save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["scores.json", "scores.safetensors"]
    assert HeadScores.load(folder).equals(old)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"

    def half_way():
        with replacing(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_way()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    with monkeypatch.context() as patched:
        patched.setattr(interp.files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "Permission denied")))
        with pytest.raises(FileError, match=r"a\.txt: Permission denied"):
            write_text(path, "new")
    assert path.read_bytes() == b"old\r\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(FileError, match="a folder stands there"):
        write_text(path.parent, "x")
    with pytest.raises(FileError, match="cannot write"):
        write_text(path / "below a file", "x")


def test_parquet_comes_back_equal(tmp_path):
    import pandas as pd

    frame = make().frame()
    write_parquet(tmp_path / "scores.parquet", frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), frame)


def test_representations_are_escaped_and_small():
    scores = make(name="<script>alert(1)</script>", unit="<b>", settings={"model": "<i>"}, extra={"<u>": GRID})
    page = scores._repr_html_()
    for tag in ("<script", "<b>l", "<i>", "<u>"):
        assert tag not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page
    assert "data:image/png;base64," in page
    assert "strongest L0 H1 = -3 <b>" in repr(scores)
    big = HeadScores(torch.randn(80, 64), name="big")
    assert len(big._repr_html_()) < 40_000


def test_plot_draws_the_scores_and_checks_its_options():
    scores = make(extra={"previous": GRID.abs()})
    heat = scores.plot()
    assert np.array_equal(heat.data[0].z, GRID.numpy())
    assert heat.layout.title.text == "direct_effect · tiny"
    assert np.array_equal(scores.plot(column="previous").data[0].z, GRID.abs().numpy())
    bars = scores.plot(kind="bars", k=2)
    assert list(bars.data[0].text) == ["L0 H1", "L0 H2"]
    assert list(bars.data[0].x) == [-3.0, 2.0]
    low, high = (end[0, 1].item() for end in scores.interval())
    assert list(bars.data[1].x[:2]) == [low, high]
    assert len(make(per_prompt=None).plot(kind="bars").data) == 1
    for options in ({"kind": "pie"}, {"column": "prev"}):
        with pytest.raises(UnknownNameError):
            scores.plot(**options)
    with pytest.raises(TypeError):
        scores.plot(colour="red")


def test_result_classes_register_once():
    with pytest.raises(SettingsError, match="registered already"):
        interp.scores.register(type("HeadScores", (interp.scores.Scores,), {}))
    assert interp.scores.register(HeadScores) is HeadScores
