"""`interp evaluate`: what it writes, how it is taken up again, and how bad input ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import interp.scores
from interp import steering
from interp.cli.app import app
from interp.cli.evaluation import comparison as compared
from interp.cli.evaluation import intervention as acting
from interp.cli.evaluation import run as runs
from interp.cli.evaluation.data import load_data
from interp.cli.evaluation.settings import EvaluateSettings, read_config, template
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.evaluation import ChairScores, PopeScores, Vocabulary, caption_images, read_answers, read_captions
from interp.report import Picture, Pictures, Section, write_report
from tests.conftest import packaged
from tests.zoo import build, processor

CATEGORIES = ["dog", "cat", "car", "hot dog", "person", "bus", "chair", "cup"]
THERE = {1: [0, 1, 2], 2: [0, 3, 4], 30: [1, 2, 5, 6], 4: [0, 1, 7], 5: [0]}


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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    made = build("llava")
    made.generation_config.pad_token_id = 0
    made.save_pretrained(folder)
    processor("llava").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder of images (one of them grey) and annotations in COCO's format."""
    folder = tmp_path_factory.mktemp("coco")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for one in THERE:
        size = (32, 40) if one == 2 else (32, 40, 3)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / "images" / f"{one}.png")
    whole = {
        "images": [{"id": one, "file_name": f"{one}.png"} for one in THERE],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CATEGORIES)],
        "annotations": [{"id": 10 * one + i, "image_id": one, "category_id": i} for one in THERE for i in THERE[one]],
    }
    (folder / "instances.json").write_text(json.dumps(whole))
    references = [{"id": one, "image_id": one, "caption": "A <b>puppy</b> and a man"} for one in THERE]
    (folder / "captions.json").write_text(json.dumps({"annotations": references}))
    return folder


def evaluate(task, model, coco, out, *arguments, code=0):
    data = ("--images", coco / "images", "--annotations", coco / "instances.json", "--device", "cpu")
    return call("evaluate", task, model, *data, "--out", out, "--max-new-tokens", 4, *arguments, code=code)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text += data


def test_chair_of_a_model(model, coco, tmp_path):
    out = tmp_path / "run"
    text = evaluate("chair", model, coco, out, "--reference-captions", coco / "captions.json", "--batch-size", 2)
    assert "chair_i" in text
    assert text.strip().splitlines()[-1] == f"report: {out / 'report.html'}"
    found = interp.scores.load(out / "scores")
    assert isinstance(found, ChairScores)
    assert found.ids == ("1", "2", "30", "4", "5")
    assert found.objects[1] == ("dog", "hot dog", "person")
    assert found.settings["vocabulary_sha256"] == Vocabulary.coco().hash
    assert found.settings["prompt"] == "Please describe this image in detail."
    # What is stored is what the model says to each image alone.
    lens = interp.load(str(model), device="cpu")
    images = {one: Image.open(coco / "images" / f"{one}.png") for one in found.ids}
    alone = {
        one: caption_images(lens, {one: image}, prompt=found.settings["prompt"], max_new_tokens=4)[one]
        for one, image in images.items()
    }
    assert read_captions(out / "captions.jsonl") == alone == dict(zip(found.ids, found.captions, strict=True))
    assert pd.read_parquet(out / "results.parquet")["id"].tolist() == list(found.ids)
    numbers = pd.read_parquet(out / "numbers.parquet")
    assert numbers["value"].tolist() == found.summary()["value"].tolist()
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert (settings["task"], settings["batch_size"], settings["seed"]) == ("chair", 2, 0)
    page = Page((out / "report.html").read_text())
    assert page.tags.count("img") == 5
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert "chair_s" in page.text
    (out / "report.html").unlink()
    call("report", out)
    assert Page((out / "report.html").read_text()).tags.count("img") == 5


def test_pope_of_a_model(model, coco, tmp_path):
    out = tmp_path / "run"
    text = evaluate("pope", model, coco, out, "--negatives", "random", "--negatives", "adversarial", "--seed", 3)
    assert "adversarial" in text
    found = interp.scores.load(out / "scores")
    assert isinstance(found, PopeScores)
    assert found.parts == ("random", "adversarial", "all")
    # Image 5 has one object: it is not asked about. Four images, three objects each, present and absent, two kinds.
    assert len(found.questions) == 4 * 6 * 2
    assert {q.image for q in found.questions} == {"1", "2", "30", "4"}
    assert found.questions[0].text == "Is there a dog in the image?"
    answers, chance = read_answers(out / "answers.jsonl", questions=found.questions)
    assert list(answers.values()) == list(found.answers)
    assert list(chance.values()) == found.yes_probability.tolist()
    assert 0 < found.value("auroc") < 1
    assert Page((out / "report.html").read_text()).tags.count("img") == 4


