"""Training: the loop is Adam on the loss, goes on bit for bit, stops clearly, is the same in two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from interp import dictionaries
from interp.dictionaries import SAE, Job, TrainSettings, Transcoder, train
from interp.dictionaries.activations import Rows, State
from interp.dictionaries.training.log import TIMES
from interp.errors import FileError, InputError, NonFiniteError, SettingsError, UnknownNameError

D_IN, D_SAE = 12, 40


class Drawn:
    """A source of sparse mixtures of fixed directions, by step; its target is another map of the same codes."""

    def __init__(self, steps=10_000, batch=64, seed=0, rank=0, world=1):
        random = torch.Generator().manual_seed(7)
        self._in, self._out = torch.randn(24, D_IN, generator=random), torch.randn(24, D_IN, generator=random)
        self.steps, self.batch, self.seed, self.at, self.rank, self.world = steps, batch, seed, 0, rank, world
        self.spoilt = -1

    d_in = {"x": D_IN, "y": D_IN}  # noqa: RUF012

    @property
    def settings(self):
        return {"seed": self.seed, "batch": self.batch}

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= self.steps:
            raise StopIteration
        random = torch.Generator().manual_seed(1000 * self.seed + self.at)
        codes = torch.rand(self.batch, 24, generator=random) * (torch.rand(self.batch, 24, generator=random) < 0.1)
        self.at += 1
        share = slice(self.rank * self.batch // self.world, (self.rank + 1) * self.batch // self.world)
        values = {"x": (codes @ self._in + 0.3)[share], "y": (codes @ self._out)[share]}
        if self.at - 1 == self.spoilt:
            values["x"] *= 1e30
        n = len(values["x"])
        return Rows(values, torch.full((n,), self.at), torch.arange(n))

    def state(self):
        return State({"at": self.at})

    def restore(self, state):
        self.at = state.values["at"]

    def close(self):
        pass


def sae(architecture="topk", **settings):
    return SAE(d_in=D_IN, d_sae=D_SAE, architecture=architecture, k=3, **settings)


def weights(dictionary):
    return {name: value.clone() for name, value in dictionary.state_dict().items()}


def same(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "batchtopk", "gated", "matryoshka_batchtopk"])
def test_the_loop_is_adam_on_the_loss(architecture):
    """Against a plain loop with torch's own optimiser: warm-up, decay, penalties, clipping and dead latents."""
    extra = {"matryoshka_widths": (8, 20)} if architecture.startswith("mat") else {}
    mine, plain = sae(architecture, **extra), sae(architecture, **extra).train()
    settings = TrainSettings(
        steps=30, lr=3e-3, lr_warm_up_steps=5, lr_decay_steps=10, sparsity_warm_up_steps=8, dead_feature_window=4
    )
    found = train(mine, Drawn(), settings, read="x")
    source, optimiser = Drawn(), torch.optim.Adam(plain.parameters(), lr=3e-3)
    idle, dead = torch.zeros(D_SAE), 0
    for step in range(30):
        x = next(source)["x"]
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 5) * min(1, (30 - step) / 10)
        loss = plain.loss(x, dead=idle >= 4, sparsity=min(1, (step + 1) / 8))
        dead += int((idle >= 4).sum())
        optimiser.zero_grad()
        loss.total.backward()
        plain.before_step()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimiser.step()
        plain.after_step()
        idle = torch.where(loss.counts() > 0, torch.zeros(D_SAE), idle + 1)
    for (name, one), two in zip(mine.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4, msg=name)
    assert found.metrics["loss"].iloc[-1] == pytest.approx(float(loss.total), rel=1e-4)
    assert found.metrics["dead"].iloc[-1] == int((idle >= 4).sum())
    assert dead > 0 or architecture in ("standard", "gated", "jumprelu")
    assert found.steps == 30
    assert found.tokens == 30 * 64


