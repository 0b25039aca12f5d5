"""Images left out, and the divergence of heads that follows: exact cases, independent formulas, every family."""

import inspect

import numpy as np
import pytest
import torch
import transformers

import interp
from interp import heads
from interp.data import scenes
from interp.errors import InputError, UnknownNameError, UnsupportedError
from interp.heads.vision_divergence import divergence, outlying
from interp.without_image import MODES, image_columns, without_image
from tests.zoo import build, inputs, processor
from tests.zoo._images import image, images
from tests.zoo._processors import IMAGE_TEXT

# Families whose layers all see the whole text: cutting an image out and hiding it is the same there.
ROTARY = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
ROTARY += ["internvl", "smolvlm", "paligemma", "mistral3"]
WINDOWS = ["gemma3_vl", "aya_vision"]
SIZES = [(60, 30), (40, 40), (32, 64)]


def wrapped(name, **options):
    given = inputs(name, **options)
    lens = interp.wrap(build(name), None if name == "mistral3" else processor(name), name=name, sample=given)
    for config in (lens.model.config, lens.model.config.get_text_config()):
        config.pad_token_id = 0  # some tiny configurations keep the id of the large vocabulary
    return lens, lens.prepare(**given)


@pytest.fixture(scope="module")
def llava():
    return wrapped("llava")


@pytest.fixture(scope="module")
def small():
    return interp.load("scenes")


def prompts(lens, texts, seed=0):
    return lens.prepare(texts, images(len(texts), SIZES, seed))


