"""The guides, followed for real: what their pages make is taken further here. And what goes out to other tools."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp import testing
from interp.dictionaries import SAE, Transcoder, feature_edits, load, registry, save
from interp.errors import InputError, MissingPackageError, SettingsError, UnknownNameError, UnsupportedError
from interp.scores import HeadScores
from interp.tracing import patch_sweep
from tests.conftest import packaged
from tests.test_docs import ROOT, python_of
from tests.zoo import build

GUIDES = ROOT / "docs" / "guides"


def followed(page: str, folder: Path, monkeypatch, stop: str | None = None) -> dict:
    """The names that the examples of a guide leave behind; up to the one that holds `stop`."""
    monkeypatch.chdir(folder)
    names: dict = {"__name__": "__guide__"}
    for line, code in python_of(GUIDES / page):
        if stop is not None and stop in code:
            break
        exec(compile("\n" * (line - 1) + code, str(GUIDES / page), "exec"), names)
    return names


@pytest.fixture(scope="module")
def patcher():
    with pytest.MonkeyPatch.context() as patcher:
        yield patcher


@pytest.fixture(scope="module")
def family(tmp_path_factory, patcher):
    return followed("new_family.md", tmp_path_factory.mktemp("family"), patcher)


def test_the_new_family_passes_the_whole_contract_under_both_kernels(family):
    """Nothing is refused and no number is more than rounding."""
    for kernel in ("sdpa", "eager"):
        model = family["LadderForCausalLM"]._from_config(family["LadderConfig"](), attn_implementation=kernel).eval()
        model.load_state_dict(family["model"].state_dict())
        lens = interp.wrap(model, name=kernel)
        found = testing.contract(lens, lens.prepare(input_ids=[[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]))
        assert set(found) == set(testing.CHECKS)
        assert all(isinstance(x, float) and x < 1e-4 for x in found.values()), found


def test_the_new_family_is_read_as_its_own_code_computes_it(family):
    """Branches, heads and patterns against the modules' own arithmetic; a padded prompt as the prompt alone."""
    lens, rungs = family["lens"], family["model"].rungs
    ids = [[5, 6, 7, 8], [9, 10]]
    reads = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "mlp_act", "pattern", "v", "z", "result", "logits"]
    alone = lens.run(lens.prepare(input_ids=ids[:1]), reads)
    with torch.no_grad():
        for i, rung in enumerate(rungs):
            stream = alone["resid_pre", i]
            looked = rung.after(rung.look(stream, None))  # without a mask, sdpa is causal by the module's is_causal
            torch.testing.assert_close(alone["attn_out", i], looked)
            middle = stream + looked
            torch.testing.assert_close(alone["resid_mid", i], middle)
            act = torch.nn.functional.silu(rung.up(rung.before(middle)))
            torch.testing.assert_close(alone["mlp_act", i], act)
            torch.testing.assert_close(alone["mlp_out", i], rung.gate * rung.down(act))
            mixed = torch.einsum("bhqk,bkhd->bqhd", alone["pattern", i], alone["v", i])
            torch.testing.assert_close(alone["z", i], mixed)
        logits = family["model"](torch.tensor(ids[:1])).logits
    torch.testing.assert_close(alone.logits, logits)
    torch.testing.assert_close(lens.unembed(alone["resid_mid", 2] + alone["mlp_out", 2]), logits)
    for side in ("left", "right"):
        batch = lens.prepare(input_ids=ids, padding_side=side)
        trace = lens.run(batch, ["resid_mid", "z"])
        single = lens.run(lens.prepare(input_ids=ids[1:]), ["resid_mid", "z"])
        for i in range(3):
            for site in ("resid_mid", "z"):
                torch.testing.assert_close(trace[site, i][1, batch.mask[1]], single[site, i][0])


