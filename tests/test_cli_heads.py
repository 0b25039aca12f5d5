"""`interp heads` with images and keywords: every method beside the direct call, what stands beside it, bad input."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp import heads
from interp.cli.ranking.evidence import leading
from interp.cli.ranking.folder import RunFolder
from interp.cli.ranking.settings import METHODS, HeadsSettings
from interp.cli.ranking.texts import QUESTIONS, TITLES
from interp.data import scenes
from interp.evaluation import image_prompt
from interp.heads import HeadEffects
from interp.heads.common import next_token_loss
from interp.scores import HeadScores
from tests.test_cli import call
from tests.zoo import build, processor

COUNT = 6


@pytest.fixture(scope="module")
def lens():
    return interp.load("scenes", device="cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Questions after the colour of the background, with the pictures beside them, and a keyword file."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = []
    for one in scenes.scenes("test", COUNT):
        one.image.save(folder / f"{one.id}.png")
        asked = scenes.colour(one)
        wrong = "green" if asked.answer != "green" else "blue"
        rows.append({"text": asked.text, "image": f"{one.id}.png", "answer": asked.answer, "wrong": wrong})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "keywords.txt").write_text("# colours\n" + "\n".join(scenes.COLOURS) + "  # all that there are\n\n")
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """All methods, in batches that do not divide the prompts."""
    out = tmp_path_factory.mktemp("run") / "run"
    call(
        *("heads", "scenes", "--out", out, "--device", "cpu", "--method", ",".join(METHODS).replace("_", "-")),
        *("--prompts", inputs / "prompts.jsonl", "--keywords", inputs / "keywords.txt", "--batch-size", "4"),
        *("--patterns-on", "repeated", "--repeat-length", "8", "--repeat-rows", "2", "--ablation-prompts", "2"),
        *("--effect-heads", "4", "--controls", "3", "--topic-heads", "3", "--topic-tokens", "5"),
        *("--random-lists", "20", "--without", "mask"),
    )
    return out


@pytest.fixture(scope="module")
def batch(lens, inputs):
    rows = [json.loads(line) for line in (inputs / "prompts.jsonl").read_text().splitlines()]
    texts = [image_prompt(lens, row["text"]) for row in rows]
    return lens.prepare(texts, [scenes.scene("test", i).image for i in range(COUNT)], padding_side="left")


def test_every_method_has_its_words():
    assert set(TITLES) == set(QUESTIONS) == set(METHODS)


def test_scores_are_those_of_one_batch(lens, batch, run):
    colours = list(scenes.COLOURS)
    direct = {
        "vision_divergence": heads.vision_divergence(lens, batch, without="mask"),
        "visual_concentration": heads.visual_concentration(lens, batch),
        "pursuit": heads.pursuit(lens, batch, colours, random_lists=20),
        "logit_lens": heads.logit_lens_ranking(lens, batch, colours),
    }
    for method, wanted in direct.items():
        found = HeadScores.load(run / method)
        assert torch.allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-5), method
        assert set(found.extra) == set(wanted.extra)
        for name, column in wanted.extra.items():
            assert torch.allclose(found.extra[name], column, rtol=1e-3, atol=1e-4), (method, name)
        assert found.settings["prompts"] == COUNT


def test_what_does_not_fit_is_split(lens, inputs, tmp_path, monkeypatch):
    """One prompt is run once for the line about the cost; smaller batches give the same; too little is refused."""
    asked = ("heads", "scenes", "--device", "cpu", "-m", "importance,direct-effect", "-p", inputs / "prompts.jsonl")
    asked = (*asked, "--effect-heads", 0, "--out")
    estimates, estimate = [], interp.Lens.estimate
    runs, run = [], interp.Lens.run

    def estimated(self, *args, **options):
        runs.clear()
        found = estimate(self, *args, **options)
        estimates.append((found, list(runs)))
        return found

    monkeypatch.setattr(interp.Lens, "estimate", estimated)
    monkeypatch.setattr(interp.Lens, "run", lambda self, b, *a, **k: (runs.append(len(b)), run(self, b, *a, **k))[1])
    text = call(*map(str, (*asked, tmp_path / "whole")))
    assert re.search(rf"a pass over the prompts: about 1 s; {COUNT} prompts at a time take about [\d.]+ MB of", text)
    ((found, made),) = estimates
    assert made.count(1) <= 2  # the prompt, and its picture's embedding
    each = found.peak // found.samples
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: int(2.5 * each / 0.9))
    text = call(*map(str, (*asked, tmp_path / "split")))
    assert "; 2 prompts at a time" in text
    for method in ("importance", "direct_effect"):
        one, two = (HeadScores.load(tmp_path / name / method) for name in ("whole", "split"))
        assert two.settings["batches"] == -(-COUNT // 2)
        assert torch.allclose(one.per_prompt, two.per_prompt, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: each // 2)
    error = call(*map(str, (*asked, tmp_path / "none")), code=2)
    assert "a pass over the prompts does not fit: the longest prompt takes about" in error


def test_topics_and_strongest_prompts(lens, batch, run):
    frame = pd.read_parquet(run / "topics.parquet")
    assert set(frame["method"]) == set(METHODS)
    for method in ("vision_divergence", "pursuit"):
        scores = HeadScores.load(run / method)
        mine = frame[frame["method"] == method]
        top = scores.top(3, by=leading(method, scores))
        assert mine[["layer", "head"]].to_numpy().tolist() == top[["layer", "head"]].to_numpy().tolist()
        first = mine.iloc[0]
        topic = heads.topics(lens, batch, top.head(1), k=5)[0]
        assert list(first["tokens"]) == list(topic.tokens)
        assert first["explained"] == pytest.approx(float(topic.explained[-1]), abs=1e-4)
        size = topic.coefficients.norm(dim=1)
        if scores.per_prompt is not None:
            size = scores.per_prompt[:, first["layer"], first["head"]]
        assert list(first["prompts"]) == size.argsort(descending=True)[:3].tolist()


def test_effects_are_those_of_the_ends_of_the_ranking(lens, batch, run, inputs):
    rows = [json.loads(line) for line in (inputs / "prompts.jsonl").read_text().splitlines()]
    asked = {"answers": [row["answer"] for row in rows], "wrong": [row["wrong"] for row in rows]}
    scores = HeadScores.load(run / "vision_divergence")
    wanted = heads.effect_of(lens, batch, heads.extremes(scores, 4), **asked, controls=3)
    found = HeadEffects.load(run / "vision_divergence" / "effects")
    assert found.sets == wanted.sets
    assert torch.allclose(found.after, wanted.after, atol=1e-4)
    assert torch.allclose(found.random, wanted.random, atol=1e-4)
    # Concepts are ranked by how far they lie above the floor, the two ends of their effects as well.
    scores = HeadScores.load(run / "pursuit")
    ends = {
        name: list(map(tuple, scores.top(4, "above_floor", largest=largest)[["layer", "head"]].to_numpy().tolist()))
        for name, largest in (("top 4", True), ("bottom 4", False))
    }
    assert {name: list(pairs) for name, pairs in HeadEffects.load(run / "pursuit" / "effects").sets.items()} == ends
    frame = pd.read_parquet(run / "effects.parquet")
    assert len(frame) == len(METHODS) * 2 * 3  # top and bottom, by loss, accuracy and logit difference


def test_pursuit_has_intervals(run):
    frame = pd.read_parquet(run / "heads.parquet")
    mine = frame[frame["method"] == "pursuit"]
    assert (mine["low"] <= mine["high"]).all()
    assert ((mine["low"] > 0) & (mine["high"] < 1)).all()
    assert np.isnan(frame[frame["method"] == "logit_lens"]["low"]).all()


def test_the_page_and_the_summary_show_them(run):
    page, summary = (run / "report.html").read_text(), (run / "report.md").read_text()
    for method in METHODS:
        assert TITLES[method] in page
        assert f"## {TITLES[method]}" in summary
    assert page.count("of the attention lies on the image") == 3 * len(METHODS)
    assert "against random heads of the same layers" in summary
    assert "random lists of the same make-up" in page
    strongest = HeadScores.load(run / "vision_divergence").top(1).iloc[0]
    assert f"| L{strongest['layer']:.0f} H{strongest['head']:.0f} | {strongest['score']:.4g} |" in summary


def test_a_method_with_keywords_joins_a_run(inputs, tmp_path):
    out, file = tmp_path / "run", inputs / "prompts.jsonl"
    common = ("heads", "scenes", "--out", out, "--device", "cpu", "--prompts", file, "--effect-heads", "0")
    call(*common, "--method", "vision-divergence")
    assert not (out / "effects.parquet").exists()
    words = tmp_path / "words.txt"
    words.write_text("red\nblue\n")
    call(*common, "--method", "pursuit", "--keywords", words)
    assert "not computed again" in call(*common, "--method", "vision_divergence")  # the keywords stay with the run
    assert RunFolder.read(out).keywords == ["red", "blue"]
    assert RunFolder.read(out).complete == ["vision_divergence", "pursuit"]
    words.write_text("red\ngreen\n")
    assert "other keywords" in call(*common, "--method", "pursuit", "--keywords", words, code=2)
    # From its own settings, elsewhere.
    call("heads", "--config", out / "settings.yaml", "--out", tmp_path / "again")
    one, two = (HeadScores.load(folder / "pursuit") for folder in (out, tmp_path / "again"))
    assert one.equals(two)


def test_a_folder_of_images_needs_no_prompts(lens, inputs, tmp_path):
    out = tmp_path / "run"
    call(
        *("heads", "scenes", "--out", out, "--device", "cpu", "--method", "vision_divergence", "--images", inputs),
        *("--ask", scenes.CAPTION_PROMPT, "--effect-heads", "2", "--controls", "2", "--topic-heads", "0"),
    )
    text = image_prompt(lens, scenes.CAPTION_PROMPT)
    batch = lens.prepare([text] * COUNT, [scenes.scene("test", i).image for i in range(COUNT)])
    wanted = heads.vision_divergence(lens, batch)
    assert torch.allclose(HeadScores.load(out / "vision_divergence").scores, wanted.scores, atol=1e-4)
    assert [p.labels["name"] for p in RunFolder.read(out).prompts] == [f"test-{i:05d}.png" for i in range(COUNT)]
    assert not (out / "topics.parquet").exists()


def test_the_next_token_loss_leaves_out_image_tokens(lens, batch):
    logits = lens.run(batch, ["logits"]).logits
    ids = batch.inputs["input_ids"]
    wanted = []
    for i in range(COUNT):
        columns = [j for j in range(1, ids.shape[1]) if batch.mask[i, j - 1] and not batch.image_mask[i, j]]
        losses = [-logits[i, j - 1].log_softmax(-1)[ids[i, j]] for j in columns]
        wanted.append(torch.stack(losses).mean())
    assert torch.allclose(next_token_loss(batch)(logits), torch.stack(wanted), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["-m", "pursuit"], "pursuit need keywords: give --keywords FILE"),
        (["-m", "vision_divergence", "--sink", "3"], "sink is an option of visual_concentration, not of vision_div"),
        (["-m", "visual_concentration", "--sink", "1"], "sink is a number above 1, found 1.0"),
        (["-m", "vision_divergence", "--without", "blur"], "without 'blur' does not exist"),
        (["-m", "vision_divergance"], "vision_divergence"),
        (["-m", "vision_divergence", "--keywords", "KEYWORDS"], "keywords is an option of pursuit, logit_lens"),
        (["-m", "pursuit", "--keywords", "EMPTY"], "holds no keywords"),
        (["-m", "pursuit", "--keywords", "TWICE"], "line 3: 'red' stands there twice, first in line 1"),
        (["-m", "pursuit", "--keywords", "LATIN"], "is not UTF-8"),
        (["-m", "pursuit", "--keywords", "MISSING"], "cannot read keywords"),
        (["-m", "pursuit", "--keywords", "FOREIGN"], "Entscheidungsproblem"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, options, found):
    files = {"EMPTY": b"# nothing\n", "TWICE": b"red\nblue\nred\n", "LATIN": b"caf\xe9\n"}
    files |= {"FOREIGN": b"Entscheidungsproblem\n", "KEYWORDS": b"red\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    options = [str(tmp_path / o) if o in (*files, "MISSING") else o for o in options]
    line = call("heads", "scenes", "--out", tmp_path / "x", "--prompts", inputs / "prompts.jsonl", *options, code=2)
    assert found in line
    assert not (tmp_path / "x" / "report.html").exists()


def test_images_are_for_models_that_take_them(inputs, tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    processor("llama").save_pretrained(tmp_path / "llama")
    blind = ("heads", tmp_path / "llama", "--out", tmp_path / "x", "-m", "vision-divergence")
    line = call(*blind, "--images", inputs, code=2)
    assert "takes none: use a vision-language model" in line
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc"}\n')
    line = call("heads", "scenes", "--out", tmp_path / "y", "-m", "vision_divergence", "--prompts", text, code=2)
    assert "prompt 1 of 1" in line
    assert "has none" in line
    (tmp_path / "none").mkdir()
    line = call("heads", "scenes", "--out", tmp_path / "y", "-m", "importance", "--images", tmp_path / "none", code=2)
    assert "holds no images" in line
    words = tmp_path / "words.txt"
    words.write_text("red\n")
    one = ("heads", "scenes", "--out", tmp_path / "y", "-m", "pursuit", "-k", words, "--prompts", text)
    assert "at least two prompts" in call(*one, code=2)


def test_a_report_of_a_model_or_of_a_run(run, tmp_path):
    (run / "report.md").unlink()
    assert "report:" in call("report", run)
    assert (run / "report.md").is_file()
    assert "the options are for models" in call("report", run, "--out", tmp_path, code=2)
    build("llama").save_pretrained(tmp_path / "llama")
    processor("llama").save_pretrained(tmp_path / "llama")
    # Answers and keywords of several tokens are left out, and with them the methods that need them.
    call("report", tmp_path / "llama", "--out", tmp_path / "out", "--prompts", "4", "--device", "cpu")
    methods = set(pd.read_parquet(tmp_path / "out" / "heads" / "heads.parquet")["method"])
    assert methods == {"importance", "ablation", "patterns"}
    assert "is for models that read text" in call("report", "dinov2-s", "--out", tmp_path / "d", code=2)


def test_settings_of_all_methods_are_taken():
    assert HeadsSettings(model="x", methods=METHODS, prompts="p", keywords="k").methods == METHODS
