"""Deletion and insertion curves against inputs edited one by one, areas by hand, and an oracle on a real model."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import interp
from interp.attribution import blank_out, rollout
from interp.attribution.blanks import blurred
from interp.data.prompts import indirect_objects
from interp.errors import InputError, NonFiniteError, SettingsError, UnknownNameError, UnsupportedError
from interp.evaluation import Curve, deletion_curve, insertion_curve, joined
from interp.figures import interval_lines
from tests import zoo

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
FRACTIONS = (0.0, 0.3, 0.5, 1.0)


@cache
def lens_of(name):
    return interp.wrap(zoo.build(name), zoo.processor(name), name=name)


def scored(lens, batch, seed=0, target=None, **options):
    """Blank-out's result with other numbers in it: distinct ones, in no order."""
    made = blank_out(lens, batch, target=target, **options)
    draw = torch.Generator().manual_seed(seed)
    return replace(made, scores=torch.rand(made.scores.shape, generator=draw))


def plan(row, fractions=FRACTIONS):
    """Columns by falling score, and how many of them each fraction is."""
    order = sorted(range(len(row)), key=lambda c: -float(row[c]))
    return order, [int(f * len(row) + 0.5) for f in fractions]


def probability(model, inputs, target, answer):
    with torch.no_grad():
        return model(**inputs).logits[0, target].softmax(-1)[answer]


def replaced(inputs, gone, key="input_ids"):
    ids = inputs[key].clone()
    ids[0, list(gone)] = 4  # <mask>
    return {**inputs, key: ids}


# Each way of taking away, against a loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_replace_equals_a_loop(name):
    lens, model = lens_of(name), zoo.build(name)
    inputs = zoo.inputs(name, batch=2, length=6)
    batch = lens.prepare(**inputs)
    scores = scored(lens, batch)
    found = [f(lens, batch, scores, answers=[70, 71], fractions=FRACTIONS, batch_size=7, baseline=2)
             for f in (deletion_curve, insertion_curve)]  # fmt: skip
    least = deletion_curve(lens, batch, scores, answers=[70, 71], fractions=FRACTIONS, order="least", baseline=0)
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        order, counts = plan(scores.scores[i, 0])
        for s, k in enumerate(counts):
            for curve, gone in ((found[0], order[:k]), (found[1], order[k:]), (least, order[6 - k :])):
                expected = probability(model, replaced(one, gone), 5, 70 + i)
                torch.testing.assert_close(curve.values[0, i, s], expected, **CLOSE)
    assert found[0].counts.tolist() == [[0, 2, 3, 6]] * 2
    assert found[0].sizes.tolist() == [6, 6]
    assert found[0].values.std() > 1e-6
    assert (found[0].settings["text"], found[0].settings["token"], found[0].unit) == (
        "replace",
        "<mask>",
        "probability",
    )


def test_measures():
    lens, model = lens_of("llama"), zoo.build("llama")
    inputs = zoo.inputs("llama", batch=1, length=5)
    batch = lens.prepare(**inputs)
    scores = scored(lens, batch)
    order, counts = plan(scores.scores[0, 0])
    with torch.no_grad():
        rows = torch.stack([model(**replaced(inputs, order[:k])).logits[0, 4] for k in counts])
    best = int(rows[0].argmax())
    options = {"fractions": FRACTIONS, "baseline": 0}
    wanted = {
        "logit": rows[:, best],
        "logprob": rows.log_softmax(-1)[:, best],
        "probability": rows.softmax(-1)[:, best],
        "accuracy": (rows.argmax(-1) == best).float(),
    }
    for measure, expected in wanted.items():
        got = deletion_curve(lens, batch, scores, measure=measure, **options)
        torch.testing.assert_close(got.values[0, 0], expected, **CLOSE)
    assert (got.unit, got.settings["measure"]) == ("accuracy", "accuracy")
    assert 0 in got.values  # the answer is lost on the way
    assert got.values[0, 0, 0] == 1
    both = deletion_curve(lens, batch, scores, answers=[70], wrong=[80], measure="logit", **options)
    torch.testing.assert_close(both.values[0, 0], rows[:, 70] - rows[:, 80], **CLOSE)
    choice = deletion_curve(lens, batch, scores, answers=[70], wrong=[80], measure="accuracy", **options)
    assert choice.values[0, 0].tolist() == (rows[:, 70] > rows[:, 80]).float().tolist()


