"""ViCrop's maps against transformers' own attention and plain autograd, invariants, the scenes model."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

import interp
from interp.attribution import relative_attention
from interp.attribution.pixel_gradient import fine_detail
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.inputs import placeholder
from tests.zoo import build, inputs, processor
from tests.zoo._images import image

PICTURES = [[image(60, 30, 1)], [image(40, 40, 2), image(32, 64, 3)], [image(44, 36, 4)]]
ASKED = ["{} is it a cow?", "what are {} and {} there", "long words before {} come first"]
GENERAL = ["{} describe it", "say of {} and of {} what there is to see", "{}."]
FORMS = ["relative", "gradient", "pixel_gradient"]


@cache
def lens_of(name):
    return interp.load(name) if name == "scenes" else interp.wrap(build(name), processor(name), name=name)


@cache
def eager_of(name):
    """The family's model, which returns its attention."""
    return build(name, attn_implementation="eager")


def prepared(lens, texts, rows=range(3), side=None):
    token = placeholder(lens.processor)
    filled = [texts[i].replace("{}", token) for i in rows]
    return lens.prepare(filled, images=[PICTURES[i] for i in rows], padding_side=side)


def maps(lens, form, asked, general, **more):
    return relative_attention(lens, asked, form=form, general=None if form == "gradient" else general, **more)


def eager(model, batch, layer):
    """Attention of the last token of one sample alone, with its graph, and the log-probability of its best token."""
    out = model(**batch.inputs, output_attentions=True)
    pattern = out.attentions[layer]
    return pattern, out.logits[0, -1].log_softmax(-1).max()


def plain_relative(model, asked, general, layer, epsilon):
    with torch.no_grad():
        above, below = (eager(model, b, layer)[0][0, :, -1, b.image_mask[0]].mean(0) for b in (asked, general))
    return above / (below + epsilon * below.mean())


def plain_gradient(model, asked, layer):
    pattern, number = eager(model, asked, layer)
    (gradient,) = torch.autograd.grad(number, pattern)
    return (pattern * gradient.relu())[0, :, -1, asked.image_mask[0]].mean(0).detach()


def plain_detail(pixels):
    """Fine detail of one normalised picture [channel, height, width], by scipy."""
    x = np.asarray(pixels, np.float64)
    tap = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 0.8**2))
    blurred = x
    for axis in (1, 2):
        blurred = ndimage.correlate1d(blurred, tap / tap.sum(), axis=axis, mode="mirror")
    energy = ndimage.median_filter(np.sqrt(((x - blurred) ** 2).sum(0)), size=7)
    return energy > np.median(energy)


def plain_pixels(model, asked, general, epsilon, patch):
    norms = []
    for batch in (asked, general):
        pixels = batch.inputs["pixel_values"].clone().requires_grad_()
        logits = model(**{**batch.inputs, "pixel_values": pixels}).logits[0, -1]
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1).max(), pixels)
        norms.append(gradient.norm(dim=1))
    ratio = norms[0] / (norms[1] + epsilon * norms[1].mean())
    ratio = ratio * torch.tensor(np.stack([plain_detail(p) for p in asked.inputs["pixel_values"]]))
    parts = torch.nn.functional.avg_pool2d(ratio[:, None].float(), patch)[:, 0]
    return parts.flatten()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
