"""Prompts with images, through each family's own processor."""

import numpy as np
import pytest
import torch
from PIL import Image

import interp
from interp.engine.anatomy import relative_error
from interp.errors import InputError, UnsupportedError
from interp.inputs import placeholder
from tests.zoo import ZOO, build, processor

LVLMS = [n for n, e in ZOO.items() if e.kind == "lvlm" and n != "mistral3"]


def picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=LVLMS)
def case(request):
    lens = interp.wrap(build(request.param), processor(request.param), name=request.param)
    return request.param, lens


def prompts(lens):
    token = placeholder(lens.processor)
    texts = [f"{token} What is in the red box?", f"Look: {token} a cat."]
    if "PaliGemma" in type(lens.processor).__name__:
        texts = ["What is in the red box?", "Look: a cat."]
    return texts, [picture(48, 40, 0), picture(40, 56, 1)]


def test_batched_equals_alone_with_left_padding(case):
    name, lens = case
    texts, images = prompts(lens)
    batch = lens.prepare(texts, images=[[x] for x in images])
    assert batch.padding in (None, "left")
    last = len(lens.anatomy.towers["text"].layers) - 1 if lens._anatomy else 2
    trace = lens.run(batch, [f"resid_post.{last}", "logits@last"])
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        one = lens.prepare([text], images=[[image]])
        alone = lens.run(one, [f"resid_post.{last}", "logits@last"])
        mine = trace["resid_post", last][i][batch.mask[i]]
        assert relative_error(mine, alone["resid_post", last][0]) < 1e-5, name
        assert relative_error(trace.logits[i], alone.logits[0]) < 1e-5, name


def test_image_span_is_what_changes_with_the_picture(case):
    """When the picture changes, what enters the first layer changes in the image span and nowhere else."""
    name, lens = case
    texts, images = prompts(lens)
    batch = lens.prepare(texts, images=[[x] for x in images])
    if name == "mllama":
        with pytest.raises(InputError, match="no image tokens"):
            batch.span("image")
        return
    span = batch.span("image")
    assert span.any(1).all()
    other = lens.prepare(texts, images=[[picture(*x.size, 9)] for x in images])
    assert torch.equal(other.span("image"), span)
    read = [interp.Read("resid_pre", layers=0)]
    change = (lens.run(batch, read)["resid_pre", 0] - lens.run(other, read)["resid_pre", 0]).abs().amax(-1) > 0
    breaks = change != span
    # Learned row breaks stand among the image tokens and hold no pixels.
    assert not (change & ~span).any(), name
    assert breaks.float().mean() < 0.1, name
    assert torch.equal(batch.span("text"), batch.mask & ~span)


def test_find_counts_characters_of_the_prompt(case):
    name, lens = case
    texts, images = prompts(lens)
    batch = lens.prepare(texts, images=[[x] for x in images])
    assert batch.tokens is not None
    with pytest.raises(InputError, match="sample 1 holds 'red' 0 times"):
        batch.find("red")
    found = batch.find("a")
    for i, word in enumerate(["What", "cat"]):
        row = lens.prepare([texts[i]], images=[[images[i]]])
        hit = row.find(word)[0]
        ids = row.inputs["input_ids"][0][hit]
        assert word in lens.processor.tokenizer.decode(ids).replace(" ", ""), name
        assert not (hit & (row.image_mask[0] if row.image_mask is not None else torch.zeros_like(hit))).any()
    assert found.any(1).all()


def test_several_images_in_one_prompt(case):
    name, lens = case
    token = placeholder(lens.processor)
    if name in ("paligemma",):
        pytest.skip("one image a prompt")
    images = [picture(40, 40, 3), picture(56, 40, 4)]
    text = f"{token} and {token} differ."
    batch = lens.prepare([text, f"{token} alone."], images=[images, images[:1]])
    last = 2
    trace = lens.run(batch, [f"resid_post.{last}"])
    one = lens.prepare([text], images=[images])
    alone = lens.run(one, [f"resid_post.{last}"])["resid_post", last][0]
    assert relative_error(trace["resid_post", last][0][batch.mask[0]], alone) < 1e-5
    if batch.image_mask is not None:
        single = lens.prepare([f"{token} alone."], images=[images[:1]])
        assert int(batch.image_mask[1].sum()) == int(single.image_mask.sum())
        assert int(batch.image_mask[0].sum()) > 0


def test_image_positions_in_reads_and_edits(case):
    name, lens = case
    if name == "mllama":
        pytest.skip("images reach this model through cross-attention")
    texts, images = prompts(lens)
    batch = lens.prepare(texts, images=[[x] for x in images])
    trace = lens.run(batch, ["resid_post.1@image|mean", "resid_post.1"])
    mean = trace.values[interp.Read.of("resid_post.1@image|mean"), 1]
    whole = trace.values[interp.Read.of("resid_post.1"), 1]
    for i in range(2):
        torch.testing.assert_close(mean[i], whole[i][batch.image_mask[i]].mean(0), atol=1e-5, rtol=1e-4)
    try:
        cut = lens.run(
            batch,
            ["pattern.1"],
            interp.edits.mask_attention(layers=1, queries="last", keys="image"),
        )["pattern", 1]
    except interp.errors.EditError:
        # In a sliding window the last token may see nothing else; then the knock-out is refused.
        return
    for i in range(2):
        last = int(batch.mask[i].nonzero()[-1])
        assert cut[i, :, last][:, batch.image_mask[i]].abs().sum() == 0


def test_vision_tower_has_the_same_names(case):
    _name, lens = case
    texts, images = prompts(lens)
    batch = lens.prepare(texts, images=[[x] for x in images])
    reads = ["vision:resid_pre.0", "vision:resid_post.0", "vision:attn_out.0", "vision:mlp_out.0", "vision:pattern.0"]
    trace = lens.run(batch, reads)
    total = trace["vision:resid_pre", 0] + trace["vision:attn_out", 0] + trace["vision:mlp_out", 0]
    torch.testing.assert_close(total, trace["vision:resid_post", 0], atol=1e-4, rtol=1e-4)
    pattern = trace["vision:pattern", 0]
    assert pattern.shape[-1] == trace["vision:resid_pre", 0].shape[1]
    changed = lens.run(batch, ["logits@last"], interp.edits.ablate(tower="vision", layers=0)).logits
    assert (changed - lens.run(batch, ["logits@last"]).logits).abs().max() > 1e-6


def test_windows_come_back_as_one_pattern():
    """Qwen2.5-VL calls its attention once for each window: the blocks stand on the diagonal of one pattern."""
    lens = interp.wrap(build("qwen2_5_vl"), processor("qwen2_5_vl"))
    texts, images = prompts(lens)
    batch = lens.prepare(texts, images=[[x] for x in images])
    trace = lens.run(batch, ["vision:pattern", "vision:v", "vision:z"])
    layers = lens.anatomy.towers["vision"].layers
    sizes = set()
    for layer in range(len(layers)):
        pattern = trace["vision:pattern", layer]
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, trace["vision:v", layer])
        torch.testing.assert_close(mixed, trace["vision:z", layer], atol=1e-5, rtol=1e-4)
        sizes.add(int((pattern[0, 0] > 0).sum()))
    assert len(sizes) > 1, "windowed and full layers look alike"
    with pytest.raises(UnsupportedError, match="window by window"):
        lens.run(batch, ["logits"], interp.edits.mask_attention(tower="vision", layers=0, keys=0))