@pytest.mark.parametrize(
    ("name", "side"), [("llama", "left"), ("llama", "right"), ("bert", "right"), ("roberta", "right")]
)
def test_drop_equals_shorter_prompts(name, side):
    """Rows that lose different numbers of tokens share a run; the target stays, and so it is no source."""
    lens, model = lens_of(name), zoo.build(name)
    rows = [list(range(70, 78)), list(range(90, 95))]
    batch = lens.prepare(input_ids=rows, padding_side=side)
    scores = scored(lens, batch)
    options = {"answers": [100, 101], "fractions": FRACTIONS, "mode": "drop"}
    got = [f(lens, batch, scores, batch_size=100, **options) for f in (deletion_curve, insertion_curve)]
    narrow = deletion_curve(lens, batch, scores, batch_size=1, **options)
    torch.testing.assert_close(got[0].values, narrow.values, **CLOSE)
    torch.testing.assert_close(got[0].random, narrow.random, **CLOSE)
    assert got[0].sizes.tolist() == [7, 4]
    for i, row in enumerate(rows):
        mine = scores.select(i).scores[0, 0, :-1]
        order, counts = plan(mine)
        for s, k in enumerate(counts):
            for curve, gone in ((got[0], order[:k]), (got[1], order[k:])):
                left = torch.tensor([[t for c, t in enumerate(row) if c not in gone]])
                expected = probability(model, {"input_ids": left}, -1, 100 + i)
                torch.testing.assert_close(curve.values[0, i, s], expected, **CLOSE)


def test_drop_of_a_target_in_the_middle():
    lens, model = lens_of("bert"), zoo.build("bert")
    inputs = zoo.inputs("bert", batch=1, length=6)
    batch = lens.prepare(**inputs)
    scores = scored(lens, batch, target=[2, 4])
    got = deletion_curve(lens, batch, scores, answers=[70], target=0, fractions=FRACTIONS, mode="drop", baseline=0)
    columns = [0, 1, 3, 4, 5]
    order, counts = plan(scores.scores[0, 0, columns])
    for s, k in enumerate(counts):
        keep = sorted({*range(6)} - {columns[c] for c in order[:k]})
        less = {key: value[:, keep] for key, value in inputs.items()}
        expected = probability(model, less, keep.index(2), 70)
        torch.testing.assert_close(got.values[0, 0, s], expected, **CLOSE)


def test_mask_equals_a_mask_given_to_the_model():
    lens, model = lens_of("llama"), zoo.build("llama")
    ids = zoo.inputs("llama", batch=1, length=6)["input_ids"]
    batch = lens.prepare(input_ids=ids)
    scores = scored(lens, batch)
    got = deletion_curve(lens, batch, scores, mode="mask", answers=[70], fractions=FRACTIONS)
    order, counts = plan(scores.scores[0, 0])
    for s, k in enumerate(counts):
        allowed = torch.ones(6, 6).tril().bool()
        allowed[:, order[:k]] = False
        allowed |= torch.eye(6).bool()
        expected = probability(model, {"input_ids": ids, "attention_mask": allowed[None, None]}, 5, 70)
        torch.testing.assert_close(got.values[0, 0, s], expected, **CLOSE)
    assert got.values.std() > 1e-6


