"""The experiments on Lorsas, small: groups of runs, levels that are reached, rows of tables, the benchmark."""

import pandas as pd
import pytest
import torch

import interp
from experiments.benchmarks import lorsa as benchmark
from experiments.dictionaries.lorsa import heads, smollm2, two_layers
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


def test_a_copied_head_is_shown_where_it_takes_its_latent_from(llama, rule, monkeypatch):
    monkeypatch.setattr(heads, "REPEATED", "the cat the cat")
    made = lorsa.from_heads(rule, n_qk=len(rule.W_Q), n_ov=32, architecture="relu").eval()
    at = lorsa.PlacedLorsa(made, llama, rule=rule)
    batch = llama.prepare(heads.REPEATED)
    x = at.inputs(llama.run(batch, at.read)["resid_pre", 1])
    rows = heads.shown_rows(at, llama, range(32), most=5)
    assert len(rows) == 5
    fired = lorsa.fired(made, x)
    late = fired.at(fired.query >= x.shape[1] // 2)
    best = late.at(late.value.argsort(descending=True)[:5])
    assert [row["head"] for row in rows] == best.head.tolist()
    given = (
        lorsa.patterns(made, x)[0, best.head // made.cfg.group, best.query] * made.values(x)[0, :, best.head].T
    ).detach()
    share = given.gather(1, given.abs().argmax(1)[:, None])[:, 0] / given.sum(1)
    assert [row["share of its latent"] for row in rows] == [f"{s:.0%}" for s in share.tolist()]


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
