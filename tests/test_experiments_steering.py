"""The experiment on interventions: rates, perplexity and intervals by hand, and the page says what it found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from docs import tables
from experiments.steering import contrasts, rates, scored, table
from interp import edits, evaluation, steering
from interp.data import scenes
from tests.conftest import packaged

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "experiments/steering/results/table.json"
PAGE = ROOT / "docs/experiments/steering.md"


@pytest.fixture(scope="module")
def lens():
    return packaged("scenes")


@pytest.fixture(scope="module")
def pictures(lens):
    return scored.Pictures.of(lens, "test", 6, 4)


def nothing(batch):
    return []


def said(counts, nats, answers, chance):
    return scored.Said(
        ("",) * len(counts), np.array(counts), np.array(nats, float), np.array(answers), np.array(chance)
    )


def test_rates_by_hand():
    """A ratio of means, not a mean of ratios: (0.9 + 0.6) / 2 against (0.1 + 0.5) / 2."""
    clean, removed = np.array([0.9, 0.6]), np.array([0.1, 0.5])
    patched = np.array([[[0.5, 0.5], [0.9, 0.6]], [[0.1, 0.5], [0.0, 0.5]]])
    found = rates.Recovery(clean, removed, patched)
    assert found.rates == pytest.approx(np.array([[0.4 / 0.9, 1.0], [0.0, -0.1 / 0.9]]))
    # Drawn twice, the first question is all there is.
    assert rates.ratio(clean, removed, patched, np.array([[2.0, 0.0]]))[0, 0] == pytest.approx([0.5, 1.0])
    row = found.rows()[1]
    assert (row["layer"], row["attention"]) == (1, {"value": 1.0, "low": 1.0, "high": 1.0})
    assert row["MLP"] == {"value": -0.111, "low": -0.125, "high": 0.0}


def test_rates_against_plain_hooks(lens):
    """p(yes) with one layer's output at the last token put in from the clean picture, by a hook of torch."""
    drawn = [s for s in scenes.scenes("validation", 4) if len(s.names) > 1][:2]
    found = rates.recovery(lens, drawn)
    yes, no = evaluation.answer_tokens(lens)
    modules = lens.model.get_submodule("model.language_model.layers")
    for i, scene in enumerate(drawn):
        name = scene.names[0]
        text = evaluation.image_prompt(lens, scenes.existence(name))
        one, other = (lens.prepare([text], [s.image]) for s in (scene, scene.without(name)))

        def chance(batch):
            with torch.no_grad():
                last = lens.model(**batch.inputs).logits[0, -1].softmax(-1)
            return float(last[yes].sum() / last[[*yes, *no]].sum())

        assert found.clean[i] == pytest.approx(chance(one), abs=1e-5)
        assert found.removed[i] == pytest.approx(chance(other), abs=1e-5)
        for row, part in enumerate(("self_attn", "mlp")):
            for layer in (0, 3):
                module, kept = getattr(modules[layer], part), []

                def keep(module, given, out, kept=kept):
                    kept.append((out[0] if isinstance(out, tuple) else out)[:, -1].clone())

                def put(module, given, out, kept=kept):
                    (out[0] if isinstance(out, tuple) else out)[:, -1] = kept[0]

                hook = module.register_forward_hook(keep)
                chance(one)
                hook.remove()
                hook = module.register_forward_hook(put)
                assert found.patched[row, layer, i] == pytest.approx(chance(other), abs=1e-4)
                hook.remove()