@pytest.mark.parametrize("mode", ["replace", "mask", "drop"])
def test_encoder_decoders(mode):
    """Sources in the encoder. A masked token sees itself still, but nobody reads it: the same as a padding mask."""
    lens, model = lens_of("t5"), zoo.build("t5")
    inputs = zoo.inputs("t5", batch=1, length=6)
    batch = lens.prepare(**inputs)
    scores = scored(lens, batch)
    fractions = (0.0, 0.2, 0.5, 0.9)
    got = deletion_curve(lens, batch, scores, mode=mode, answers=[70], fractions=fractions)
    assert got.settings["tower"] == "encoder"
    order, counts = plan(scores.scores[0, 0], fractions)
    assert counts[-1] == 5
    for s, k in enumerate(counts):
        new = replaced(inputs, order[:k]) if mode == "replace" else inputs
        if mode == "mask":
            mask = inputs["attention_mask"].clone()
            mask[0, order[:k]] = 0
            new = {**inputs, "attention_mask": mask}
        elif mode == "drop":
            keep = sorted(order[k:])
            new = {**inputs, **{key: inputs[key][:, keep] for key in ("input_ids", "attention_mask")}}
        torch.testing.assert_close(got.values[0, 0, s], probability(model, new, -1, 70), **CLOSE)
    if mode != "replace":
        with pytest.raises(InputError, match=f"nothing is left of sample 0 when '{mode}' has taken all away"):
            deletion_curve(lens, batch, scores, mode=mode)


@pytest.mark.parametrize("image", ["mean", "blur"])
def test_patches_of_a_vision_transformer_equal_a_loop(image):
    """Class logits; the class token is special and stays."""
    lens, model = lens_of("vit"), zoo.build("vit")
    inputs = zoo.inputs("vit", batch=2)
    pixels = inputs["pixel_values"]
    batch = lens.prepare(**inputs)
    scores = scored(lens, batch, answers=[2, 2])
    got = deletion_curve(lens, batch, scores, image=image, answers=[2, 2], fractions=FRACTIONS, baseline=1)
    assert got.sizes.tolist() == [16, 16]
    assert got.settings["image"] == image
    smooth = blurred(pixels, 4.0) if image == "blur" else pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    for i in range(2):
        order, counts = plan(scores.scores[i, 0, 1:])
        for s, k in enumerate(counts):
            new = pixels[i : i + 1].clone()
            for n in order[:k]:
                row, col = divmod(n, 4)
                box = (slice(None), slice(8 * row, 8 * row + 8), slice(8 * col, 8 * col + 8))
                new[0][box] = smooth[i][box]
            with torch.no_grad():
                expected = model(pixel_values=new).logits[0].softmax(-1)[2]
            torch.testing.assert_close(got.values[0, i, s], expected, **CLOSE)
    masked = deletion_curve(lens, batch, scores, answers=[2, 2], keep_special=False, baseline=0)
    assert masked.sizes.tolist() == [17, 17]
    assert not torch.allclose(masked.values[0, :, -1], got.values[0, :, -1], atol=1e-6)


def test_text_and_pictures_of_an_lvlm():
    """Text dropped and pixels painted over in the same row; and each kind of source alone."""
    lens, model = lens_of("llava"), zoo.build("llava")
    draw = torch.Generator().manual_seed(3)
    pictures = [torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy() for _ in range(2)]
    batch = lens.prepare(["ab<image>cd", "x<image>yz ?"], pictures, padding_side="left")
    inputs = dict(batch.inputs)
    scores = scored(lens, batch)
    options = {"answers": [70, 71], "fractions": FRACTIONS, "baseline": 0, "keep_special": False}
    got = deletion_curve(lens, batch, scores, mode="drop", image="mean", **options)
    for i in range(2):
        real = batch.mask[i].nonzero()[:, 0].tolist()
        columns = real[:-1]
        picture = batch.image_mask[i].nonzero()[:, 0].tolist()
        order, counts = plan(scores.scores[i, 0, columns])
        for s, k in enumerate(counts):
            gone = {columns[n] for n in order[:k]}
            keep = [c for c in real if c not in gone or c in picture]
            new = inputs["pixel_values"][i : i + 1].clone()
            for c in gone & set(picture):
                row, col = divmod(picture.index(c), 4)
                box = (0, slice(None), slice(8 * row, 8 * row + 8), slice(8 * col, 8 * col + 8))
                new[box] = inputs["pixel_values"][i].mean((1, 2), keepdim=True)
            less = {"input_ids": inputs["input_ids"][i : i + 1, keep], "pixel_values": new}
            torch.testing.assert_close(got.values[0, i, s], probability(model, less, -1, 70 + i), **CLOSE)
    kinds = {k: deletion_curve(lens, batch, scores, sources=k, mode="drop", **options) for k in ("image", "text")}
    assert kinds["image"].sizes.tolist() == [16, 16]
    assert kinds["text"].sizes.tolist() == [3, 4]  # without the target
    marked = deletion_curve(lens, batch, scores, sources=scores.spans["image"], mode="drop", **options)
    torch.testing.assert_close(marked.values, kinds["image"].values)
    assert marked.settings["sources"] == "marked"
    # Dropped text and masked image tokens: with everything gone, only the target is left, whatever came before it.
    both = deletion_curve(lens, batch, scores, mode="drop", image="mask", **options)
    alone = torch.stack([
        probability(model, {"input_ids": inputs["input_ids"][i : i + 1, -1:], "position_ids": torch.tensor([[16]])},
                    -1, 70 + i) for i in range(2)])  # fmt: skip
    torch.testing.assert_close(both.values[0, :, -1], alone, **CLOSE)


