"""`interp attribute`: what it writes, that it is what the methods give, how it is taken up again, bad input."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import interp
import interp.cli.cost
from interp import attribution
from interp.attribution.continued import continued
from interp.attribution.relative_attention import relative_attention
from interp.attribution.token_activation_map import token_activation_map
from interp.cli.app import app
from interp.cli.attribution import asking
from interp.cli.attribution.agreement import compared
from interp.cli.attribution.folder import AttributionFolder
from interp.cli.attribution.settings import METHODS, OPTIONS, AttributeSettings, read_config, template
from interp.cli.attribution.texts import QUESTIONS, TITLES, explanation
from interp.cli.named import named_methods
from interp.data import read_prompts
from interp.errors import FileError, InputError, SettingsError, UnknownNameError
from interp.evaluation.agreement import agreement as correlation
from interp.report import Panel, Panels, Scale, Section, overlay, write_report
from interp.tokens import TokenScores
from tests.conftest import packaged
from tests.zoo import build, processor

ROWS = [
    {"text": "ab cd ab c", "answer": "d", "wrong": "e"},
    {"text": "xyz ab", "answer": "a", "wrong": "b"},
    {"text": "hello ab hell", "answer": "o", "wrong": "p"},
    {"text": "1 2 ab 1 2", "answer": "3", "wrong": "4"},
    {"text": "q ab", "answer": "e", "wrong": "r"},
]
SCENE = "is there a {} in the image ?"


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


def attribute(model, prompts, out, *arguments, code=0):
    options = ("-p", prompts, "--out", out, "--device", "cpu", "--examples", 1)  # pages are drawn where they are read
    return call("attribute", model, *options, *arguments, code=code)


def saved(folder, name):
    model, read = build(name), processor(name)
    if model.can_generate():
        model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / name)
    read.save_pretrained(folder / name)
    return folder / name


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(models):
    return saved(models, "llama")


@pytest.fixture(scope="module")
def lens(model):
    return interp.load(str(model), device="cpu")


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", ROWS)


@pytest.fixture(scope="module")
def scenes_lens():
    return packaged("scenes")


@pytest.fixture
def pictures(tmp_path):
    """A folder with three scenes and a prompt file beside it."""
    from interp.data import scenes

    drawn = list(scenes.scenes("test", 3))
    (tmp_path / "images").mkdir()
    rows = []
    for n, scene in enumerate(drawn):
        scene.image.save(tmp_path / "images" / f"{n}.png")
        rows.append({"text": SCENE.format(scene.names[0]), "image": f"{n}.png", "answer": "yes", "wrong": "no"})
    return write(tmp_path / "questions.jsonl", rows), drawn


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.raw = path.read_text()
        self.tags, self.addresses, self.text, self.panels = [], [], "", 0
        self.feed(self.raw)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        self.panels += ("class", "panel") in attrs

    def handle_data(self, data):
        self.text += data


def own(scores, sample):
    """Scores of one sample over its own tokens [target, source]."""
    return scores.select(sample).scores[0]


# What it writes ----------------------------------------------------------------------------------------------------


def test_end_to_end(model, lens, prompts, tmp_path):
    out = tmp_path / "run"
    named = ("--method", "rollout,gradient_x_input", "-m", "blank_out")
    text = attribute(model, prompts, out, *named, "--batch-size", 2, "--examples", 4)
    assert text.strip().splitlines()[-1] == f"report: {out / 'report.html'}"
    assert "d rather than e" in text
    assert not list(out.rglob("*.tmp"))
    assert yaml.safe_load((out / "settings.yaml").read_text())["methods"] == [
        "rollout",
        "gradient_x_input",
        "blank_out",
    ]
    frame = pd.read_parquet(out / "tokens.parquet")
    assert list(frame.columns[:9]) == [
        *("method", "prompt", "target", "target_token", "source", "token", "kind", "score", "rank")
    ]
    asked = [{"answers": [r["answer"]], "wrong": [r["wrong"]]} for r in ROWS]
    # Whatever the batches were: the numbers are those of each prompt alone.
    for i, row in enumerate(ROWS):
        batch = lens.prepare([row["text"]])
        alone = {
            "rollout": attribution.rollout(lens, batch),
            "gradient_x_input": attribution.gradient_x_input(lens, batch, **asked[i]),
            "blank_out": attribution.blank_out(lens, batch, **asked[i]),
        }
        for method, wanted in alone.items():
            rows = frame[(frame["method"] == method) & (frame["prompt"] == i)]
            found = torch.tensor(rows["score"].to_numpy())
            torch.testing.assert_close(found, own(wanted, 0)[-1], atol=1e-5, rtol=1e-3)
            assert rows["target"].unique().tolist() == [len(rows) - 1]
            assert rows.loc[rows["score"].idxmax(), "rank"] == 1
            assert (rows["source"] == range(len(rows))).all()
    parts = sorted(p.name for p in (out / "rollout").iterdir())
    assert parts == ["00000", "00002", "00004"]
    part = interp.scores.load(out / "blank_out" / "00002")
    assert isinstance(part, TokenScores)
    assert part.settings["prompt_index"] == [2, 3]
    assert part.settings["wrong"] == [["p"], ["4"]]
    figures = sorted(p.name for p in (out / "figures").iterdir())
    assert len(figures) == 3 * 4 + 1
    assert "plotly.min.js" in figures
    page = Page(out / "report.html")
    assert page.panels == 3 * 4
    assert all(a.startswith("#") for a in page.addresses)
    for words in ("What it does not see", "Do the methods agree?", "d rather than e", "Spearman"):
        assert words in page.text
    agree = pd.read_parquet(out / "agreement.parquet").set_index(["method", "other"])
    assert agree["prompts"].tolist() == [5, 5, 5]
    assert (agree["low"] <= agree["sizes"]).all()
    assert agree["signed"].isna().tolist() == [True, True, False]
    batch = lens.prepare([r["text"] for r in ROWS])
    every = {name: [r[name] for r in ROWS] for name in ("answer", "wrong")}
    asked = {"answers": every["answer"], "wrong": every["wrong"]}
    pair = attribution.rollout(lens, batch), attribution.gradient_x_input(lens, batch, **asked)
    wanted = correlation(*pair, sizes=True).value("spearman")
    assert agree.loc[("rollout", "gradient_x_input"), "sizes"] == pytest.approx(wanted, abs=1e-6)
    before = page.raw
    (out / "report.html").unlink()
    (out / "tokens.parquet").unlink()
    call("report", out)
    assert (out / "report.html").read_text() == before
    assert pd.read_parquet(out / "tokens.parquet").equals(frame)


def test_every_method_has_its_words_and_runs(model, prompts, tmp_path):
    assert set(TITLES) == set(QUESTIONS) == set(METHODS) == set(asking.FUNCTIONS)
    of_pictures = ("token_activation_map", "relative_attention")
    named = ",".join(m for m in METHODS if m not in of_pictures)
    out = tmp_path / "run"
    attribute(model, prompts, out, "-m", named, "--steps", 2, "--layer", 1, "--measure", "probability")
    folder = AttributionFolder.read(out)
    for i, found in folder.results():
        assert list(found) == named.split(",")
        for method, scores in found.items():
            assert scores.scores.shape[:2] == (1, 1)
            assert scores.scores.isfinite().all()
            words = explanation(method, scores.settings)
            assert "None" not in words
            assert words.count("What it does not see") == 1
            if "measure" in OPTIONS[method]:
                assert scores.settings["measure"] == "probability"
                assert "the probability of the answer" in words
        assert found["rollout"].settings["layers"] == [0, 1]
        assert found["raw_attention"].settings["layer"] == 1
        assert i < len(ROWS)
    assert Page(out / "report.html").panels == 10


def test_pages_escape_what_they_show(model, tmp_path):
    evil = '<script>alert(1)</script> & "b" <img src=x onerror=alert(2)>'
    prompts = write(tmp_path / "p.jsonl", [{"text": evil}])
    out = tmp_path / "run"
    attribute(model, prompts, out, "-m", "rollout,input_gradient")
    page = Page(out / "report.html")
    assert "<script>alert" not in page.raw
    assert "img" not in page.tags
    assert evil in page.text
    figure = Page(out / "figures" / "rollout-prompt-1.html")
    assert figure.addresses == ["plotly.min.js"]
    assert "<script>alert" not in figure.raw
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page.raw)[1]
    assert "default-src 'none'" in policy


# Resuming ----------------------------------------------------------------------------------------------------------


def test_a_complete_method_is_not_computed_again(model, prompts, tmp_path, monkeypatch):
    out = tmp_path / "run"
    attribute(model, prompts, out, "-m", "rollout")
    before = (out / "rollout" / "00000" / "scores.safetensors").stat().st_mtime_ns

    def refuse(*args, **kwargs):
        raise AssertionError("loaded a model although nothing is missing")

    with monkeypatch.context() as patch:
        patch.setattr("interp.cli.attribution.run.load", refuse)
        text = attribute(model, prompts, out, "-m", "rollout", "--batch-size", 2, "--top", 1)
        assert "rollout: complete in" in text
        assert "not computed again" in text
    text = attribute(model, prompts, out, "-m", "raw_attention")  # joins the same run
    assert (out / "rollout" / "00000" / "scores.safetensors").stat().st_mtime_ns == before
    assert yaml.safe_load((out / "settings.yaml").read_text())["methods"] == ["raw_attention", "rollout"]
    assert Page(out / "report.html").panels == 2


def test_an_interrupted_run_goes_on(model, prompts, tmp_path, monkeypatch):
    named = ("-m", "rollout,input_gradient")
    attribute(model, prompts, tmp_path / "whole", *named, "--batch-size", 2)
    real, calls = asking.Asker.attribute, []

    def broken(self, method, asked):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((method, asked.rows))
        return real(self, method, asked)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(asking.Asker, "attribute", broken)
        command = ["attribute", model, "-p", prompts, "--out", out, "--device", "cpu", *named, "--batch-size", 2]
        assert CliRunner().invoke(app, [str(a) for a in command]).exit_code != 0
    # Every method of a batch before the next batch: what does not work shows early.
    assert calls == [("rollout", [0, 1]), ("input_gradient", [0, 1]), ("rollout", [2, 3])]
    assert "no complete method" in call("report", out, code=2)
    calls.clear()

    def counted(self, method, asked):
        calls.append((method, asked.rows))
        return real(self, method, asked)

    monkeypatch.setattr(asking.Asker, "attribute", counted)
    text = attribute(model, prompts, out, *named, "--batch-size", 3)
    assert "rollout: 4 of 5 prompts are in" in text
    assert calls == [("input_gradient", [2, 3, 4]), ("rollout", [4])]
    one, two = (pd.read_parquet(tmp_path / name / "tokens.parquet") for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(one, two, atol=1e-5, rtol=1e-3)


def test_what_it_takes_is_said_and_what_does_not_fit_is_split(model, prompts, tmp_path, monkeypatch):
    """A line for each method before it runs; smaller batches give the same; too little for one prompt is refused."""
    named = ("-m", "rollout,gradient_x_input,blank_out")
    seen, rows_of = [], interp.cli.cost.rows_of
    monkeypatch.setattr("interp.cli.cost.rows_of", lambda costs, size: (seen.extend(costs), rows_of(costs, size))[1])
    text = attribute(model, prompts, tmp_path / "whole", *named)
    line = r"^(\w+): about \d+ s; 5 prompts at a time take about [\d.]+ \w?B of [\d.]+ \w?B free on cpu$"
    assert re.findall(line, text, re.MULTILINE) == ["rollout", "gradient_x_input", "blank_out"]
    longest = max(len(row["text"]) for row in ROWS)
    assert [cost.need.runs for cost in seen] == [1, 1, longest]
    each = max(cost.each for cost in seen)
    assert each == seen[1].each > 2 * seen[0].each  # a graph of all layers
    calls, real, blank = [], asking.Asker.attribute, asking.FUNCTIONS["blank_out"]

    def counted(self, method, asked):
        calls.append((method, len(asked.rows)))
        return real(self, method, asked)

    def blanked(*args, batch_size, **options):
        calls.append(("rows", batch_size))
        return blank(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(asking.Asker, "attribute", counted)
    monkeypatch.setitem(asking.FUNCTIONS, "blank_out", blanked)
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: int(2.5 * each / 0.9))
    text = attribute(model, prompts, tmp_path / "split", *named)
    assert "gradient_x_input: about 1 s; 2 prompts at a time" in text
    assert [size for method, size in calls if method == "gradient_x_input"] == [2, 2, 1]
    most = int(2.5 * each / 0.9 * 0.9) // seen[2].each
    assert {size for method, size in calls if method == "rows"} == {min(8 * 4, most)}
    one, two = (pd.read_parquet(tmp_path / name / "tokens.parquet") for name in ("whole", "split"))
    pd.testing.assert_frame_equal(one, two, atol=1e-5, rtol=1e-3)
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: each // 2)
    error = attribute(model, prompts, tmp_path / "none", *named, code=2)
    assert re.search(
        r"gradient_x_input does not fit: the longest prompt takes about [\d.]+ .?B, and [\d.]+ .?B are free", error
    )


def test_needs_of_every_method_are_known(scenes_lens, pictures, tmp_path, monkeypatch):
    """All methods and forms say something on a model with pictures, and run one prompt once for each kind of run."""
    from interp.cli.attribution.needs import costs

    runs, run = [], interp.Lens.run
    monkeypatch.setattr(interp.Lens, "run", lambda self, b, *a, **k: (runs.append(len(b)), run(self, b, *a, **k))[1])
    for form in ("relative", "gradient", "pixel_gradient"):
        settings = AttributeSettings(model="scenes", methods=METHODS, prompts=str(pictures[0]), form=form)
        asker = asking.Asker(scenes_lens, settings, read_prompts(pictures[0], images=tmp_path / "images"))
        lengths = {i: asker.check(i) for i in range(len(asker.prompts))}
        runs.clear()
        found = costs(asker, METHODS, lengths)
        assert list(found) == list(METHODS)
        # Each kind of run once, with its picture's embedding; in the vision tower also two pictures at once.
        assert len(runs) < 2 * len(METHODS)
        assert set(runs) == ({1, 2} if form == "pixel_gradient" else {1})
        assert all(cost.seconds > 0 and cost.fits > 100 for cost in found.values())


def test_other_settings_prompts_or_folders_are_refused(model, prompts, tmp_path):
    out = tmp_path / "run"
    attribute(model, prompts, out, "-m", "rollout")
    line = attribute(model, prompts, out, "-m", "rollout", "--residual", 0.2, code=2)
    assert "residual is 0.5 there, asked is 0.2" in line
    assert "target is 'last' there, asked is 'ab'" in attribute(
        model, prompts, out, "-m", "rollout", "--target", "ab", code=2
    )
    write(prompts, ROWS[:2])
    assert "other prompts" in attribute(model, prompts, out, "-m", "rollout", code=2)
    (out / "own.txt").write_text("mine")
    attribute(model, prompts, out, "-m", "raw_attention", "--overwrite")
    assert not (out / "rollout").exists()
    assert (out / "own.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"format": "interp-heads-run"}')
    for more in ((), ("--overwrite",)):
        line = attribute(model, prompts, other, "-m", "rollout", *more, code=2)
        assert "no record of `interp attribute`" in line
    (other / "run.json").rename(other / "x")
    assert "no run folder and not empty" in attribute(model, prompts, other, "-m", "rollout", code=2)


# Targets -----------------------------------------------------------------------------------------------------------


def test_a_text_is_a_target(model, lens, prompts, tmp_path):
    out = tmp_path / "run"
    attribute(model, prompts, out, "-m", "rollout,relevance", "--target", "ab", "--batch-size", 3)
    for i, found in AttributionFolder.read(out).results():
        start = ROWS[i]["text"].index("ab")  # the tokenizer is of bytes
        for method, scores in found.items():
            assert scores.targets.tolist() == [[start, start + 1]], method
            assert scores.target_tokens == [["a", "b"]]
        batch = lens.prepare([ROWS[i]["text"]])
        wanted = attribution.rollout(lens, batch, target=[start, start + 1])
        torch.testing.assert_close(found["rollout"].scores, wanted.scores, atol=1e-5, rtol=1e-3)
        asked = {"answers": [ROWS[i]["answer"]], "wrong": [ROWS[i]["wrong"]]}
        wanted = attribution.relevance(lens, batch, target=[start, start + 1], **asked)
        torch.testing.assert_close(found["relevance"].scores, wanted.scores, atol=1e-6, rtol=1e-3)
        assert found["relevance"].settings["answers"] == [[ROWS[i]["answer"]] * 2]
    assert Page(out / "report.html").panels == 2 * 2
    line = attribute(model, prompts, tmp_path / "no", "-m", "rollout", "--target", "cd", code=2)
    assert "the target 'cd' does not stand in prompt 2 of 5" in line
    assert "'xyz ab'" in line
    assert not (tmp_path / "no").exists()
    line = attribute(model, prompts, tmp_path / "no", "-m", "rollout", "--target", "text:last", code=2)
    assert "the target 'last' does not stand in prompt 1 of 5" in line


def test_what_the_model_says_is_a_target(model, lens, tmp_path):
    texts = ["ab cd ab c", "xyz", "1 2 3"]
    prompts = write(tmp_path / "p.jsonl", [{"text": t, "answer": "d"} for t in texts])
    out = tmp_path / "run"
    text = attribute(
        *(model, prompts, out, "-m", "raw_attention,gradient_x_input", "--target", "argmax"),
        *("--max-new-tokens", 3, "--batch-size", 2),
    )
    seen = 0
    for i, found in AttributionFolder.read(out).results():
        batch = lens.prepare([texts[i]], padding_side="left")
        made = lens.generate(batch, max_new_tokens=3, min_new_tokens=1).tokens
        whole, predicts = continued(lens, batch, made)
        count = int(predicts.sum())
        said = found["raw_attention"].settings["said"][0][:count]
        # The file's answers are not used: each token that was said is explained where it was predicted.
        assert found["gradient_x_input"].settings["answers"][0][:count] == said
        width = len(texts[i])
        assert found["raw_attention"].targets.tolist() == [list(range(width - 1, width - 1 + count))]
        wanted = attribution.gradient_x_input(lens, whole, target=predicts, answers=made[:, :count])
        torch.testing.assert_close(found["gradient_x_input"].scores, wanted.scores, atol=1e-4, rtol=1e-3)
        later = found["raw_attention"].scores[0].triu(width)
        assert not later.any()
        seen += 1
    assert seen == 3
    assert "gradient_x_input" in text
    # One token is what `last` explains without an answer; the token itself, at the end, has no say in it.
    write(prompts, [{"text": t} for t in texts])
    attribute(model, prompts, tmp_path / "one", "-m", "relevance", "--target", "argmax", "--max-new-tokens", 1)
    attribute(model, prompts, tmp_path / "last", "-m", "relevance")
    both = ([f["relevance"] for _, f in AttributionFolder.read(tmp_path / n).results()] for n in ("one", "last"))
    for one, last in zip(*both, strict=True):
        torch.testing.assert_close(one.scores[..., :-1], last.scores, atol=1e-6, rtol=1e-3)
        assert not one.scores[..., -1].any()
    line = attribute(model, prompts, tmp_path / "x", "-m", "rollout", "--max-new-tokens", 3, code=2)
    assert "max_new_tokens is for the target argmax" in line


def test_first_and_a_classifier(models, tmp_path):
    """A classifier is explained at the position that its class is read from, by methods with and without an answer."""
    torch.manual_seed(0)
    config = build("bert").config.to_dict() | {"num_labels": 2, "id2label": {0: "bad", 1: "good"}}
    config |= {"label2id": {"bad": 0, "good": 1}}
    classifier = BertForSequenceClassification(BertConfig(**config)).eval()
    folder = models / "classifier"
    classifier.save_pretrained(folder)
    processor("bert").save_pretrained(folder)
    rows = [{"text": "ab cd ef", "answer": "good", "wrong": "bad"}, {"text": "xy", "answer": "bad", "wrong": "good"}]
    prompts = write(tmp_path / "p.jsonl", rows)
    attribute(folder, prompts, tmp_path / "a", "-m", "rollout,relevance,gradient_x_input")
    lens = interp.load(str(folder), device="cpu")
    for i, found in AttributionFolder.read(tmp_path / "a").results():
        batch = lens.prepare([rows[i]["text"]])
        assert [s.targets.tolist() for s in found.values()] == [[[0]]] * 3
        wanted = attribution.relevance(lens, batch, answers=[rows[i]["answer"]], wrong=[rows[i]["wrong"]])
        torch.testing.assert_close(found["relevance"].scores, wanted.scores, atol=1e-6, rtol=1e-3)
        wanted = attribution.rollout(lens, batch, target=0)
        torch.testing.assert_close(found["rollout"].scores, wanted.scores, atol=1e-5, rtol=1e-3)
    write(prompts, [{**rows[0], "answer": "god"}])
    line = attribute(folder, prompts, tmp_path / "b", "-m", "relevance", code=2)
    assert "prompt 1 of 1: class 'god' does not exist" in line
    # A model of language has its rows where they are asked for.
    bert = saved(models, "bert")
    write(prompts, [{"text": "ab cd"}, {"text": "x"}])
    attribute(bert, prompts, tmp_path / "c", "-m", "rollout", "--target", "first")
    attribute(bert, prompts, tmp_path / "d", "-m", "rollout")
    ends = [[f["rollout"].targets.tolist() for _, f in AttributionFolder.read(tmp_path / n).results()] for n in "cd"]
    assert ends[0] == [[[0]], [[0]]]
    assert ends[1][0] != ends[1][1]
    assert "does not generate" in attribute(
        folder, prompts, tmp_path / "e", "-m", "rollout", "--target", "argmax", code=2
    )


def test_encoder_decoders(models, tmp_path):
    t5 = saved(models, "t5")
    prompts = write(tmp_path / "p.jsonl", [{"text": "ab cd"}, {"text": "hello"}])
    attribute(t5, prompts, tmp_path / "a", "-m", "relevance,gradient_x_input,blank_out")
    lens = interp.load(str(t5), device="cpu")
    for i, found in AttributionFolder.read(tmp_path / "a").results():
        wanted = attribution.relevance(lens, lens.prepare([["ab cd", "hello"][i]]))
        torch.testing.assert_close(found["relevance"].scores, wanted.scores, atol=1e-6, rtol=1e-3)
        assert {s.tower for s in found.values()} == {"encoder"}
    attribute(t5, prompts, tmp_path / "b", "-m", "raw_attention", "--tower", "cross")
    line = attribute(t5, prompts, tmp_path / "c", "-m", "rollout", "--tower", "encoder", "-t", "argmax", code=2)
    assert "rollout in the tower encoder" in line


# Pictures ----------------------------------------------------------------------------------------------------------


def test_scenes(scenes_lens, pictures, tmp_path):
    prompts, drawn = pictures
    out = tmp_path / "run"
    named = ("rollout", "relevance", "token_activation_map", "relative_attention")
    text = attribute(
        *("scenes", prompts, out, "--images", tmp_path / "images", "-m", ",".join(named), "--batch-size", 2),
        *("--general", "describe the image .", "--examples", 3),
    )
    assert "patch " in text
    lens = scenes_lens
    frame = pd.read_parquet(out / "tokens.parquet")
    assert {"image", "left", "top", "right", "bottom"} <= set(frame.columns)
    for i, found in AttributionFolder.read(out).results():
        assert list(found) == [m for m in METHODS if m in named]
        texts = [
            interp.evaluation.image_prompt(lens, t) for t in (SCENE.format(drawn[i].names[0]), "describe the image .")
        ]
        batch, general = (lens.prepare([t], [drawn[i].image]) for t in texts)
        wanted = {
            "rollout": attribution.rollout(lens, batch),
            "relevance": attribution.relevance(lens, batch, answers=["yes"], wrong=["no"]),
            "token_activation_map": token_activation_map(lens, batch, answers=["yes"]),
            "relative_attention": relative_attention(lens, batch, general=general),
        }
        for method, scores in wanted.items():
            torch.testing.assert_close(found[method].scores, scores.scores, atol=1e-4, rtol=2e-3)
            torch.testing.assert_close(found[method].image_map(), scores.image_map(), atol=1e-4, rtol=2e-3)
        assert found["rollout"].scores.shape[-1] == int(batch.mask.sum())
    assert sorted(p.name for p in (out / "pictures").iterdir()) == [f"{i}-72x72.png" for i in range(3)]
    page = Page(out / "report.html")
    assert page.panels == 3 * 4
    assert page.tags.count("img") == 3 * 4
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    call("report", out)
    assert Page(out / "report.html").raw == page.raw
    # The settings in the folder repeat the run, from any place.
    call("check", out / "settings.yaml")
    # Images relative to the prompt file.
    write(tmp_path / "images" / "p.jsonl", [{"text": "describe the image .", "image": "0.png"}])
    attribute("scenes", tmp_path / "images" / "p.jsonl", tmp_path / "b", "-m", "blank_out", "-t", "argmax")
    ((_, found),) = AttributionFolder.read(tmp_path / "b").results()
    assert 1 <= found["blank_out"].scores.shape[1] <= 8
    assert len(found["blank_out"].settings["said"][0]) == found["blank_out"].scores.shape[1]
    assert "said 2: " in Page(tmp_path / "b" / "report.html").text


def test_gradient_forms_and_the_vision_tower(pictures, tmp_path):
    prompts, _ = pictures
    images = ("--images", tmp_path / "images")
    attribute("scenes", prompts, tmp_path / "a", *images, "-m", "relative_attention", "--form", "gradient")
    for _, found in AttributionFolder.read(tmp_path / "a").results():
        assert found["relative_attention"].settings["answers"] == [["yes"]]
        assert found["relative_attention"].unit == "nats"
    options = ("-m", "rollout", "--tower", "vision", "--examples", 3)
    attribute("scenes", prompts, tmp_path / "b", *images, *options)
    for _, found in AttributionFolder.read(tmp_path / "b").results():
        assert found["rollout"].target_tokens == [["[class]"]]
        assert found["rollout"].image_map().shape == (72, 72)
    assert Page(tmp_path / "b" / "report.html").tags.count("img") == 3


def test_bad_pictures(model, pictures, tmp_path):
    prompts, _ = pictures
    images = ("--images", tmp_path / "images")
    out = tmp_path / "run"
    line = attribute("scenes", prompts, out, "-m", "rollout", code=2)
    assert "line 1: there is no image file" in line
    line = attribute("scenes", prompts, out, "-m", "rollout", "--images", tmp_path / "nowhere", code=2)
    assert "there is no folder" in line
    line = attribute(model, prompts, out, *images, "-m", "rollout", code=2)
    assert "prompt 1 of 3: LlamaForCausalLM takes no images" in line
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    line = attribute("scenes", prompts, out, *images, "-m", "rollout", code=2)
    assert "1.png is not an image" in line
    texts = write(tmp_path / "texts.jsonl", [{"text": "describe the image ."}])
    line = attribute("scenes", texts, out, "-m", "token_activation_map", code=2)
    assert "token_activation_map explains by the tokens of a picture, but prompt 1 of 1" in line
    assert "no prompt of" in attribute("scenes", texts, out, *images, "-m", "rollout", code=2)
    write(texts, [{"image": "images/0.png"}])
    line = attribute("scenes", texts, out, "-m", "rollout", code=2)
    assert "prompt 1 of 1 has no text, which scenes reads" in line


def test_a_vision_model_takes_pictures_alone(models, tmp_path):
    vit = saved(models, "vit")
    random = np.random.default_rng(0)
    for n in range(2):
        Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    prompts = write(tmp_path / "p.jsonl", [{"image": "0.png"}, {"image": "1.png"}])
    attribute(vit, prompts, tmp_path / "a", "-m", "rollout,relevance", "--examples", 2)
    lens = interp.load(str(vit), device="cpu")
    for i, found in AttributionFolder.read(tmp_path / "a").results():
        batch = lens.prepare(images=[Image.open(tmp_path / f"{i}.png")])
        wanted = attribution.relevance(lens, batch)
        torch.testing.assert_close(found["relevance"].scores, wanted.scores, atol=1e-6, rtol=1e-3)
        assert found["rollout"].targets.tolist() == [[0]]
    page = Page(tmp_path / "a" / "report.html")
    assert page.tags.count("img") == 4
    assert "0.png" in page.text
    write(prompts, [{"image": "0.png", "text": "what is it"}])
    line = attribute(vit, prompts, tmp_path / "b", "-m", "rollout", code=2)
    assert "reads images alone: prompts have an image and no text" in line


@pytest.mark.slow
def test_dino(tmp_path):
    packaged("dinov2-s")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    prompts = write(tmp_path / "p.jsonl", [{"image": "a.png"}])
    attribute("dinov2-s", prompts, tmp_path / "run", "-m", "rollout,raw_attention")
    ((_, found),) = AttributionFolder.read(tmp_path / "run").results()
    assert found["rollout"].target_tokens == [["[class]"]]
    assert (tmp_path / "run" / "pictures" / "0-224x224.png").is_file()
    line = attribute("dinov2-s", prompts, tmp_path / "x", "-m", "gradient_x_input", code=2)
    assert "logits" in line


def test_sounds_are_refused(models, tmp_path):
    whisper = build("whisper")
    whisper.save_pretrained(models / "whisper")
    prompts = write(tmp_path / "p.jsonl", [{"text": "hello"}])
    line = attribute(models / "whisper", prompts, tmp_path / "run", "-m", "rollout", code=2)
    assert "reads sounds" in line


# Settings ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(model, prompts, tmp_path):
    out = tmp_path / "out"
    line = attribute(model, prompts, out, "-m", "rolout", code=2)
    assert "method 'rolout' does not exist. Did you mean 'rollout'" in line
    assert "method 'flw'" in attribute(model, prompts, out, "-m", "rollout,flw", code=2)
    assert "each once" in attribute(model, prompts, out, "-m", "rollout,rollout", code=2)
    assert "no method is named" in attribute(model, prompts, out, code=2)
    assert "no prompts are named" in call("attribute", model, "-m", "rollout", "--out", out, code=2)
    assert "no run folder is named" in call("attribute", model, "-m", "rollout", "-p", prompts, code=2)
    assert "does not exist" in attribute("smolm2-135m", prompts, out, "-m", "rollout", code=2)
    assert "No such option" in attribute(model, prompts, out, "--methods", "rollout", code=2)
    assert "residual must be below 1" in attribute(model, prompts, out, "-m", "rollout", "--residual", 1, code=2)
    assert "fusion 'median'" in attribute(model, prompts, out, "-m", "rollout", "--fusion", "median", code=2)
    assert "batch_size must be at least 1" in attribute(model, prompts, out, "-m", "flow", "--batch-size", 0, code=2)
    assert "the target is empty" in attribute(model, prompts, out, "-m", "rollout", "--target", "", code=2)
    line = attribute(model, prompts, out, "-m", "rollout,flow", "--steps", 4, code=2)
    assert "steps is an option of integrated_gradients, not of rollout, flow" in line
    assert "mode is an option of blank_out" in attribute(model, prompts, out, "-m", "flow", "--mode", "mask", code=2)
    assert "no such" in attribute(model, tmp_path / "none.jsonl", out, "-m", "flow", code=2).lower()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "holds no prompts" in attribute(model, empty, out, "-m", "flow", code=2)
    write(empty, [{"text": "a b"}, {"txt": "c"}])
    assert "line 2" in attribute(model, empty, out, "-m", "flow", code=2)
    write(empty, [{"text": "a", "answer": "c"}, {"text": "b"}])
    assert "prompt 2 of 2" in attribute(model, empty, out, "-m", "flow", code=2)
    write(empty, [{"text": "a", "wrong": "c"}])
    assert "'wrong' but no 'answer'" in attribute(model, empty, out, "-m", "flow", code=2)
    assert not out.exists()
    # What only the model can tell comes before anything heavy, with the prompt's number.
    write(empty, [{"text": "a", "answer": "c"}, {"text": "b", "answer": "two"}])
    line = attribute(model, empty, out, "-m", "gradient_x_input", code=2)
    assert "prompt 2 of 2: answer[0] 'two' is 3 tokens" in line
    write(empty, [{"text": "a"}, {"text": "b" * 200}])
    line = attribute(model, empty, out, "-m", "rollout", code=2)  # nothing was stored: other prompts may follow
    assert "prompt 2 of 2: input_ids holds 200 positions, but the model can take 128" in line
    write(empty, [{"text": "abc"}, {"text": "def"}, {"text": "g"}])
    line = attribute(model, empty, out, "-m", "blank_out", "--mode", "drop", "--batch-size", 2, code=2)
    assert "prompt 3 of 3 is one token: nothing would be left" in line
    assert "layer 7" in attribute(model, prompts, tmp_path / "y", "-m", "raw_attention", "--layer", 7, code=2)
    assert "tower 'vision'" in attribute(model, prompts, tmp_path / "z", "-m", "rollout", "--tower", "vision", code=2)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"methods": ("rollot",)}, UnknownNameError, "Did you mean 'rollout'"),
        ({"methods": ()}, SettingsError, "no method is named"),
        ({"residual": -0.1}, SettingsError, "residual must be at least 0"),
        ({"residual": True}, SettingsError, "residual is a number"),
        ({"layer": 1.5}, SettingsError, "layer is a whole number"),
        ({"tower": "vision", "target": "argmax"}, SettingsError, "its target is last or first"),
        ({"baseline": "zero"}, SettingsError, "baseline is an option of integrated_gradients"),
        ({"form": "gradient"}, SettingsError, "form is an option of relative_attention"),
        ({"target": "text:"}, SettingsError, "the target is empty"),
        ({"prompts": None}, SettingsError, "no prompts are named"),
        ({"model": ""}, SettingsError, "no model is named"),
    ],
)
def test_settings_are_checked(bad, error, match):
    with pytest.raises(error, match=match):
        AttributeSettings(**({"model": "m", "methods": ("rollout",), "prompts": "p"} | bad))


def test_targets_and_methods_by_name():
    made = {"model": "m", "methods": ("rollout",), "prompts": "p"}
    spans = {t: AttributeSettings(**made, target=t).span for t in ("last", "first", "argmax", " cat", "text:last")}
    assert spans == {"last": None, "first": None, "argmax": None, " cat": " cat", "text:last": "last"}
    assert named_methods(["rollout, flow", "blank_out"]) == ("rollout", "flow", "blank_out")
    settings = AttributeSettings(**made | {"methods": METHODS, "form": "gradient"})
    assert {m for m in METHODS if settings.answering(m)} == {
        *("attention_times_gradient", "relevance", "input_gradient", "gradient_x_input", "integrated_gradients"),
        *("blank_out", "token_activation_map", "relative_attention"),
    }


def test_configs(model, prompts, tmp_path):
    config = tmp_path / "run.yaml"
    assert "interp attribute --config" in call("init", "attribute", "--out", config)
    assert set(yaml.safe_load(template())) == set(AttributeSettings.__dataclass_fields__)
    assert AttributeSettings.of(read_config(config)).prompts == str(tmp_path / "prompts.jsonl")
    config.write_text(
        yaml.safe_dump({"model": str(model), "methods": ["rollout"], "prompts": "prompts.jsonl", "top": 2})
    )
    assert "rollout; 5 prompts; target 'last'" in call("check", config)
    call("attribute", "--config", config, "--out", tmp_path / "a", "--top", 3, "--device", "cpu", "-m", "flow")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (record["settings"]["top"], list(record["methods"])) == (3, ["flow"])
    config.write_text(yaml.safe_dump({"model": str(model), "targt": "last", "methods": ["rollout"]}))
    assert "setting 'targt' does not exist" in call("check", config, code=2)
    config.write_text(
        yaml.safe_dump({"model": str(model), "target": "cd", "methods": ["rolout"], "prompts": "p.jsonl"})
    )
    assert "Did you mean 'rollout'" in call("check", config, code=2)
    config.write_text(yaml.safe_dump({"model": str(model), "methods": ["importance"], "prompts": "prompts.jsonl"}))
    assert "importance; 5 prompts" in call("check", config)
    # The settings of a run repeat it without its prompt file.
    prompts.unlink()
    call("check", tmp_path / "a" / "settings.yaml")
    call("attribute", "--config", tmp_path / "a" / "settings.yaml", "--out", tmp_path / "b")
    one, two = (pd.read_parquet(tmp_path / name / "tokens.parquet") for name in "ab")
    assert one.equals(two)


def test_help_is_fast():
    script = (
        "import sys\nfrom interp.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'plotly', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, "attribute", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


# Parts -------------------------------------------------------------------------------------------------------------


def made(values, name="x", image=None):
    values = torch.tensor(values)[None]
    count, width = values.shape[1:]
    spans = {} if image is None else {"image": torch.tensor([image])}
    return TokenScores(
        values,
        torch.full((1, count), width - 1),
        torch.ones(1, width, dtype=torch.bool),
        [[str(i) for i in range(width)]],
        [["t"] * count],
        name=name,
        spans=spans,
    )


def test_agreement_by_hand():
    def both(one, two, other="b"):
        found = compared({"a": one, other: two}, "a", other)
        return None if found is None else [round(x.value("spearman"), 6) for x in found]

    a, b = made([[4.0, -3.0, 2.0, 1.0]]), made([[-4.0, 3.0, 1.0, 2.0]])
    # Sizes 4 3 2 1 against 4 3 1 2; signed ranks 4 1 3 2 against 1 4 2 3.
    assert both(a, b) == [0.8, -1.0]
    two, same = made([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), made([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert both(two, same)[0] == 0.0  # one target agrees, one is reversed
    # A method that says nothing of text is compared over image tokens alone.
    marks = [False, True, True, True]
    full, part = made([[9.0, 1.0, 2.0, 3.0]], image=marks), made([[0.0, 1.0, 2.0, 3.0]], image=marks)
    assert both(full, part, "relative_attention")[0] == 1.0
    assert both(full, part)[0] < 0.5
    assert both(full, two) is None  # other sources
    assert both(made([[9.0, 1.0]]), made([[9.0, 1.0]]), "relative_attention") is None  # no picture


def test_overlays():
    grid = np.array([[0.0, 1.0], [np.nan, 0.5]])
    png, scale = overlay(grid, Image.new("RGB", (2, 2), (100, 100, 100)))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    step = pixels.shape[0] // 2
    corners = pixels[::step, ::step]
    assert corners[0, 0].tolist() == corners[1, 0].tolist() == [100, 100, 100]  # zero, and no patch: clear
    assert corners[0, 1, 0] > corners[1, 1, 0] > 100
    assert (scale.low, scale.high) == ("0", "1")
    png, scale = overlay(np.array([[-2.0, 1.0]]), None)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    left, right = pixels[0, 0], pixels[0, -1]
    assert left[2] > left[0]  # blue
    assert right[0] > right[2]  # orange
    assert (scale.low, scale.high) == ("-2", "2")


def test_panels_show_text_and_only_colours(tmp_path):
    scale = Scale(("#ffffff", "#000000"), "<0>", "1")
    panel = Panel("<t>", [("<b>x</b>", 'a"b', "#ffffff", "#000000")], scale, note="<n>")
    page = write_report(tmp_path, title="t", sections=[Section("s", [Panels([panel], "<c>")])]).read_text()
    assert 'title="a&#34;b">&lt;b&gt;x&lt;/b&gt;</span>' in page
    assert "linear-gradient(90deg,#ffffff,#000000)" in page
    for text in ("&lt;t&gt;", "&lt;n&gt;", "&lt;c&gt;", "&lt;0&gt;"):
        assert text in page
    for bad in ("red;} body{", "#FFFFFF", "#fff"):
        section = Section("s", [Panels([Panel("t", [("x", "", bad, "#000000")])])])
        with pytest.raises(InputError, match="a colour is written '#rrggbb'"):
            write_report(tmp_path, title="t", sections=[section])


def test_prompts_of_pictures_alone(tmp_path):
    (tmp_path / "i").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "i" / "a.png")
    path = write(tmp_path / "p.jsonl", [{"image": "a.png"}])
    (prompt,) = read_prompts(path, images=tmp_path / "i")
    assert (prompt.text, prompt.image) == ("", tmp_path / "i" / "a.png")
    with pytest.raises(FileError, match="paths are relative to the prompt file"):
        read_prompts(path)
    write(path, [{"image": "a.png", "text": " "}])
    with pytest.raises(InputError, match="text is empty, or nothing but white space"):
        read_prompts(path, images=tmp_path / "i")
    write(path, [{"answer": "a"}])
    with pytest.raises(InputError, match="no field 'text'"):
        read_prompts(path)


@pytest.mark.slow
def test_smollm2(tmp_path):
    """Taking the country away costs the capital most; rollout rests on the first token, as it always does there."""
    packaged("smollm2-135m")
    rows = [
        {"text": "The capital of France is", "answer": " Paris", "wrong": " Rome"},
        {"text": "The city of Rome is the capital of Italy, and Paris that of France", "answer": ".", "wrong": "\n"},
    ]
    prompts = write(tmp_path / "p.jsonl", rows)
    out = tmp_path / "run"
    named = ("-m", "rollout,blank_out,gradient_x_input", "--mode", "mask", "--examples", 2)
    text = attribute("smollm2-135m", prompts, out, *named)
    assert "·Paris rather than ·Rome" in text
    found = dict(AttributionFolder.read(out).results())
    assert found[0]["blank_out"].top(1)["token"].tolist() == [" France"]
    assert float(found[0]["rollout"].scores[0, 0, 0]) > 0.9
    page = Page(out / "report.html")
    assert page.panels == 6
    assert all(a.startswith("#") for a in page.addresses)
