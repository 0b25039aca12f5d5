"""Batches taken apart: pictures that a processor packed go with the samples that they belong to."""

import dataclasses

import pytest
import torch

import interp
from interp.errors import InputError
from tests.zoo import build, inputs, processor
from tests.zoo._images import image
from tests.zoo._processors import IMAGE_TEXT

SIZES = [(60, 30), (40, 40), (32, 64)]
FAMILIES = ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3_vl", "aya_vision"]


def prompts(name, counts):
    """A batch with so many pictures of unequal sizes to each prompt, and prompts of unequal lengths."""
    lens = interp.wrap(build(name), processor(name), sample=inputs(name))
    pictures = [[image(*SIZES[(i + j) % 3], seed=7 * i + j) for j in range(n)] for i, n in enumerate(counts)]
    token = IMAGE_TEXT.get(name, "<image>")
    texts = ["ab " + token * n + " hello"[: 3 + i] for i, n in enumerate(counts)]
    return lens, lens.prepare(texts, pictures)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("counts", [[2, 1, 1], [2, 0, 1], [0, 2]])
@pytest.mark.parametrize("name", [*FAMILIES, "mllama"])
def test_parts_give_what_the_whole_gives(name, counts):
    """Also where there are as many pictures as prompts, but not one to each; with the patch map, and by sizes alone."""
    lens, batch = prompts(name, counts)
    assert batch.padding == "left"
    whole, maps = lens.run(batch, "logits").logits, batch.patches
    for made in (batch, dataclasses.replace(batch, patches=None)):
        for i in range(len(counts)):
            real = batch.mask[i]
            close(lens.run(made.part(i, i + 1), "logits").logits[0][real], whole[i][real])
            close(lens.run(made[i], "logits").logits[0], whole[i][real])
        some = slice(1, len(counts))
        close(lens.run(made.part(1, len(counts)), "logits").logits[batch.mask[some]], whole[some][batch.mask[some]])
    if maps is not None:
        part = batch.part(1, len(counts))
        mine = maps.sample >= 1
        assert part.patches.sizes == maps.sizes[1:]
        assert torch.equal(part.patches.sample, maps.sample[mine] - 1)
        assert torch.equal(part.patches.box, maps.box[mine])
        assert torch.equal(part.patches.column, maps.column[mine])


def test_what_does_not_say_whose_it_is_is_refused():
    """LLaVA-NeXT's tokens are in no proportion to its tiles; its patch map says how many pictures each prompt has."""
    lens, batch = prompts("llava_next", [2, 0])
    whole = lens.run(batch, "logits").logits
    close(lens.run(batch[1], "logits").logits[0], whole[1][batch.mask[1]])
    bare = dataclasses.replace(batch, patches=None)
    with pytest.raises(InputError, match=r"pixel_values \(2, 5, 3, 32, 32\) is packed over its 2 samples"):
        bare.part(0, 1)
    with pytest.raises(InputError, match="Prepare the samples one by one"):
        lens.estimate(bare, "resid_post")
    packed = dict(batch.inputs) | {"pixel_values": torch.zeros(5, 3, 32, 32)}
    with pytest.raises(InputError, match=r"pixel_values \(5, 3, 32, 32\)"):
        dataclasses.replace(bare, inputs=packed)[0]


def test_columns_of_every_input():
    """A sample alone loses its padding in each input that has columns: of three axes of positions, and of a decoder."""
    given = inputs("qwen2_vl", batch=3)
    lens = interp.wrap(build("qwen2_vl"), sample=given)
    width = given["input_ids"].shape[1]
    given["attention_mask"][0, :2] = 0
    positions = torch.arange(3 * 3 * width).reshape(3, 3, width)
    batch = lens.prepare(**given, position_ids=positions)
    assert torch.equal(batch[0].inputs["position_ids"], positions[:, :1, 2:])
    assert torch.equal(batch.part(1, 3).inputs["position_ids"], positions[:, 1:])
    lens = interp.wrap(build("t5"))
    ids = [[70, 80, 90, 100], [71, 81, 91, 101]]
    batch = lens.prepare(input_ids=ids, decoder_input_ids=[[0, 70, 80, 90], [0, 71]])
    whole = lens.run(batch, "logits").logits
    assert batch[1].inputs["decoder_input_ids"].tolist() == [[0, 71]]
    assert batch[1].inputs["input_ids"].tolist() == [ids[1]]
    close(lens.run(batch[1], "logits").logits[0], whole[1, :2])