# What must hold ----------------------------------------------------------------------------------------------------


def test_deletion_and_insertion_are_each_other_read_backwards():
    lens = lens_of("llama")
    batch = lens.prepare(input_ids=[list(range(70, 80)), list(range(90, 95))])
    scores = scored(lens, batch)
    gone, back = (f(lens, batch, scores) for f in (deletion_curve, insertion_curve))
    torch.testing.assert_close(gone.values[..., -1], back.values[..., 0])
    torch.testing.assert_close(gone.values[..., 0], back.values[..., -1])
    least = insertion_curve(lens, batch, scores, order="least")
    torch.testing.assert_close(least.values[:, :1].flip(-1), gone.values[:, :1])  # ten sources: no rounding
    torch.testing.assert_close(least.areas[:, 0], gone.areas[:, 0])
    torch.testing.assert_close(least.random, back.random)
    assert (gone.random[..., 0] == gone.values[0, :, 0]).all()  # sets that orders share are run once
    assert (gone.random[..., -1] == gone.values[0, :, -1]).all()


@pytest.mark.parametrize("mode", ["replace", "mask", "drop"])
@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("llama", "right"), ("bert", "right"), ("t5", "right")])
def test_batched_is_single_and_padding_changes_nothing(mode, name, side):
    """Random orders too: they depend on a sample's own content."""
    lens = lens_of(name)
    rows = [list(range(70, 78)), list(range(90, 95))]
    more = {"decoder_input_ids": torch.tensor([[2, 70, 71], [2, 80, 81]])} if name == "t5" else {}
    both = lens.prepare(input_ids=rows, **more, padding_side=side)
    scores = scored(lens, both)
    options = {"mode": mode, "fractions": (0.0, 0.4, 0.8), "baseline": 3}
    got = deletion_curve(lens, both, scores, answers=[100, 101], batch_size=6, **options)
    assert got.values.std() > 1e-7
    for i, row in enumerate(rows):
        alone = lens.prepare(input_ids=[row], **{k: v[i : i + 1] for k, v in more.items()})
        one = deletion_curve(lens, alone, scores.select(i), answers=[100 + i], batch_size=1, **options)
        torch.testing.assert_close(got.values[:, i : i + 1], one.values, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(got.random[:, i : i + 1], one.random, rtol=1e-4, atol=1e-8)


def test_equal_scores_stand_in_a_random_order_that_the_seed_fixes():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=3, length=8))
    scores = scored(lens, batch)
    flat = replace(scores, scores=torch.zeros_like(scores.scores))
    one, same, other = (deletion_curve(lens, batch, flat, seed=s, baseline=1) for s in (0, 0, 1))
    assert one.equals(same)
    assert not torch.equal(one.values, other.values)
    assert (one.settings["tied"], one.settings["seed"]) == ([1.0], 0)
    assert deletion_curve(lens, batch, scores, baseline=0).settings["tied"] == [0.0]
    more = deletion_curve(lens, batch, scores, baseline=3)
    torch.testing.assert_close(more.random[:1], one.random)  # more orders leave the first ones as they are


