"""Lists of heads as edits, random heads, norm-matched scaling, effects against controls, folding into the weights."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp import edits, heads
from interp.errors import EditError, InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads.measure import scaling
from interp.heads.resampled import double_means, means
from interp.scores import HeadScores, load
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
GOOD, BAD = [120, 121, 122], [130, 131, 132]
SET = [(0, 1), (2, 0), (2, 3)]


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def batch(llama):
    return llama.prepare(input_ids=IDS, padding_side="left")


def ranking(values=None, **changes):
    values = torch.arange(12.0).reshape(3, 4) if values is None else values
    return HeadScores(values, name="planted", **({"settings": {"model": "llama"}} | changes))


def logits_of(lens, batch, change=()):
    return lens.run(batch, ["logits"], change).logits


# Lists of heads.


def test_a_ranking_is_a_list_of_heads(llama, batch):
    top = ranking().top(3)
    pairs = [(2, 3), (2, 2), (2, 1)]
    wanted = logits_of(llama, batch, edits.scale_heads(-1.0, pairs=pairs))
    assert not torch.equal(wanted, logits_of(llama, batch))
    for change in (
        edits.scale_heads(top, -1.0),
        edits.scale_heads(pairs, -1.0),
        edits.scale_heads(-1.0, pairs=top),
        edits.scale_heads(pd.DataFrame(pairs, columns=["layer", "head"]), -1.0),
    ):
        assert torch.equal(logits_of(llama, batch, change), wanted)
    removed = logits_of(llama, batch, edits.ablate(pairs=top))
    assert torch.equal(removed, logits_of(llama, batch, edits.scale_heads(top, 0.0)))


def test_scaling_by_one_changes_no_bit(llama, batch):
    assert torch.equal(logits_of(llama, batch, edits.scale_heads(ranking().top(12), 1.0)), logits_of(llama, batch))


def test_heads_of_another_model_are_refused(llama, batch):
    other = ranking(settings={"model": "gpt2"}).top(2)
    for change in (edits.scale_heads(other, 0.0), edits.ablate(pairs=other)):
        with pytest.raises(EditError, match=r"a head list from another model.*'gpt2'.*'llama'"):
            llama.run(batch, ["logits"], change)
    left = llama.prepare(input_ids=[IDS[0]])
    with pytest.raises(EditError, match="a head list from another model"):
        llama.generate(left, edits.scale_heads(other[other["head"] > 1], 0.0), max_new_tokens=2)
    plain = list(zip(other["layer"], other["head"], strict=True))
    llama.run(batch, ["logits"], edits.scale_heads(plain, 0.0))
    for call in (
        lambda: heads.random_heads(other, llama),
        lambda: heads.random_heads(other, ranking()),
        lambda: heads.effect_of(llama, batch, other),
        lambda: heads.norm_matched(llama, other, 0.0),
        lambda: heads.fold(llama, other, 0.0).__enter__(),
    ):
        with pytest.raises(EditError, match="a head list from another model"):
            call()
    large = ranking(torch.zeros(9, 4), settings={})
    with pytest.raises(UnknownNameError, match=r"layer 8 does not exist.*3 layers"):
        llama.run(batch, ["logits"], edits.scale_heads(large.frame().tail(2), 0.0))


def test_heads_are_looked_for_in_their_own_tower():
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given, name="llava")
    batch = lens.prepare(**given)
    seen = ranking(tower="vision", settings={"model": "llava"}).top(2)
    found = lens.run(batch, ["vision:z.2", "z.2"], edits.scale_heads(seen, 0.0))
    assert found["vision:z", 2][:, :, [2, 3]].abs().sum() == 0
    assert found["z", 2][:, :, [2, 3]].abs().sum() > 0
    with pytest.raises(EditError, match="tower 'text' is asked for, but the heads were ranked in tower 'vision'"):
        edits.scale_heads(seen, 0.0, tower="text")
    reference = lens.run(batch, ["vision:z"])
    mean = edits.ablate(mode="mean", reference=reference, pairs=seen)
    found = lens.run(batch, ["vision:z.2"], mean)["vision:z", 2]
    torch.testing.assert_close(found[0, 0, 3], reference["vision:z", 2][:, :, 3].mean((0, 1)))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: edits.scale_heads(pd.DataFrame({"layer": [1]}), 0.0), EditError, "columns layer and head"),
        (lambda: edits.scale_heads([(0.5, 1)], 0.0), EditError, "pairs of whole numbers"),
        (lambda: edits.scale_heads([(0, 1, 2)], 0.0), EditError, "pairs of whole numbers"),
        (lambda: edits.scale_heads([], 0.0), EditError, "at least one"),
        (lambda: edits.scale_heads([(0, 1)]), SettingsError, "the factor behind the heads"),
        (lambda: edits.scale_heads([(0, 1)], 0.0, pairs=[(0, 1)]), SettingsError, "twice"),
        (lambda: edits.scale_heads([(0, 1)], 0.0, layers=1), SettingsError, "either"),
    ],
)
def test_what_is_no_list_of_heads(call, error, text):
    with pytest.raises(error, match=text):
        call()


# Random heads.


def test_random_heads_are_others_of_the_same_layers(llama):
    chosen, barred = [(0, 1), (2, 0), (2, 3)], [(0, 0)]
    for of in (llama, ranking()):
        lists = heads.random_heads(chosen, of, exclude=barred, draws=40, seed=3)
        assert len(lists) == 40
        for pairs in lists:
            assert [layer for layer, _ in pairs] == [0, 2, 2]
            assert len(set(pairs)) == 3
            assert not set(pairs) & {*chosen, *barred}
        assert {h for pairs in lists for layer, h in pairs if layer == 0} == {2, 3}  # every free head is drawn
    assert lists == heads.random_heads(chosen, ranking(), exclude=barred, draws=40, seed=3)
    assert lists != heads.random_heads(chosen, ranking(), exclude=barred, draws=40, seed=4)
    assert heads.random_heads(chosen, ranking(), exclude=[]) == heads.random_heads(chosen, ranking())


def test_random_heads_of_any_layer():
    lists = heads.random_heads([(2, 0), (2, -3 + 4)], ranking(), matched="none", draws=60)
    assert all(len(set(pairs)) == 2 and not {(2, 0), (2, 1)} & set(pairs) for pairs in lists)
    assert {layer for pairs in lists for layer, _ in pairs} == {0, 1, 2}
    drawn = np.bincount([layer for pairs in lists for layer, _ in pairs], minlength=3)
    assert drawn[2] < drawn[0]  # two of its four heads are left: about 48, 48 and 24 of 120


def test_too_few_heads_to_draw_from():
    many = [(1, 0), (1, 1), (1, 2)]
    with pytest.raises(InputError, match="layer 1 has 3 chosen heads, and only 1 others"):
        heads.random_heads(many, ranking())
    lists = heads.random_heads(many, ranking(), matched="nearest", draws=30)
    for pairs in lists:
        assert len(set(pairs)) == 3
        assert (1, 3) in pairs
        assert not set(pairs) & set(many)
    assert {layer for pairs in lists for layer, _ in pairs} == {0, 1, 2}
    # Nothing is free in layer 0: all comes from the next one.
    assert heads.random_heads([(0, 0), (0, 1), (0, 2), (0, 3)], ranking(), matched="nearest")[0] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
    enough = [(0, 1), (2, 0)]
    for matched in ("layer", "nearest"):
        assert [[layer for layer, _ in x] for x in heads.random_heads(enough, ranking(), matched=matched)] == [
            [0, 2]
        ] * 10
    with pytest.raises(InputError, match="there are 7 chosen heads, and only 5 others"):
        heads.random_heads([(i, h) for i in range(3) for h in range(3)][:7], ranking(), matched="nearest")
    lists = heads.random_heads(many, ranking(), disjoint=False, draws=20)
    assert all([layer for layer, _ in pairs] == [1, 1, 1] for pairs in lists)
    holes = ranking(valid=torch.tensor([[True] * 4, [True, True, False, False], [True] * 4]))
    with pytest.raises(UnknownNameError, match="head 2 of layer 1 is not among the 10 heads"):
        heads.random_heads([(1, 2)], holes)
    assert heads.random_heads([(-2, 0)], holes, draws=2) == [[(1, 1)], [(1, 1)]]
    with pytest.raises(SettingsError, match="draws"):
        heads.random_heads(many, ranking(), draws=0)


# Norm-matched scaling.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "gpt_neox", "olmo2", "opt", "dinov2"])
def test_norm_matched_scaling_keeps_the_size_and_changes_the_direction(name):
    given = inputs(name) if name == "dinov2" else {"input_ids": torch.tensor([IDS[0], [*IDS[2], 99]])}
    lens = interp.wrap(build(name), sample=given, name=name)
    batch = lens.prepare(**given)
    chosen = [(0, 1), (2, 0), (2, 3)]
    change = heads.norm_matched(lens, chosen, -1.0)
    found = lens.run(batch, ["attn_out.0,2"], change)
    # Layer 0 gets the model's own stream; layer 2 that which the edits of layer 0 left.
    own = lens.run(batch, ["attn_out.0"])["attn_out", 0]
    there = lens.run(batch, ["attn_out.2"], change[:2])["attn_out", 2]
    for layer, old in ((0, own), (2, there)):
        torch.testing.assert_close(found["attn_out", layer].norm(dim=-1), old.norm(dim=-1), atol=1e-5, rtol=1e-3)
        assert (found["attn_out", layer] - old).norm() > 1e-2 * old.norm()
    scaled = lens.run(batch, ["attn_out.0"], edits.scale_heads([(0, 1)], -1.0))["attn_out", 0]
    cosine = torch.nn.functional.cosine_similarity(found["attn_out", 0], scaled, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-5, rtol=0)


def test_norm_matched_scaling_at_positions_and_of_nothing(llama, batch):
    own = llama.run(batch, ["attn_out.1"])["attn_out", 1]
    change = heads.norm_matched(llama, [(1, 2)], 3.0, positions="last")
    found = llama.run(batch, ["attn_out.1"], change)["attn_out", 1]
    assert torch.equal(found[:, :-1], own[:, :-1])
    assert not torch.allclose(found[:, -1], own[:, -1])
    torch.testing.assert_close(found[:, -1].norm(dim=-1), own[:, -1].norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert heads.norm_matched(llama, [(1, 2)], 1.0) == []
    everything = heads.norm_matched(llama, [(1, h) for h in range(4)], 0.0)
    assert llama.run(batch, ["attn_out.1"], everything)["attn_out", 1].abs().max() == 0  # no bias: nothing to scale up
    with pytest.raises(EditError, match="finite"):
        heads.norm_matched(llama, [(1, 2)], float("nan"))


def test_norm_matched_scaling_in_generation(llama):
    """Token by token it is what one run over the finished text gives."""
    prompt = llama.prepare(input_ids=[IDS[0]])
    change = heads.norm_matched(llama, SET, -2.0)
    made = llama.generate(prompt, change, max_new_tokens=6, min_new_tokens=6)
    plain = llama.generate(prompt, max_new_tokens=6, min_new_tokens=6)
    assert not torch.equal(made.tokens, plain.tokens)
    whole = llama.prepare(input_ids=made.sequences)
    logits = llama.run(whole, ["logits"], change).logits[0, len(IDS[0]) - 1 : -1]
    eos = llama.model.generation_config.eos_token_id
    if eos is not None:
        logits[:, eos] = -torch.inf
    assert torch.equal(logits.argmax(-1), made.tokens[0])


# Effects against controls.


def by_hand(lens, batch, pairs, scale):
    """loss, accuracy, logit difference of every prompt, from one plain run."""
    logits = logits_of(lens, batch, edits.scale_heads(pairs, scale) if pairs else ())[:, -1]
    rows = torch.arange(3)
    apart = logits[rows, GOOD] - logits[rows, BAD]
    return torch.stack([-logits.log_softmax(-1)[rows, GOOD], (apart > 0).float(), apart])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "jamba"])
@pytest.mark.parametrize(("scale", "max_tokens"), [(0.0, 1), (-1.0, 1000)])
def test_effects_are_those_of_plain_edits(name, scale, max_tokens):
    lens = interp.wrap(build(name), processor(name), name=name)
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    have = [i for i, layer in enumerate(lens.anatomy.towers["text"].layers) if "attn" in layer.attention]
    sets = {"first": [(have[-1], 1), (have[-1], 3)], "second": [(have[0], 0), (have[-1], 2)]}
    found = heads.effect_of(
        lens, batch, sets, scale=scale, answers=GOOD, wrong=BAD, controls=2, seed=5, max_tokens=max_tokens
    )
    assert found.metrics == ("loss", "accuracy", "logit difference")
    before = by_hand(lens, batch, [], 1.0)
    torch.testing.assert_close(found.before, before, atol=1e-5, rtol=1e-5)
    for j, (name_, pairs) in enumerate(sets.items()):
        torch.testing.assert_close(found.after[:, j], by_hand(lens, batch, pairs, scale), atol=2e-5, rtol=1e-4)
        assert found.sets[name_] == tuple(pairs)
        for d, others in enumerate(heads.random_heads(pairs, lens, draws=2, seed=5)):
            torch.testing.assert_close(found.random[:, j, d], by_hand(lens, batch, others, scale), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.changes[2].mean(-1), (found.after[2] - before[2]).mean(-1))


def test_effects_without_answers_by_batch_and_by_prompt(llama, batch):
    top = ranking().top(2)
    together = heads.effect_of(llama, batch, top, controls=1)
    assert together.metrics == ("loss", "accuracy")
    logits = logits_of(llama, batch, edits.scale_heads(top, 0.0))
    for i, row in enumerate(IDS):
        target = torch.tensor(row[1:])
        mine = logits[i, -len(row) : -1]
        loss = torch.nn.functional.cross_entropy(mine, target)
        torch.testing.assert_close(together.after[0, 0, i], loss, atol=1e-5, rtol=1e-5)
        assert together.after[1, 0, i] == (mine.argmax(-1) == target).float().mean()
    alone = heads.effect_of(llama, [llama.prepare(input_ids=[row]) for row in IDS], top, controls=1)
    for name in ("before", "after", "random"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), atol=1e-5, rtol=1e-4)
    right = llama.prepare(input_ids=IDS, padding_side="right")
    torch.testing.assert_close(
        heads.effect_of(llama, right, top, controls=1).after, together.after, atol=1e-5, rtol=1e-4
    )
    answered = heads.effect_of(llama, [llama.prepare(input_ids=[row]) for row in IDS], top, answers=GOOD, controls=0)
    assert answered.metrics[2] == "logit"
    wanted = llama.run(llama.prepare(input_ids=[IDS[2]]), ["logits@last"]).logits[0, 0]
    torch.testing.assert_close(answered.before[2, 2], wanted[GOOD[2]])
    assert answered.before[1, 2] == float(wanted.argmax() == GOOD[2])


def test_a_scale_of_one_changes_no_bit(llama, batch):
    found = heads.effect_of(llama, batch, SET, scale=1.0, controls=3)
    assert torch.equal(found.after[:, 0], found.before)
    assert not found.random_changes.any()


def test_each_copy_of_a_batch_has_its_own_heads(llama, batch):
    factors = torch.ones(2, 3, 4)
    factors[0, 1, 2], factors[1, 1, 0] = 0.0, -1.0
    found = llama.run(batch.repeat(2), ["z.1"], scaling(factors, 3))["z", 1]
    plain = llama.run(batch, ["z.1"])["z", 1]
    first, second = plain.clone(), plain.clone()
    first[:, :, 2], second[:, :, 0] = 0.0, -plain[:, :, 0]
    torch.testing.assert_close(found, torch.cat([first, second]))


def test_both_ends_of_a_ranking():
    scores = ranking()
    ends = heads.extremes(scores, 2)
    assert list(ends) == ["top 2", "bottom 2"]
    assert ends["top 2"]["head"].tolist() == [3, 2]
    assert list(zip(ends["bottom 2"]["layer"], ends["bottom 2"]["head"], strict=True)) == [(0, 0), (0, 1)]
    with pytest.raises(SettingsError, match="overlap"):
        heads.extremes(scores, 7)


def test_effects_as_a_frame_and_on_disk(llama, batch, tmp_path):
    found = heads.effect_of(llama, batch, heads.extremes(ranking(), 2), answers=GOOD, wrong=BAD, controls=4)
    frame = found.frame()
    assert len(frame) == 2 * 3
    row = frame[(frame["set"] == "top 2") & (frame["metric"] == "loss")].iloc[0]
    change, each = found.changes[0, 0].double(), found.random_changes[0, 0].double().mean(-1)
    assert row["change"] == pytest.approx(float(change.mean()))
    assert row["after"] - row["before"] == pytest.approx(row["change"], abs=1e-6)
    assert row["low"] <= row["change"] <= row["high"]
    assert change.min() <= row["low"]
    assert row["high"] <= change.max()
    assert (row["random_low"], row["random_high"]) == (
        pytest.approx(float(each.min())),
        pytest.approx(float(each.max())),
    )
    assert row["difference"] == pytest.approx(float(change.mean() - each.mean()))
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert row["p"] == (1 + int((each.abs() >= change.mean().abs()).sum())) / 5
    assert frame.equals(found.frame())
    found.save(tmp_path / "effects")
    assert load(tmp_path / "effects").equals(found)
    assert load(tmp_path / "effects").sets == found.sets
    assert len(found.plot("accuracy").data[0].y) == 4
    with pytest.raises(UnknownNameError, match="los"):
        found.plot("los")
    assert "top 2" in repr(found)
    single = heads.effect_of(llama, llama.prepare(input_ids=[IDS[0]]), SET, controls=0)
    assert single.frame()["low"].isna().all()
    assert "random" not in single.frame()
    assert len(single.plot().data[0].y) == 1


def test_the_bootstrap_is_the_plain_one():
    values = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double().numpy()
    drawn = means(values, 300, 1)
    assert drawn.shape == (300, 2, 5)
    np.testing.assert_allclose(drawn.mean(0), values.mean(-1), atol=0.15)
    assert (drawn.max(0) <= values.max(-1)).all()
    spread = values.std(-1) / np.sqrt(7)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.2)
    both = double_means(values, 4000, 1)
    assert both.shape == (4000, 2)
    np.testing.assert_allclose(both.mean(0), values.mean((-1, -2)), atol=0.03)
    random = np.random.default_rng(0)
    slow = []
    for _ in range(4000):
        rows, columns = random.integers(5, size=5), random.integers(7, size=7)
        slow.append(values[:, rows][:, :, columns].mean((1, 2)))
    np.testing.assert_allclose(both.std(0), np.std(slow, 0), rtol=0.06)
    one = double_means(values[:, :1], 300, 1)
    np.testing.assert_allclose(one, means(values[:, 0], 300, 1))  # the same prompts are drawn in both


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"heads": {}}, InputError, "no set of heads"),
        ({"heads": [(0, 9)]}, UnknownNameError, "head 9 of layer 0"),
        ({"heads": [(0, 0), (0, 1), (0, 2)], "matched": "layer"}, InputError, "only 1 others"),
        ({"scale": float("inf")}, SettingsError, "finite"),
        ({"controls": -1}, SettingsError, "controls"),
        ({"data": []}, InputError, "no batch"),
        ({"answers": [70]}, InputError, "1 answers were given for 3"),
        ({"wrong": [70, 71, 72]}, SettingsError, "need answers"),
    ],
)
def test_bad_effects(llama, batch, changes, error, text):
    given = {"data": batch, "heads": SET} | changes
    with pytest.raises(error, match=text):
        heads.effect_of(llama, **given)


def test_a_model_without_logits_has_no_effects():
    lens = interp.wrap(build("bert"), processor("bert"), name="bert")
    with pytest.raises(UnsupportedError):
        heads.effect_of(lens, lens.prepare(["The cat sat"]), [(0, 1)])


# Folding.


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "gpt_neox", "opt", "bert", "dinov2"])
@pytest.mark.parametrize("scale", [0.0, -1.0, 2.5])
def test_a_fold_is_the_edit_and_leaves_no_trace(name, scale):
    given = {"input_ids": torch.tensor([IDS[0]])} if name != "dinov2" else inputs(name)
    lens = interp.wrap(build(name), sample=given, name=name)
    batch = lens.prepare(**given)
    read = f"resid_post.{len(lens.anatomy.towers[lens.anatomy.main].layers) - 1}"
    before = {k: v.clone() for k, v in lens.model.state_dict().items()}
    plain = lens.run(batch, [read]).values
    wanted = lens.run(batch, [read], edits.scale_heads(SET, scale)).values
    with heads.fold(lens, SET, scale):
        found = lens.run(batch, [read]).values
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(value, plain[key], atol=1e-3)
    after = lens.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(v, plain[k]) for k, v in lens.run(batch, [read]).values.items())


def test_folds_are_nested_and_end_with_an_error(llama, batch):
    weights = [x.self_attn.o_proj.weight.clone() for x in llama.model.model.layers]
    bits = [w.view(torch.int32) for w in weights]
    with pytest.raises(RuntimeError, match="stop"), heads.fold(llama, [(0, 1)], 0.0):  # noqa: PT012
        with heads.fold(llama, [(0, 1), (1, 2)], -3.0):
            both = logits_of(llama, batch)
        once = logits_of(llama, batch)
        raise RuntimeError("stop")
    for layer, old in zip(llama.model.model.layers, bits, strict=True):
        assert torch.equal(layer.self_attn.o_proj.weight.view(torch.int32), old)
    torch.testing.assert_close(once, logits_of(llama, batch, edits.scale_heads([(0, 1)], 0.0)), atol=1e-5, rtol=1e-5)
    change = [edits.scale_heads([(0, 1)], 0.0), edits.scale_heads([(1, 2)], -3.0)]
    torch.testing.assert_close(both, logits_of(llama, batch, change), atol=1e-5, rtol=1e-5)


def test_a_fold_by_one_changes_no_bit(llama):
    weight = llama.model.model.layers[0].self_attn.o_proj.weight
    old = weight.clone()
    with heads.fold(llama, [(0, 1)], 1.0):
        assert torch.equal(weight, old)


def test_what_cannot_be_folded():
    lens = interp.wrap(build("llama"), processor("llama"), name="llama")
    one, two = (lens.model.model.layers[i].self_attn.o_proj for i in (0, 1))
    two.weight = one.weight
    with pytest.raises(UnsupportedError, match=r"several places.*layers\.0.*layers\.1"):
        heads.fold(lens, [(1, 0)], 0.0).__enter__()
    two.weight = torch.nn.Parameter(one.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantised"):
        heads.fold(lens, [(2, 0), (1, 0)], 0.0).__enter__()
    two.weight = torch.nn.Parameter(one.weight.detach().clone())
    two.__class__ = type("Adapted", (torch.nn.Linear,), {"forward": lambda self, x: torch.nn.Linear.forward(self, x)})
    with pytest.raises(UnsupportedError, match=r"o_proj \(Adapted\) is no plain linear map"):
        heads.fold(lens, [(1, 0)], 0.0).__enter__()
    with pytest.raises(EditError, match="finite"):
        heads.fold(lens, [(0, 0)], float("inf")).__enter__()


# Agreement.


def test_agreement_of_rankings():
    one = ranking(torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.5, 0.4, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0]]))
    other = HeadScores(-one.scores * 10, name="other")
    frame = heads.agreement({"one": one, "other": other, "elsewhere": ranking(tower="vision")}, k=3)
    assert len(frame) == 1
    row = frame.iloc[0]
    assert (row["method"], row["other method"]) == ("one", "other")
    assert row["Spearman of sizes"] == pytest.approx(1.0)
    assert row["Spearman of signed scores"] == pytest.approx(-1.0)
    assert (row["shared of top 3"], row["by chance"]) == (3, 0.75)


def test_agreement_against_all_pairs():
    """Spearman's correlation as that of ranks counted by hand, ties at their mean rank."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = (torch.randint(0, 5, (3, 4), generator=generator).float() for _ in range(2))
        row = heads.agreement({"a": ranking(a), "b": ranking(b)}).iloc[0]
        ranks = []
        for x in (a.flatten().tolist(), b.flatten().tolist()):
            ranks.append([sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x])
        assert row["Spearman of sizes"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    constant = heads.agreement({"a": ranking(torch.ones(3, 4)), "b": ranking()}).iloc[0]
    assert np.isnan(constant["Spearman of sizes"])


def test_random_pairs_share_what_chance_says():
    generator = torch.Generator().manual_seed(1)
    rankings = {str(i): ranking(torch.rand(3, 4, generator=generator)) for i in range(20)}
    frame = heads.agreement(rankings, k=4)
    assert len(frame) == len(list(itertools.combinations(range(20), 2)))
    assert frame["shared of top 4"].mean() == pytest.approx(4 * 4 / 12, abs=0.25)