def test_training_learns_and_the_log_says_so():
    made = sae(normalize_activations="expected_average_only_in")
    settings = TrainSettings(steps=600, lr=3e-3, log_every=100, scale_rows=1000, b_dec_init="mean")
    found = train(made, Drawn(), settings, read="x")
    fvu = found.metrics["fvu"].to_numpy()
    assert fvu[-1] < 0.25 < fvu[0]
    assert list(found.metrics["step"]) == [100, 200, 300, 400, 500, 600]
    assert np.isfinite(found.metrics.drop(columns="dictionary").to_numpy(dtype=float)).all()
    held = Drawn(seed=5)
    x = torch.cat([next(held)["x"] for _ in range(20)])
    done = found.dictionaries["dictionary"]
    assert done.cfg.normalize_activations == "none"
    assert float((done(x) - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.3
    assert not done.training


@pytest.mark.parametrize("at", [7, 20])
def test_a_run_that_is_taken_up_ends_with_the_same_bits(tmp_path, at):
    jobs = lambda: {  # noqa: E731
        "one": Job(sae("batchtopk", normalize_activations="expected_average_only_in"), "x"),
        "two": Job(Transcoder(d_in=D_IN, d_sae=D_SAE, architecture="topk", k=3, skip=True), "x", "y"),
        "three": Job(sae("jumprelu"), "y"),
    }
    settings = TrainSettings(
        steps=30, lr=1e-2, log_every=4, checkpoint_every=5, dead_feature_window=3, scale_rows=300, lr_decay_steps=10
    )
    whole, rest = jobs(), jobs()
    expected = train(whole, Drawn(), settings, folder=tmp_path / "whole")
    stopped = Drawn(steps=at)
    with pytest.warns(UserWarning, match=f"after {at} of 30 steps"):
        train(jobs(), stopped, settings, folder=tmp_path / "cut")
    found = train(rest, Drawn(), settings, folder=tmp_path / "cut")
    for name in whole:
        same(whole[name].dictionary, rest[name].dictionary)
        same(dictionaries.load(tmp_path / "whole" / name), dictionaries.load(tmp_path / "cut" / name))
    logs = [one.metrics.drop(columns=list(TIMES)) for one in (expected, found)]
    pd.testing.assert_frame_equal(*logs)
    read = pd.read_parquet(tmp_path / "cut" / "metrics.parquet")
    pd.testing.assert_frame_equal(read.drop(columns=list(TIMES)), logs[0])
    assert len(sorted((tmp_path / "cut" / "checkpoints").iterdir())) == 2
    again = train(jobs(), Drawn(), settings, folder=tmp_path / "cut")
    assert again.steps == 30
    same(again.dictionaries["two"], found.dictionaries["two"])


KILLED = """
import sys, torch
torch.set_num_threads(1)
from tests.test_dictionaries_training import Drawn, sae, train, TrainSettings
from pathlib import Path
folder = Path(sys.argv[1])
settings = TrainSettings(steps=400, lr=1e-2, log_every=10, checkpoint_every=7, dead_feature_window=20)
train(sae("batchtopk"), Drawn(), settings, read="x", folder=folder, on_log=lambda row: print(row["step"], flush=True))
print("done", flush=True)
"""


def test_killed_at_three_random_steps_it_ends_with_the_same_bits(tmp_path):
    random = np.random.default_rng(int(time.time()))
    marks = sorted(random.choice(range(2, 38), 3, replace=False).tolist())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=300)[0].strip().endswith("done")
    for mark in marks:
        process = start(tmp_path / "cut")
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "done" or int(line) >= 10 * mark:
                break
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(tmp_path / "cut")
    assert last.communicate(timeout=300)[0].strip().endswith("done")
    same(dictionaries.load(tmp_path / "whole" / "dictionary"), dictionaries.load(tmp_path / "cut" / "dictionary"))
    logs = [pd.read_parquet(tmp_path / n / "metrics.parquet").drop(columns=list(TIMES)) for n in ("whole", "cut")]
    pd.testing.assert_frame_equal(*logs)


def test_other_settings_and_damaged_checkpoints_are_refused(tmp_path):
    settings = TrainSettings(steps=10, checkpoint_every=4, log_every=5)
    train(sae(), Drawn(), settings, read="x", folder=tmp_path)
    with pytest.raises(SettingsError, match=r"lr.*0\.1"):
        train(sae(), Drawn(), TrainSettings(steps=10, lr=0.1), read="x", folder=tmp_path)
    with pytest.raises(SettingsError, match="source"):
        train(sae(), Drawn(seed=3), settings, read="x", folder=tmp_path)
    with pytest.raises(SettingsError, match="dictionary"):
        train(sae(seed=3), Drawn(), settings, read="x", folder=tmp_path)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = newest / "dictionary-dictionary.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-10], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match="missing or damaged"):
            train(sae(), Drawn(), settings, read="x", folder=tmp_path)
    shutil_free = newest / "checkpoint.json"
    assert json.loads(shutil_free.read_text())["step"] == 10
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert train(sae(), Drawn(), settings, read="x", folder=tmp_path).steps == 10


def test_a_loss_that_is_not_finite_stops_and_loses_nothing(tmp_path):
    settings = TrainSettings(steps=30, checkpoint_every=5, log_every=5)
    source = Drawn()
    source.spoilt = 12
    with pytest.raises(NonFiniteError, match="step 12"):
        train(sae(), source, settings, read="x", folder=tmp_path)
    clean, whole = sae(), sae()
    assert train(clean, Drawn(), settings, read="x", folder=tmp_path).steps == 30
    train(whole, Drawn(), settings, read="x")
    same(clean, whole)


def test_a_full_disk_stops_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    from interp.dictionaries.training import checkpoint

    settings = TrainSettings(steps=20, checkpoint_every=5, log_every=5)
    real, calls = checkpoint.save_tensors, []

    def full(path, *rest):
        calls.append(path)
        if len(calls) == 6:
            raise FileError(f"cannot write {path}: No space left on device.")
        return real(path, *rest)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(FileError, match="No space left"):
        train(sae(), Drawn(), settings, read="x", folder=tmp_path)
    monkeypatch.setattr(checkpoint, "save_tensors", real)
    found, whole = sae(), sae()
    assert train(found, Drawn(), settings, read="x", folder=tmp_path).steps == 20
    train(whole, Drawn(), settings, read="x")
    same(found, whole)
    assert all(path.name.startswith("step-") for path in (tmp_path / "checkpoints").iterdir())


def test_half_precision_keeps_weights_and_losses_wide():
    made, wide = sae(), sae()
    settings = TrainSettings(steps=200, lr=3e-3, log_every=200)
    low = train(made, Drawn(), TrainSettings(steps=200, lr=3e-3, log_every=200, autocast="bfloat16"), read="x")
    high = train(wide, Drawn(), settings, read="x")
    assert made.W_enc.dtype == torch.float32
    assert low.metrics["fvu"].iloc[-1] == pytest.approx(high.metrics["fvu"].iloc[-1], rel=0.1)
    assert not torch.equal(made.W_enc, wide.W_enc)


TWO = """
import json, os, sys, torch
torch.set_num_threads(1)
from interp.dictionaries.training import Processes, TrainSettings, train
from interp.dictionaries.training.sharded import sharded
from tests.test_dictionaries_training import Drawn, sae
processes = Processes.join("cpu")
kind, folder, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
source = Drawn(rank=processes.rank, world=processes.world, steps=steps)
settings = TrainSettings(
    steps=steps, lr=1e-2, log_every=1, dead_feature_window=3, scale_rows=640, checkpoint_every=10,
    sharded=len(sys.argv) > 4,
)
given = sae(kind, normalize_activations="expected_average_only_in")
found = train(given, source, settings, read="x", folder=folder)
if settings.sharded:
    spread = sharded(given)
    parts = torch.tensor([p.to_local().numel() for p in spread.parameters()])
    torch.distributed.all_reduce(parts)
    assert parts.tolist() == [p.numel() for p in given.parameters()], parts
    assert parts.sum() > 1.9 * sum(p.to_local().numel() for p in spread.parameters())
"""


def two(script, kind, folder, *more):
    """A run of 40 steps in two processes over gloo."""
    script.write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    done = subprocess.run(
        [*command, str(script), kind, str(folder), "40", *more],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def alone(kind):
    settings = TrainSettings(steps=40, lr=1e-2, log_every=1, dead_feature_window=3, scale_rows=640)
    one = sae(kind, normalize_activations="expected_average_only_in")
    return train(one, Drawn(), settings, read="x").metrics


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_a_dictionary_spread_over_processes_has_the_curve_of_one(tmp_path, kind):
    """FSDP2 over gloo; taken up again from whole weights, with the same bits."""
    two(tmp_path / "two.py", kind, tmp_path / "run", "sharded")
    one, found = alone(kind), pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    for column in ("loss", "mse_loss", "fvu", "l0", "dead"):
        np.testing.assert_allclose(found[column], one[column], rtol=1e-4, atol=1e-5, err_msg=column)
    weights = (tmp_path / "run" / "dictionary" / "sae_weights.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000040")
    shutil.rmtree(tmp_path / "run" / "dictionary")
    two(tmp_path / "two.py", kind, tmp_path / "run", "sharded")
    assert (tmp_path / "run" / "dictionary" / "sae_weights.safetensors").read_bytes() == weights


def test_what_cannot_be_spread():
    with pytest.raises(SettingsError, match="torchrun"):
        train(sae(), Drawn(), TrainSettings(steps=2, sharded=True), read="x")
    with pytest.raises(SettingsError, match="bfloat16 or none"):
        TrainSettings(steps=2, sharded=True, autocast="float16")


@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, kind):
    """Over gloo: the threshold, the dead latents, the norms and the gradient are those of all processes together."""
    for _ in range(2):  # the second time it is taken up and there is nothing left to do
        two(tmp_path / "two.py", kind, tmp_path / "run")
    one, found = alone(kind), pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert int(one["dead"].max()) > 0
    for column in ("loss", "mse_loss", "auxiliary_reconstruction_loss", "fvu", "l0", "dead"):
        np.testing.assert_allclose(found[column], one[column], rtol=2e-5, atol=1e-5, err_msg=column)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"steps": 0}, SettingsError, "steps is a whole number of at least 1"),
        ({"steps": 5, "lr": float("nan")}, SettingsError, "lr is a finite number above 0"),
        ({"steps": 5, "adam_beta1": 1.0}, SettingsError, "adam_beta1"),
        ({"steps": 5, "lr_warm_up_steps": 3, "lr_decay_steps": 3}, SettingsError, "more than the 5 steps"),
        ({"steps": 5, "autocast": "int8"}, UnknownNameError, "int8"),
        ({"steps": 5, "learning_rate": 1.0}, UnknownNameError, "learning_rate"),
        ({}, SettingsError, "training needs steps"),
    ],
)
def test_bad_settings(settings, error, said):
    with pytest.raises(error, match=said):
        TrainSettings.of(settings)


def test_bad_jobs(tmp_path):
    settings = TrainSettings(steps=2)
    with pytest.raises(InputError, match="there is no dictionary"):
        train({}, Drawn(), settings)
    with pytest.raises(InputError, match="choose one by read="):
        train(sae(), Drawn(), settings)
    with pytest.raises(InputError, match="not 'z'"):
        train(sae(), Drawn(), settings, read="z")
    with pytest.raises(InputError, match="x is 12 wide, but the dictionary has d_in=13"):
        train(SAE(d_in=13, d_sae=40, k=3), Drawn(), settings, read="x")
    with pytest.raises(InputError, match="needs a target"):
        train(Transcoder(d_in=12, d_sae=40, k=3), Drawn(), settings, read="x")
    with pytest.raises(SettingsError, match="it names files"):
        train({"../x": sae()}, Drawn(), settings, read="x")
    one = sae()
    with pytest.raises(InputError, match="two names"):
        train({"a": one, "b": one}, Drawn(), settings, read="x")
    with pytest.raises(UnknownNameError, match="paper"):
        train(sae(), Drawn(), settings, read="x", writers=["paper"])
