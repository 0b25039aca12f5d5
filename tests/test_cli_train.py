"""`interp train`: dictionaries as the library trains them, stores, stopped runs, several processes, bad input."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import interp
from interp import dictionaries
from interp.cli.fields import help_of
from interp.cli.training.command import command_of
from interp.cli.training.documented import settings_of
from interp.cli.training.lorsa_settings import LorsaRunSettings
from interp.cli.training.settings import TrainRunSettings, read_config, template
from interp.dictionaries import DictionaryConfig, LorsaConfig, TrainSettings
from interp.dictionaries import lorsa as package
from interp.dictionaries.activations import ActivationStore, ActivationStream, MixingBuffer
from interp.dictionaries.training.learner import Learner
from interp.dictionaries.training.log import TIMES
from tests.test_cli_attribute import call, saved

WORDS = "ab cd efg hij klm nop qrs tuv wxy z 1 2 3".split()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Four thousand letters in paragraphs, always the same."""
    random = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    drawn = [WORDS[i] for i in torch.randint(len(WORDS), (1600,), generator=random)]
    path.write_text("\n\n".join(" ".join(drawn[i : i + 16]) for i in range(0, len(drawn), 16)))
    return path


SMALL = (
    *("--tokens", 1600, "--batch-size", 100, "--buffer", 400, "--context", 32, "--contexts", 4, "--expansion", 2),
    *("--lr", "1e-2", "--log-every", 4, "--checkpoint-every", 5, "--device", "cpu"),
)


def trained(kind, model, texts, out, *arguments, code=0):
    return call("train", kind, model, "--data", texts, "--out", out, *SMALL, *arguments, code=code)


def same(one, two):
    assert one.cfg == two.cfg
    for (name, x), y in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_several_dictionaries_are_those_of_the_library(llama, texts, tmp_path):
    out = tmp_path / "out"
    said = trained("sae", llama, texts, out, "--layer", "0,-1", "--architecture", "topk,standard", "--k", "3,5")
    assert "6 dictionaries, 16 steps of 100 tokens" in said
    lens = interp.load(str(llama), device="cpu")
    stream = ActivationStream(
        lens, interp.data.corpus(texts, seed=0), ["resid_post.0", "resid_post.-1"], context=32, batch=4, epochs=None
    )
    last = len(lens.anatomy.towers["text"].layers) - 1
    assert stream.reads == ("resid_post.0", f"resid_post.{last}")
    width = stream.d_in["resid_post.0"]
    jobs = {}
    for layer in (0, last):
        for options in (
            {"architecture": "topk", "k": 3},
            {"architecture": "topk", "k": 5},
            {"architecture": "standard"},
        ):
            name = "-".join(
                [f"resid_post.{layer}", options["architecture"], *([f"k{options['k']}"] if "k" in options else [])]
            )
            jobs[name] = dictionaries.Job(
                dictionaries.SAE(d_in=width, d_sae=2 * width, **options), f"resid_post.{layer}"
            )
    source = MixingBuffer(stream, rows=400, batch=100, seed=0, dtype=torch.float32)
    settings = TrainSettings(steps=16, lr=1e-2, log_every=4, checkpoint_every=5)
    expected = dictionaries.train(jobs, source, settings)
    for name, one in expected.dictionaries.items():
        found = dictionaries.load(out / name)
        assert found.metadata["read"] == jobs[name].read
        x = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(found(x), one(x), atol=1e-5, rtol=1e-5)
    logs = [m.drop(columns=list(TIMES)) for m in (pd.read_parquet(out / "metrics.parquet"), expected.metrics)]
    pd.testing.assert_frame_equal(*logs)
    page = (out / "report.html").read_text()
    assert "Unexplained variance" in page
    assert all(name in page for name in jobs)
    (out / "report.html").unlink()
    call("report", out)
    assert (out / "report.html").read_text() == page
    record = json.loads((out / "run.json").read_text())
    assert record["dictionaries"][f"resid_post.{last}-standard"] == {"read": f"resid_post.{last}", "target": None}


def test_a_transcoder_reconstructs_what_the_mlp_writes(llama, texts, tmp_path):
    trained("transcoder", llama, texts, tmp_path / "out", "--layer", 1, "--k", 4, "--skip")
    made = dictionaries.load(tmp_path / "out" / "resid_mid.1-topk-k4")
    assert isinstance(made, dictionaries.Transcoder)
    assert made.cfg.skip
    assert (made.metadata["read"], made.metadata["target"]) == ("resid_mid.1", "mlp_out.1")