def test_several_scores_share_what_they_have_in_common():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=7))
    named = {"a": scored(lens, batch, 0), "b": scored(lens, batch, 1)}
    both = deletion_curve(lens, batch, named)
    for n, (name, one) in enumerate(named.items()):
        alone = deletion_curve(lens, batch, {name: one})
        torch.testing.assert_close(both.values[n : n + 1], alone.values)
        torch.testing.assert_close(both.random, alone.random)
        assert both.value("gain", name) == pytest.approx(alone.value("gain"))
    assert [(n.part, n.metric) for n in both.numbers] == [
        (part, metric) for part in ("a", "b") for metric in ("area", "random", "gain")
    ]


def test_no_set_of_tokens_is_run_twice(monkeypatch):
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=3))
    scores = scored(lens, batch)
    rows = []
    run = type(lens).run

    def counted(self, given, *args, **options):
        rows.extend(tuple(row) for row in given.inputs["input_ids"].tolist())
        return run(self, given, *args, **options)

    monkeypatch.setattr(type(lens), "run", counted)
    deletion_curve(lens, batch, scores, baseline=50)
    sets = rows[2:]  # behind the run that asks for the answer
    assert len(sets) == 16  # all eight sets of three tokens, for each of two samples
    assert len(set(sets)) == 15  # which are alike when all tokens are gone


def test_a_decoder_s_future_is_no_source():
    lens, bert = lens_of("llama"), lens_of("bert")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=6))
    scores = scored(lens, batch, target=[1, 3])
    got = deletion_curve(lens, batch, scores, target=0, fractions=(0.0, 0.5, 1.0), baseline=0)
    assert got.sizes.tolist() == [2, 2]
    changed = replace(scores, scores=scores.scores.index_fill(2, torch.tensor([2, 3, 4, 5]), 9.0))
    same = deletion_curve(lens, batch, changed, target=0, fractions=(0.0, 0.5, 1.0), baseline=0)
    torch.testing.assert_close(same.values, got.values)
    assert deletion_curve(lens, batch, scores, baseline=0).sizes.tolist() == [4, 4]
    batch = bert.prepare(**zoo.inputs("bert", batch=2, length=6))
    seen = deletion_curve(bert, batch, scored(bert, batch, target=[1, 3]), target=0, baseline=0)
    assert seen.sizes.tolist() == [6, 6]


def test_a_picture_for_each_sample_that_cannot_be_repeated():
    """Images packed over the batch: a run for each set of columns, and the same numbers as ever."""
    lens = lens_of("qwen2_vl")
    batch = lens.prepare(**zoo.inputs("qwen2_vl", batch=2))
    scores = scored(lens, batch)
    got = deletion_curve(lens, batch, scores, fractions=(0.0, 0.5, 1.0), baseline=0, sources="image")
    assert got.values.isfinite().all()
    assert (got.values[0, :, 0] - got.values[0, :, -1]).abs().min() > 1e-9


def test_scores_of_an_encoder_are_read_at_the_decoder_s_last_position():
    lens = lens_of("t5")
    batch = lens.prepare(**zoo.inputs("t5", batch=2, length=6))
    inside = rollout(lens, batch, target="last", tower="encoder")
    across = scored(lens, batch)
    both = {"rollout": inside, "other": replace(across, scores=across.scores)}
    got = deletion_curve(lens, batch, both, baseline=0)
    torch.testing.assert_close(got.values[0, :, 0], got.values[1, :, 0])
    own = deletion_curve(lens, batch, inside, baseline=0)
    torch.testing.assert_close(own.values[0], got.values[0])


# The result --------------------------------------------------------------------------------------------------------