def test_a_run_is_taken_up_where_it_stopped(model, coco, tmp_path, monkeypatch):
    evaluate("chair", model, coco, tmp_path / "whole", "--batch-size", 2)
    real, asked = runs.caption_images, []

    def broken(lens, images, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(list(images))
        return real(lens, images, **options)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "caption_images", broken)
        data = ("--images", coco / "images", "--annotations", coco / "instances.json", "--device", "cpu")
        arguments = ("evaluate", "chair", model, *data, "--out", out, "--max-new-tokens", 4, "--batch-size", 2)
        assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code != 0
    assert list(read_captions(out / "captions.jsonl")) == ["1", "2", "30", "4"]
    assert not (out / "scores").exists()
    assert "is not complete" in call("report", out, code=2)
    # A line that was cut short in the middle of a letter is made again.
    content = (out / "captions.jsonl").read_bytes()
    (out / "captions.jsonl").write_bytes(content[:-1] if content.endswith(b"}\n") else content)
    asked.clear()

    def counted(lens, images, **options):
        asked.append(list(images))
        return real(lens, images, **options)

    monkeypatch.setattr(runs, "caption_images", counted)
    text = evaluate("chair", model, coco, out, "--batch-size", 3)
    assert "3 of 5 are in" in text
    assert asked == [["4", "5"]]
    for name in ("captions.jsonl", "scores/scores.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def refuse(*args, **kwargs):
        raise AssertionError("loaded a model although nothing is missing")

    monkeypatch.setattr(runs, "load", refuse)
    assert "not computed again" in evaluate("chair", model, coco, out)
    assert "chair_i" in evaluate("chair", model, coco, out)


@pytest.mark.slow
def test_a_killed_process_leaves_whole_lines(model, coco, tmp_path):
    """SIGKILL after the first stored batch: the next run makes the rest, and the result is that of one run."""
    out = tmp_path / "run"
    data = ["--images", coco / "images", "--annotations", coco / "instances.json", "--device", "cpu", "--batch-size", 1]
    command = [sys.executable, "-c", "from interp.cli import main; main()", "evaluate", "pope", model, *data]
    command += ["--max-new-tokens", 4, "--out", out]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([str(a) for a in command], env=environment, stdout=subprocess.DEVNULL)
    stored = out / "answers.jsonl"
    deadline = time.monotonic() + 400
    while not (stored.is_file() and stored.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stored.stat().st_size
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / "scores").exists()
    evaluate("pope", model, coco, out, "--batch-size", 1)
    evaluate("pope", model, coco, tmp_path / "whole", "--batch-size", 1)
    (texts, chance), (wanted, near) = (read_answers(f / "answers.jsonl") for f in (out, tmp_path / "whole"))
    assert texts == wanted
    assert list(texts) == list(wanted)
    assert chance == pytest.approx(near, abs=1e-5)  # processes with other numbers of threads add in another order


def test_other_settings_files_or_images_are_refused(model, coco, tmp_path):
    out, file = tmp_path / "run", tmp_path / "mine.jsonl"
    annotations = ("--annotations", coco / "instances.json", "--out", out)
    rows = [{"image": one, "caption": "a dog"} for one in THERE]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("evaluate", "chair", "--captions", file, *annotations)
    line = call("evaluate", "chair", "--captions", file, *annotations, "--seed", 1, code=2)
    assert "other settings: seed is 0 there, asked is 1" in line
    assert "--overwrite" in line
    file.write_text(file.read_text().replace("a dog", "a cat", 1))
    assert "other texts" in call("evaluate", "chair", "--captions", file, *annotations, code=2)
    (out / "own.txt").write_text("mine")
    call("evaluate", "chair", "--captions", file, *annotations, "--overwrite")
    assert ChairScores.load(out / "scores").captions[0] == "a cat"
    assert (out / "own.txt").read_text() == "mine"
    copy = tmp_path / "images"
    copy.mkdir()
    for one in THERE:
        (copy / f"{one}.png").write_bytes((coco / "images" / f"{one}.png").read_bytes())
    data = ("--images", copy, "--annotations", coco / "instances.json", "--device", "cpu", "--max-new-tokens", 2)
    call("evaluate", "chair", model, *data, "--out", tmp_path / "m")
    Image.new("RGB", (8, 8)).save(copy / "4.png")
    assert "other images" in call("evaluate", "chair", model, *data, "--out", tmp_path / "m", code=2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("x")
    assert "no run folder and not empty" in call(
        *("evaluate", "chair", "--captions", file, *annotations[:2], "--out", other), code=2
    )
    (other / "x").unlink()
    (other / "run.json").write_text('{"format": "interp-heads-run"}')
    for more in ((), ("--overwrite",)):
        line = call("evaluate", "chair", "--captions", file, *annotations[:2], "--out", other, *more, code=2)
        assert "no record of `interp evaluate`" in line
    assert (other / "run.json").exists()


def test_a_file_of_captions_is_scored_and_its_text_escaped(coco, tmp_path):
    """By hand: 'dog' is there in 1, 2, 4 and 5, but not in 30; nothing else is mentioned."""
    file = tmp_path / "mine.jsonl"
    rows = [{"image": one, "caption": "<script>alert(1)</script> a dog & dogs"} for one in THERE]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = ("--images", coco / "images", "--annotations", coco / "instances.json")
    call("evaluate", "chair", "--captions", file, *images, "--out", tmp_path / "run", "--examples", 3)
    found = ChairScores.load(tmp_path / "run" / "scores")
    assert (found.chair_i, found.chair_s, found.recall) == (0.2, 0.2, 4 / 14)
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 3
    assert "<script>alert" not in text
    assert "<script>alert(1)</script> a dog & dogs" in page.text
    assert text.count('<mark class="wrong">dog</mark>') == 1
    assert text.count('<mark class="right">dogs</mark>') == 2
    file.write_text(json.dumps(rows[0]) + "\n")
    out = ("--annotations", coco / "instances.json", "--out", tmp_path / "part")
    line = call("evaluate", "chair", "--captions", file, *out, code=2)
    assert "4 of 5 images have no captions: '2'" in line
    assert not (tmp_path / "part").exists()
    call("evaluate", "chair", "--captions", file, *out, "--subset")
    assert ChairScores.load(tmp_path / "part" / "scores").recall == 1 / 3


def test_a_file_of_answers_and_popes_own_questions(coco, tmp_path):
    rows = [
        {"question_id": i + 1, "image": f"{one}.png", "text": f"Is there a {name} in the image?", "label": label}
        for i, (one, name, label) in enumerate(
            [(1, "dog", "yes"), (1, "bus", "no"), (4, "cup", "yes"), (4, "car", "no")]
        )
    ]
    asked, said = tmp_path / "popular.json", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["Yes.", "No\n", "I do not know", "yes"]
    said.write_text("".join(json.dumps({"id": f"popular-{i + 1}", "answer": t}) + "\n" for i, t in enumerate(texts)))
    command = ("evaluate", "pope", "--questions", asked, "--answers", said, "--images", coco / "images")
    call(*command, "--out", tmp_path / "a")
    found = PopeScores.load(tmp_path / "a" / "scores")
    assert (found.accuracy, found.value("unparsed"), found.value("disagreement")) == (0.5, 0.25, 0.5)
    assert found.yes_probability is None
    call(*command, "--out", tmp_path / "b", "--parser", "compat")
    assert PopeScores.load(tmp_path / "b" / "scores").accuracy == 0.25
    said.write_text(said.read_text().replace("popular-4", "popular-5"))
    assert "belong to no known questions: 'popular-5'" in call(*command, "--out", tmp_path / "c", code=2)
    assert not (tmp_path / "c").exists()


def test_n_images_are_drawn_by_seed(coco, tmp_path):
    file = tmp_path / "c.jsonl"
    data = ("--annotations", coco / "instances.json", "--captions", file, "--n", 2)
    drawn = set()
    for seed in range(6):
        file.write_text(json.dumps({"image": 1, "caption": ""}) + "\n")
        line = call("evaluate", "chair", *data, "--seed", seed, "--out", tmp_path / "x", code=2)
        drawn.add(line.partition("Known: ")[2] or line.partition("no captions: ")[2])
    assert len(drawn) > 1
    line = call("evaluate", "chair", *data[:4], "--n", 6, "--out", tmp_path / "x", code=2)
    assert "6 images were asked for, but" in line


def test_bad_input_is_one_line(model, coco, tmp_path):
    out = tmp_path / "out"
    assert "no run folder" in call("evaluate", "chair", model, "--data", "scenes", code=2)
    assert "no model is named" in call("evaluate", "chair", "--out", out, code=2)
    assert "does not exist" in call("evaluate", "chair", "scnes", "--out", out, code=2)
    assert "needs --annotations" in call("evaluate", "chair", model, "--images", coco, "--out", out, code=2)
    line = call("evaluate", "chair", model, "--annotations", coco / "instances.json", "--out", out, code=2)
    assert "give --images DIR" in line
    assert "no such" in evaluate("chair", model, coco, out, "--annotations", coco / "x.json", code=2).lower()
    assert "there is no folder" in evaluate("chair", model, coco, out, "--images", coco / "nowhere", code=2)
    line = evaluate("chair", model, coco, out, "--images", tmp_path, code=2)
    assert "5 of 5 images of" in line
    assert "'1.png'" in line
    assert "batch_size must be at least 1" in evaluate("chair", model, coco, out, "--batch-size", 0, code=2)
    assert "negatives 'hard' does not exist" in evaluate("pope", model, coco, out, "--negatives", "hard", code=2)
    assert "each once" in evaluate("pope", model, coco, out, "--negatives", "random", "--negatives", "random", code=2)
    assert "No such option" in evaluate("chair", model, coco, out, "--negatives", "random", code=2)
    assert "vocabulary 'cocoo' does not exist" in evaluate("chair", model, coco, out, "--vocabulary", "cocoo", code=2)
    assert "holds {name} once" in evaluate("pope", model, coco, out, "--template", "is it?", code=2)
    assert "no image has the 9 objects" in evaluate("pope", model, coco, out, "--minimum", 9, code=2)
    assert "leave out one of the two" in evaluate("chair", model, coco, out, "--data", "scenes", code=2)
    file = tmp_path / "c.jsonl"
    assert "both named" in evaluate("chair", model, coco, out, "--captions", file, code=2)
    data = ("--annotations", coco / "instances.json", "--out", out)
    assert "no such file" in call("evaluate", "chair", "--captions", file, *data, code=2).lower()
    file.write_text('{"image": 1, "caption": "a"}\n{"image": 1, "caption": "b"}\n')
    assert "line 2: image '1' stands there twice" in call("evaluate", "chair", "--captions", file, *data, code=2)
    assert not out.exists()


def test_bad_images_are_one_line(model, coco, tmp_path):
    for one in THERE:
        (tmp_path / f"{one}.png").write_bytes((coco / "images" / f"{one}.png").read_bytes())
    (tmp_path / "4.png").write_bytes(b"no image")
    arguments = ("--images", tmp_path, "--batch-size", 2)
    line = evaluate("chair", model, coco, tmp_path / "run", *arguments, code=2)
    assert "4.png (image '4') is not an image" in line
    Image.new("RGBA", (8, 8)).save(tmp_path / "4.png")
    line = evaluate("chair", model, coco, tmp_path / "run2", *arguments, code=2)
    assert "image '4' has the mode 'RGBA'" in line
    # What came before is stored; with the image mended another folder is needed, since the images are others now.
    assert len(read_captions(tmp_path / "run2" / "captions.jsonl")) == 2


def test_configs(model, coco, tmp_path):
    for task in ("chair", "pope"):
        path = tmp_path / f"{task}.yaml"
        assert f"evaluate {task} --config" in call("init", task, "--out", path)
        found = EvaluateSettings.of(read_config(path))
        assert found == EvaluateSettings(task=task, model="scenes")
        assert ("negatives" in yaml.safe_load(template(task))) == (task == "pope")
        assert ("captions" in yaml.safe_load(template(task))) == (task == "chair")
    config = tmp_path / "mine.yaml"
    (tmp_path / "files").symlink_to(coco)
    lines = {"task": "chair", "model": str(model), "images": "files/images", "annotations": "files/instances.json"}
    config.write_text(yaml.safe_dump({**lines, "max_new_tokens": 3, "seed": 5, "device": "cpu"}))
    assert "chair; 5 images" in call("check", config)
    call("evaluate", "chair", "--config", config, "--out", tmp_path / "a", "--seed", 6)
    assert ChairScores.load(tmp_path / "a" / "scores").settings["seed"] == 6
    # The settings in the folder repeat the run.
    call("check", tmp_path / "a" / "settings.yaml")
    call("evaluate", "chair", "--config", tmp_path / "a" / "settings.yaml", "--out", tmp_path / "b")
    assert ChairScores.load(tmp_path / "a" / "scores").equals(ChairScores.load(tmp_path / "b" / "scores"))
    assert "is for `interp evaluate chair`, not pope" in call("evaluate", "pope", "--config", config, code=2)
    config.write_text(yaml.safe_dump({**lines, "annotations": "files/x.json"}))
    assert "cannot read" in call("check", config, code=2)
    (tmp_path / "c.jsonl").write_text('{"image": 1, "caption": "a dog"}\n')
    texts = {"task": "chair", "captions": "c.jsonl", "annotations": "files/instances.json"}
    config.write_text(yaml.safe_dump(texts))
    assert "4 of 5 images have no captions" in call("check", config, code=2)
    config.write_text(yaml.safe_dump({**texts, "subset": True}))
    assert "c.jsonl: chair; 5 images" in call("check", config)
    config.write_text("task: chair\nmodle: x\n")
    assert "setting 'modle' does not exist" in call("check", config, code=2)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"task": "blue"}, UnknownNameError, "task 'blue'"),
        ({"task": ""}, SettingsError, "no task is named"),
        ({"n": 0}, SettingsError, "n must be at least 1"),
        ({"n": True}, SettingsError, "n is a whole number"),
        ({"chat": 1}, SettingsError, "chat is true or false"),
        ({"split": "dev"}, UnknownNameError, "split 'dev'"),
        ({"data": ""}, UnknownNameError, "data ''"),
        ({"negatives": ("random",)}, SettingsError, "negatives is a setting of `interp evaluate pope`"),
        ({"subset": True}, SettingsError, "give --captions FILE"),
        ({"task": "pope", "negatives": ()}, SettingsError, "one or more names"),
        ({"task": "pope", "prompt": "x"}, SettingsError, "prompt is a setting of `interp evaluate chair`"),
        ({"task": "pope", "questions": "q", "data": "scenes"}, SettingsError, "about images of a folder"),
        ({"task": "pope", "questions": "q", "images": "i", "n": 3}, SettingsError, "leave out n"),
        (
            {"task": "pope", "questions": "q", "images": "i", "annotations": "a"},
            SettingsError,
            "hold their own answers",
        ),
    ],
)
def test_settings_are_checked(bad, error, match):
    with pytest.raises(error, match=match):
        EvaluateSettings(**({"task": "chair", "model": "m"} | bad))