def test_a_run_that_was_stopped_goes_on_and_a_store_is_replayed(llama, texts, tmp_path, monkeypatch):
    arguments = ("--layer", 0, "--architecture", "batchtopk", "--k", 4)
    trained("sae", llama, texts, tmp_path / "whole", *arguments)
    real, count = Learner.step, []

    def stops(self, rows, step, log):
        count.append(step)
        if step == 11 and len(count) == 12:
            raise KeyboardInterrupt
        return real(self, rows, step, log)

    monkeypatch.setattr(Learner, "step", stops)
    with pytest.raises(AssertionError):
        trained("sae", llama, texts, tmp_path / "cut", *arguments)
    trained("sae", llama, texts, tmp_path / "cut", *arguments)
    assert count == [*range(12), *range(10, 16)]
    name = "resid_post.0-batchtopk-k4"
    same(dictionaries.load(tmp_path / "whole" / name), dictionaries.load(tmp_path / "cut" / name))
    line = trained("sae", llama, texts, tmp_path / "cut", *arguments, "--lr", "0.5", code=2)
    assert "lr" in line
    assert "--overwrite" in line
    store = ("--store", tmp_path / "store", "--store-dtype", "float32")
    trained("sae", llama, texts, tmp_path / "stored", *arguments, *store)
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*.safetensors")}
    trained("sae", llama, texts, tmp_path / "again", *arguments, *store, "--seed", 0)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*.safetensors")} == made
    same(dictionaries.load(tmp_path / "stored" / name), dictionaries.load(tmp_path / "again" / name))