def curve(**changes):
    given = {
        "kind": "deletion",
        "order": "most",
        "names": ("a",),
        "fractions": torch.tensor([0.0, 0.25, 1.0]),
        "values": torch.tensor([[[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]]]),
        "random": torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]),
        "counts": torch.tensor([[0, 1, 4], [0, 2, 8]]),
        "sizes": torch.tensor([4, 8]),
        "unit": "probability",
        "settings": {"model": "tiny", "seed": 0, "resamples": 200},
    }
    return Curve(**(given | changes))


def test_areas_and_gains_by_hand():
    found = curve()
    # Sample 0: (1 + .5) / 2 * .25 + (.5 + 0) / 2 * .75; sample 1: .25 + .375.
    assert found.areas.tolist() == [[0.375, 0.625]]
    # Random: (.625 + 1) / 2 and 1.
    assert found.gains.tolist() == [[0.8125 - 0.375, 1 - 0.625]]
    assert (found.value("area"), found.value("random")) == (0.5, 0.90625)
    assert found.value("gain") == pytest.approx(0.40625)
    assert found.mean.tolist() == [[1.0, 0.75, 0.0]]
    signs = {(k, o): curve(kind=k, order=o).value("gain") for k in ("deletion", "insertion") for o in ("most", "least")}
    assert [x > 0 for x in signs.values()] == [True, False, False, True]
    part = curve(fractions=torch.tensor([0.5, 0.625, 1.0]))  # half the range, the same shape
    torch.testing.assert_close(part.areas, found.areas)
    alone = curve(random=torch.zeros(0, 2, 3))
    assert [n.metric for n in alone.numbers] == ["area"]
    with pytest.raises(InputError, match="without random orders"):
        alone.gains  # noqa: B018


def test_intervals_resample_samples():
    found = curve()
    frame = found.summary().set_index("metric")
    assert frame.loc["area", ["low", "high"]].tolist() == [0.375, 0.625]
    assert frame.loc["gain", ["low", "high"]].tolist() == pytest.approx([0.375, 0.4375])
    same = curve(values=torch.ones(1, 2, 3)).summary().set_index("metric")
    assert same.loc["area", ["low", "high"]].tolist() == [1, 1]
    one = curve(values=torch.ones(1, 1, 3), random=torch.ones(1, 1, 3), counts=torch.ones(1, 3).long(),
                sizes=torch.tensor([4]))  # fmt: skip
    assert one.summary()["low"].isna().all()
    one.plot()


def test_frame_figure_and_files(tmp_path):
    found = curve(names=("<b>&",), caveat="<i>not</i> so")
    frame = found.frame()
    assert list(frame.columns) == ["curve", "draw", "sample", "fraction", "count", "value"]
    assert len(frame) == 3 * 2 * 3
    first = frame[frame["curve"] == "<b>&"]
    assert first["value"].tolist() == [1.0, 0.5, 0.0, 1.0, 1.0, 0.0]
    assert first["count"].tolist() == [0, 1, 4, 0, 2, 8]
    assert first["draw"].isna().all()
    assert sorted(frame["draw"].dropna().unique()) == [0, 1]
    figure = found.plot()
    lines = {t.name: t for t in figure.data if t.name}
    assert list(lines) == ["&lt;b&gt;&amp;", "random order"]
    assert lines["&lt;b&gt;&amp;"].y.tolist() == [1.0, 0.75, 0.0]
    assert lines["&lt;b&gt;&amp;"].customdata[1].tolist() == [0.5, 1.0]
    assert lines["random order"].line.dash == "dot"
    assert len(found.plot(("gain",)).data[0].x) == 1
    assert "deletion, most relevant first · tiny · 2 samples" in repr(found)
    html = found._repr_html_()
    assert "over samples" in html
    assert "&lt;i&gt;not&lt;/i&gt; so" in html
    assert "<i>not</i>" not in html
    found.save(tmp_path / "x")
    assert Curve.load(tmp_path / "x").equals(found)
    assert interp.scores.load(tmp_path / "x").equals(found)