@pytest.mark.parametrize("name", [*ROTARY, *WINDOWS])
def test_cut_out_at_the_same_positions_is_hidden(name):
    """Every head of every layer, at every position that stays: two ways of computing the same function."""
    lens, batch = wrapped(name)
    kept = without_image(lens, batch, "drop_keep_positions")
    hidden = without_image(lens, batch, "mask")
    columns = batch.mask & ~image_columns(lens, batch)
    one = lens.run(kept.batch, interp.Read("z", positions=kept.columns(columns)))
    two = lens.run(hidden.batch, interp.Read("z", positions=columns), hidden.edits)
    if name not in WINDOWS:
        for layer in range(len(lens.anatomy.towers["text"].layers)):
            torch.testing.assert_close(one["z", layer], two["z", layer], atol=2e-6, rtol=1e-4)
        return
    # Windows count columns, and what is cut out takes no room in them: the same only where no window reaches it.
    torch.testing.assert_close(one["z", 0][:, -1], two["z", 0][:, -1], atol=2e-6, rtol=1e-4)
    assert (one["z", 0] - two["z", 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma"])
def test_a_shift_of_the_whole_text_changes_nothing(name):
    """Rotary heads see distances: with no text in front of the image, `drop` is `mask`; with some, it is not."""
    lens, _ = wrapped(name)
    place = IMAGE_TEXT.get(name, "<image>")
    for text, same in ((place + "abcdefg", True), ("xy" + place + "abcdefg", False)):
        if name == "paligemma" and not same:
            continue  # its image always comes first
        batch = prompts(lens, [text])
        drop, mask = (heads.vision_divergence(lens, batch, without=m).scores for m in ("drop", "mask"))
        assert torch.allclose(drop, mask, atol=1e-5) == same
        assert drop.min() > 1e-2


def test_three_positions_are_kept():
    lens, batch = wrapped("qwen2_vl")
    blind = without_image(lens, batch, "drop_keep_positions")
    given = {k: batch.inputs[k] for k in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")}
    wanted, _ = lens.model.model.get_rope_index(**given)
    kept = batch.mask & ~image_columns(lens, batch)
    for i in range(len(batch)):
        found = blind.batch.inputs["position_ids"][:, i, blind.batch.mask[i]]
        assert torch.equal(found, wanted[:, i, kept[i]])
    last = wanted[:, 0, kept[0]][:, -1]
    assert (last > kept[0].sum()).all()


CUT = [
    ("llava", "ab<image>cd", []),
    ("llava", "<|im_start|><image>cd<|im_end|>", []),
    ("qwen2_vl", "ab<|vision_start|><|image_pad|><|vision_end|>cd", ["<|vision_end|>", "<|vision_start|>"]),
    ("internvl", "ab<IMG_CONTEXT>cd", ["</img>", "<img>"]),
    ("smolvlm", "ab<image>cd", None),
    ("idefics3", "ab<image>cd", None),
    ("aya_vision", "ab<image>cd", None),
    ("gemma3_vl", "ab<start_of_image>cd", ["<end_of_image>", "<start_of_image>"]),
    ("paligemma", "<image>cd", []),
]


@pytest.mark.parametrize(("name", "text", "frames"), CUT)
def test_what_is_cut_out(name, text, frames):
    """Image tokens, tile names, row breaks and frames go; words, line ends and marks of turns stay."""
    lens, _ = wrapped(name)
    batch = prompts(lens, [text])
    blind = without_image(lens, batch)
    left = lens.processor.tokenizer.decode(blind.batch.inputs["input_ids"][0])
    wanted = {"gemma3_vl": "ab\n\n\n\ncd", "paligemma": "<bos>cd\n"}
    assert left == wanted.get(name, text.replace("<image>", "") if name == "llava" else "abcd")
    assert blind.settings["image_tokens"] == int(batch.image_mask.sum())
    assert frames is None or blind.settings["frames"] == frames
    assert not any(k.startswith(("pixel", "image")) for k in blind.batch.inputs)
    assert blind.batch.image_mask is None


def test_a_marked_column_is_found_again(llava):
    lens, _ = llava
    batch = prompts(lens, ["ab<image>cde", "<image>f"])
    blind = without_image(lens, batch)
    names = np.array(batch.tokens)
    ids = lens.processor.tokenizer.convert_ids_to_tokens
    for word in "cde":
        column = torch.from_numpy((names == word) & np.array([[True], [False]]))
        found = blind.columns(column).nonzero().tolist()
        assert len(found) == 1
        assert ids(int(blind.batch.inputs["input_ids"][0, found[0][1]])) == word
    # The last image token of the first prompt becomes what stands before the image; nothing does in the second.
    ends = batch.image_mask & ~batch.image_mask.roll(-1, 1)
    only = ends & torch.tensor([[True], [False]])
    row, column = blind.columns(only).nonzero()[0].tolist()
    assert (row, ids(int(blind.batch.inputs["input_ids"][row, column]))) == (0, "b")
    with pytest.raises(InputError, match="sample 1: nothing but the image"):
        blind.columns(ends)
    with pytest.raises(InputError, match="cut out"):
        blind.columns(batch.image_mask & torch.tensor([[True], [False]]))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "internvl", "smolvlm", "gemma3_vl", "mllama"])
def test_other_pixels(name):
    lens, batch = wrapped(name, batch=3)
    pixels = batch.inputs["pixel_values"]
    made = {m: without_image(lens, batch, m).batch.inputs["pixel_values"] for m in ("zero", "mean", "noise")}
    for mode, new in made.items():
        assert new.shape == pixels.shape
        blocks = pixels.flatten(-3).any(-1) if pixels.ndim > 2 else pixels.any(-1)
        again = new.flatten(-3).any(-1) if pixels.ndim > 2 else new.any(-1)
        assert torch.equal(blocks, again), mode  # padding stays padding, and nothing else becomes it
    assert made["zero"].abs().max() < 1e-30
    real = made["noise"][made["noise"] != 0]
    assert abs(float(real.mean())) < 0.1
    assert abs(float(real.std()) - 1) < 0.1
    if name == "qwen2_vl":
        start = 0
        for count in batch.inputs["image_grid_thw"].prod(1).tolist():
            rows = slice(start, start + count)
            patches, flat = pixels[rows].reshape(count, 3, -1), made["mean"][rows].reshape(count, 3, -1)
            torch.testing.assert_close(flat, patches.mean((0, 2), keepdim=True)[:, :, :1].expand_as(flat))
            start += count
    elif name == "llava":
        torch.testing.assert_close(made["mean"], pixels.mean((2, 3), keepdim=True).expand_as(pixels))
    elif name == "llava_next":
        for row, old in zip(made["mean"], pixels, strict=True):
            tiles = old.flatten(1).any(1)
            mean = old[tiles].mean((0, 2, 3))
            torch.testing.assert_close(row[tiles], mean[None, :, None, None].expand_as(row[tiles]))


def plain_outputs(model, given):
    """Head outputs at the last position by hooks of our own on the output projections."""
    found, hooks = [], []
    for layer in model.model.language_model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0][:, -1])))
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).unflatten(-1, (4, -1))


