"""The experiments on Lorsas, small: groups of runs, levels that are reached, rows of tables, objects, the benchmark."""

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from experiments.benchmarks import lorsa as benchmark
from experiments.dictionaries.lorsa import heads, objects, smollm2, two_layers
from experiments.dictionaries.lorsa import scenes as scenes_experiment
from interp.data import scenes
from interp.dictionaries import Trained, lorsa
from interp.dictionaries.activations import ActivationStream, harvest
from interp.dictionaries.lorsa import Behaviours
from tests.zoo import build, processor

TEXTS = ["the cat saw a dog and ran home over hills to sleep on warm grass until noon " * 3] * 12


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def rule(llama):
    return lorsa.attention_rule(llama, 1, context=24)


@pytest.fixture(scope="module")
def store(llama, rule, tmp_path_factory):
    stream = ActivationStream(
        llama, interp.data.corpus(TEXTS), [*rule.reads, "attn_out.1"], batch=4, context=24, special="bos"
    )
    return harvest(stream, tmp_path_factory.mktemp("store"), tokens=600, dtype="float32")


def test_every_group_is_trained_and_taken_up(rule, store, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WIDTH", 16)
    monkeypatch.setattr(smollm2, "K", 4)
    monkeypatch.setattr(smollm2, "WIDTHS", ((16, 4), (8, 4)))
    monkeypatch.setattr(smollm2, "BATCH", 4)
    monkeypatch.setattr(smollm2, "TARGET", "attn_out.1")
    monkeypatch.setattr(smollm2, "STREAM", "text:resid_pre.1")
    monkeypatch.setattr(smollm2, "LEVELS", (10.0,))
    monkeypatch.setattr(smollm2, "SMOOTHED", 2)
    trained = {group: smollm2.run(group, store, rule, tmp_path) for group in smollm2.GROUPS}
    assert all(one.steps == sum(store.counts("contexts")) // 4 for one in trained.values())
    assert set(trained["others"].dictionaries) == {"SAE", "transcoder"}
    frozen = trained["starts-1"].dictionaries["subspace-QK-frozen"]
    assert torch.allclose(frozen.W_Q, rule.W_Q, rtol=1e-4)
    assert not torch.allclose(trained["starts-1"].dictionaries["subspace"].W_Q, rule.W_Q, rtol=1e-4)
    again = smollm2.run("starts-0", store, rule, tmp_path)
    assert torch.equal(again.dictionaries["random"].W_V, trained["starts-0"].dictionaries["random"].W_V)
    rows = smollm2.start_rows(trained, store, rule)
    assert [row["seed"] for row in rows] == [0, 1] * 4 + [0]
    assert {row["L0"] for row in rows} <= {f"{n / 10:.1f}" for n in range(41)}
    assert not [row for row in rows if row["tokens to FVU 10"] == "not reached"]
    assert [(row["heads"], row["k"]) for row in smollm2.width_rows(trained, store, rule)] == [(16, 4), (8, 4)]


def test_a_level_is_reached_by_the_mean_of_some_steps(monkeypatch):
    monkeypatch.setattr(smollm2, "SMOOTHED", 2)
    metrics = pd.DataFrame(
        {
            "dictionary": ["a", "b"] * 4,
            "tokens": [1, 1, 2, 2, 3, 3, 4, 4],
            "fvu": [0.9, 0.9, 0.2, 0.9, 0.8, 0.9, 0.1, 0.9],
        }
    )
    trained = Trained({}, metrics, 4, 4)
    assert smollm2.reached(trained, "a", 0.54) == 3  # not at 2, where one step alone is below it
    assert smollm2.reached(trained, "b", 0.54) is None


def test_labels_need_a_score_and_firings():
    done = Behaviours(
        {"induction": torch.tensor([0.9, 0.9, 0.4, float("nan")])}, {"induction": torch.tensor([20, 19, 90, 0])}
    )
    assert heads.found(done, "induction").tolist() == [True, False, False, False]
    assert two_layers.best(done, "induction") == "0.90"


def test_a_text_is_repeated_and_heads_are_shown_where_they_take_their_latents_from(llama, rule):
    made = lorsa.from_heads(rule, n_qk=len(rule.W_Q), n_ov=32, architecture="relu").eval()
    at = lorsa.PlacedLorsa(made, llama, rule=rule)
    once = torch.tensor([[5, 6, 7, 6], [9, 8, 3, 4], [2, 3, 4, 5]])
    seen = heads.twice(at, llama, once, batch=2)
    assert torch.equal(seen.ids, once.repeat(1, 2))
    x = at.inputs(llama.run(llama.prepare(input_ids=seen.ids), at.read)["resid_pre", 1])
    latents = made.encode(x)
    latents[:, 0] = 0
    assert len(seen.where) == int((latents > 0).sum())
    pattern, values = lorsa.patterns(made, x).detach(), made.values(x).detach()
    for n in range(0, len(seen.where), 7):
        b, t, h = (int(v[n]) for v in (seen.where.sample, seen.where.query, seen.where.head))
        given = pattern[b, h // made.cfg.group, t] * values[b, :, h]
        source = int(given.abs().argmax())
        assert int(seen.source[n]) == source
        assert float(seen.share[n]) == pytest.approx(float(given[source] / given.sum()), rel=1e-4)
        assert bool(seen.rule[n]) == (source > 0 and int(seen.ids[b, source - 1]) == int(seen.ids[b, t]))
        assert bool(seen.second[n]) == (t >= 4)
    scores = torch.tensor([0.9] * 4 + [0.1] * 28)
    rows = heads.repeated_rows(seen, Behaviours({"induction": scores}, {"induction": torch.full((32,), 50)}), [2, 31])
    assert [row["head"] for row in rows] == ["all 4 induction heads", "all other heads", "2", "31"]
    assert rows[0]["fires at, second time"] == f"{float((latents[:, 4:, :4] > 0).any(-1).float().mean()):.1%}"
    assert rows[3]["fires at, first time"] == f"{float((latents[:, 1:4, 31] > 0).float().mean()):.1%}"
    mine = seen.second & (seen.where.head < 4)
    assert rows[0]["by induction, second time"] == f"{float(seen.rule[mine].float().mean()):.0%}"
    shown = heads.shown_rows(seen, llama, [2, 31])
    assert [row["head"] for row in shown] == [2, 31]


def test_a_cell_shows_a_token_and_what_stands_before_it():
    assert heads._quoted(["a", " b|", " c"], 2) == "a b\\| **c**"
    assert heads._quoted(["a", "\n"], 1) == "a**\\\\n**"
    assert heads._quoted(["  "], 0) == "**␣**"


@pytest.fixture(scope="module")
def pictures():
    lens = interp.load("scenes", device="cpu")
    rule = lorsa.attention_rule(lens, 4, context=96)
    drawn = list(scenes.scenes("test", 5))
    return lens, rule, lorsa.exact_copy(lens, 4, architecture="relu", context=96), drawn


def test_mentions_are_the_places_before_words(pictures):
    lens, rule, made, drawn = pictures
    seen, firing = objects.mentions(lens, made, rule, drawn)
    assert list(seen.name) == [name for one in drawn for name in one.names]
    batch = objects.captioned(lens, drawn)
    ids = objects.word_ids(lens)
    after = batch.inputs["input_ids"][torch.from_numpy(seen.scene), torch.from_numpy(seen.column) + 1].tolist()
    assert after == [ids[name] for name in seen.name]
    single = objects.captioned(lens, drawn[1:2])
    trace = lens.run(single, ["resid_pre.4", "pattern.4", "logits"])
    x, first = rule.inputs(trace["resid_pre", 4]), int(single.span("image")[0].int().argmax())
    latents, pattern, values = made.encode(x), lorsa.patterns(made, x), made.values(x)
    image = slice(first, first + 64)
    for n in np.flatnonzero(seen.scene == 1):
        t = int(seen.column[n])
        torch.testing.assert_close(torch.from_numpy(seen.latents[n]), latents[0, t], atol=1e-4, rtol=1e-3)
        np.testing.assert_allclose(seen.pattern[n], trace["pattern", 4][0, :, t, image].numpy(), atol=1e-5)
        assert bool(seen.known[n]) == (int(trace.logits[0, t].argmax()) == ids[seen.name[n]])
        tokens = (drawn[1].mask(seen.name[n]).reshape(8, 9, 8, 9).mean((1, 3)) >= objects.OWN).flatten()
        np.testing.assert_array_equal(seen.own[n], tokens)
        assert not (seen.own[n] & seen.other[n]).any()
        for head in np.flatnonzero(seen.latents[n])[:5]:
            size = (pattern[0, head // made.cfg.group, t] * values[0, :, head]).abs().detach()
            assert seen.on_image[n, head] == pytest.approx(float(size[image].sum() / size.sum()), rel=1e-3)
            assert seen.on_own[n, head] == pytest.approx(float(size[image][tokens].sum() / size.sum()), rel=1e-3)
        assert np.isnan(seen.on_own[n][seen.latents[n] == 0]).all()
    assert 0 < firing.min() < firing.max() < 1
    moved = seen.moved.sum(-1)
    assert moved.min() > 0
    assert moved.max() <= 1 + 1e-5


def test_words_change_by_what_is_taken_away_alone(pictures):
    lens, rule, made, drawn = pictures
    seen, _ = objects.mentions(lens, made, rule, drawn)
    every = np.ones((len(seen.name), made.cfg.n_ov), dtype=bool)
    none = np.zeros_like(seen.own)
    found = objects.effects(
        lens,
        made,
        rule,
        drawn,
        seen,
        {
            "nothing": objects.Removal(),
            "error": objects.Removal(error=False),
            "all": objects.Removal(every),
            "no token": objects.Removal(every, none),
            "picture": objects.Removal(every, ~none),
        },
    )
    for what in ("nothing", "error", "no token"):  # a copy has no error
        np.testing.assert_allclose(np.nan_to_num(found[what]), 0, atol=1e-4)
    batch, ids = objects.captioned(lens, drawn), objects.word_ids(lens)
    plain, cut = (
        lens.run(batch, "logits", edits=edits).logits.log_softmax(-1)
        for edits in ((), interp.edits.ablate(site="attn_out", layers=4))
    )
    gain = [float((cut - plain)[b, t, ids[n]]) for b, t, n in zip(seen.scene, seen.column, seen.name, strict=True)]
    np.testing.assert_allclose(found["all"][0], gain, atol=1e-3)
    for n in range(len(gain)):
        rest = [gain[m] for m in np.flatnonzero((seen.scene == seen.scene[n]) & seen.known) if m != n]
        assert (
            np.isnan(found["all"][1, n]) if not rest else found["all"][1, n] == pytest.approx(np.mean(rest), abs=1e-3)
        )
    assert not np.allclose(found["picture"][0], 0, atol=1e-2)


def test_heads_lose_what_marked_tokens_give(pictures):
    lens, rule, made, drawn = pictures
    batch = objects.captioned(lens, drawn[:2])
    x = rule.inputs(lens.run(batch, "resid_pre.4")["resid_pre", 4])
    image, heads_of = batch.span("image"), np.zeros((2, made.cfg.n_ov), dtype=bool)
    heads_of[0, ::2], heads_of[1, 1::2] = True, True
    tokens = np.zeros((2, 64), dtype=bool)
    tokens[0, 3], tokens[1, 5:9] = True, True
    given = objects._given(made, x, batch)
    removal = objects.Removal(heads_of, tokens)
    change = objects._change(removal, np.arange(2), given, made.cfg.n_ov, batch.mask.shape)
    latents = made.encode(x, real=batch.mask).detach()
    changed, expected = change(latents), latents.clone()
    pattern, values = lorsa.patterns(made, x, real=batch.mask).detach(), made.values(x).detach()
    columns = torch.zeros_like(image)
    columns[image] = torch.from_numpy(tokens).flatten()
    part = torch.stack(
        [
            pattern[b, h // made.cfg.group, :, columns[b]] @ values[b, columns[b], h]
            for b in range(2)
            for h in range(made.cfg.n_ov)
        ]
    ).view(2, made.cfg.n_ov, -1)
    where = (batch.mask & ~image)[..., None] & torch.from_numpy(heads_of)[:, None] & (latents > 0)
    expected = torch.where(where, (latents - part.transpose(1, 2)).clamp_min(0), latents)
    torch.testing.assert_close(changed, expected, atol=1e-4, rtol=1e-3)
    assert not torch.equal(expected, latents)


def test_heads_are_chosen_matched_and_averaged():
    n = 6
    latents = np.zeros((n, 4))
    latents[:3, 0], latents[:2, 1], latents[:, 2], latents[3:, 3] = 1, 1, 1, 1
    on_image = np.where(latents > 0, 0.9, np.nan)
    on_image[:, 0] = 0.2  # tells the words best, but not from the picture
    blank = np.zeros((n, 1))
    seen = objects.Mentions(
        np.arange(n), np.array(["a"] * 3 + ["b"] * 3), np.arange(n), np.ones(n, bool), blank, blank, latents,
        on_image, on_image, on_image, blank, blank, blank,
    )  # fmt: skip
    assert objects.chosen(seen, ["a", "b"], 1) == {"a": [1], "b": [3]}
    rates = np.array([0.5, 0.5, 0.2, 0.9, 0.52])
    assert objects.matched(rates, [0], 0, near=1) == [1]
    assert objects.matched(rates, [0, 1], 0, near=1) == [4, 2]
    assert objects.matched(rates, [0], 0, near=1, without=[1]) == [4]
    wanted, among = (
        np.array([[True, True, False, False]] * 2),
        np.array([[False, False, True, True], [False] * 3 + [True]]),
    )
    drawn = scenes_experiment.as_many(wanted, among, 0)
    assert drawn.tolist() == among.tolist()
    values = np.array([1.0, 3.0, np.nan, 5.0])
    np.testing.assert_allclose(objects.by_scene(values, np.array([4, 4, 7, 9])), [2, 5])
    np.testing.assert_allclose(objects.by_scene(np.stack([values, values]), np.array([4, 4, 7, 9])), [[2, 5]] * 2)


def test_drawn_rows_repeat_and_the_model_has_no_mlp():
    ids = two_layers.rows_of(3)
    assert any(torch.equal(ids[:, p:], ids[:, :-p]) for p in range(8, 25))
    lens = two_layers.model(2, 0)
    batch = lens.prepare(input_ids=ids[:2])
    assert not lens.run(batch, "mlp_out.0")["mlp_out", 0].any()
    made, numbers = two_layers.learnt(lens, 1, "subspace", 4, 0)
    assert made.cfg.n_ov == two_layers.OV
    assert 0 < float(numbers["FVU"]) < 2
    source = two_layers.Drawn(lens, lorsa.attention_rule(lens, 1, context=two_layers.LENGTH), 0)
    item = next(source)
    trace = lens.run(lens.prepare(input_ids=item.ids), "attn_out.1")
    torch.testing.assert_close(item["y.1"], trace["attn_out", 1], atol=1e-5, rtol=1e-4)


def test_a_step_of_the_benchmark_learns():
    x, y = torch.randn(1, 8, benchmark.D_IN), torch.randn(1, 8, benchmark.D_IN)
    made, step = benchmark.ours(benchmark.OWN, x, y, frozen=True)
    before, keys = made.W_V.clone(), made.W_K.clone()
    step()
    assert not torch.equal(made.W_V, before)
    assert torch.equal(made.W_K, keys)