def test_a_padded_batch_equals_plain_attention_and_gradients(form, side):
    """Prompts of other lengths, several images, other padding for the general instruction: each sample as alone."""
    lens, model = lens_of("llava"), eager_of("llava")
    asked, general = prepared(lens, ASKED, side=side), prepared(lens, GENERAL, side="left")
    more = {} if form == "pixel_gradient" else {"layer": 1}
    found = maps(lens, form, asked, general, **more)
    for i in range(3):
        one, other = prepared(lens, ASKED, [i]), prepared(lens, GENERAL, [i])
        if form == "relative":
            expected = plain_relative(model, one, other, 1, 1e-3)
        elif form == "gradient":
            expected = plain_gradient(model, one, 1)
        else:
            expected = plain_pixels(model, one, other, 1e-3, 8)
        mine = found.select(i)
        scores = mine.scores[0, 0]
        assert expected.max() > 0
        near = {"rtol": 1e-3, "atol": float(1e-4 * expected.max())}
        torch.testing.assert_close(scores[mine.spans["image"][0]], expected.float(), **near)
        assert (scores[mine.spans["text"][0]] == 0).all()
        if form != "relative":
            continue
        single = maps(lens, form, one, other, **more)
        torch.testing.assert_close(mine.scores, single.scores, **near)
        assert mine.frame().drop(columns=["score", "rank"]).equals(single.frame().drop(columns=["score", "rank"]))
    assert found.unit == ("nats" if form == "gradient" else "ratio")


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "gemma3_vl"])
def test_families(name):
    """Tiles, packed pictures, both directions: the quotient of what the model attends to."""
    lens, model = lens_of(name), eager_of(name)
    layer = len(lens.anatomy.towers["text"].layers) - 1
    asked, general = prepared(lens, ASKED, [1]), prepared(lens, GENERAL, [1])
    found = relative_attention(lens, asked, general=general, layer=layer)
    expected = plain_relative(model, asked, general, layer, 1e-3)
    torch.testing.assert_close(found.scores[0, 0, asked.image_mask[0]], expected, rtol=1e-3, atol=1e-4)
    loss = relative_attention(lens, asked, form="gradient", layer=layer).scores[0, 0, asked.image_mask[0]]
    expected = plain_gradient(model, asked, layer)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=float(1e-4 * expected.max()))
    if name != "gemma3_vl":
        with pytest.raises(UnsupportedError, match="one whole picture for each image, found"):
            relative_attention(lens, asked, form="pixel_gradient", general=general)


def test_epsilon_by_hand():
    """The same prompt twice: A / (A + epsilon mean A)."""
    lens = lens_of("llava")
    batch = prepared(lens, ASKED, [0])
    read = interp.Read("pattern", layers=(1,), positions="last", reduce="head_mean")
    attention = lens.run(batch, read).values[read, 1][0, 0][batch.image_mask[0]]
    for epsilon in (1e-3, 0.5):
        found = relative_attention(lens, batch, general=batch, layer=1, epsilon=epsilon)
        expected = attention / (attention + epsilon * attention.mean())
        torch.testing.assert_close(found.scores[0, 0, batch.image_mask[0]], expected)
        assert found.settings["epsilon"] == epsilon
        assert found.settings["general"] == list(batch.texts)


def test_fine_detail_is_scipys():
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, 30, 20), (1, 8, 9), (3, 33, 33)):
        pixels = torch.rand(2, *shape, generator=draw)
        pixels[:, :, : shape[1] // 2] *= 0.1
        found = fine_detail(pixels)
        assert found.numpy().tolist() == [plain_detail(p).tolist() for p in pixels]
        assert 0 < found.float().mean() <= 0.5


def test_half_depth_is_the_default_and_nothing_above_is_run():
    lens = lens_of("scenes")
    pictures = [scenes.scene("test", 0).image]
    asked = lens.prepare([f"<image> {scenes.existence('cow')}"], images=pictures)
    general = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"], images=pictures)
    relative_attention(lens, asked, general=general)  # the model's parts are found on the first batch with images
    ran, stack = [], lens.model.get_decoder().layers
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(stack)]
    found = relative_attention(lens, asked, general=general)
    for handle in handles:
        handle.remove()
    assert found.settings["layer"] == 3
    assert len(lens.anatomy.towers["text"].layers) == len(stack) == 6
    assert sorted(ran) == [0, 0, 1, 1, 2, 2]  # layer 3 is left once its attention is known
    again = relative_attention(lens, asked, general=general, layer=-3)
    assert again.scores.equal(found.scores)
    assert found.image_map().shape == (72, 72)


def test_targets_and_answers():
    lens = lens_of("llava")
    asked, general = prepared(lens, ASKED, [0]), prepared(lens, GENERAL, [0])
    for form in FORMS:
        both = maps(lens, form, asked, general, target=[-4, -1])
        for t, at in enumerate((-4, -1)):
            one = maps(lens, form, asked, general, target=at)
            torch.testing.assert_close(both.scores[:, t : t + 1], one.scores, rtol=1e-4, atol=1e-7)
    for form in FORMS[1:]:
        best = maps(lens, form, asked, general)
        token = int(lens.run(asked, "logits@last").logits.argmax())
        assert maps(lens, form, asked, general, answers=[token]).scores.equal(best.scores)
        assert not maps(lens, form, asked, general, answers=[token - 1]).scores.allclose(best.scores)
    uneven = torch.zeros_like(prepared(lens, ASKED).mask)
    uneven[:, -1], uneven[0, -3] = True, True
    found = relative_attention(lens, prepared(lens, ASKED, side="left"), form="gradient", target=uneven)
    assert found.scores[1:, 1].isnan().all()
    lone = relative_attention(lens, asked, form="gradient", target=[-3, -1])
    torch.testing.assert_close(found.select(0).scores, lone.scores, rtol=1e-4, atol=1e-7)


