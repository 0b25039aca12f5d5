"""Pruning: against plain loops of full runs, against zeroing everything, its random orders, its curve."""

import inspect
import math

import numpy as np
import pytest
import torch

import interp
from interp import edits, heads
from interp.errors import EditError, InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads.common import next_token_loss
from interp.heads.prune import random_orders, without_lowest
from interp.heads.pruning_curve import PruningCurve
from interp.scores import HeadScores, load
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
GOOD, BAD = [120, 121, 122], [130, 131, 132]
ORDER = torch.tensor([[5.0, 9.0, 1.0, 7.0], [3.0, 11.0, 2.0, 8.0], [12.0, 4.0, 10.0, 6.0]])


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def batch(llama):
    return llama.prepare(input_ids=IDS, padding_side="left")


def planted(values=ORDER, **changes):
    return HeadScores(values, name="planted", **({"settings": {"model": "llama"}} | changes))


def loss_of(lens, batch, removed, change=None):
    """The next-token loss of every prompt in one plain run without some heads."""
    change = edits.scale_heads(removed, 0.0) if removed and change is None else change or ()
    return next_token_loss(batch)(lens.run(batch, ["logits"], change).logits)


def lowest_first(values):
    return sorted(((i, h) for i in range(3) for h in range(4)), key=lambda p: float(values[p]))


def test_heads_go_in_the_order_of_the_ranking(llama, batch):
    curve = heads.prune(llama, batch, ranking=planted(), step=0.25, controls=0)
    order = lowest_first(ORDER)
    assert curve.counts == [0, 3, 6, 9, 12]
    assert curve.shares == [0, 0.25, 0.5, 0.75, 1]
    for i, count in enumerate(curve.counts):
        assert set(curve.removed(i)) == set(order[:count])
        torch.testing.assert_close(curve.values[0, i], loss_of(llama, batch, order[:count]), atol=1e-5, rtol=1e-5)
    assert curve.random.shape == (2, 0, 5, 3)
    assert curve.name == "planted"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "jamba", "gpt_neox"])
