"""Two processes under torchrun (gloo): a tensor-parallel model is read, edited and swept as the whole one is."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import interp
from interp.cli.tracing.folder import TraceFolder
from interp.scores import HeadScores
from tests.scale import findings
from tests.test_cli_trace import PAIRS, write
from tests.zoo import build, processor

TENSOR_PARALLEL = """
import sys, warnings
import torch
from torch import distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
import interp
from interp import edits
from interp.errors import UnsupportedError
from tests.scale import CLEAN, findings

dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.float32)
lens = interp.wrap(model)
held = {name: p.to_local() for name, p in model.named_parameters() if hasattr(p, "to_local")}
assert held["model.layers.0.self_attn.o_proj.weight"].shape == (32, 16)  # half of the heads is here
found = findings(lens)
batch = lens.prepare(input_ids=CLEAN, padding_side="left")
said = []
for ask in (
    lambda: lens.run(batch, ["resid_pre.0"], gradients=["resid_pre.0"], metric=lambda logits: logits[:, -1, 3]),
    lambda: lens.run(batch, ["logits"], [edits.ablate(site="pattern", layers=0)]),
):
    try:
        ask()
    except UnsupportedError as error:
        said.append(str(error))
print("REFUSED", *said, sep="\\nREFUSED ")
save_file({name: value.contiguous() for name, value in found.items()}, f"{sys.argv[2]}/{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


def torchrun(*arguments: object, port: int = 29541) -> str:
    """What two processes print; fails with what they said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_tensor_parallel(tmp_path):
    """Heads and neurons that lie on two processes are gathered; both processes find what one finds."""
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    said = torchrun(tmp_path / "run.py", tmp_path / "model", tmp_path)
    assert said.count("gradients are refused in a tensor-parallel model") == 2
    assert said.count("edits of ['pattern'] are refused in a tensor-parallel model") == 2
    whole = findings(interp.wrap(build("llama")))
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert set(found) == set(whole)
        for name, value in whole.items():
            torch.testing.assert_close(
                found[name], value, atol=2e-5, rtol=1e-4, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


def commands(tmp_path, *arguments: object) -> tuple[str, str]:
    """What a command says in one process and in two, which write into `one` and `two`."""
    one = subprocess.run(
        [sys.executable, "-m", "interp", *map(str, arguments), "--out", str(tmp_path / "one")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    two = torchrun("-m", "interp", *arguments, "--out", tmp_path / "two", port=29542)
    left = [{p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert left[0] == left[1]  # nothing that was exchanged stays
    return one, two


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    processor("llama").save_pretrained(folder)
    return folder


def test_heads(model, tmp_path):
    """Batches of prompts are divided; the rankings, the tables and what is printed are those of one process."""
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    given = ["heads", model, "-m", "direct_effect,importance,ablation", "-p", prompts, "--device", "cpu"]
    one, two = commands(tmp_path, *given, "--batch-size", 2, "--effect-heads", 0)
    kept = [[x for x in said.splitlines() if "strongest" in x or x[:1] == " "] for said in (one, two)]
    assert kept[0] == kept[1]
    assert two.count("free on cpu") == 1  # only the first process speaks
    for method in ("direct_effect", "importance", "ablation"):
        first, second = (HeadScores.load(tmp_path / name / method) for name in ("one", "two"))
        assert len(first.per_prompt) == len(PAIRS)
        assert second.equals(first)


def test_trace(model, tmp_path):
    """Parts of prompts are divided; the map of all prompts is that of one process."""
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    given = ["trace", model, "-m", "sweep,attribution", "-p", prompts, "--device", "cpu", "--batch-size", 2]
    commands(tmp_path, *given)
    for method in ("sweep", "attribution"):
        one, two = (dict(TraceFolder.read(tmp_path / name).results())[method] for name in ("one", "two"))
        assert len(one) == len(PAIRS)
        assert two.equals(one)
