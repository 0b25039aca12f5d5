"""Blank-out against one plain forward pass for each token."""

from functools import cache

import pytest
import torch

import interp
from interp.attribution import blank_out
from interp.attribution.blanks import blurred
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from tests import zoo

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@cache
def lens_of(name):
    return interp.wrap(zoo.build(name), zoo.processor(name), name=name)


def pictures(count=2):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy() for _ in range(count)]


def naive(model, inputs, target, answer, changed, measure=lambda x: x):
    """The number of the whole less the one of each changed input, one at a time."""
    with torch.no_grad():
        full = measure(model(**inputs).logits[0, target])[answer]
        return torch.stack([full - measure(model(**c).logits[0, t])[answer] for c, t in changed])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_replace_equals_a_loop(name):
    lens, model = lens_of(name), zoo.build(name)
    inputs = zoo.inputs(name, batch=2, length=6)
    got = blank_out(lens, lens.prepare(**inputs), answers=[70, 71], batch_size=5)  # chunks that do not come out even
    assert (got.settings["token"], got.settings["text"]) == ("<mask>", "replace")
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        changed = []
        for c in range(6):
            ids = one["input_ids"].clone()
            ids[0, c] = 4  # <mask>
            changed.append(({**one, "input_ids": ids}, 5))
        torch.testing.assert_close(got.scores[i, 0], naive(model, one, 5, 70 + i, changed), **CLOSE)