def test_divergence_is_what_two_plain_runs_say(llava):
    lens, batch = llava
    ids, pixels = batch.inputs["input_ids"], batch.inputs["pixel_values"]
    seen = plain_outputs(lens.model, {"input_ids": ids, "pixel_values": pixels})
    text = torch.stack([row[row != lens.model.config.image_token_id] for row in ids])
    unseen = plain_outputs(lens.model, {"input_ids": text})
    found = heads.vision_divergence(lens, batch)
    torch.testing.assert_close(found.per_prompt, (seen - unseen).norm(dim=-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.scores, found.per_prompt.mean(0))
    torch.testing.assert_close(found.extra["seen"], seen.norm(dim=-1).mean(0))
    torch.testing.assert_close(found.extra["unseen"], unseen.norm(dim=-1).mean(0))
    assert found.settings["without"] == "drop"
    assert found.settings["image_tokens"] == int(batch.image_mask.sum())
    relative = heads.vision_divergence(lens, batch, form="relative").per_prompt
    wanted = (seen - unseen).norm(dim=-1) * 2 / (seen.norm(dim=-1) + unseen.norm(dim=-1))
    torch.testing.assert_close(relative, wanted, atol=1e-6, rtol=1e-5)
    cosine = heads.vision_divergence(lens, batch, form="cosine").per_prompt
    torch.testing.assert_close(cosine, 1 - torch.cosine_similarity(seen, unseen, dim=-1), atol=1e-5, rtol=1e-4)
    projected = heads.vision_divergence(lens, batch, form="projected").per_prompt
    for i, layer in enumerate(lens.model.model.language_model.layers):
        weight = layer.self_attn.o_proj.weight.T.unflatten(0, (4, -1))
        wanted = torch.einsum("bhd,hdm->bhm", (seen - unseen)[:, i], weight).norm(dim=-1)
        torch.testing.assert_close(projected[:, i], wanted, atol=1e-6, rtol=1e-5)


def test_no_attention_weights_are_computed(monkeypatch):
    """The model keeps its fused attention in both runs; the plain one is never called."""
    given = inputs("llava")
    lens = interp.wrap(build("llava", attn_implementation="sdpa"), processor("llava"), sample=given)
    batch = lens.prepare(**given)
    eager = heads.vision_divergence(interp.wrap(build("llava", attn_implementation="eager"), sample=given), batch)

    def refuse(*args, **kwargs):
        raise AssertionError("attention weights were computed")

    from transformers.models.llama import modeling_llama

    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", refuse)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    monkeypatch.setattr(torch.Tensor, "softmax", refuse)
    monkeypatch.setattr(torch.nn.functional, "softmax", refuse)
    found = heads.vision_divergence(lens, batch)
    assert len(calls) >= 6
    assert lens.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found.per_prompt, eager.per_prompt, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["zero", "mean", "noise"])
