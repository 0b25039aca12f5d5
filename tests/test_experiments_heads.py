"""The experiments on heads: they count what is there, their halves do not meet, and the page says what they found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from docs import tables
from experiments.heads import concepts_scenes, concepts_text, detector, prompts, pruning
from experiments.heads.intervals import mean_interval
from experiments.heads.sentences import MEASURED, RANKED
from interp import edits, evaluation
from interp.data import scenes
from interp.heads.measure import Task
from tests.conftest import packaged

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "experiments/heads/results").glob("*.json"))
PAGE = ROOT / "docs/experiments/heads.md"


def test_auroc_within_strata():
    """Against a loop over pairs; a caption drawn twice counts as two."""
    random = np.random.default_rng(0)
    score, wrong = random.integers(0, 5, 60).astype(float), random.random(60) < 0.3
    strata, times = random.integers(0, 4, 60), random.integers(0, 3, 60)

    def plain(score, wrong, strata):
        good = [
            (score[i] > score[j]) + (score[i] == score[j]) / 2
            for i in np.flatnonzero(wrong)
            for j in np.flatnonzero(~wrong)
            if strata[i] == strata[j]
        ]
        return np.mean(good), len(good)

    found, pairs = detector.within(score, wrong, strata, np.ones((1, 60)))
    assert (found[0], pairs) == pytest.approx(plain(score, wrong, strata))
    found, pairs = detector.within(score, wrong, strata, times[None].astype(float))
    assert (found[0], pairs) == pytest.approx(plain(*(np.repeat(x, times) for x in (score, wrong, strata))))
    assert detector.within(strata * 1.0, wrong, strata, np.ones((1, 60)))[0] == 0.5
    assert detector.within(score, wrong, np.arange(60), np.ones((2, 60)))[0].tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_words_of_captions():
    """Each word's numbers against a run on its caption up to the word."""
    lens = packaged("scenes")
    drawn = list(scenes.scenes("test", 6))
    words = detector.object_words(lens, drawn)
    batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * 6, images=[s.image for s in drawn])
    texts = lens.generate(batch, max_new_tokens=48).texts
    said = [[w for w in text.split() if w in scenes.NAMES] for text in texts]
    assert words.groupby("caption")["word"].agg(list).tolist() == said
    assert words["wrong"].tolist() == [w not in s.names for s, row in zip(drawn, said, strict=True) for w in row]
    assert words["repeated"].tolist() == [w in row[:i] for row in said for i, w in enumerate(row)]
    for row in words[words["caption"] == 5].to_dict("records"):
        parts = texts[5].split()
        places = [i for i, part in enumerate(parts) if part in scenes.NAMES]
        start = " ".join([f"<image> {scenes.CAPTION_PROMPT}", *parts[: places[row["place in the caption"] - 1]]])
        one = lens.prepare([start], images=[drawn[5].image])
        trace = lens.run(one, ["logits@last", "pattern@last"])
        chances = trace.logits[0, -1].softmax(-1)
        token = lens.processor.tokenizer.convert_tokens_to_ids(row["word"])
        assert row["token probability"] == pytest.approx(float(chances[token]), abs=1e-5)
        assert row["entropy"] == pytest.approx(float(-(chances * chances.log()).sum()), abs=1e-4)
        patterns = [v[0, :, 0] for (read, _), v in trace.values.items() if read.site == "pattern"]
        mass = [v[:, one.span("image")[0]].sum(-1).mean() for v in patterns]
        assert row["image attention"] == pytest.approx(float(torch.stack(mass).mean()), abs=1e-5)


@pytest.mark.slow
def test_the_detector_from_end_to_end():
    lens = packaged("scenes")
    words = detector.object_words(lens, list(scenes.scenes("test", 12)), temperature=2.0, seed=1)
    assert words["wrong"].any()
    *rows, pairs = detector.table(words)
    assert [row["detector"] for row in rows] == [*detector.TVHD, *detector.BARE]
    bad, good = words[words["wrong"]], words[~words["wrong"]]
    assert pairs["all words"] == len(bad) * len(good)
    lower = (bad["entropy"].to_numpy()[:, None] > good["entropy"].to_numpy()).mean()
    (row,) = [row for row in rows if row["detector"] == "entropy"]
    assert row["all words"]["value"] == pytest.approx(lower, abs=1e-3)
    assert row["all words"]["low"] <= row["all words"]["value"] <= row["all words"]["high"]
    (place,) = [row for row in rows if row["detector"] == "place in the caption"]
    assert place["same place"]["value"] == 0.5
    assert sum(row["words"] for row in detector.places(words)) == len(words)