def test_perplexity_is_that_of_a_plain_loop(lens, pictures):
    """Each caption alone, token by token, under the plain model, its end counted; captions made under an edit."""
    (batch,) = pictures.captions
    change = edits.scale_heads([(4, h) for h in range(8)], 3.0)
    made = lens.generate(batch, change, max_new_tokens=14)
    found = evaluation.caption_surprise(lens, batch, made.tokens)
    end = lens.processor.tokenizer.eos_token_id
    text = evaluation.image_prompt(lens, scenes.CAPTION_PROMPT)
    lengths = set()
    for i, scene in enumerate(pictures.drawn):
        ids = made.tokens[i].tolist()
        ids = ids[: ids.index(end) + 1] if end in ids else ids
        one = lens.prepare([text], [scene.image])
        inputs, nats = dict(one.inputs), 0.0
        for token in ids:
            with torch.no_grad():
                nats -= float(lens.model(**inputs).logits[0, -1].log_softmax(-1)[token])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert found[i].tolist() == pytest.approx([nats, len(ids)], abs=1e-3)
        lengths.add(len(ids))
    assert len(lengths) > 1


def test_what_is_said_is_what_the_evaluation_says(lens, pictures):
    found = scored.speak(lens, pictures, nothing)
    value, _ = scored.Scale(pictures, resamples=10).of([found])
    images = {s.id: s.image for s in pictures.drawn}
    captions = evaluation.caption_images(lens, images, prompt=scenes.CAPTION_PROMPT, max_new_tokens=scored.LONGEST)
    there = {s.id: s.names for s in pictures.drawn}
    right = evaluation.chair(captions, there, vocabulary=scored.VOCABULARY)
    for name, metric in (("CHAIR_S, %", "chair_s"), ("CHAIR_I, %", "chair_i"), ("recall, %", "recall")):
        assert value[name][0] == pytest.approx(100 * right.value(metric))
    assert value["length"][0] == pytest.approx(right.length)
    assert value["perplexity"][0] == pytest.approx(np.exp(found.nats[:, 0].sum() / found.nats[:, 1].sum()))
    answers = evaluation.answer_questions(lens, pictures.questions, images, max_new_tokens=1)
    wanted = evaluation.pope(answers.texts, pictures.questions, yes_probability=answers.yes_probability)
    assert value["POPE right, %"][0] == pytest.approx(100 * wanted.accuracy)
    assert value["POPE yes, %"][0] == pytest.approx(100 * wanted.yes_ratio)
    assert value["POPE AUROC, %"][0] == pytest.approx(100 * wanted.value("auroc"))


def test_runs_and_scenes_are_drawn_together(pictures):
    """Two runs: the number is the mean of theirs; equal rows differ by nothing in any draw."""
    scale = scored.Scale(pictures, resamples=200)
    n, m = len(pictures.drawn), len(pictures.questions)
    random = np.random.default_rng(0)

    def make(wrong):
        counts = [[4, wrong, 4, 2, 10, 7, 7]] * n
        return said(counts, [[1.0, 2.0]] * n, scale.present * 1, random.random(m))

    one, two = make(1), make(3)
    value, drawn = scale.of([one, two])
    assert value["CHAIR_I, %"][0] == 50
    assert set(np.unique(drawn["CHAIR_I, %"])) == {25.0, 50.0, 75.0}  # scenes are alike: only the runs are drawn
    assert value["POPE right, %"][0] == 100
    again, same = scale.of([one, two])
    found = scored.interval(
        value["POPE AUROC, %"] - again["POPE AUROC, %"], drawn["POPE AUROC, %"] - same["POPE AUROC, %"]
    )
    assert found == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert drawn["POPE AUROC, %"].std() > 0