def test_pictures_that_all_look_alike_make_no_divergence(mode):
    lens, batch = wrapped("llava")
    with torch.no_grad():
        for parameter in lens.model.model.multi_modal_projector.parameters():
            parameter.zero_()
    for form in ("absolute", "relative", "cosine", "projected"):
        found = heads.vision_divergence(lens, batch, without=mode, form=form)
        assert not found.scores.any()
        assert not found.extra["outlier"].any()


@pytest.mark.parametrize("mode", ["drop", "drop_keep_positions", "mask", "noise"])
def test_a_prompt_without_an_image_has_no_divergence(llava, mode):
    lens, batch = llava
    ids = batch.inputs["input_ids"]
    text = [[70 + i for i in range(7)]]
    both = lens.prepare(
        input_ids=[ids[0].tolist(), *text], pixel_values=batch.inputs["pixel_values"][:1], padding_side="left"
    )
    found = heads.vision_divergence(lens, both, without=mode).per_prompt
    assert found[0].min() > 1e-2
    torch.testing.assert_close(found[1], torch.zeros(3, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm", "gemma3_vl"])
def test_a_batch_is_its_prompts(name):
    """Prompts and pictures of unequal sizes, padded together; right padding too."""
    lens, _ = wrapped(name)
    place = IMAGE_TEXT.get(name, "<image>")
    texts = [f"ab{place}cdefgh", f"a{place}c", f"{place}what is it"]
    pictures = images(3, SIZES, 1)
    batch = lens.prepare(texts, pictures)
    right = lens.prepare(texts, pictures, padding_side="right")
    for mode in MODES:
        together = heads.vision_divergence(lens, batch, without=mode).per_prompt
        for i in range(3):
            alone = heads.vision_divergence(lens, lens.prepare([texts[i]], [pictures[i]]), without=mode)
            torch.testing.assert_close(together[i], alone.per_prompt[0], atol=5e-6, rtol=1e-4)
        again = heads.vision_divergence(lens, right, without=mode).per_prompt
        torch.testing.assert_close(together, again, atol=5e-6, rtol=1e-4)


def test_forms_by_hand():
    one = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    two = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert divergence(one, two, "absolute").tolist() == pytest.approx([0, 0, 2**0.5, 2])
    assert divergence(one, two, "relative").tolist() == pytest.approx([0, 0, 2**0.5, 2])
    assert divergence(one, two, "cosine").tolist() == pytest.approx([0, 0, 1, 1])
    assert divergence(one, -one, "cosine").tolist() == pytest.approx([2, 0, 2, 2])
    assert divergence(one.half(), two.half(), "absolute").dtype == torch.float32


def test_outliers_by_hand():
    """Both numbers have to stand out among the heads of the layer."""
    high, flat = torch.tensor([9.0, 1.0, 1.0, 1.0]), torch.ones(4)  # mean 3, deviation 3.46
    assert outlying(high, high).tolist() == [True, False, False, False]
    assert not outlying(high, flat).any()
    assert not outlying(flat, high).any()
    assert not outlying(high, high.flip(0)).any()
    between = torch.tensor([1.0, 1.0, 0.6, 0.0, 0.0])  # mean 0.52, deviation 0.449 or, unbiased, 0.502
    assert outlying(between, between).tolist() == [True, True, False, False, False]
    assert not outlying(between, between, unbiased=True).any()
    bound = torch.tensor([4.0, 0.0])  # mean 2, deviation 2: at the bound is not above it
    assert not outlying(bound, bound).any()
    assert not outlying(torch.ones(3, 1), torch.ones(3, 1), unbiased=True).any()
    rows = outlying(torch.stack([high, flat]), torch.stack([high, high]))
    assert rows.tolist() == [[True, False, False, False], [False] * 4]


def test_the_rule_on_outliers_in_a_model(small):
    batch = small.prepare(["<image> describe the image ."] * 6, [scenes.scene("test", i).image for i in range(6)])
    plain = heads.vision_divergence(small, batch)
    ruled = heads.vision_divergence(small, batch, outliers="biased")
    unseen = small.run((blind := without_image(small, batch)).batch, "z@last", blind.edits)
    squared = torch.stack([unseen["z", i][:, 0] for i in range(6)], 1).square().sum(-1)
    wanted = plain.per_prompt.clone()
    count = 0
    for i in range(6):
        for layer in range(6):
            row, power = plain.per_prompt[i, layer].numpy(), squared[i, layer].numpy()
            out = (row > row.mean() + row.std()) & (power > power.mean() + power.std())
            wanted[i, layer, torch.from_numpy(out)] = 0.0
            count += int(out.sum())
    assert count > 0
    torch.testing.assert_close(ruled.per_prompt, wanted)
    torch.testing.assert_close(plain.extra["outlier"], (wanted == 0).float().mean(0))
    assert ruled.settings["outliers"] == "biased"


def test_images_seen_through_cross_attention():
    """Cut out, the image's word goes as well; hidden, its queries would have nothing to look at."""
    lens, batch = wrapped("mllama")
    ids = batch.inputs["input_ids"]
    found = heads.vision_divergence(lens, batch)
    text = torch.stack([row[row != lens.model.config.image_token_index] for row in ids])
    alone = lens.run(lens.prepare(input_ids=text), "z@last")
    seen = lens.run(batch, "z@last")
    for layer in (0, 2):
        wanted = (seen["z", layer] - alone["z", layer]).norm(dim=-1)[:, 0]
        torch.testing.assert_close(found.per_prompt[:, layer], wanted, atol=1e-6, rtol=1e-5)
    assert found.scores[[1, 3]].isnan().all()
    with pytest.raises(UnsupportedError, match="cross-attention"):
        heads.vision_divergence(lens, batch, without="mask")


def test_what_cannot_be_compared_is_an_error(llava):
    lens, batch = llava
    text = interp.wrap(build("llama"), processor("llama"), name="llama")
    with pytest.raises(UnsupportedError, match="llama takes no images"):
        heads.vision_divergence(text, text.prepare(["The cat"]))
    with pytest.raises(InputError, match="holds no images"):
        heads.vision_divergence(lens, lens.prepare(input_ids=[[70, 71]]))
    vision = interp.wrap(build("dinov2"), processor("dinov2"))
    with pytest.raises(UnsupportedError, match="nothing but images"):
        heads.vision_divergence(vision, vision.prepare(images=[image(32, 32, 0)]))
    with pytest.raises(InputError, match="sample 0 is nothing but its image"):
        heads.vision_divergence(lens, prompts(lens, ["<image>"]))
    with pytest.raises(UnknownNameError, match="Did you mean 'mask'"):
        inspect.unwrap(heads.vision_divergence)(lens, batch, without="masks")
    for option, value in (("form", "squared"), ("outliers", "drop")):
        with pytest.raises(UnknownNameError, match=value):
            inspect.unwrap(heads.vision_divergence)(lens, batch, **{option: value})


def test_trained_heads_differ_more_than_untrained_ones(small):
    """A few heads carry the picture: the divergence is unequal in the trained model, nearly even in a random one."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(interp.models.folder("scenes"))
    fresh = transformers.LlavaForConditionalGeneration(config).float().eval()
    pictures = [scenes.scene("test", i).image for i in range(8)]
    found = {}
    for lens in (small, interp.wrap(fresh, small.processor, name="fresh")):
        batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * 8, pictures)
        ordered = heads.vision_divergence(lens, batch, form="relative").scores.flatten().sort().values.double()
        n = len(ordered)
        gini = 2 * (torch.arange(1, n + 1) * ordered).sum() / (n * ordered.sum()) - (n + 1) / n
        found[lens.name] = float(gini)
    assert found["scenes"] > 2 * found["fresh"]
