"""Attention knock-out against runs with the edges cut one by one, and what has to hold of it."""

import pytest
import torch

import interp
from interp import edits
from interp.data import scenes
from interp.errors import EditError, InputError, SettingsError
from interp.tracing import attention_knockout
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
EDGES = {"early to last": ((1, 2), "last"), "first to all": (0, slice(1, None)), "middle to late": (1, slice(2, None))}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3", "bert"])
def lens(request):
    return interp.wrap(build(request.param), processor(request.param), name=request.param)


@pytest.mark.parametrize("window", [1, 3])
def test_it_equals_runs_with_the_edges_cut(lens, window):
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    found = attention_knockout(lens, batch, EDGES, window=window)
    assert found.settings["way"].startswith("whole" if lens.name == "bert" else "carried")
    logits = lens.run(batch, "logits@last").logits[:, 0]
    answers, rows = logits.argmax(-1), torch.arange(3)
    torch.testing.assert_close(found.clean, logits.softmax(-1)[rows, answers], atol=1e-6, rtol=1e-4)
    depth = lens.anatomy.depth["text"]
    assert len(found.cells) == depth * len(EDGES)
    for i, (_, layer, _, group) in enumerate(found.cells.tolist()):
        layers = [j for j in range(depth) if layer - window // 2 <= j < layer + (window + 1) // 2]
        come, to = EDGES[found.groups[group]]
        cut = edits.mask_attention(queries=to, keys=come, layers=layers)
        wanted = lens.run(batch, "logits@last", cut).logits[:, 0].softmax(-1)[rows, answers]
        torch.testing.assert_close(found.values[i], wanted, atol=1e-6, rtol=1e-4)
        share = (found.clean.sum() - wanted.sum()) / found.clean.sum()
        assert float(found.effects[i]) == pytest.approx(float(share), abs=1e-4)


def test_edges_against_the_mask_change_nothing_and_blindness_is_refused():
    lens = interp.wrap(build("llama"), processor("llama"), name="llama")
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    found = attention_knockout(lens, batch, {"late to early": ("last", 1)}, answers=[5, 6, 7], wrong=[8, 9, 10])
    assert found.metric == "logit_difference"
    torch.testing.assert_close(found.values, found.clean.expand_as(found.values), atol=1e-5, rtol=1e-5)
    alone = lens.prepare(input_ids=IDS[1:2])
    one = attention_knockout(lens, alone, EDGES, answers=[6])
    both = attention_knockout(lens, batch, EDGES, answers=[5, 6, 7])
    torch.testing.assert_close(one.values[:, 0], both.values[:, 1], atol=1e-6, rtol=1e-4)
    with pytest.raises(EditError, match="no key at all"):
        attention_knockout(lens, batch, {"all to first": ("all", 0)})
    with pytest.raises(SettingsError, match="edges are a mapping"):
        attention_knockout(lens, batch, {})
    with pytest.raises(SettingsError, match="'kl' is zero"):
        attention_knockout(lens, batch, EDGES, metric="kl")
    with pytest.raises(InputError, match="no image tokens"):
        attention_knockout(lens, batch, {"image to last": ("image", "last")})


def test_images():
    given = inputs("gemma3_vl")
    lens = interp.wrap(build("gemma3_vl"), sample=given)
    batch = lens.prepare(**given)
    found = attention_knockout(lens, batch, {"image": ("image", "last"), "text": ("image", "text")}, window=2)
    logits = lens.run(batch, "logits@last").logits[:, 0]
    answers, rows = logits.argmax(-1), torch.arange(len(batch))
    for i in (0, 3, 5):
        _, layer, _, group = found.cells[i].tolist()
        layers = [j for j in range(4) if layer - 1 <= j < layer + 1]
        cut = edits.mask_attention(queries="last" if group == 0 else "text", keys="image", layers=layers)
        wanted = lens.run(batch, "logits@last", cut).logits[:, 0].softmax(-1)[rows, answers]
        torch.testing.assert_close(found.values[i], wanted, atol=1e-6, rtol=1e-4)


def test_scenes_need_their_image():
    """Cut in all layers at once, the text no longer knows what the picture shows."""
    lens = interp.load("scenes")
    scene = next(iter(scenes.scenes("test", 1)))
    batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT} a photo of a"], [scene.image])
    depth = lens.anatomy.depth["text"]
    found = attention_knockout(
        lens, batch, {"image to text": ("image", "text")}, layers=depth // 2, window=2 * depth, metric="probability"
    )
    assert float(found.effects[0]) > 0.1
    assert "image to text" in repr(found)
    found.plot()