@pytest.mark.slow
def test_prompts_and_their_halves(smollm):
    tokenizer = smollm.processor
    for concept in prompts.CONCEPTS:
        one, two = prompts.halves(smollm, concept)
        assert not set(one) & set(two)
        assert abs(len(one) - len(two)) <= 1
        every = prompts.questions(smollm, concept)
        assert len({q.text for q in every}) == len(every) > 50
        for q in every:
            assert q.word in (one, two)[q.half]
            assert q.word not in q.text.replace(",", "").split()
            assert len(tokenizer(q.answer, add_special_tokens=False)["input_ids"]) == 1
    some = prompts.questions(smollm, "countries")[:12]
    right = prompts.known(smollm, some, each=2)
    assert 0 < len(right) <= 4
    for q in right:
        made = smollm.generate(smollm.prepare([q.text]), max_new_tokens=1)
        assert made.texts == (q.answer,)


def test_own_and_other_prompts():
    """Heads of concept c lose 10 c + m nats on prompts of concept m."""
    names = prompts.CONCEPTS
    asked = [prompts.Question(c, str(i), "x", 0) for i, c in enumerate([*names, names[0]])]
    found = concepts_text.Found(asked)
    numbers = np.array([[10 * c + names.index(q.concept) for q in asked] for c in range(4)], dtype=float)
    assert found.mine(numbers).tolist() == [0, 0, 11, 22, 33]
    assert found.mine(numbers, 2).tolist() == [22]
    assert found.others(numbers, 1).tolist() == [10, 10, 12, 13]
    rest = [np.mean([10, 20, 30]), np.mean([10, 20, 30]), np.mean([1, 21, 31]), np.mean([2, 12, 32])]
    assert found.others(numbers) == pytest.approx([*rest, np.mean([3, 13, 23])])
    drawn = np.stack([numbers, numbers + 1], 1)
    assert found.mine(drawn).tolist() == [[0, 0, 11, 22, 33], [1, 1, 12, 23, 34]]


@pytest.mark.slow
def test_concepts_in_text_from_end_to_end(smollm, monkeypatch):
    monkeypatch.setattr(concepts_text, "SIZES", (2,))
    every = {c: prompts.questions(smollm, c)[: 40 if c == "first names" else 8] for c in prompts.CONCEPTS}
    chosen = [q for some in every.values() for q in prompts.known(smollm, some, each=1)]
    assert len(chosen) == 8
    found, folds = concepts_text.measure(smollm, chosen, controls=1, lists=5, seed=0)
    for half, fold in enumerate(folds):
        for (concept, _), scores in fold.items():
            words = set(scores.settings["keywords"]["kept"])
            measured = {q.word for q in found.prompts if q.half != half and q.concept == concept}
            assert measured
            assert not words & measured
    assert len(found.prompts) == 8
    # The second half's prompts are measured with heads that were ranked on the first.
    last = [i for i, q in enumerate(found.prompts) if (q.half, q.concept) == (1, "months")]
    q = found.prompts[last[0]]
    change = edits.scale_heads(list(concepts_text.top(folds[0], ("months", "logit lens"), 2)), -1.0)
    answer = smollm.processor(q.answer, add_special_tokens=False)["input_ids"][0]
    batch = smollm.prepare([q.text])
    nats = [-float(smollm.run(batch, "logits@last", e).logits[0, -1].log_softmax(-1)[answer]) for e in ((), change)]
    lost = found.own["logit lens", 2][1][prompts.CONCEPTS.index("months"), last[0]]
    assert lost == pytest.approx(nats[1] - nats[0], abs=1e-3)
    rows = concepts_text.overall(found)
    assert {row["chosen by"] for row in rows} == {*concepts_text.FLIPPED, concepts_text.KNOWN}
    assert len(concepts_text.by_concept(found, 2)) == 12
    assert all(row["measured"] == 2 for row in concepts_text.asked(smollm, every, chosen))