def test_measures_answers_and_tokens():
    lens, model = lens_of("llama"), zoo.build("llama")
    inputs = zoo.inputs("llama", batch=1, length=5)
    batch = lens.prepare(**inputs)
    ids = inputs["input_ids"]
    best = int(model(**inputs).logits[0, 4].argmax())
    changed = [({"input_ids": torch.where(torch.arange(5) == c, 0, ids)}, 4) for c in range(5)]
    for measure, f in (("probability", torch.softmax), ("logprob", torch.log_softmax)):
        expected = naive(model, inputs, 4, best, changed, lambda x, f=f: f(x, -1))
        got = blank_out(lens, batch, measure=measure, token=0)
        torch.testing.assert_close(got.scores[0, 0], expected, **CLOSE)
    assert got.unit == "nats"
    torch.testing.assert_close(blank_out(lens, batch, measure="logprob", token="<pad>").scores, got.scores)
    right, other = (blank_out(lens, batch, answers=[a], token=0).scores for a in (70, 80))
    both = blank_out(lens, batch, answers=[70], wrong=[80], token=0).scores
    torch.testing.assert_close(both, right - other, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_drop_equals_the_shorter_prompt(name):
    lens, model = lens_of(name), zoo.build(name)
    inputs = zoo.inputs(name, batch=1, length=6)
    got = blank_out(lens, lens.prepare(**inputs), mode="drop", target=[2, 5], answers=[70])
    for t, target in enumerate((2, 5)):
        changed = []
        for c in range(6):
            keep = [i for i in range(6) if i != c]
            changed.append(({k: v[:, keep] for k, v in inputs.items()}, target - (c <= target) if c != target else 0))
        expected = naive(model, inputs, target, 70, changed)
        expected[target] = 0  # the position to read from cannot go
        torch.testing.assert_close(got.scores[0, t], expected, **CLOSE)


def test_mask_equals_a_mask_given_to_the_model():
    """A 4-D mask of the plain model: the token's own row still sees it, no other does."""
    lens, model = lens_of("llama"), zoo.build("llama")
    ids = zoo.inputs("llama", batch=1, length=6)["input_ids"]
    causal = torch.ones(6, 6).tril().bool()
    changed = []
    for c in range(6):
        allowed = causal.clone()
        allowed[:, c] = False
        allowed[c, c] = True
        changed.append(({"input_ids": ids, "attention_mask": allowed[None, None]}, 5))
    got = blank_out(lens, lens.prepare(input_ids=ids), mode="mask", answers=[70])
    expected = naive(model, {"input_ids": ids}, 5, 70, changed)
    torch.testing.assert_close(got.scores[0, 0], expected, **CLOSE)
    assert (got.scores[0, 0, :5].abs() > 1e-3).all()


def test_encoder_decoders():
    """`mask` of a source token is what a padding mask of it does, to others; here with the naive padding mask.

    The token's own encoder position still sees it, but then nobody reads that position: the same numbers.
    """
    lens, model = lens_of("t5"), zoo.build("t5")
    inputs = zoo.inputs("t5", batch=1, length=6)
    batch, last = lens.prepare(**inputs), inputs["decoder_input_ids"].shape[1] - 1
    changed = {"mask": [], "drop": [], "replace": []}
    for c in range(6):
        keep = [i for i in range(6) if i != c]
        mask, ids = inputs["attention_mask"].clone(), inputs["input_ids"].clone()
        mask[0, c], ids[0, c] = 0, 4
        changed["mask"].append(({**inputs, "attention_mask": mask}, last))
        changed["replace"].append(({**inputs, "input_ids": ids}, last))
        short = {k: inputs[k][:, keep] for k in ("input_ids", "attention_mask")}
        changed["drop"].append(({**inputs, **short}, last))
    for mode, rows in changed.items():
        got = blank_out(lens, batch, mode=mode, answers=[70])
        torch.testing.assert_close(got.scores[0, 0], naive(model, inputs, last, 70, rows), **CLOSE)
        assert got.tower == "encoder"
    decoder = blank_out(lens, batch, mode="drop", answers=[70], tower="decoder")
    ids = inputs["decoder_input_ids"]
    rows = [
        ({**inputs, "decoder_input_ids": ids[:, [i for i in range(last + 1) if i != c]]}, last - 1) for c in range(last)
    ]
    torch.testing.assert_close(decoder.scores[0, 0, :last], naive(model, inputs, last, 70, rows), **CLOSE)
    assert decoder.scores[0, 0, last] == 0


@pytest.mark.parametrize("image", ["mean", "blur"])
def test_patches_of_a_vision_transformer_equal_a_loop(image):
    lens, model = lens_of("vit"), zoo.build("vit")
    inputs = zoo.inputs("vit", batch=2)
    pixels = inputs["pixel_values"]
    got = blank_out(lens, lens.prepare(**inputs), image=image, answers=[2, 2], batch_size=7)
    smooth = blurred(pixels, 4.0) if image == "blur" else pixels.mean((2, 3), keepdim=True).expand_as(pixels)
    with torch.no_grad():
        full = model(pixel_values=pixels).logits[:, 2]
        for row in range(4):
            for col in range(4):
                box = (slice(None), slice(None), slice(8 * row, 8 * row + 8), slice(8 * col, 8 * col + 8))
                new = pixels.clone()
                new[box] = smooth[box]
                expected = full - model(pixel_values=new).logits[:, 2]
                torch.testing.assert_close(got.scores[:, 0, 1 + 4 * row + col], expected, **CLOSE)
    assert got.settings["image"] == image
    assert got.settings["text"] == "mask"  # the class token


def test_blurring():
    """A constant stays, a point spreads with the variance asked for and keeps its sum, and channels do not mix."""
    assert torch.allclose(blurred(torch.full((1, 1, 9, 9), 3.0), 2.0), torch.tensor(3.0))
    point = torch.zeros(1, 2, 41, 41)
    point[0, 0, 20, 20] = 1
    spread = blurred(point, 2.0)
    assert spread[0, 1].abs().max() == 0
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    x = torch.arange(41) - 20.0
    assert float((spread[0, 0].sum(0) * x**2).sum()) == pytest.approx(4, abs=0.02)
    assert float((spread[0, 0].sum(1) * x**2).sum()) == pytest.approx(4, abs=0.02)


def test_masked_patches():
    """A masked patch is one that no other token of the vision tower attends to: the plain model's scores at -inf."""
    lens, model = lens_of("vit"), zoo.build("vit", attn_implementation="eager")
    inputs = zoo.inputs("vit", batch=1)
    got = blank_out(lens, lens.prepare(**inputs), answers=[2])
    column = torch.zeros(17, 17, dtype=torch.bool)
    from transformers.models.vit import modeling_vit

    plain = modeling_vit.eager_attention_forward
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():

        def attention(module, query, key, value, mask, **options):
            return plain(
                module, query, key, value, torch.zeros(17, 17).masked_fill(column, -1e9)[None, None], **options
            )

        patch.setattr(modeling_vit, "eager_attention_forward", attention)
        full = model(**inputs).logits[0, 2]
        for c in range(17):
            column[:] = False
            column[:, c] = True
            column[c, c] = False
            torch.testing.assert_close(got.scores[0, 0, c], full - model(**inputs).logits[0, 2], **CLOSE)
    assert got.scores.abs().min() > 1e-5


def test_an_lvlm_with_pictures():
    """Text tokens one way, image tokens another; pictures of the model's own size, so that a patch is 8 x 8 pixels."""
    lens, model = lens_of("llava"), zoo.build("llava")
    batch = lens.prepare(["ab<image>cd", "x<image>yz ?"], pictures(), padding_side="left")
    inputs = dict(batch.inputs)
    mask = batch.image_mask
    got = {m: blank_out(lens, batch, answers=[70, 71], image=m) for m in ("mask", "mean", "blur")}
    assert got["mean"].settings["image"] == "mean"
    text = got["mask"].spans["text"]
    for other in ("mean", "blur"):
        torch.testing.assert_close(got[other].scores.mT[text], got["mask"].scores.mT[text], **CLOSE)
        assert not torch.allclose(got[other].scores.mT[mask], got["mask"].scores.mT[mask], atol=1e-3)
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        full = model(**inputs).logits[torch.arange(2), -1, torch.tensor([70, 71])]
        for n in (0, 6, 15):
            new = pixels.clone()
            row, col = divmod(n, 4)
            new[:, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] = pixels.mean((2, 3), keepdim=True)
            less = model(**{**inputs, "pixel_values": new}).logits[torch.arange(2), -1, torch.tensor([70, 71])]
            for i in range(2):
                column = int(mask[i].nonzero()[n])
                torch.testing.assert_close(got["mean"].scores[i, 0, column], (full - less)[i], **CLOSE)
    dropped = blank_out(lens, batch, answers=[70, 71], mode="drop")
    assert (dropped.scores[:, 0][got["mask"].spans["text"]] != 0).sum() == int(text.sum()) - 2  # but the targets


@pytest.mark.parametrize("mode", ["replace", "mask", "drop"])
@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "left"), ("llama", "right"), ("bert", "right"), ("roberta", "right"), ("t5", "right")],
)
def test_batched_is_single_and_padding_changes_nothing(mode, name, side):
    lens = lens_of(name)
    rows = [list(range(70, 78)), list(range(90, 95))]
    more = {"decoder_input_ids": torch.tensor([[2, 70, 71], [2, 80, 81]])} if name == "t5" else {}
    both = blank_out(
        lens, lens.prepare(input_ids=rows, **more, padding_side=side), answers=[100, 101], mode=mode, batch_size=6
    )
    for i, row in enumerate(rows):
        alone = lens.prepare(input_ids=[row], **{k: v[i : i + 1] for k, v in more.items()})
        expected = blank_out(lens, alone, answers=[100 + i], mode=mode, batch_size=1).scores
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(both.select(i).scores, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("mode", ["replace", "mask", "drop"])
def test_a_decoder_sees_nothing_of_the_future(mode):
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=6))
    scores = blank_out(lens, batch, target=[1, 3], mode=mode).scores
    assert (scores[:, 0, 2:] == 0).all()
    assert (scores[:, 1, 4:] == 0).all()
    assert (scores[:, 1, :3] != 0).all()
    seen = blank_out(lens_of("bert"), lens_of("bert").prepare(**zoo.inputs("bert", batch=1, length=6)), target=1)
    assert (seen.scores[:, :, 2:] != 0).all()