def test_two_processes_under_torchrun_share_the_work(llama, texts, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541"]
    arguments = ("--layer", 0, "--architecture", "batchtopk", "--k", 4, *SMALL)
    told = ("-m", "interp", "train", "sae", llama, "--data", texts, "--out", tmp_path / "two", *arguments)
    done = subprocess.run(
        [*command, *map(str, told)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = pd.read_parquet(tmp_path / "two" / "metrics.parquet")
    assert metrics["fvu"].iloc[-1] < metrics["fvu"].iloc[0]
    assert dictionaries.load(tmp_path / "two" / "resid_post.0-batchtopk-k4").metadata["tokens"] == 1600
    from interp.dictionaries.activations import Together

    lens = interp.load(str(llama), device="cpu")
    shares = []
    for rank in (0, 1):
        stream = ActivationStream(
            lens, interp.data.corpus(texts, seed=0), "resid_post.0",
            context=32, batch=4, epochs=None, rank=rank, world=2,
        )  # fmt: skip
        shares.append(MixingBuffer(stream, rows=200, batch=50, seed=rank, dtype=torch.float32))
    width = shares[0].d_in["resid_post.0"]
    alone = dictionaries.SAE(d_in=width, d_sae=2 * width, architecture="batchtopk", k=4)
    one = dictionaries.train(alone, Together(shares), TrainSettings(steps=16, lr=1e-2, log_every=4)).metrics
    for column in ("loss", "fvu", "l0"):
        assert metrics[column].to_numpy() == pytest.approx(one[column].to_numpy(), rel=1e-4, abs=1e-4), column


def test_settings_have_the_words_of_the_library():
    rows = {name: (kind, field) for name, kind, field in settings_of(DictionaryConfig)}
    assert rows["l1_coefficient"][0] is float
    assert rows["target_l0"][0] is float
    assert rows["target_l0"][1].default is None
    assert rows["skip"][0] is bool
    assert rows["aux_loss"][1].metadata["choices"] == ("paper", "saelens")
    assert rows["matryoshka_widths"][0] is tuple
    said = help_of(TrainRunSettings, "dead_feature_window")
    assert said.startswith("A latent that was active in no token of so many steps is dead")
    for kind, cls in (("transcoder", TrainRunSettings), ("lorsa", LorsaRunSettings)):
        parameters = inspect.signature(command_of(kind)).parameters
        assert {row.name for row in fields(cls)} | {"out", "config", "overwrite"} == set(parameters)
    measured = {*("causal", "window", "context", "scale", "softcap"), *("d_in", "d_out", "d_qk", "dtype", "seed")}
    own = {row.name for row in fields(LorsaConfig) if not row.name.startswith(("rotary", "qk_norm"))} - measured
    assert own <= {row.name for row in fields(LorsaRunSettings)}
    assert "Train transcoders of MODEL" in call("train", "transcoder", "--help")
    assert "Results open in SAELens" not in call("train", "lorsa", "--help")
    assert "transcoder" in call("train", "--help")


def test_config_and_init(llama, texts, tmp_path):
    call("init", "train", "--out", tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == template(TrainRunSettings, "sae|transcoder")
    made = yaml.safe_load((tmp_path / "run.yaml").read_text())
    made |= {"model": str(llama), "data": str(texts), "layer": [0, 1], "k": 3, "expansion": 2, "tokens": 300}
    made |= {"batch_size": 100, "buffer": 200, "context": 32, "architecture": ["matryoshka_batchtopk"]}
    made |= {"matryoshka_widths": [8, 16], "device": "cpu"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    settings = TrainRunSettings.of(read_config(tmp_path / "run.yaml", TrainRunSettings))
    assert settings.layers() == [0, 1]
    call("train", "sae", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")
    found = dictionaries.load(tmp_path / "out" / "resid_post.1-matryoshka_batchtopk-k3")
    assert found.cfg.architecture == "jumprelu"
    assert "interp train sae" in (tmp_path / "out" / "settings.yaml").read_text()
    assert "usable" in call("check", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layer", "0", "--k", "x"), "k is a number"),
        (("--layer", "0,0"), "names one twice"),
        (("--layer", "99"), "99"),
        ((), "no layer is named"),
        (("--layer", "0", "--site", "nowhere"), "nowhere"),
        (("--layer", "0", "--architecture", "magic"), "magic"),
        (("--layer", "0", "--k", "5000"), "k is a whole number from 1 to d_sae"),
        (("--layer", "0", "--target-site", "mlp_out"), "target_site is for transcoders"),
        (("--layer", "0", "--batch-size", "500"), "more than the buffer"),
        (("--layer", "0", "--tokens-used", "image"), "pictures"),
        (("--layer", "0", "--log-to", "paper"), "paper"),
        (("--layer", "0", "--data", "nowhere.txt"), "nowhere.txt"),
        (("--layer", "0", "--lr", "nan"), "lr is a finite number above 0"),
    ],
)
def test_bad_input_is_one_line(llama, texts, tmp_path, arguments, said):
    assert said in trained("sae", llama, texts, tmp_path / "out", *arguments, code=2)


def test_data_without_a_usable_token(llama, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "empty.txt" in trained("sae", llama, tmp_path / "empty.txt", tmp_path / "out", "--layer", 0, code=2)


LORSA = (
    *("--tokens", 1600, "--context", 20, "--contexts", 4, "--expansion", 2, "--k", 4, "--lr", "1e-2"),
    *("--log-every", 4, "--checkpoint-every", 5, "--device", "cpu"),
)


def lorsa(model, data, out, *arguments, code=0):
    return call("train", "lorsa", model, "--data", data, "--out", out, *LORSA, *arguments, code=code)


def test_lorsas_are_those_of_the_library(llama, texts, tmp_path):
    out = tmp_path / "out"
    inits = ("--init", "random,heads,subspace-values", "--freeze-qk", "--no-freeze-qk")
    said = lorsa(llama, texts, out, "--layer", "0,-1", *inits, "--architecture", "topk,batchtopk")
    assert "12 dictionaries, 20 steps of 4 contexts" in said
    lens = interp.load(str(llama), device="cpu", dtype="float32")
    last = len(lens.anatomy.towers["text"].layers) - 1
    rules = [package.attention_rule(lens, n, context=20) for n in (0, last)]
    reads = [read for rule in rules for read in rule.reads]
    stream = ActivationStream(lens, interp.data.corpus(texts, seed=0), reads, context=20, batch=4, epochs=None)
    begin, sample = stream.state(), []
    while sum(item.used for item in sample) < 4096:
        sample.append(next(stream))
    stream.restore(begin)
    pairs = package.AttentionPairs(stream, rules)
    jobs = {}
    for rule in rules:
        heads, width = rule.W_Q.shape[:2]
        sizes = {"n_qk": 2 * heads, "n_ov": 2 * width, "k": 4}
        x = torch.cat([rule.inputs(item[rule.reads[0]]) for item in sample])
        for architecture in ("topk", "batchtopk"):
            made = {
                "random": package.shaped(rule, **sizes, architecture=architecture),
                "heads": package.from_heads(rule, **sizes, architecture=architecture),
                "subspace-values": package.from_heads(rule, **sizes, architecture=architecture, x=x, subspace="values"),
            }
            for init, one in made.items():
                name = f"attn.{rule.layer}-{architecture}-k4-{init}"
                jobs[name] = dictionaries.Job(one, f"x.{rule.layer}", f"y.{rule.layer}")
    settings = TrainSettings(steps=20, lr=1e-2, log_every=4, checkpoint_every=5)
    expected = dictionaries.train(jobs, pairs, settings)
    y = next(pairs)
    for name, one in expected.dictionaries.items():
        found = package.load(out / name)
        assert (found.metadata["layer"], found.metadata["init"]) == (one.metadata["layer"], name.split("k4-")[1])
        x = y[jobs[name].read]
        torch.testing.assert_close(found(x, real=y.real), one(x, real=y.real), atol=1e-4, rtol=1e-4)
    logs = [m.drop(columns=list(TIMES)) for m in (pd.read_parquet(out / "metrics.parquet"), expected.metrics)]
    pd.testing.assert_frame_equal(*logs, atol=1e-5, rtol=1e-4)
    page = (out / "report.html").read_text()
    assert "Low-rank sparse attention of" in page
    assert "subspace-values" in page
    (out / "report.html").unlink()
    call("report", out)
    assert (out / "report.html").read_text() == page
    record = json.loads((out / "run.json").read_text())
    assert record["dictionaries"]["attn.0-topk-k4-heads"] == {
        **{"read": "x.0", "target": "y.0", "n_qk": 2 * heads, "n_ov": 2 * width, "d_qk": rules[0].W_Q.shape[2]},
        **{"init": "heads", "freeze_qk": False},
    }


def test_frozen_queries_are_the_layers(llama, texts, tmp_path):
    lorsa(llama, texts, tmp_path / "out", "--layer", 1, "--freeze-qk", "--architecture", "relu")
    found = package.load(tmp_path / "out" / "attn.1-relu-subspace-outputs")
    rule = package.attention_rule(interp.load(str(llama), device="cpu"), 1, context=20)
    assert found.cfg.n_qk == len(rule.W_Q)
    for name in ("W_Q", "W_K", "b_Q", "b_K"):
        assert torch.equal(getattr(found, name), getattr(rule, name)), name


def test_a_lorsa_killed_twice_ends_with_the_same_bits_and_a_store_is_replayed(llama, texts, tmp_path):
    arguments = ("--layer", 1, "--architecture", "batchtopk", "--checkpoint-every", 3)
    random = np.random.default_rng(int(time.time()))
    lorsa(llama, texts, tmp_path / "whole", *arguments)
    told = ("-m", "interp", "train", "lorsa", llama, "--data", texts, "--out", tmp_path / "cut", *LORSA, *arguments)
    for mark in sorted(random.choice(range(1, 6), 2, replace=False).tolist()):
        process = subprocess.Popen(
            [sys.executable, *map(str, told)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        checkpoints = tmp_path / "cut" / "checkpoints"
        while process.poll() is None and not any(
            int(path.name.removeprefix("step-")) >= 3 * mark for path in checkpoints.glob("step-*")
        ):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    lorsa(llama, texts, tmp_path / "cut", *arguments)
    name = "attn.1-batchtopk-k4-subspace-outputs"
    same(package.load(tmp_path / "whole" / name), package.load(tmp_path / "cut" / name))
    logs = [pd.read_parquet(tmp_path / n / "metrics.parquet").drop(columns=list(TIMES)) for n in ("whole", "cut")]
    pd.testing.assert_frame_equal(*logs)
    assert "init is" in lorsa(llama, texts, tmp_path / "cut", *arguments, "--init", "heads", code=2)
    store = ("--store", tmp_path / "store", "--store-dtype", "float32", "--layer", 1)
    lorsa(llama, texts, tmp_path / "stored", *store)
    held = ActivationStore(tmp_path / "store")
    assert (set(held.d_in), held.keep, held.used >= 1600) == ({"x.1", "y.1"}, "contexts", True)
    metrics = pd.read_parquet(tmp_path / "stored" / "metrics.parquet")
    assert metrics["fvu"].iloc[-1] < metrics["fvu"].iloc[0]


def test_a_lorsa_of_two_processes_has_the_curve_of_one(llama, tmp_path):
    """Contexts of different lengths: the processes' shares differ in their number of tokens."""
    random = torch.Generator().manual_seed(1)
    lines = [" ".join(WORDS[:n]) for n in torch.randint(1, len(WORDS), (40,), generator=random)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    arguments = (
        "--layer",
        1,
        "--architecture",
        "batchtopk",
        "--no-packed",
        "--log-every",
        1,
        "--dead-feature-window",
        3,
    )
    lorsa(llama, tmp_path / "lines.txt", tmp_path / "one", *arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29543"]
    told = ("-m", "interp", "train", "lorsa", llama, "--data", tmp_path / "lines.txt", "--out", tmp_path / "two")
    done = subprocess.run(
        [*command, *map(str, (*told, *LORSA, *arguments))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (pd.read_parquet(tmp_path / name / "metrics.parquet") for name in ("one", "two"))
    assert len(one) == 20
    assert int(one["dead"].max()) > 0
    assert not np.array_equal(one["tokens"], 2 * two["tokens"])
    for column in ("loss", "mse_loss", "auxiliary_reconstruction_loss", "fvu", "l0", "dead"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-4, atol=1e-4, err_msg=column)
    name = "attn.1-batchtopk-k4-subspace-outputs"
    alone, shared = (package.load(tmp_path / folder / name) for folder in ("one", "two"))
    assert shared.metadata["tokens"] == alone.metadata["tokens"] == int(one["tokens"].iloc[-1])


@pytest.mark.parametrize(
    ("name", "more", "folder"),
    [("bert", (), "attn.1"), ("vit", (), "attn.1"), ("llava", ("--tower", "vision"), "vision-attn.1"),
     ("llava", ("--tokens-used", "image"), "attn.1")],
)  # fmt: skip
def test_lorsas_of_encoders_and_of_both_towers(name, more, folder, texts, tmp_path):
    model = saved(tmp_path, name)
    data = texts if name == "bert" else "scenes"
    documents = () if name == "bert" else ("--tokens", 400)
    lorsa(model, data, tmp_path / "out", "--layer", 1, *documents, *more)
    found = package.load(tmp_path / "out" / f"{folder}-topk-k4-subspace-outputs")
    assert found.cfg.causal is (folder == "attn.1" and name == "llava")
    metrics = pd.read_parquet(tmp_path / "out" / "metrics.parquet")
    assert metrics["fvu"].iloc[-1] < metrics["fvu"].iloc[0]


def test_a_config_of_a_lorsa(llama, texts, tmp_path):
    call("init", "lorsa", "--out", tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == template(LorsaRunSettings, "lorsa")
    made = yaml.safe_load((tmp_path / "run.yaml").read_text())
    made |= {"model": str(llama), "data": str(texts), "layer": 1, "k": [2, 3], "init": ["heads", "random"], "n_ov": 64}
    made |= {"n_qk": 8, "tokens": 160, "context": 20, "contexts": 4, "device": "cpu", "l1_coefficient": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    assert "usable" in call("check", tmp_path / "run.yaml")
    call("train", "lorsa", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")
    found = package.load(tmp_path / "out" / "attn.1-topk-k3-random")
    assert (found.cfg.n_qk, found.cfg.n_ov, found.cfg.k, found.metadata["steps"]) == (8, 64, 3, 2)
    assert "interp train lorsa" in (tmp_path / "out" / "settings.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--n-qk", "3", "--n-ov", "10"), "take n_ov=9"),
        (("--n-qk", "3", "--init", "heads"), "n_qk=3 is no multiple of the layer's 4 heads"),
        (("--context", "1"), "context must be at least 2"),
        (("--no-packed", "--special", "none", "--no-drop-first", "--documents", "lines"), "at least two"),
        (("--layer", "99"), "99"),
        (("--init", "magic"), "magic"),
        (("--init", "heads,heads"), "init names one twice"),
        (("--init", "random", "--freeze-qk"), "init=random has others"),
        (("--architecture", "identity"), "identity"),
        (("--k", "5000"), "k lies above 0"),
        (("--k", "2.5"), "k lies above 0"),
        (("--dtype", "bfloat16"), "measured in float32"),
        (("--expansion", "0"), "expansion must be at least 1"),
    ],
)
def test_bad_input_for_a_lorsa_is_one_line(llama, tmp_path, arguments, said):
    (tmp_path / "letters.txt").write_text("\n".join("abcdefgh"))
    layer = () if "--layer" in arguments else ("--layer", 1)
    assert said in lorsa(llama, tmp_path / "letters.txt", tmp_path / "out", *layer, *arguments, code=2)


def test_a_layer_without_attention_and_a_rule_of_another_form(texts, tmp_path):
    assert "no self-attention" in lorsa(saved(tmp_path, "mamba"), texts, tmp_path / "out", "--layer", 1, code=2)
    model = saved(tmp_path, "t5")
    assert "bias by distance" in lorsa(model, texts, tmp_path / "t5out", "--layer", 1, "--tower", "encoder", code=2)
    assert "read its encoder" in lorsa(model, texts, tmp_path / "decoder", "--layer", 1, code=2)
