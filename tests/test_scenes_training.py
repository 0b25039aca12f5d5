"""Training of the scenes model: what is learned is what is asked later, the loss falls, a resumed run is the same."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments.scenes.pool import NOTHING, draw, patch_classes, to_input
from experiments.scenes.stages import STAGES, answer_logits, see
from experiments.scenes.texts import TASKS, Turn, all_turns, existence_turns, pack
from experiments.scenes.train import course, export, processor, steps
from interp.data import scenes
from tests.conftest import packaged

CPU = torch.device("cpu")


@pytest.fixture
def run():
    return course(seed=0, pool=64, device=CPU)


def short(*names: str, count: int) -> tuple:
    """The named stages, with few and small steps at a rate that shows in few steps."""
    return tuple(dataclasses.replace(s, steps=count, batch=8, warmup=1, rate=2e-3) for s in STAGES if s.name in names)


def test_packed_turns_give_the_logits_of_each_turn_alone(run):
    model = run.parts.model.eval()
    scene = scenes.scene("train", 3)
    turns = all_turns(scene, np.random.default_rng(0))
    assert {TASKS[turn.task] for turn in turns} == set(TASKS)
    packed = pack([turns, turns[:2]], run.words)
    begin = torch.tensor([[run.words.bos_token_id]] * 2)
    pixels = torch.from_numpy(scene.pixels.copy())[None].expand(2, -1, -1, -1)
    with torch.no_grad():
        seen = model.model.multi_modal_projector(see(model, pixels))
        prefix = torch.cat([model.get_input_embeddings()(begin), seen], 1)
        together = answer_logits(model, prefix, packed)
        alone = []
        for turn in (*turns, *turns[:2]):
            inputs = processor()(
                text=[f"<image> {turn.prompt} {turn.answer} </s>"], images=[scene.image], return_tensors="pt"
            )
            answer = len(run.words(turn.answer, add_special_tokens=False)["input_ids"]) + 1
            alone.append(model(**inputs).logits[0, -answer - 1 : -1])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)


def test_pixels_are_prepared_as_the_processor_does():
    scene = scenes.scene("train", 0)
    given = processor()(text=["<image>"], images=[scene.image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_input(torch.from_numpy(scene.pixels.copy()))[None], given, rtol=0, atol=1e-5)


def test_the_class_of_a_patch_is_the_object_that_covers_it():
    scene = scenes.compose(["dog"], size=27, seed=2)
    classes = patch_classes(scene).reshape(8, 8)
    cover = scene.mask("dog").reshape(8, 9, 8, 9).mean((1, 3))
    np.testing.assert_array_equal(classes == scenes.NAMES.index("dog"), cover > 0.2)
    assert set(classes.flatten()) == {scenes.NAMES.index("dog"), NOTHING}


def test_yes_and_no_are_asked_equally_often():
    turns = [
        turn
        for scene in scenes.scenes("train", 100)
        for turn in existence_turns(scene, np.random.default_rng(0), names=scenes.NAMES, most=4)
    ]
    answers = [turn.answer for turn in turns]
    assert answers.count("yes") == answers.count("no")
    assert Turn("is there a cow in the image ?", "yes", 0) in turns


@pytest.mark.parametrize(("stage", "count"), [("vision", 40), ("match", 12), ("all", 12)])
def test_the_loss_falls(run, stage, count):
    losses = [numbers["loss"] for numbers in steps(run, short(stage, count=count))]
    assert len(losses) == count
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:2])


def test_a_resumed_run_is_the_same_run(tmp_path):
    stages = short("vision", "all", count=4)
    whole = course(seed=1, pool=16, device=CPU)
    expected = [numbers["loss"] for numbers in steps(whole, stages)]
    state = tmp_path / "state.safetensors"
    found: list[float] = []
    for stop in (3, 2, 3):  # in the middle of a stage, at its end, to the end
        part = course(seed=1, pool=16, device=CPU)
        going = steps(part, stages, state=state, keep_every=1)
        for _ in range(stop):
            found.append(next(going)["loss"])
        next(going, None)  # lets the step be kept; what it gives is computed again by the next run
    assert found == expected
    assert [*steps(part, stages)] == []
    for one, other in zip(whole.parts.parameters(), part.parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_exported_model_loads_through_transformers(tmp_path, run):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    export(run.parts.model, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = AutoProcessor.from_pretrained(tmp_path)(
        text=["<image> describe the image ."], images=[scenes.scene("test", 0).image], return_tensors="pt"
    )
    with torch.no_grad():
        difference = (model(**inputs).logits - run.parts.model.eval()(**inputs).logits).abs().max()
    assert difference < 1e-2, "only float16 lies between them"


@pytest.mark.slow
def test_the_larger_model_trains_its_projector_only(tmp_path):
    from experiments.scenes import smol

    packaged("smollm2-135m")
    packaged("dinov2-s")
    model, words = smol.assemble()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    pool = draw("train", 4, workers=1)
    state = tmp_path / "state.safetensors"
    first = next(smol.train(model, words, pool, steps=2, batch=1, state=state))
    assert first["caption"] < 12
    list(smol.train(model, words, pool, steps=2, batch=1, state=state))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("multi_modal_projector" in name for name in trained)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    given = words(text=["<image> describe the image ."], images=[pool.scenes[0].image], return_tensors="pt")
    assert int((given["input_ids"] == model.config.image_token_id).sum()) == smol.PATCHES