def test_names_of_categories():
    found = concepts_scenes.count_names([["dog", "car", "dog", "star"], []])
    assert found.tolist() == [[2, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
    keywords = [set(words) for words in concepts_scenes.KEYWORDS.values()]
    assert sum(map(len, keywords)) == len(set().union(*keywords)) == len(scenes.NAMES) + len(scenes.COLOURS)


def test_ratios_over_scenes():
    weights = concepts_scenes.Weights(3)
    part, whole = np.array([[1, 0, 2], [0, 0, 1]]), np.array([[2, 1, 2], [1, 1, 1]])
    found = weights.ratio(part, whole)
    assert found["value"] == 0.5
    # A draw may hold one scene alone: the ends of the interval are those of the scenes' own ratios.
    assert (found["low"], found["high"]) == (0.0, 1.0)
    assert weights.ratio(whole, whole, times=100) == {"value": 100.0, "low": 100.0, "high": 100.0}


@pytest.mark.slow
def test_concepts_in_scenes_from_end_to_end(monkeypatch):
    lens = packaged("scenes")
    monkeypatch.setattr(concepts_scenes, "SIZES", (2,))
    ranked = concepts_scenes.rankings(lens, concepts_scenes.Pictures.of(lens, "validation", 6), lists=5)
    pictures = concepts_scenes.Pictures.of(lens, "test", 4)
    same = concepts_scenes.speak(lens, pictures, edits.scale_heads([(0, 0), (3, 2)], 1.0))
    spoken = concepts_scenes.Spoken(lens, pictures, ranked, controls=1, seed=0)
    for name in ("categories", "recalled", "there", "counts", "colour"):
        assert np.array_equal(getattr(same, name), getattr(spoken.before, name))
    there = {s.id: s.names for s in pictures.drawn}
    captions = evaluation.caption_images(
        lens, {s.id: s.image for s in pictures.drawn}, prompt=scenes.CAPTION_PROMPT, max_new_tokens=20
    )
    scored = evaluation.chair(captions, there, vocabulary=evaluation.Vocabulary.of(scenes.NAMES))
    assert spoken.before.recalled.sum() / spoken.before.there.sum() == pytest.approx(scored.recall)
    rows = concepts_scenes.overall(spoken, concepts_scenes.Weights(4))
    assert (rows[0]["own words"]["value"], rows[0]["other objects"]["value"]) == (1.0, 1.0)
    assert rows[0]["CHAIR_I, %"]["value"] == pytest.approx(100 * scored.chair_i, abs=1e-3)
    assert rows[0]["length"]["value"] == pytest.approx(scored.length, abs=1e-3)
    assert len(concepts_scenes.matrix(spoken, concepts_scenes.Weights(4), 2)) == 19
    assert len(concepts_scenes.colours(spoken, concepts_scenes.Weights(4))) == 7
    assert [row["by chance"] for row in concepts_scenes.shared(ranked, 8)] == [round(64 / 48, 2)] * 3
    animal = spoken.chosen["animal", "logit lens", 2]
    change = edits.scale_heads(concepts_scenes.top(ranked["animal", "logit lens"], "logit lens", 2), -1.0)
    assert np.array_equal(animal.counts, concepts_scenes.speak(lens, pictures, change).counts)


@pytest.mark.slow
def test_pruning_from_end_to_end(smollm, monkeypatch):
    monkeypatch.setattr(pruning, "MEASURED", MEASURED[:3])
    monkeypatch.setattr(pruning, "RANKED", RANKED[:3])
    monkeypatch.setattr(pruning, "STEP", 0.25)
    tables_ = pruning.names(smollm, 4, upto=0.5, controls=1, seed=0)
    tables_ |= pruning.loss(smollm, 4, upto=0.5, controls=1, seed=0)
    for rows in tables_.values():
        assert [row["removed"] for row in rows] == [0, 68, 135]
        values = [v["value"] for v in rows[0].values() if isinstance(v, dict)]
        assert len(set(values)) == 1  # the intact model is the same in all
        assert len({v["value"] for v in rows[2].values() if isinstance(v, dict)}) > 1
    task = Task(smollm.prepare(sorted(MEASURED[:3], key=len)))
    plain = task.measured(smollm.run(task.batch, task.read).logits)[0].mean()
    assert tables_["sentences, loss"][0]["importance"]["value"] == pytest.approx(float(plain), abs=2e-3)
    assert not set(RANKED) & set(MEASURED)
    assert len(set(RANKED) | set(MEASURED)) == 40


def test_mean_intervals():
    values = np.array([0.0, 1.0, 2.0, 3.0])
    found = mean_interval(values)
    assert found["value"] == 1.5
    assert found["low"] < 1.0 < 2.0 < found["high"]
    twice = mean_interval(np.stack([values, values]))
    assert twice == found  # equal draws add nothing
    assert mean_interval(np.stack([values, values + 4]))["high"] > found["high"] + 2


def test_the_page_holds_every_table():
    assert [path.stem for path in RESULTS] == ["concepts_scenes", "concepts_text", "detector", "pruning"]
    text = PAGE.read_text(encoding="utf-8")
    for path in RESULTS:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["page"] == "heads"
        assert {"model", "seed", "minutes", "torch", "transformers"} <= set(found["settings"])
        for name, rows in found["tables"].items():
            assert tables.between(text, f"{path.stem}: {name}") == tables.markdown(rows)


def test_every_number_of_the_prose_is_in_the_results():
    """Numbers such as .63 or 6.2 in the text between the tables are numbers of a table, rounded."""
    known: set[float] = set()

    def collect(found):
        if isinstance(found, dict):
            for value in found.values():
                collect(value)
        elif isinstance(found, list):
            for value in found:
                collect(value)
        elif isinstance(found, (int, float)) and not isinstance(found, bool):
            known.add(float(found))

    for path in RESULTS:
        collect(json.loads(path.read_text(encoding="utf-8")))
    text = re.sub(r"<!-- [^>]*begin[^>]*-->.*?<!-- [^>]*end -->|```.*?```", "", PAGE.read_text("utf-8"), flags=re.S)
    numbers = re.findall(r"(?<![\w.])-?(?:\d*\.\d+)(?![\w.]*\d)", text)
    assert len(numbers) > 20
    for number in numbers:
        digits = len(number.partition(".")[2])
        close = [x for x in known if abs(x - float(number)) <= 0.5 * 10**-digits + 1e-9]
        assert close, f"{number} is in the text of {PAGE.name}, but in no table"
