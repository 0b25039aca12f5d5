"""Visual heads: the formula by hand, against the model's own attention weights, sinks, masks."""

import math

import numpy as np
import pytest
import torch

import interp
from interp import heads
from interp.data import scenes
from interp.errors import InputError, SettingsError
from interp.heads.visual_concentration import concentrated, mask_shares
from tests.test_heads_vision import SIZES, wrapped
from tests.zoo import build, inputs, processor
from tests.zoo._images import image, images


def test_weight_and_concentration_by_hand():
    seen = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.6, 0.0, 0.0, 0.0], [0.2, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    weight, concentration = concentrated(seen, torch.ones(1, 4, dtype=torch.bool))
    assert weight[0].tolist() == pytest.approx([0.4, 0.6, 0.4, 0.0])
    assert concentration[0].tolist() == pytest.approx([0.0, 1.0, 0.5, 0.0], abs=1e-6)
    weight, concentration = concentrated(seen, torch.tensor([[True, True, False, False]]))
    assert weight[0].tolist() == pytest.approx([0.2, 0.6, 0.4, 0.0])
    assert concentration[0].tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0], abs=1e-6)
    assert not concentrated(seen, torch.tensor([[True, False, False, False]]))[1].any()


def plain_score(attention):
    """w C in plain numbers."""
    if len(attention) < 2:
        return 0.0
    weight = sum(attention)
    entropy = -sum(x / weight * math.log(x / weight) for x in attention if x > 0)
    return weight * (1 - entropy / math.log(len(attention)))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3_vl", "smolvlm"])
def test_against_the_model_s_own_weights(name):
    """Eager attention weights and hidden states of transformers, prompt by prompt, in plain loops."""
    given = inputs(name)
    model = build(name, attn_implementation="eager")
    lens = interp.wrap(model, processor(name), sample=given)
    batch = lens.prepare(**given)
    found = heads.visual_concentration(lens, batch, sink=1.1)
    with torch.no_grad():
        out = model(**batch.inputs, output_attentions=True, output_hidden_states=True)
    sinks, without = 0, torch.zeros(found.scores.shape)
    for i in range(len(batch)):
        columns = batch.image_mask[i].nonzero()[:, 0].tolist()
        for layer, pattern in enumerate(out.attentions):
            sizes = out.hidden_states[layer][i, columns].norm(dim=-1)
            plain = [c for c, s in zip(columns, sizes, strict=True) if not s > 1.1 * sizes.median()]
            sinks += len(columns) - len(plain)
            for head in range(pattern.shape[1]):
                row = pattern[i, head, -1].double()
                score, rest = plain_score(row[columns].tolist()), plain_score(row[plain].tolist())
                assert float(found.per_prompt[i, layer, head]) == pytest.approx(score, abs=1e-5)
                without[layer, head] += rest / len(batch)
    torch.testing.assert_close(found.extra["without_sinks"], without, atol=1e-5, rtol=1e-4)
    assert found.settings["sinks"] == sinks > 0
    weights = torch.stack([p[:, :, -1] for p in out.attentions], 1)
    wanted = (weights * batch.image_mask[:, None, None]).sum(-1).mean(0)
    torch.testing.assert_close(found.extra["weight"], wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.extra["concentration"] * found.extra["weight"], found.scores, atol=1e-6, rtol=1e-4)
    assert (found.extra["sink_weight"] <= found.extra["weight"] + 1e-6).all()


