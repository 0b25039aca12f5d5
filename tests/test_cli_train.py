"""`interp train`: dictionaries as the library trains them, stores, stopped runs, several processes, bad input."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields

import pandas as pd
import pytest
import torch
import yaml

import interp
from interp import dictionaries
from interp.cli.training.command import command_of
from interp.cli.training.documented import settings_of
from interp.cli.training.settings import TrainRunSettings, help_of, read_config, template
from interp.dictionaries import DictionaryConfig, TrainSettings
from interp.dictionaries.activations import ActivationStream, MixingBuffer
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
    assert help_of("dead_feature_window").startswith("A latent that was active in no token of so many steps is dead")
    parameters = inspect.signature(command_of("transcoder")).parameters
    assert {row.name for row in fields(TrainRunSettings)} | {"out", "config", "overwrite"} == set(parameters)
    assert "Train transcoders of MODEL" in call("train", "transcoder", "--help")
    assert "transcoder" in call("train", "--help")


def test_config_and_init(llama, texts, tmp_path):
    call("init", "train", "--out", tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == template()
    made = yaml.safe_load((tmp_path / "run.yaml").read_text())
    made |= {"model": str(llama), "data": str(texts), "layer": [0, 1], "k": 3, "expansion": 2, "tokens": 300}
    made |= {"batch_size": 100, "buffer": 200, "context": 32, "architecture": ["matryoshka_batchtopk"]}
    made |= {"matryoshka_widths": [8, 16], "device": "cpu"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    settings = TrainRunSettings.of(read_config(tmp_path / "run.yaml"))
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
