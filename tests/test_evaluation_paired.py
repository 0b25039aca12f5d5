"""Runs beside each other, recovery rates, costs of texts, and answers under logits processors."""

import math

import numpy as np
import pytest
import torch

from experiments.steering import rates
from interp import evaluation, steering
from interp.data import scenes
from interp.errors import InputError
from interp.evaluation import Vocabulary, caption_surprise, chair, paired, pope, recovery_rates
from tests.conftest import packaged
from tests.test_heads_vision import wrapped

THERE = {str(i): ["dog", "cat"] for i in range(40)}


@pytest.fixture(scope="module")
def lens():
    return packaged("scenes")


def captions(wrong):
    """Captions of forty images; `wrong` of them name something that is not there, one in ten of the rest as well."""
    return {one: "a dog and a cup" if int(one) < wrong or int(one) % 10 == 9 else "a dog" for one in THERE}


def scored(wrong, **options):
    words = Vocabulary.of(["dog", "cat", "cup"])
    return chair(captions(wrong), THERE, vocabulary=words, resamples=400, **options)


def test_pairs_by_hand():
    runs = {"one": scored(8), "same": scored(8), "worse": scored(12)}
    nats = {name: np.array([[2.0, 4.0]] * 40) * (2 if name == "worse" else 1) for name in runs}
    nats["worse"][:, 1] /= 2
    frame = paired(runs, "one", ("chair_s", "recall"), nats=nats).set_index(["run", "metric"])
    assert frame.loc[("one", "chair_s"), "value"] == pytest.approx(12 / 40)
    assert frame.loc[("worse", "chair_s"), "change"] == pytest.approx(3 / 40)  # image 9 was wrong already
    # The same texts differ by nothing in any draw, though the number itself has an interval.
    same = frame.loc[("same", "chair_s")]
    assert (same["change"], same["change_low"], same["change_high"]) == (0, 0, 0)
    assert same["high"] - same["low"] > 0.1
    # A paired interval is that of the images that changed: about 3 of 40.
    worse = frame.loc[("worse", "chair_s")]
    spread = worse["change_high"] - worse["change_low"]
    assert 0.1 < spread < 0.9 * (worse["high"] - worse["low"])
    assert worse["change_low"] >= 0
    assert frame.loc[("one", "perplexity"), "value"] == pytest.approx(math.exp(0.5))
    assert frame.loc[("worse", "perplexity"), "value"] == pytest.approx(math.exp(1.0))
    assert frame.loc[("worse", "perplexity"), "change_low"] == pytest.approx(math.exp(1.0) - math.exp(0.5))
    summary = runs["worse"].summary().set_index("metric")
    for end in ("low", "high"):
        assert worse[end] == pytest.approx(summary.loc["chair_s", end])


def test_pairs_need_the_same_images_and_draws():
    with pytest.raises(InputError, match="same images and draws"):
        paired({"one": scored(8), "two": scored(8, seed=1)}, "one", ("chair_s",))
    questions = evaluation.pope_questions(THERE, split="random", classes=["dog", "cat", "cup", "bus"], minimum=1)
    answers = pope({q.id: "yes" for q in questions[:-6]}, questions[:-6], resamples=400)
    with pytest.raises(InputError, match="same images and draws"):
        paired({"one": scored(8), "two": answers}, "one", ("recall",))


def test_rates_are_those_of_patching_by_hand(lens):
    """Against lens.run with one layer's output put in, for each question alone."""
    drawn = [s for s in scenes.scenes("validation", 6) if len(s.names) > 1][:3]
    found = rates.recovery(lens, drawn)
    texts = [evaluation.image_prompt(lens, scenes.existence(s.names[0])) for s in drawn]
    pair = [lens.prepare(texts, [s.image for s in some]) for some in (drawn, [s.without(s.names[0]) for s in drawn])]
    whole = recovery_rates(lens, [tuple(pair)])
    assert torch.allclose(whole.rates, torch.from_numpy(found.rates), atol=1e-5)
    apart = recovery_rates(lens, [(pair[0][i], pair[1][i]) for i in range(3)])
    assert torch.allclose(apart.patched, whole.patched, atol=1e-5)
    with pytest.raises(InputError, match="no questions"):
        recovery_rates(lens, [])
    same = recovery_rates(lens, [(pair[0], pair[0])])
    with pytest.raises(InputError, match="the same with and without"):
        _ = same.rates


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3_vl"])
def test_costs_are_those_of_a_plain_loop(name):
    """Token by token under the plain model; behind an end nothing counts."""
    lens, batch = wrapped(name)
    tokens = torch.randint(5, 60, (len(batch), 4), generator=torch.Generator().manual_seed(0))
    stop = lens.model.generation_config.eos_token_id
    stop = lens.processor.tokenizer.eos_token_id if stop is None else stop
    stop = stop if isinstance(stop, int) else stop[0]
    tokens[0, 1] = stop
    tokens[0, 2:] = 0
    found = caption_surprise(lens, batch, tokens)
    assert found[:, 1].tolist() == [2, *[4] * (len(batch) - 1)]
    nats = torch.zeros(len(batch), dtype=torch.float64)
    inputs = dict(batch.inputs)
    for step in range(4):
        chance = lens.run(lens.prepare(**inputs), ["logits@last"]).logits[:, -1].double().log_softmax(-1)
        cost = -chance.gather(1, tokens[:, step : step + 1])[:, 0]
        nats += torch.where(found[:, 1] > step, cost, 0.0)
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.shape == (len(batch), batch.mask.shape[1] + step):
                more = (
                    tokens[:, step : step + 1]
                    if key == "input_ids"
                    else torch.full((len(batch), 1), int("mask" in key))
                )
                inputs[key] = torch.cat([value, more.to(value)], 1)
    assert torch.allclose(found[:, 0], nats, atol=1e-4)


def test_answers_under_processors(lens):
    """p(yes) is of the contrast without its cut-off, the text of the contrast with it."""
    drawn = list(scenes.scenes("test", 4))
    objects = {s.id: s.names for s in drawn}
    questions = evaluation.pope_questions(objects, split="random", classes=scenes.NAMES, template=scenes.TEMPLATE)
    images = {s.id: s.image for s in drawn}

    def processors(batch):
        return [steering.VisualContrast(lens, batch, strength=1.5, cutoff=0.5)]

    options = {"batch_size": 3, "max_new_tokens": 2}
    found = evaluation.answer_questions(lens, questions, images, processors=processors, **options)
    plain = evaluation.answer_questions(lens, questions, images, **options)
    assert found.yes_probability != plain.yes_probability
    assert all(0 < chance < 1 for chance in found.yes_probability.values())
    yes, no = evaluation.answer_tokens(lens)
    for question in questions[:2]:
        batch = lens.prepare([evaluation.image_prompt(lens, question.text)], [images[question.image]])
        (made,) = processors(batch)
        other = made.branch.first.double()
        mixed = 2.5 * lens.run(batch, ["logits@last"]).logits[:, -1].double() - 1.5 * other
        wanted = torch.sigmoid(mixed[:, yes].logsumexp(-1) - mixed[:, no].logsumexp(-1))
        assert found.yes_probability[question.id] == pytest.approx(float(wanted), abs=1e-4)
        said = lens.generate(batch, max_new_tokens=2, logits_processor=[made]).texts
        assert found.texts[question.id] == said[0].strip()