def test_the_gradient_does_not_stay_on_the_model_or_the_batch():
    lens = lens_of("llava")
    asked, general = prepared(lens, ASKED, [0]), prepared(lens, GENERAL, [0])
    relative_attention(lens, asked, form="pixel_gradient", general=general)
    assert not asked.inputs["pixel_values"].requires_grad
    assert all(p.grad is None for p in lens.model.parameters())


def test_it_points_at_the_object():
    """In a caption, the patch that the gradient's map is largest at lies in the mask of the word to come."""
    lens, hits, chance = lens_of("scenes"), [], []
    for scene in scenes.scenes("test", 6):
        batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT} {scenes.caption(scene.names)}"], images=[scene.image])
        for name in scene.names:
            before = batch.find(f" {name} ").roll(-1, 1)
            found = relative_attention(lens, batch, form="gradient", layer=4, target=before, answers=[name])
            grid, mask = found.image_map().numpy(), scene.mask(name)
            hits.append(mask[grid == grid.max()].mean())
            chance.append(mask.mean())
    assert len(hits) >= 12
    assert np.mean(hits) > 5 * np.mean(chance)


def test_what_is_wrong_is_said():
    lens, llama = lens_of("llava"), lens_of("llama")
    asked, general = prepared(lens, ASKED, [0]), prepared(lens, GENERAL, [0])
    with pytest.raises(UnknownNameError, match=r"form 'rel-att'.*relative, gradient, pixel_gradient"):
        relative_attention(lens, asked, general=general, form="rel-att")
    for form in ("relative", "pixel_gradient"):
        with pytest.raises(SettingsError, match="needs a general instruction"):
            relative_attention(lens, asked, form=form)
    with pytest.raises(SettingsError, match="takes no general"):
        relative_attention(lens, asked, form="gradient", general=general)
    with pytest.raises(SettingsError, match="leave layer out"):
        relative_attention(lens, asked, form="pixel_gradient", general=general, layer=1)
    with pytest.raises(SettingsError, match="knows nothing of answers"):
        relative_attention(lens, asked, general=general, answers=[70])
    for epsilon in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="epsilon is a number above zero"):
            relative_attention(lens, asked, general=general, epsilon=epsilon)
    with pytest.raises(UnknownNameError, match="layer 9"):
        relative_attention(lens, asked, general=general, layer=9)
    with pytest.raises(InputError, match="no image tokens"):
        relative_attention(llama, llama.prepare(["a b"]), form="gradient")
    with pytest.raises(InputError, match="no image tokens"):
        relative_attention(lens, asked, general=lens.prepare(["a b"]))
    with pytest.raises(InputError, match="general holds 2 samples for 1 questions"):
        relative_attention(lens, asked, general=prepared(lens, GENERAL, [0, 2]))
    with pytest.raises(InputError, match=r"same images in the same order: its pixel_values differs"):
        relative_attention(lens, asked, general=prepared(lens, GENERAL, [2]))
    with pytest.raises(InputError, match=r"general has \[32\] image tokens in its samples, the questions have \[16\]"):
        relative_attention(lens, asked, general=prepared(lens, GENERAL, [1]))
    crossed = lens_of("mllama")
    with pytest.raises(InputError, match="through cross-attention"):
        relative_attention(crossed, crossed.prepare(**inputs("mllama")), form="gradient")
    bare = lens.prepare(**inputs("llava"))
    with pytest.raises(InputError, match="needs to know where the image tokens look"):
        relative_attention(lens, bare, form="pixel_gradient", general=bare)
    assert relative_attention(lens, bare, general=bare).patches is None


def test_a_layer_that_cannot_see_the_image_is_named():
    """Gemma's window is four tokens here: with enough words behind the image nothing is left to divide by."""
    lens = lens_of("gemma3_vl")
    asked, general = prepared(lens, ASKED, [0]), prepared(lens, GENERAL, [0])
    with pytest.raises(UnsupportedError, match=r"no attention in layer 0 \(a sliding window"):
        relative_attention(lens, asked, general=general, layer=0)