def test_without_any_head_every_output_is_zero(name):
    lens = interp.wrap(build(name), processor(name), name=name)
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    curve = heads.prune(lens, batch, step=0.5, controls=1)
    nothing = edits.splice(torch.zeros_like, site="z")
    wanted = next_token_loss(batch)(lens.run(batch, ["logits"], nothing).logits)
    torch.testing.assert_close(curve.values[0, -1], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(curve.random[0, 0, -1], wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(curve.values[:, 0], curve.random[:, 0, 0])
    plain = next_token_loss(batch)(lens.run(batch, ["logits"]).logits)
    torch.testing.assert_close(curve.values[0, 0], plain, atol=1e-6, rtol=1e-6)


def naive_greedy(lens, batch, per_step, metric, normalize=False):
    """One head mask that is really there, its gradient by autograd prompt by prompt, recomputed after each step."""
    removed, steps = [], [[]]
    while len(removed) < 12:
        total = torch.zeros(3, 4)
        for b in range(len(batch)):
            grads = torch.zeros(3, 4)
            trace = lens.run(
                batch,
                ["z"],
                edits.scale_heads(removed, 0.0) if removed else (),
                gradients=["z"],
                metric=lambda logits, b=b: metric(logits)[b],
            )
            for layer in range(3):
                grads[layer] = (trace["z", layer] * trace.gradient("z", layer)).sum((0, 1, 3))
            total += grads.abs()
        if normalize:
            total = total / total.norm(dim=1, keepdim=True).clamp_min(1e-20)
        left = [p for p in lowest_first(total) if p not in removed]
        removed = removed + left[:per_step]
        steps.append(removed)
    return steps


@pytest.mark.parametrize("normalize", ["none", "layer"])
def test_greedy_is_the_plain_loop(llama, batch, normalize):
    metric = next_token_loss(batch)
    steps = naive_greedy(llama, batch, 2, metric, normalize == "layer")
    found = heads.prune(llama, batch, strategy="greedy", step=1 / 6, controls=0, normalize=normalize)
    assert [set(found.removed(i)) for i in range(7)] == [set(s) for s in steps]
    for i, removed in enumerate(steps):
        torch.testing.assert_close(found.values[0, i], loss_of(llama, batch, removed), atol=1e-5, rtol=1e-5)
    first = heads.prune(llama, batch, step=1 / 6, controls=0, normalize=normalize)
    assert found.removed(1) == first.removed(1)
    assert found.removed(4) != first.removed(4)  # importance changes as heads go


def test_one_shot_goes_by_importance(llama, batch):
    curve = heads.prune(llama, batch, step=1 / 12, upto=0.5, controls=0)
    order = lowest_first(heads.importance(llama, batch).scores)
    assert curve.counts == list(range(7))
    assert [set(curve.removed(i)) for i in range(7)] == [set(order[:i]) for i in range(7)]
    answered = heads.prune(llama, batch, step=1 / 12, upto=0.25, controls=0, answers=GOOD, wrong=BAD)
    order = lowest_first(heads.importance(llama, batch, answers=GOOD, wrong=BAD).scores)
    assert set(answered.removed(-1)) == set(order[:3])


def test_importance_of_what_is_left(llama, batch):
    gone = [(1, 2), (2, 0)]
    found = heads.importance(llama, batch, edits=edits.scale_heads(gone, 0.0)).scores
    assert found[1, 2] == 0
    assert found[2, 0] == 0
    step = 1e-3
    slope = [
        loss_of(llama, batch, None, [edits.scale_heads(gone, 0.0), edits.scale_heads(1 + s * step, layers=0, heads=1)])
        for s in (1, -1)
    ]
    torch.testing.assert_close(found[0, 1], ((slope[0] - slope[1]) / (2 * step)).abs().mean(), atol=2e-4, rtol=0.05)


def test_what_is_measured_with_answers(llama, batch):
    curve = heads.prune(llama, batch, ranking=planted(), answers=GOOD, wrong=BAD, step=0.5, controls=0)
    assert curve.metrics == ("loss", "accuracy", "logit difference")
    gone = edits.scale_heads(curve.removed(1), 0.0)
    logits, rows = llama.run(batch, ["logits"], gone).logits[:, -1], torch.arange(3)
    torch.testing.assert_close(curve.values[0, 1], -logits.log_softmax(-1)[rows, GOOD], atol=1e-5, rtol=1e-5)
    apart = logits[rows, GOOD] - logits[rows, BAD]
    torch.testing.assert_close(curve.values[2, 1], apart, atol=1e-5, rtol=1e-5)
    assert torch.equal(curve.values[1, 1], (apart > 0).float())
    likely = logits.argmax(-1).tolist()
    alone = heads.prune(llama, batch, ranking=planted(), answers=[likely[0], GOOD[1], likely[2]], step=0.5, controls=0)
    assert alone.values[1, 1].tolist() == [1.0, float(likely[1] == GOOD[1]), 1.0]


def test_heads_at_their_mean(llama, batch):
    curve = heads.prune(llama, batch, ranking=planted(), mode="mean", step=0.5, controls=1)
    reference = llama.run(batch, ["z"])
    gone = edits.ablate(mode="mean", reference=reference, pairs=curve.removed(1))
    torch.testing.assert_close(curve.values[0, 1], loss_of(llama, batch, None, gone), atol=1e-5, rtol=1e-5)
    alone = [llama.prepare(input_ids=[row]) for row in IDS]
    split = heads.prune(llama, alone, ranking=planted(), mode="mean", step=0.5, controls=1)
    torch.testing.assert_close(split.values, curve.values, atol=1e-5, rtol=1e-4)
    greedy = heads.prune(llama, batch, mode="mean", strategy="greedy", step=0.5, controls=0)
    assert greedy.counts == [0, 6, 12]


@pytest.mark.parametrize("strategy", ["one_shot", "greedy"])
def test_batches_padding_and_runs_change_nothing(llama, batch, strategy):
    options = {"strategy": strategy, "step": 0.25, "controls": 2, "seed": 3}
    whole = heads.prune(llama, batch, **options, max_tokens=1)
    variants = [
        heads.prune(llama, batch, **options, max_tokens=40),
        heads.prune(llama, batch, **options, max_tokens=10**6),
        heads.prune(llama, [llama.prepare(input_ids=[row]) for row in IDS], **options),
        heads.prune(llama, llama.prepare(input_ids=IDS, padding_side="right"), **options),
    ]
    for other in variants:
        assert torch.equal(other.kept, whole.kept)
        assert torch.equal(other.random_kept, whole.random_kept)
        torch.testing.assert_close(other.values, whole.values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other.random, whole.random, atol=1e-5, rtol=1e-4)
    assert whole.settings["prompts"] == variants[2].settings["prompts"] == 3
    assert whole.settings["tokens"] == variants[2].settings["tokens"] == 15


def test_layers_keep_some_heads(llama, batch):
    curve = heads.prune(llama, batch, ranking=planted(), step=0.25, at_least=2, controls=1, matched="none")
    assert curve.counts == [0, 3, 6]
    assert (curve.kept[-1].sum(1) == 2).all()
    assert (curve.random_kept[0, -1].sum(1) >= 2).all()
    kept = torch.ones(3, 4, dtype=torch.bool)
    assert (~without_lowest(ORDER, kept, 3, 3)).nonzero().tolist() == [[0, 2], [1, 2], [2, 1]]  # one of each layer
    assert (~without_lowest(torch.zeros(3, 4), kept, 2)).nonzero().tolist() == [[0, 0], [0, 1]]  # ties in order
    with pytest.raises(SettingsError, match="at_least=4"):
        heads.prune(llama, batch, ranking=planted(), at_least=4)


@pytest.mark.parametrize("matched", ["layer", "none"])
def test_random_orders_are_nested_and_of_the_same_size(matched):
    kept = torch.ones(4, 3, 4, dtype=torch.bool)
    kept[1, 0, :2] = kept[2, 0, :2] = kept[3, 0, :3] = False
    kept[2, 2, 1] = kept[3, 2, 1] = False
    found = random_orders(kept, 30, matched, seed=1)
    assert found[:, 0].all()
    assert not (found[:, 1:] & ~found[:, :-1]).any()
    if matched == "layer":
        assert (found.sum(3) == kept.sum(2)).all()
        assert len({tuple(x.flatten().tolist()) for x in found[:, 1]}) == 6  # two of four heads
    else:
        assert (found.sum((2, 3)) == kept.sum((1, 2))).all()
        assert (found.sum(3) != kept.sum(2)).any()
    assert torch.equal(found, random_orders(kept, 30, matched, seed=1))
    assert not torch.equal(found, random_orders(kept, 30, matched, seed=2))


def test_random_curves_are_those_of_their_heads(llama, batch):
    curve = heads.prune(llama, batch, ranking=planted(), step=1 / 3, controls=3)
    for draw in range(3):
        for step in range(1, 4):
            gone = (~curve.random_kept[draw, step]).nonzero().tolist()
            torch.testing.assert_close(curve.random[0, draw, step], loss_of(llama, batch, gone), atol=1e-5, rtol=1e-5)


def curve_by_hand():
    """Two prompts; the loss goes 1, 2, 4 and 3, 2, 6 with 0, 1 and 4 of 4 heads removed."""
    kept = torch.tensor([[[True, True], [True, True]], [[True, False], [True, True]], [[False, False], [False, False]]])
    values = torch.tensor([[[1.0, 3.0], [2.0, 2.0], [4.0, 6.0]], [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]])
    random = torch.tensor([[[[1.0, 3.0], [4.0, 4.0], [4.0, 6.0]]], [[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]])
    return PruningCurve("planted", ("loss", "accuracy"), values, random, kept, kept[None])


def test_the_curve_by_hand(tmp_path):
    curve = curve_by_hand()
    assert curve.shares == [0, 0.25, 1]
    assert curve.removed(1) == [(0, 1)]
    summary = curve.summary().set_index("metric")
    area = 0.25 * (2 + 2) / 2 + 0.75 * (2 + 5) / 2
    random = 0.25 * (2 + 4) / 2 + 0.75 * (4 + 5) / 2
    assert summary.loc["loss", "area"] == pytest.approx(area)
    assert summary.loc["loss", "gain"] == pytest.approx(random - area)  # a low loss is good
    assert summary.loc["accuracy", "gain"] == pytest.approx(0.25 * 0.5 / 2 + 0.75 * 0.5 / 2)
    assert set(map(str, summary.dtypes)) == {"float64"}
    assert summary.loc["loss", "gain_low"] <= summary.loc["loss", "gain"] <= summary.loc["loss", "gain_high"]
    frame = curve.frame()
    assert len(frame) == 2 * 2 * 3
    own = frame[(frame["curve"] == "planted, one_shot") & (frame["metric"] == "loss")]
    assert own["value"].tolist() == [2.0, 2.0, 5.0]
    assert own["removed"].tolist() == [0, 1, 4]
    assert own["low"].tolist() == [1.0, 2.0, 4.0]
    assert own["high"].tolist() == [3.0, 2.0, 6.0]
    assert frame.equals(curve.frame())
    curve.save(tmp_path / "curve")
    assert load(tmp_path / "curve").equals(curve)
    names = {trace.name for trace in curve.plot("accuracy").data if trace.name}
    assert names == {"planted, one_shot", "random order"}
    assert "without 4 of them" in repr(curve)
    with pytest.raises(UnknownNameError, match="los"):
        curve.plot("los")
    with pytest.raises(UnknownNameError, match="step 3 does not exist"):
        curve.removed(3)
    with pytest.raises(SettingsError, match="confidence"):
        curve.frame(1.0)


def test_a_curve_of_one_prompt_has_no_interval(llama):
    curve = heads.prune(llama, llama.prepare(input_ids=[IDS[0]]), step=0.5, controls=1)
    assert curve.frame()["low"].isna().all()
    assert curve.summary()["gain_low"].isna().all()
    assert len(curve.plot().data) == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"values": torch.ones(2, 3)}, "values"),
        ({"metrics": ("loss",)}, "a name for each metric"),
        ({"kept": torch.ones(3, 2, 2, dtype=torch.bool)}, "every step removes heads"),
        ({"kept": curve_by_hand().kept.flip(0)}, "stays removed"),
        ({"random_kept": torch.ones(2, 3, 2, 2, dtype=torch.bool)}, "random_kept"),
    ],
)
def test_curves_that_do_not_fit(changes, text):
    curve = curve_by_hand()
    names = ("name", "metrics", "values", "random", "kept", "random_kept")
    # With run-time type checks, as in these tests, shapes that contradict each other are found before.
    with pytest.raises((InputError, TypeError), match=text):
        PruningCurve(**{n: getattr(curve, n) for n in names} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"strategy": "exact"}, UnknownNameError, "one_shot, greedy"),
        ({"mode": "resample"}, UnknownNameError, "zero, mean"),
        ({"normalize": "global"}, UnknownNameError, "none, layer"),
        ({"matched": "layers"}, UnknownNameError, "layer"),
        ({"step": 0.0}, SettingsError, "step"),
        ({"upto": 1.5}, SettingsError, "upto"),
        ({"at_least": -1}, SettingsError, "at_least"),
        ({"upto": 0.01}, SettingsError, "nothing is removed"),
        ({"by": "abs"}, SettingsError, "given ranking"),
        ({"ranking": planted(), "by": "previous"}, UnknownNameError, "previous"),
        ({"ranking": planted(), "strategy": "greedy"}, SettingsError, "a ranking was given"),
        ({"ranking": planted(settings={"model": "gpt2"})}, EditError, "a head list from another model.*'gpt2'"),
        ({"ranking": planted(torch.ones(2, 4))}, InputError, r"\[2, 4\].*12 that can be removed, \[3, 4\]"),
        ({"ranking": planted(tower="vision")}, UnknownNameError, "vision"),
        ({"answers": ["abcd", "e", "f"]}, InputError, "4 tokens"),
    ],
)
def test_bad_input(llama, batch, changes, error, text):
    with pytest.raises(error, match=text):
        inspect.unwrap(heads.prune)(llama, batch, **changes)  # past the tests' type check