def test_what_is_wrong_is_said():
    lens, vit, t5 = lens_of("llama"), lens_of("vit"), lens_of("t5")
    batch = lens.prepare(**zoo.inputs("llama", batch=1, length=5))
    with pytest.raises(UnknownNameError, match=r"mode 'erase'.*replace, mask, drop"):
        blank_out(lens, batch, mode="erase")
    with pytest.raises(UnknownNameError, match=r"image mode 'grey'.*mask, mean, blur"):
        blank_out(lens, batch, image="grey")
    with pytest.raises(SettingsError, match="token is for mode='replace'"):
        blank_out(lens, batch, mode="drop", token=1)
    with pytest.raises(SettingsError, match="sigma=2 is for image='blur'"):
        blank_out(lens, batch, sigma=2)
    with pytest.raises(SettingsError, match=r"batch_size .* found 0"):
        blank_out(lens, batch, batch_size=0)
    with pytest.raises(InputError, match=r"token is 320; the vocabulary has 320 \(0 to 319\)"):
        blank_out(lens, batch, token=320)
    with pytest.raises(InputError, match="token 'two' is 3 tokens"):
        blank_out(lens, batch, token="two")
    with pytest.raises(InputError, match="sample 0 is one token"):
        blank_out(lens, lens.prepare(input_ids=[[70]]), mode="drop")
    with pytest.raises(UnsupportedError, match="sources in 'encoder' and 'decoder' of t5, not in 'cross'"):
        blank_out(t5, t5.prepare(**zoo.inputs("t5", batch=1, length=5)), tower="cross")
    with pytest.raises(InputError, match="encoder reads one token"):
        blank_out(t5, t5.prepare(input_ids=[[70]], decoder_input_ids=[[2, 70]]), mode="mask")
    whisper = lens_of("whisper")
    with pytest.raises(UnsupportedError, match="tower 'encoder' of whisper reads no tokens; use mode='mask'"):
        blank_out(whisper, whisper.prepare(**zoo.inputs("whisper", batch=1)))
    llava = lens_of("llava")
    with pytest.raises(UnsupportedError, match="no patch map here; use image='mask'"):
        blank_out(llava, llava.prepare(**zoo.inputs("llava", batch=1)), image="blur")
    assert blank_out(vit, vit.prepare(**zoo.inputs("vit", batch=1)), image="blur", sigma=1.5).settings["sigma"] == 1.5