def test_a_planted_sink_is_left_out(monkeypatch):
    """One image token is made huge and looked at alone: all of the score goes with it."""
    lens, batch = wrapped("llava")
    column = int(batch.image_mask[0].nonzero()[3])
    table = batch.image_mask & (torch.arange(batch.mask.shape[1]) == column)
    big = interp.edits.splice(lambda x: x * 50, site="resid_pre", layers=1, positions=table)
    look = interp.edits.splice(
        lambda p: torch.zeros_like(p).index_fill(-1, torch.tensor([column]), 1.0), site="pattern", layers=1
    )
    real = lens.run
    monkeypatch.setattr(lens, "run", lambda batch, reads: real(batch, reads, [big, look]))
    found = heads.visual_concentration(lens, batch)
    there = table.any(1).float().mean()  # the second prompt's image may stand elsewhere
    assert there > 0
    torch.testing.assert_close(found.extra["sink_weight"][1], there.expand(4))
    torch.testing.assert_close(found.extra["without_sinks"][1], torch.zeros(4))
    assert found.settings["sinks"] >= int(table.sum())


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_a_batch_is_its_prompts(name):
    lens, _ = wrapped(name)
    texts, pictures = ["ab<image>cdefgh", "<image>c", "a<image>bcd"], images(3, SIZES, 1)
    together = heads.visual_concentration(lens, lens.prepare(texts, pictures), sink=1.2)
    alone = [
        heads.visual_concentration(lens, lens.prepare([text], [picture]), sink=1.2)
        for text, picture in zip(texts, pictures, strict=True)
    ]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together.per_prompt[i], one.per_prompt[0], atol=1e-6, rtol=1e-4)
    for column in ("weight", "without_sinks", "sink_weight"):
        mean = torch.stack([one.extra[column] for one in alone]).mean(0)
        torch.testing.assert_close(together.extra[column], mean, atol=1e-6, rtol=1e-4)
    assert together.settings["sinks"] == sum(one.settings["sinks"] for one in alone)


def test_shares_of_a_mask_by_hand():
    """A picture of 40 pixels in 4 x 4 tokens: boxes of 10 pixels, in the order of rows."""
    lens, _ = wrapped("llava")
    batch = lens.prepare(["a<image>b", "<image>"], [image(40, 40, 0)] * 2)
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:20, 30:35] = True
    mask[0, 0] = True
    shares = mask_shares(batch, [mask, np.ones((40, 40), dtype=bool)])
    wanted = torch.zeros(16)
    wanted[7], wanted[0] = 0.5, 0.01
    torch.testing.assert_close(shares[0], wanted)
    torch.testing.assert_close(shares[1], torch.ones(16))
    # Boxes that cut pixels: 30 pixels in 4 columns.
    odd = lens.prepare(["<image>"], [image(30, 30, 0)])
    left = odd.patches.box[1, 0].item()
    mask = np.zeros((30, 30), dtype=bool)
    mask[:, 7] = True
    width = odd.patches.box[1, 2].item() - left
    assert mask_shares(odd, [mask])[0, 1].item() == pytest.approx((8 - max(left, 7)) / width, abs=1e-5)


def test_attention_inside_masks():
    lens = interp.load("scenes")
    drawn = [scenes.scene("test", i) for i in range(8)]
    batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * 8, [s.image for s in drawn])
    everything = [np.ones((72, 72), dtype=bool)] * 8
    whole = heads.visual_concentration(lens, batch, masks=everything)
    torch.testing.assert_close(whole.extra["inside"], torch.ones(6, 8), atol=1e-4, rtol=0)
    assert whole.settings["chance"] == pytest.approx(1)
    masks = [np.logical_or.reduce([s.mask(name) for name in s.names]) for s in drawn]
    found = heads.visual_concentration(lens, batch, masks=masks)
    area = np.mean([m.mean() for m in masks])
    assert found.settings["chance"] == pytest.approx(area, abs=1e-4)
    best = found.top(3)
    assert (best["inside"] > 3 * area).all()
    assert "inside" not in heads.visual_concentration(lens, batch).extra


def test_bad_input():
    lens, batch = wrapped("llava")
    for sink in (1.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="above 1"):
            heads.visual_concentration(lens, batch, sink=sink)
    with pytest.raises(InputError, match="where image tokens look"):
        heads.visual_concentration(lens, batch, masks=[np.ones((32, 32), dtype=bool)] * 2)
    made = lens.prepare(["<image>a"], [image(40, 40, 0)])
    with pytest.raises(InputError, match="2 masks were given for 1"):
        heads.visual_concentration(lens, made, masks=[np.ones((40, 40), dtype=bool)] * 2)
    for bad in (np.ones((40, 40)), np.ones((32, 40), dtype=bool)):
        with pytest.raises(InputError, match=r"mask 0 must be bools \[40, 40\]"):
            heads.visual_concentration(lens, made, masks=[bad])
    text = interp.wrap(build("llama"), processor("llama"))
    with pytest.raises(InputError, match="no image tokens"):
        heads.visual_concentration(text, text.prepare(["The cat"]))
    crossed, given = wrapped("mllama")
    with pytest.raises(InputError, match="cross-attention"):
        heads.visual_concentration(crossed, given)