@pytest.mark.slow
def test_the_table_from_end_to_end(lens, pictures, monkeypatch):
    monkeypatch.setattr(table, "SCALES", (4.0,))
    monkeypatch.setattr(table, "KEPT", (4.0,))
    monkeypatch.setattr(table, "INJECTED", (0.1, 0.5))
    monkeypatch.setattr(table, "PERMUTED", (0.5,))
    monkeypatch.setattr(table, "ENHANCED", (2.0,))
    monkeypatch.setattr(contrasts, "STRENGTHS", (1.0,))
    monkeypatch.setattr(contrasts, "RATES", (0.3,))
    chosen = table.choose(lens, 3)
    assert [row["sink dimensions"] for row in chosen.sinks] == [0, len(chosen.dimensions)]
    assert len(chosen.dimensions) > 0
    table.check_nothing(lens, pictures.captions[0], chosen)
    scale, runs = scored.Scale(pictures, resamples=50), {}
    for key, made in table.ways(lens, chosen, draws=2, seed=0).items():
        runs[key] = [scored.speak(lens, pictures, change) for change in made]
    assert {len(one) for key, one in runs.items() if "random" in key[0] or "permuted" in key[0]} == {2}
    found = {key: scale.of(one) for key, one in runs.items()}
    plain = runs["nothing", ""][0]
    assert runs["VAR, published threshold", "p = 0.6"][0].captions == plain.captions
    (batch,) = pictures.captions
    made = lens.generate(batch, steering.vision_reinforcement(lens, batch, scale=4.0), max_new_tokens=scored.LONGEST)
    assert runs["VHR", "x 4.0"][0].captions == made.texts
    others = [runs[key][0].captions for key in (("VHR", "x 4.0"), ("VHR, the other heads", "x 4.0"), ("nothing", ""))]
    assert len(set(others)) == 3
    made = table.written(found, runs)
    assert [row["intervention"] for row in made["against the control"]] == [
        "VHR", "VHR", "IRI", "head editing", "AvisC"]  # fmt: skip
    for name in table.COMPARED:
        rows = {key: {row["intervention"]: row[name]["value"] for row in made[key] if name in row} for key in made}
        both = rows["captions"] or rows["answers"]
        assert rows["against nothing"]["VHR"] == pytest.approx(both["VHR"] - both["nothing"], abs=2e-3)
        less = both["VHR"] - both["VHR, random heads"]
        row = next(row for row in made["against the control"] if row["control"] == "random heads")
        assert row[name]["value"] == pytest.approx(less, abs=2e-3)
    times = table.latency(lens, batch, chosen, rounds=2)
    assert times[0]["time / plain"] == 1


def test_a_strength_of_nothing_that_changes_something_stops_the_script(lens, pictures, monkeypatch):
    chosen = table.choose(lens, 2)
    monkeypatch.setattr(steering, "edit_heads", lambda ranked, strength, k: edits.scale_heads(ranked.top(24), 0.0))
    with pytest.raises(SystemExit, match="head editing x 1 changes captions"):
        table.check_nothing(lens, pictures.captions[0], chosen)


def test_the_page_holds_every_table():
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert found["page"] == "steering"
    assert {"model", "seed", "minutes", "torch", "transformers"} <= set(found["settings"])
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in found["tables"].items():
        assert tables.between(text, f"table: {name}") == tables.markdown(rows)


def test_every_number_of_the_prose_is_in_the_results():
    """Numbers such as 0.63 or -6.2 in the text between the tables are numbers of a table, or half-widths, rounded."""
    known: set[float] = set()

    def collect(found):
        if isinstance(found, dict):
            for value in found.values():
                collect(value)
            if "high" in found:
                known.add((found["high"] - found["low"]) / 2)
        elif isinstance(found, list):
            for value in found:
                collect(value)
        elif isinstance(found, (int, float)) and not isinstance(found, bool):
            known.add(float(found))

    collect(json.loads(RESULT.read_text(encoding="utf-8")))
    text = re.sub(r"<!-- [^>]*begin[^>]*-->.*?<!-- [^>]*end -->|```.*?```", "", PAGE.read_text("utf-8"), flags=re.S)
    numbers = re.findall(r"(?<![\w.])-?(?:\d*\.\d+)(?![\w.]*\d)", text)
    assert len(numbers) > 15
    for number in numbers:
        digits = len(number.partition(".")[2])
        close = [x for x in known if abs(x - float(number)) <= 0.5 * 10**-digits + 1e-9]
        assert close, f"{number} is in the text of {PAGE.name}, but in no table"