def test_lines_within_intervals():
    low, high = [0.0, math.nan, 1.0], [1.0, math.nan, 2.0]
    figure = interval_lines([0, 1, 2], {"<a>": ([0.5, math.nan, 1.5], low, high), "b": ([1, 2, 3], None, None)})
    band, line, other = figure.data
    assert band.x.tolist() == [0, 2, 2, 0]  # the gap is left out
    assert band.y.tolist() == [1, 2, 1, 0]
    assert (line.name, other.name) == ("&lt;a&gt;", "b")
    with pytest.raises(InputError, match=r"'b' has \[2\] values for 3 points"):
        interval_lines([0, 1, 2], {"b": ([1, 2], None, None)})
    with pytest.raises(InputError, match="need both ends"):
        interval_lines([0, 1], {"b": ([1, 2], [0, 1], None)})
    with pytest.raises(InputError, match="draws 1 to 7 series, found 8"):
        interval_lines([0, 1], {str(n): ([1, 2], None, None) for n in range(8)})
    with pytest.raises(InputError, match="found 0"):
        interval_lines([0, 1], {})


def test_what_a_curve_refuses():
    with pytest.raises(InputError, match="fractions ascend"):
        curve(fractions=torch.tensor([0.0, 0.5, 0.5]))
    with pytest.raises(InputError, match="a name for each curve"):
        curve(names=("a", "b"))
    with pytest.raises(NonFiniteError, match=r"curve 0, sample 1, step 2"):
        curve(values=torch.tensor([[[1.0, 0.5, 0.0], [1.0, 1.0, float("nan")]]]))
    with pytest.raises(InputError, match="not shuffling, most"):
        curve(kind="shuffling")
    with pytest.raises(InputError, match="counts are"):
        curve(sizes=torch.tensor([4]))