def test_help_is_fast():
    script = (
        "import sys\nfrom interp.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'pandas', 'plotly', 'numpy') if m in sys.modules])"
    )
    for arguments in (["evaluate", "--help"], ["evaluate", "chair", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.strip().splitlines()[-1] == "[]", arguments


# Scenes ------------------------------------------------------------------------------------------------------------


def test_the_truth_about_scenes_is_perfect(tmp_path):
    """Scenes' own captions mention all that is there and nothing else; the true answers are all right."""
    from interp.data import scenes

    rows = list(scenes.dataset("test", n=12, seed=1))
    file = tmp_path / "truth.jsonl"
    file.write_text("".join(json.dumps({"image": r["image_id"], "caption": r["caption"]}) + "\n" for r in rows))
    call("evaluate", "chair", "--captions", file, "--n", 12, "--seed", 1, "--out", tmp_path / "chair")
    found = ChairScores.load(tmp_path / "chair" / "scores")
    assert (found.chair_i, found.recall) == (0.0, 1.0)
    assert int(found.counts[:, 0].sum()) == sum(len(row["objects"]) for row in rows)
    assert Page((tmp_path / "chair" / "report.html").read_text()).tags.count("img") == 8
    line = call(
        *("evaluate", "chair", "--captions", file, "--n", 12, "--seed", 1, "--out", tmp_path / "coco"),
        *("--vocabulary", "coco"),
        code=2,
    )
    assert "does not exist in the classes, asked for image 'test-" in line
    settings = EvaluateSettings(task="pope", answers="x", n=12, seed=1)
    questions = load_data(settings).questions
    assert {q.kind for q in questions} == {"random", "popular", "adversarial"}
    said = tmp_path / "answers.jsonl"
    said.write_text("".join(json.dumps({"id": q.id, "answer": q.answer}) + "\n" for q in questions))
    call("evaluate", "pope", "--answers", said, "--n", 12, "--seed", 1, "--out", tmp_path / "pope")
    scores = PopeScores.load(tmp_path / "pope" / "scores")
    assert [scores.value("accuracy", part) for part in scores.parts] == [1.0] * 4
    assert scores.questions[0].text.startswith("is there a")
    assert scores.questions[0].text.endswith(" in the image ?")


def test_a_model_is_asked_about_scenes(model, tmp_path):
    from interp.data import scenes

    options = ("--n", 3, "--max-new-tokens", 2, "--device", "cpu")
    call("evaluate", "chair", model, *options, "--split", "validation", "--out", tmp_path / "a")
    found = ChairScores.load(tmp_path / "a" / "scores")
    assert found.settings["prompt"] == scenes.CAPTION_PROMPT
    assert [one.startswith("validation") for one in found.ids] == [True] * 3
    call("evaluate", "pope", model, *options, "--minimum", 1, "--negatives", "popular", "--out", tmp_path / "b")
    assert PopeScores.load(tmp_path / "b" / "scores").parts == ("popular",)


def test_pictures_know_two_marks(tmp_path):
    item = Picture(b"png", "<t>", [("a ", ""), ("<dog>", "right")])
    page = write_report(tmp_path, title="t", sections=[Section("s", [Pictures([item], "<c>")])]).read_text()
    assert 'a <mark class="right">&lt;dog&gt;</mark></p>' in page
    assert "<h3>&lt;t&gt;</h3>" in page
    with pytest.raises(InputError, match="marked 'right', 'wrong' or '', found 'bad'"):
        write_report(tmp_path, title="t", sections=[Section("s", [Pictures([Picture(b"", "t", [("a", "bad")])])])])


def on_scenes(task, out, *arguments, code=0):
    base = ("--data", "scenes", "--n", 6, "--examples", 1, "--device", "cpu", "--batch-size", 4)
    return call("evaluate", task, "scenes", *base, "--out", out, *arguments, code=code)


def test_interventions_act_and_are_recorded(tmp_path):
    packaged("scenes")
    lens = interp.load("scenes", device="cpu")
    on_scenes("chair", tmp_path / "plain")
    on_scenes("chair", tmp_path / "vhr", "--intervention", "vhr", "--strength", 4)
    found = ChairScores.load(tmp_path / "vhr" / "scores")
    assert {key: found.settings[key] for key in ("intervention", "strength", "control")} == {
        "intervention": "vhr", "strength": 4.0, "control": None}  # fmt: skip
    assert "intervention" not in ChairScores.load(tmp_path / "plain" / "scores").settings
    images = {s.id: s.image for s in scenes.scenes("test", 6)}
    wanted = caption_images(
        lens,
        images,
        prompt=scenes.CAPTION_PROMPT,
        batch_size=4,
        edits=lambda batch: steering.vision_reinforcement(lens, batch, scale=4.0),
    )
    assert dict(zip(found.ids, found.captions, strict=True)) == wanted
    assert found.captions != ChairScores.load(tmp_path / "plain" / "scores").captions
    assert "scenes, vhr at strength 4" in (tmp_path / "vhr" / "report.html").read_text()
    settings = yaml.safe_load((tmp_path / "vhr" / "settings.yaml").read_text())
    assert (settings["intervention"], settings["strength"]) == ("vhr", 4)
    # Strength 1 changes nothing; the usual one named or left out is the same run.
    on_scenes("chair", tmp_path / "one", "--intervention", "vhr", "--strength", 1)
    assert (tmp_path / "one" / "captions.jsonl").read_bytes() == (tmp_path / "plain" / "captions.jsonl").read_bytes()
    on_scenes("pope", tmp_path / "pope", "--intervention", "vhr", "--negatives", "random")
    text = on_scenes("pope", tmp_path / "pope", "--intervention", "vhr", "--strength", 2, "--negatives", "random")
    assert "not computed again" in text
    line = on_scenes("pope", tmp_path / "pope", "--negatives", "random", code=2)
    assert "intervention is 'vhr' there, asked is None" in line
    # A record from before there were interventions is that of a run without one.
    record = json.loads((tmp_path / "plain" / "run.json").read_text())
    for name in ("intervention", "strength", "control"):
        del record["fingerprint"][name]
    (tmp_path / "plain" / "run.json").write_text(json.dumps(record))
    assert "not computed again" in on_scenes("chair", tmp_path / "plain")
    line = on_scenes("chair", tmp_path / "vhr", "--intervention", "vhr", "--strength", 3, code=2)
    assert "strength is 4.0 there, asked is 3.0" in line
    assert "--overwrite" in on_scenes("chair", tmp_path / "plain", "--intervention", "var", code=2)
    text = on_scenes("chair", tmp_path / "var", "--intervention", "var")
    assert "scenes has no sink dimensions" in text
    assert (tmp_path / "var" / "captions.jsonl").read_bytes() == (tmp_path / "plain" / "captions.jsonl").read_bytes()


def test_random_heads_do_not_depend_on_the_batch(tmp_path):
    """A run that is taken up has other batches; the control must be the same one."""
    control = ("--intervention", "vhr", "--strength", 4, "--control", "random")
    on_scenes("chair", tmp_path / "a", *control)
    on_scenes("chair", tmp_path / "b", *control, "--batch-size", 1)
    on_scenes("chair", tmp_path / "seed", *control, "--seed", 1)
    on_scenes("chair", tmp_path / "chosen", *control[:4])
    a, b, seed, chosen = ((tmp_path / name / "captions.jsonl").read_text() for name in ("a", "b", "seed", "chosen"))
    assert a == b
    assert len({a, seed, chosen}) == 3


def test_sinks_are_found_once(monkeypatch, tmp_path):
    """VAR with the dimensions of the first images, in every batch."""
    probed, made = [], []

    def found(lens, batch):
        probed.append(len(batch))
        return (3,)

    def redistributed(lens, batch, *, dimensions, p):
        made.append((len(batch), dimensions, p))
        return steering.attention_redistribution(lens, batch, dimensions=dimensions, tau=0.1, p=p)

    monkeypatch.setattr(acting, "sink_dimensions", found)
    monkeypatch.setattr(acting, "attention_redistribution", redistributed)
    on_scenes("chair", tmp_path / "run", "--intervention", "var", "--strength", 0.75)
    assert (probed, made) == ([6], [(4, (3,), 0.25), (2, (3,), 0.25)])
    probed.clear()
    on_scenes("pope", tmp_path / "pope", "--intervention", "var", "--negatives", "random")
    assert probed == [8]


def test_bad_interventions_are_one_line(coco, tmp_path):
    out = tmp_path / "out"
    vhr, both = ("--intervention", "vhr"), ("--intervention", "vhr,var")
    for arguments, said in (
        (("--intervention", "vhx"), "intervention 'vhx' does not exist"),
        (("--intervention", "vhr,"), "intervention '' does not exist"),
        (("--intervention", "vhr,vhr"), "named once each"),
        (("--strength", 2), "give --intervention vhr or iri or var"),
        (("--control", "random"), "give --intervention vhr"),
        (("--doses", "0,1"), "give --intervention vhr"),
        (("--intervention", "var", "--control", "random"), "control random is for vhr and iri and edit and avisc"),
        (("--intervention", "iri", "--control", "norm"), "control norm is for vhr and edit, not for iri"),
        (("--intervention", "var", "--strength", 2), "between 0 and 1, found 2"),
        (("--intervention", "m3id", "--strength", -1), "is finite and at least 0, found -1"),
        ((*vhr, "--strength", "nan"), "is finite, found nan"),
        ((*both, "--strength", 2), "strength is of one intervention alone"),
        ((*vhr, "--doses", "0,1", "--control", "norm"), "control is of one intervention alone"),
        ((*vhr, "--doses", "0,x"), "doses are numbers from 0"),
        ((*vhr, "--doses", "-1,1"), "doses are numbers from 0"),
        (("--intervention", "var", "--doses", "1,3"), "strength of var lies between 0 and 1, found 1.2"),
    ):
        assert said in on_scenes("chair", out, *arguments, code=2), arguments
    assert "give --intervention vhr" in on_scenes("pope", out, "--control", "random", code=2)
    file = tmp_path / "c.jsonl"
    file.write_text('{"image": 1, "caption": "a"}\n')
    data = ("--annotations", coco / "instances.json", "--out", out, "--subset")
    line = call("evaluate", "chair", "--captions", file, *data, "--intervention", "vhr", code=2)
    assert "vhr acts on a model, but a file is scored" in line
    assert not out.exists()


NAMES = "vhr,iri,var,edit,vcd,m3id,avisc"


def counted(frame, run, metric):
    return frame[(frame["run"] == run) & (frame["metric"] == metric)].iloc[0]


def test_a_comparison_of_captions(tmp_path, monkeypatch):
    """Every dose and control; each run is what the same run alone gives; numbers, differences and the page agree."""
    lens = packaged("scenes")
    monkeypatch.setattr(compared, "ROUNDS", 1)
    out = tmp_path / "all"
    said = on_scenes("chair", out, "--intervention", NAMES, "--doses", "0,2", "--resamples", 100)
    frame = pd.read_parquet(out / "comparison.parquet")
    controls = [f"{name} {control} 2" for name in ("vhr", "edit") for control in ("random", "norm")]
    controls += ["iri random 2", "avisc random 2"]
    wanted = {"plain", *(f"{name} {dose}" for name in NAMES.split(",") for dose in (0, 2)), *controls}
    assert set(frame["run"]) == wanted
    strengths = {"vhr": 3.0, "iri": 0.52, "var": 0.8, "edit": 3.0, "vcd": 2.0, "m3id": 0.04, "avisc": 2.0}
    for name, strength in strengths.items():
        assert counted(frame, f"{name} 2", "recall")["strength"] == pytest.approx(strength)
        zero, plain = ((out / "runs" / one / "captions.jsonl").read_bytes() for one in (f"{name}-0", "plain"))
        assert zero == plain
    captions = {path.name: (path / "captions.jsonl").read_text() for path in (out / "runs").iterdir()}
    assert len({captions[one.replace(" ", "-")] for one in ("vhr 2", "vhr random 2", "vhr norm 2")}) == 3
    # One of the runs as a run of its own, and as the library makes it.
    on_scenes("chair", tmp_path / "one", "--intervention", "vcd", "--strength", 2)
    alone = ChairScores.load(tmp_path / "one" / "scores")
    images = {s.id: s.image for s in scenes.scenes("test", 6)}
    made = caption_images(
        lens,
        images,
        prompt=scenes.CAPTION_PROMPT,
        batch_size=4,
        processors=lambda batch: [steering.VisualContrast(lens, batch, strength=2.0)],
    )
    assert dict(zip(alone.ids, alone.captions, strict=True)) == made
    within = ChairScores.load(out / "runs" / "vcd-2" / "scores")
    assert within.captions == alone.captions
    row, plain = counted(frame, "vcd 2", "chair_i"), counted(frame, "plain", "chair_i")
    assert row["value"] == pytest.approx(alone.chair_i)
    assert row["change"] == pytest.approx(row["value"] - plain["value"])
    assert (plain["change"], plain["change_low"], plain["change_high"]) == (0, 0, 0)
    # Perplexity is that of the costs that stand beside the captions.
    lines = [json.loads(line) for line in captions["plain"].splitlines()]
    nats, tokens = (sum(line[key] for line in lines) for key in ("nats", "tokens"))
    assert counted(frame, "plain", "perplexity")["value"] == pytest.approx(np.exp(nats / tokens))
    assert counted(frame, "vhr 2", "perplexity")["change"] > 0
    record = json.loads((out / "run.json").read_text())
    assert set(record["latency"]) == {"plain", *NAMES.split(",")}
    assert record["latency"]["plain"] == 1
    assert "validation split" in record["estimated"]["iri rates"]
    page = (out / "report.html").read_text()
    for text in ("At a dose of zero no text is changed", "avisc random 2", "vhr and its controls", "perplexity"):
        assert text in page
    assert "avisc random 2" in said
    # It is taken up, and rebuilt.
    assert "not computed again" in on_scenes(
        "chair", out, "--intervention", NAMES, "--doses", "2,0", "--resamples", 100
    )
    assert "doses is '0,2' there" in on_scenes(
        "chair", out, "--intervention", NAMES, "--doses", "0,1", "--resamples", 100, code=2
    )
    (out / "report.html").unlink()
    assert "report.html" in call("report", out)
    assert (out / "report.html").is_file()


def test_a_comparison_that_was_cut_off(tmp_path, monkeypatch):
    """What is complete is not asked again, and the rest gives what a whole run gives."""
    arguments = ("--intervention", "vhr,avisc", "--doses", "1", "--resamples", 20, "--negatives", "random")
    monkeypatch.setattr(compared, "ROUNDS", 1)
    on_scenes("pope", tmp_path / "whole", *arguments)
    real, made, limit = runs.answer_questions, [], [11]

    def answer(lens, questions, *rest, **options):
        if len(made) == limit[0]:
            raise InputError("cut off")
        made.append(len(questions))
        return real(lens, questions, *rest, **options)

    monkeypatch.setattr(runs, "answer_questions", answer)
    on_scenes("pope", tmp_path / "cut", *arguments, code=2)
    limit[0] = None
    on_scenes("pope", tmp_path / "cut", *arguments, "--batch-size", 3)
    assert sum(made) == 6 * len((tmp_path / "cut" / "questions.jsonl").read_text().splitlines())
    for name in ("plain", "vhr-1", "vhr-random-1", "vhr-norm-1", "avisc-1", "avisc-random-1"):
        one, two = ((tmp_path / run / "runs" / name / "answers.jsonl").read_text() for run in ("whole", "cut"))
        rows = [[json.loads(line) for line in text.splitlines()] for text in (one, two)]
        assert [(r["id"], r["answer"]) for r in rows[0]] == [(r["id"], r["answer"]) for r in rows[1]]
        assert [r["p_yes"] for r in rows[0]] == pytest.approx([r["p_yes"] for r in rows[1]], abs=1e-4)
    frame = pd.read_parquet(tmp_path / "cut" / "comparison.parquet")
    assert set(frame["metric"]) == {"accuracy", "yes_ratio", "auroc"}
    plain = PopeScores.load(tmp_path / "cut" / "runs" / "plain" / "scores")
    assert counted(frame, "plain", "auroc")["value"] == pytest.approx(plain.value("auroc"))


def test_interventions_on_other_data(model, coco, tmp_path):
    """Rates and rankings of labelled images in COCO's format, for captions and for questions."""
    for task in ("chair", "pope"):
        out = tmp_path / task
        extra = () if task == "chair" else ("--negatives", "random", "--minimum", 1)
        evaluate(task, model, coco, out, "--intervention", "iri,edit", "--doses", "1", "--resamples", 20, *extra)
        record = json.loads((out / "run.json").read_text())
        assert "mean colour" in record["estimated"]["iri rates"]
        assert {"iri-random-1", "edit-norm-1"} <= {path.name for path in (out / "runs").iterdir()}