def test_models_without_heads_or_logits():
    state = interp.wrap(build("mamba"), processor("mamba"))
    with pytest.raises(UnsupportedError):
        heads.prune(state, state.prepare(["The cat"]))
    encoder = interp.wrap(build("bert"), processor("bert"))
    with pytest.raises(UnsupportedError):
        heads.prune(encoder, encoder.prepare(["The cat"]))


def test_the_vision_tower_of_an_image_model():
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given, name="llava")
    batch = lens.prepare(**given)
    ranking = planted(tower="vision", settings={"model": "llava"})
    curve = heads.prune(lens, batch, ranking=ranking, answers=[70, 71], step=0.5, controls=1)
    gone = edits.scale_heads(curve.removed(1), 0.0, tower="vision")
    logits = lens.run(batch, ["logits@last"], gone).logits[:, 0]
    torch.testing.assert_close(curve.values[2, 1], logits[torch.arange(2), [70, 71]], atol=1e-5, rtol=1e-4)
    assert not torch.equal(curve.values[2, 1], curve.values[2, 0])


@pytest.mark.slow
def test_smollm_is_hurt_less_by_the_order_of_importance(smollm):
    from interp.data import indirect_objects

    prompts = indirect_objects(24, seed=0)
    batch = smollm.prepare([p.text for p in prompts], padding_side="left")
    answers = {"answers": [p.answer for p in prompts], "wrong": [p.wrong for p in prompts]}
    curve = heads.prune(smollm, batch, **answers, step=0.2, upto=0.4, controls=2)
    assert curve.counts == [0, 54, 108]
    intact = curve.values[:, 0].mean(-1)
    assert intact[1] > 0.8  # it knows the answers
    assert math.isfinite(curve.values.sum())
    loss = curve.frame().query("metric == 'loss' and step == 1").set_index("curve")["value"]
    assert loss["importance, one_shot"] < loss["random order"]
    assert np.isfinite(curve.summary()["gain"]).all()