def test_batches_are_joined():
    lens = lens_of("llama")
    inputs = zoo.inputs("llama", batch=3, length=6)
    batch = lens.prepare(**inputs)
    scores = scored(lens, batch)
    whole = deletion_curve(lens, batch, scores)
    parts = []
    for some in (slice(0, 2), slice(2, 3)):
        less = lens.prepare(**{k: v[some] for k, v in inputs.items()})
        mine = replace(blank_out(lens, less), scores=scores.scores[some])
        parts.append(deletion_curve(lens, less, mine))
    both = joined(parts)
    torch.testing.assert_close(both.values, whole.values, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(both.random, whole.random, rtol=1e-4, atol=1e-8)
    assert both.sizes.tolist() == whole.sizes.tolist()
    assert (both.settings["prompts"], both.settings["tokens"]) == (3, 18)
    assert both.settings["fractions"] == whole.settings["fractions"]
    np.testing.assert_allclose(both.summary()["high"], whole.summary()["high"], rtol=1e-4)
    with pytest.raises(InputError, match="differ in order"):
        joined([curve(), curve(order="least")])
    with pytest.raises(InputError, match="differ in fractions"):
        joined([curve(), curve(fractions=torch.tensor([0.0, 0.5, 1.0]))])
    with pytest.raises(InputError, match="differ in the shape of random"):
        joined([curve(), curve(random=torch.zeros(0, 2, 3))])
    with pytest.raises(InputError, match="differ in seed"):
        joined([curve(), curve(settings={"seed": 1, "resamples": 200})])
    with pytest.raises(InputError, match="results of one kind"):
        joined([])


def test_what_is_wrong_is_said():
    lens = lens_of("llama")
    batch = lens.prepare(input_ids=[[70, 71, 72, 73], [80, 81]])
    other = lens.prepare(input_ids=[[70, 71, 72, 74], [80, 81]])
    scores = scored(lens, batch)
    with pytest.raises(InputError, match=r"another batch .* column 3 of sample 0 is '\*' in one, '\+' in the other"):
        deletion_curve(lens, other, scores)
    with pytest.raises(InputError, match="1 samples of 4 columns"):
        deletion_curve(lens, lens.prepare(input_ids=[[70, 71, 72, 73]]), scores)
    with pytest.raises(InputError, match="sample 1 is padded differently"):
        deletion_curve(lens, lens.prepare(input_ids=[[70, 71, 72, 73], [80, 81]], padding_side="right"), scores)
    with pytest.raises(InputError, match="'b' is of another batch than 'c'"):
        deletion_curve(lens, batch, {"b": scores, "c": scored(lens, other)})
    with pytest.raises(InputError, match="'c' is a Tensor"):
        deletion_curve(lens, batch, {"b": scores, "c": scores.scores})
    with pytest.raises(InputError, match="position 1 of sample 0, the c scores 0"):
        deletion_curve(lens, batch, {"b": scored(lens, batch, target=[1]), "c": scored(lens, batch, target=[0])})
    with pytest.raises(UnknownNameError, match="mode 'erase'"):
        deletion_curve(lens, batch, scores, mode="erase")
    with pytest.raises(UnknownNameError, match="order 'best'"):
        deletion_curve(lens, batch, scores, order="best")
    with pytest.raises(UnknownNameError, match=r"measure 'loss'.*accuracy"):
        insertion_curve(lens, batch, scores, measure="loss")
    with pytest.raises(UnknownNameError, match="kind of sources 'words'"):
        insertion_curve(lens, batch, scores, sources="words")
    with pytest.raises(UnknownNameError, match=r"target 1 .* sample 0 has 1"):
        insertion_curve(lens, batch, scores, target=1)
    for fractions in ((0, 1.1), (-0.1, 1), (0, 0.5, 0.5), (0.5,), (0, float("nan"), 1)):
        with pytest.raises(SettingsError, match="fractions ascend within 0 and 1"):
            deletion_curve(lens, batch, scores, fractions=fractions)
    with pytest.raises(SettingsError, match="random orders from 0, found -1"):
        deletion_curve(lens, batch, scores, baseline=-1)
    with pytest.raises(SettingsError, match="resamples is a whole number"):
        deletion_curve(lens, batch, scores, resamples=0)
    with pytest.raises(InputError, match="have no 'image' tokens among their sources"):
        deletion_curve(lens, batch, scores, sources="image")
    with pytest.raises(InputError, match=r"sources are bools \[2, 4\]"):
        deletion_curve(lens, batch, scores, sources=torch.ones(2, 3).bool())
    first = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(InputError, match="sample 1 has no source"):
        deletion_curve(lens, batch, scores, sources=first)
    llava = lens_of("llava")
    pictures = llava.prepare(**zoo.inputs("llava", batch=1))
    llava.run(pictures, "logits")
    inside = rollout(llava, pictures, target=[0], tower="vision")
    with pytest.raises(UnsupportedError, match="deletion_curve has its sources in 'text' of llava, not in 'vision'"):
        deletion_curve(llava, pictures, inside)


def test_an_answer_that_the_scores_do_not_explain_is_told():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=5))
    scores = blank_out(lens, batch, answers=[70, 71])
    assert deletion_curve(lens, batch, scores, answers=[70, 71], baseline=0).caveat == ""
    other = deletion_curve(lens, batch, scores, answers=[70, 72], baseline=0)
    assert other.caveat == "The blank_out scores explain '(' in sample 1, the curve measures ')'."


# A real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_blank_out_beats_random_orders_on_indirect_objects(smollm):
    """An order by the measured effects of single names: the difference of two names' logits falls with it."""
    prompts = indirect_objects(6, seed=1)
    batch = smollm.prepare([p.text for p in prompts])
    asked = {"answers": [p.answer for p in prompts], "wrong": [p.wrong for p in prompts]}
    scores = blank_out(smollm, batch, **asked)
    options = {"measure": "logit", "baseline": 3, "fractions": (0, 0.15, 0.4, 0.7, 1), **asked}
    most, back = (f(smollm, batch, scores, **options) for f in (deletion_curve, insertion_curve))
    least = deletion_curve(smollm, batch, scores, order="least", **options | {"baseline": 0})
    assert most.value("area") < most.value("random") < least.value("area")
    for found in (most, back):
        assert found.summary().set_index("metric").loc["gain", "low"] > 0, found
    torch.testing.assert_close(most.values[..., -1], back.values[..., 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(least.values[..., -1], most.values[..., -1], rtol=1e-3, atol=1e-3)