def test_methods_work_on_the_new_family(family):
    """A head's direct effect is its `result` through the norm; a sweep of all streams recovers everything."""
    lens = family["lens"]
    clean, corrupt = lens.prepare(input_ids=[[5, 6, 7, 8]]), lens.prepare(input_ids=[[5, 16, 7, 18]])
    swept = patch_sweep(lens, clean, corrupt, sites=["resid_pre"], positions={"all": "all"}, answers=[3])
    torch.testing.assert_close(swept.effects, torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    effect = interp.heads.direct_effect(lens, clean, answers=[3], wrong=[4])
    rows = lens.run(clean, ["result@last", "resid_post.2@last"])
    final = rows["resid_post@last", 2][0, 0]
    scale = final.var(unbiased=False).add(1e-5).rsqrt()
    direction = family["model"].speak.weight[3] - family["model"].speak.weight[4]
    for i in range(3):
        part = rows["result@last", i][0, 0]
        normed = (part - part.mean(-1, keepdim=True)) * scale * family["model"].landing.weight
        torch.testing.assert_close(effect.scores[i], (normed @ direction).detach(), atol=1e-4, rtol=1e-4)


def test_what_is_not_found_is_said(family):
    from interp.errors import AnatomyError

    byhand, lens = family["other"], family["lens"]
    refused = [s for s in ("q", "k", "v", "scores", "pattern", "z", "result") if byhand.refusal(s, 0)]
    assert refused == ["q", "k", "v", "scores", "pattern", "z", "result"]
    assert "attention table" in byhand.refusal("pattern", 0)
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        one, two = (x.run(family["pair"], site)[site] for x in (byhand, lens))
        assert all(torch.allclose(one[i], two[i], atol=1e-5) for i in range(3))
    shared = family["LadderForCausalLM"](family["LadderConfig"]()).eval()
    shared.rungs = torch.nn.ModuleList([shared.rungs[0]] * 3)
    with pytest.raises(AnatomyError, match="several times"):
        interp.wrap(shared)


@pytest.fixture(scope="module")
def distance(tmp_path_factory, patcher):
    """The method alone: its tests are in the page, which runs with the other pages."""
    code = python_of(GUIDES / "new_method.md")[0][1]
    names: dict = {}
    exec(code.partition("lens = interp.load")[0], names)
    return names["attention_distance"]


def test_the_new_method_leaves_out_layers_without_heads(distance):
    """A hybrid model: its recurrent layers have no score, the others that of their patterns."""
    lens = interp.wrap(build("qwen3_next"), name="hybrid")
    batch = lens.prepare(input_ids=[[70, 80, 90, 100], [71, 81, 91, 101]])
    scores = distance(lens, batch)
    there = lens.layers_with("pattern")
    assert 0 < len(there) < len(scores.scores)
    assert scores.valid.any(1).nonzero()[:, 0].tolist() == there
    pattern = lens.run(batch, f"pattern.{there[0]}")["pattern", there[0]]
    wanted = sum(pattern[:, :, i, j] * (i - j) for i in range(4) for j in range(i)) / 3
    torch.testing.assert_close(scores.per_prompt[:, there[0]], wanted)


def test_the_new_method_finds_previous_token_heads(distance):
    """Where nearly all attention goes to the token before, the distance is nearly one."""
    lens = packaged("smollm2-135m")
    ids = interp.data.repeated_tokens(4, 20, allowed_ids=range(1000, 8000), seed=0)
    batch = lens.prepare(input_ids=ids)
    previous = interp.heads.patterns(lens, batch, score="previous").top(1).iloc[0]
    assert previous["score"] > 0.6
    scores = distance(lens, batch)
    found = float(scores.scores[int(previous["layer"]), int(previous["head"])])
    assert found < float(scores.scores.quantile(0.1))


@pytest.fixture(scope="module")
def groupmax(tmp_path_factory, patcher):
    """The architecture of the guide, registered for these tests only, with the folder that the page trained into."""
    patcher.setattr(registry, "_KNOWN", {n: k for n, k in registry._KNOWN.items() if n != "groupmax"})
    folder = tmp_path_factory.mktemp("groupmax")
    return followed("new_dictionary.md", folder, patcher), folder


def test_the_new_architecture_is_its_rule(groupmax):
    sae = SAE(d_in=10, d_sae=24, architecture="groupmax", k=6, seed=3)
    x = torch.randn(7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_(True)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    wanted = torch.zeros(7, 24)
    for token in range(7):
        for group in range(6):
            best = max(range(4 * group, 4 * group + 4), key=lambda j: float(pre[token, j]))
            wanted[token, best] = max(float(pre[token, best]), 0.0)
    torch.testing.assert_close(sae.encode(x).detach(), wanted)
    loss = sae.loss(x)
    torch.testing.assert_close(loss.reconstruction, sae(x))
    torch.testing.assert_close(loss.total, (wanted @ sae.W_dec + sae.b_dec - x).square().sum(1).mean())
    loss.total.backward()
    dead = (wanted > 0).sum(0) == 0
    assert dead.any()
    assert torch.equal(sae.W_enc.grad.abs().sum(0) == 0, dead)
    with pytest.raises(SettingsError, match="divides d_sae=24"):
        SAE(d_in=10, d_sae=24, architecture="groupmax", k=7)


def test_the_new_architecture_is_trained_saved_and_used(groupmax, tmp_path):
    names, folder = groupmax
    metrics = names["trained"].metrics
    assert metrics["fvu"].iloc[-1] < 0.5 * metrics["fvu"].iloc[0]
    assert names["scores"].value("kl_recovered_mean") > 0.9
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(1))
    used, same = names["sae"].eval(), load(folder / "runs" / "groupmax" / "dictionary")
    assert same.cfg.architecture == "groupmax"
    assert torch.equal(same.encode(x), used.encode(x))
    for training in (False, True):
        assert torch.equal(load(save(used, tmp_path / str(training), training=training))(x), used(x))
    transcoder = Transcoder(d_in=10, d_sae=12, d_out=3, architecture="groupmax", k=4, skip=True)
    assert transcoder(torch.randn(2, 10)).shape == (2, 3)
    assert torch.equal(load(save(transcoder, tmp_path / "transcoder"))(x[:, :10]), transcoder(x[:, :10]))
    lens, batch = names["lens"], names["lens"].prepare(["a photo of a cow ."])
    latents = same.encode(lens.run(batch, "resid_post.3@last")["resid_post@last", 3])[0, 0]
    change = feature_edits(same, [int(latents.argmax())], scale=0.0, read="resid_post.3")
    moved = lens.run(batch, "resid_post.3@last", change)["resid_post@last", 3]
    assert not torch.equal(moved, lens.run(batch, "resid_post.3@last")["resid_post@last", 3])


def test_a_file_of_an_unregistered_architecture_says_so(groupmax):
    """Another program that did not register it."""
    _, folder = groupmax
    code = f"from interp.dictionaries import load; load({str(folder / 'runs' / 'groupmax' / 'dictionary')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "UnknownNameError" in done.stderr
    assert "groupmax" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def sweep():
    lens = interp.wrap(build("gpt2"), name="gpt2")
    clean, corrupt = (lens.prepare(input_ids=[row]) for row in ([70, 80, 90, 100], [70, 81, 90, 101]))
    return patch_sweep(lens, clean, corrupt, sites=["resid_pre", "z"], answers=[120])


HEADS = HeadScores(
    torch.tensor([[0.5, -1.0, float("nan")], [2.0, 3.0, 4.0]]),
    "made",
    extra={"other": torch.tensor([[5.0, 6.0, float("nan")], [7.0, 8.0, 9.0]])},
    valid=torch.tensor([[True, True, False], [True, True, True]]),
)


@pytest.fixture
def given(monkeypatch):
    """A stand-in for CircuitsVis that keeps what it is given."""
    from types import ModuleType

    kept: list = []
    package, tokens = ModuleType("circuitsvis"), ModuleType("circuitsvis.tokens")
    tokens.colored_tokens_multi = lambda *args: kept.append(args) or "drawn"
    monkeypatch.setitem(sys.modules, "circuitsvis", package)
    monkeypatch.setitem(sys.modules, "circuitsvis.tokens", tokens)
    return kept


def test_head_scores_for_circuitsvis(given):
    assert HEADS.to_circuitsvis() == "drawn"
    names, values, labels = given[0]
    assert names == ["L0H0", "L0H1", "L1H0", "L1H1", "L1H2"]  # the head that does not exist is left out
    assert labels == ["score", "other"]
    assert values.tolist() == [[0.5, 5.0], [-1.0, 6.0], [2.0, 7.0], [3.0, 8.0], [4.0, 9.0]]


def test_causal_maps_for_circuitsvis(given, sweep):
    sweep.to_circuitsvis()
    sweep.to_circuitsvis("resid_pre", of="value")
    (names, values, labels), (_, single, layers) = given
    assert names == list(sweep.tokens or sweep.groups)
    assert values.shape == (4, 3 + 3 * 4)
    frame = sweep.frame()
    for number, label in enumerate(labels):
        site, layer, *head = label.replace(" L", " ").replace(" H", " ").split(" ")
        rows = frame[(frame["site"] == site) & (frame["layer"] == int(layer))]
        rows = rows[rows["head"] == (int(head[0]) if head else -1)].sort_values("position")
        np.testing.assert_allclose(values[:, number].numpy(), rows["effect"].to_numpy())
    assert layers == ["resid_pre L0", "resid_pre L1", "resid_pre L2"]
    rows = frame[(frame["site"] == "resid_pre") & (frame["layer"] == 1)].sort_values("position")
    np.testing.assert_allclose(single[:, 1].numpy(), rows["value"].to_numpy())
    with pytest.raises(UnknownNameError, match="site"):
        sweep.to_circuitsvis("resid_post")
    with pytest.raises(UnknownNameError, match="number"):
        sweep.to_circuitsvis(of="size")


def test_names_cannot_end_the_script_that_circuitsvis_writes(given):
    from interp.figures import circuitsvis_tokens

    circuitsvis_tokens(["</script><b>", "<!--", "a < b", "<"], np.zeros((4, 1)), ["<i>"])
    names, _, labels = given[0]
    assert not any(bad in "".join([*names, *labels]) for bad in ("</", "<!", "<b", "<i"))
    assert names[2:] == ["a < b", "<"]


def test_circuitsvis_itself(sweep):
    pytest.importorskip("circuitsvis")
    for found, word in ((HEADS.to_circuitsvis(), "L1H2"), (sweep.to_circuitsvis(), "resid_pre L2")):
        page = found.show_code()
        assert word in page
        assert "ColoredTokensMulti" in page


def test_a_missing_circuitsvis_is_said(monkeypatch, sweep):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    monkeypatch.setitem(sys.modules, "circuitsvis.tokens", None)
    for scores in (HEADS, sweep):
        with pytest.raises(MissingPackageError, match="pip install circuitsvis"):
            scores.to_circuitsvis()


@pytest.fixture(scope="module")
def padded():
    lens = interp.wrap(build("llama"), name="llama")
    return lens, lens.prepare(input_ids=[[70, 80, 90, 100], [71, 81]], padding_side="left")


READS = [
    "resid_post",
    "z.1/2,0",
    "pattern.0",
    "resid_pre.1@last",
    "k.0|norm",
    "mlp_out.2|mean",
    "z.2@-3:",
    "embed",
]


def test_a_frame_of_a_trace(padded):
    """Every number at its place, and nothing of the padding."""
    lens, batch = padded
    trace = lens.run(batch, READS)
    axes = {
        "resid_post": "layer batch pos d_model",
        "z.1/2,0": "layer batch pos head d_head",
        "embed": "batch pos d_model",
    }
    axes |= {"pattern.0": "layer batch head query key", "resid_pre.1@last": "layer batch pos d_model"}
    axes |= {"k.0|norm": "layer batch pos kv_head", "mlp_out.2|mean": "layer batch d_model"}
    axes |= {"z.2@-3:": "layer batch pos head d_head"}
    for read in READS:
        frame = trace.frame(read)
        assert list(frame.columns) == [*axes[read].split(), "value"], read
        assert len(frame.drop_duplicates(axes[read].split())) == len(frame)
    stream = trace.frame("resid_post")
    real = int(batch.mask.sum())
    assert len(stream) == 3 * real * 32
    cube = trace["resid_post"]
    picked = stream.sample(50, random_state=0)
    for layer, b, p, d, value in picked.itertuples(index=False):
        assert cube[layer][b, p, d] == value
        assert batch.mask[b, p]
    heads = trace.frame("z.1/2,0")
    assert sorted(heads["head"].unique()) == [0, 2]
    one = heads[(heads["head"] == 0) & (heads["batch"] == 1) & (heads["pos"] == 3)]
    np.testing.assert_array_equal(one["value"], trace["z.1/2,0", 1][1, 3, 1].numpy())
    pattern = trace.frame("pattern")
    assert len(pattern) == 4 * (4 * 4 + 2 * 2)
    np.testing.assert_allclose(pattern.groupby(["batch", "head", "query"])["value"].sum(), 1.0, rtol=1e-5)
    assert len(trace.frame("resid_pre@last")) == 2 * 32
    assert len(trace.frame("z.2@-3:")) == (3 + 2) * 32  # of the shorter prompt two exist
    with pytest.raises(UnknownNameError, match="not in this trace"):
        trace.frame("q")
    with pytest.raises(UnsupportedError, match="read it without"):
        lens.run(batch, "z.2@-3:|norm").frame("z")


def test_a_frame_of_half_precision_is_of_floats():
    lens = interp.wrap(build("llama").bfloat16())
    frame = lens.run(lens.prepare(input_ids=[[70, 80]]), "resid_post.1").frame("resid_post")
    assert frame["value"].dtype == np.float32


def test_a_single_token_is_refused_by_the_new_method(distance, padded):
    lens, _ = padded
    with pytest.raises(InputError, match="at least two tokens"):
        distance(lens, lens.prepare(input_ids=[[70]]))
