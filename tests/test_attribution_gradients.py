"""Input gradients, gradient times input and integrated gradients against plain autograd."""

from functools import cache

import pytest
import torch

import interp
from interp.attribution import gradient_x_input, input_gradient, integrated_gradients
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from tests import zoo

METHODS = [input_gradient, gradient_x_input, integrated_gradients]


@cache
def lens_of(name):
    return interp.wrap(zoo.build(name), zoo.processor(name), name=name)


def vectors_of(model, ids):
    return model.get_input_embeddings()(ids).detach()


def plain(model, vectors, mask, at, answers, measure="logit", name="inputs_embeds", **more):
    """The number of each sample, as a plain function of the input vectors."""
    logits = model(**{name: vectors}, attention_mask=mask, **more).logits[torch.arange(len(at)), at]
    logits = {"logit": lambda x: x, "probability": lambda x: x.softmax(-1), "logprob": lambda x: x.log_softmax(-1)}[
        measure
    ](logits)
    return logits[torch.arange(len(at)), answers]


def gradient_at(vectors, function):
    vectors = vectors.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(vectors).sum(), vectors)
    return found


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("measure", ["logit", "probability", "logprob"])
def test_gradients_equal_autograd(name, measure):
    inputs = zoo.inputs(name, batch=2, length=7)
    lens, model = lens_of(name), zoo.build(name)
    batch = lens.prepare(**inputs)
    segments = {k: v for k, v in inputs.items() if k == "token_type_ids"}
    at, answers = torch.tensor([[2, 6], [4, 5]]), torch.tensor([[70, 71], [72, 73]])
    asked = {"target": at, "answers": answers, "measure": measure}
    x = vectors_of(model, inputs["input_ids"])
    l2, l1 = input_gradient(lens, batch, **asked).scores, input_gradient(lens, batch, **asked, norm="l1").scores
    total, product = input_gradient(lens, batch, **asked, norm="sum").scores, gradient_x_input(lens, batch, **asked)
    for t in range(2):
        where, what = at[:, t], answers[:, t]
        g = gradient_at(
            x,
            lambda v, where=where, what=what: plain(
                model, v, inputs["attention_mask"], where, what, measure, **segments
            ),
        )
        scale = (g**2).sum(-1).sqrt().max()
        near = {"rtol": 1e-4, "atol": float(1e-5 * scale)}
        torch.testing.assert_close(l2[:, t], (g**2).sum(-1).sqrt(), **near)
        torch.testing.assert_close(l1[:, t], g.abs().sum(-1), **near)
        torch.testing.assert_close(total[:, t], g.sum(-1), **near)
        torch.testing.assert_close(product.scores[:, t], (g * x).sum(-1), **near)
        assert scale > 0
    assert product.settings["site"] == "embed"


@pytest.mark.parametrize(
    ("name", "baseline"),
    [("gpt2", "zero"), ("llama", "pad"), ("llama", "mean"), ("llama", "vector"), ("llama", "all")],
)
def test_integrated_gradients_equal_a_fine_sum(name, baseline):
    """Against the paper's sum of equal steps, of which 2,000 are taken here."""
    inputs = zoo.inputs(name, batch=1, length=5)
    lens, model = lens_of(name), zoo.build(name)
    x = vectors_of(model, inputs["input_ids"])
    draw = torch.Generator().manual_seed(0)
    start = {
        "zero": torch.zeros_like(x),
        "pad": model.get_input_embeddings().weight[0].detach().expand_as(x),
        "mean": x.mean(1, keepdim=True).expand_as(x),
        "vector": torch.randn(32, generator=draw).expand_as(x),
        "all": torch.randn(x.shape, generator=draw),
    }[baseline]
    given = {"vector": start[0, 0], "all": start}.get(baseline, baseline)
    got = integrated_gradients(lens, lens.prepare(**inputs), answers=[70], baseline=given, steps=48)
    n = 2000
    points = ((torch.arange(n) + 0.5) / n)[:, None, None]
    path = start + points * (x - start)
    mask, at, answer = torch.ones(n, 5).long(), torch.full((n,), 4), torch.full((n,), 70)
    mean = gradient_at(path, lambda v: plain(model, v, mask, at, answer)).mean(0)
    expected = ((x - start)[0] * mean).sum(-1)
    torch.testing.assert_close(got.scores[0, 0], expected, rtol=1e-2, atol=float(5e-3 * expected.abs().max()))
    ends = torch.cat([x, start])
    high, low = plain(model, ends, mask[:2], at[:2], answer[:2]).tolist()
    difference = got.settings["difference"][0][0]
    assert difference == pytest.approx(high - low, abs=1e-4)
    assert got.settings["gap"][0][0] == pytest.approx(high - low - float(got.scores.sum()), abs=1e-4)


def test_the_gap_shrinks_with_steps():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=5))
    one, many = (integrated_gradients(lens, batch, answers=[70, 71], baseline="pad", steps=n) for n in (1, 64))
    assert one.caveat.startswith("the scores miss")
    assert not many.caveat
    for i in range(2):
        size = abs(one.settings["difference"][i][0])
        assert abs(many.settings["gap"][i][0]) < 1e-2 * size
        assert abs(one.settings["gap"][i][0]) > 1e-1 * size


def test_zero_is_told_to_be_no_baseline_before_an_rms_norm():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=1, length=5))
    assert integrated_gradients(lens, batch, baseline="zero", steps=64).caveat
    assert not integrated_gradients(lens, batch, steps=32).caveat


def test_from_the_input_to_itself_nothing_is_attributed():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=1, length=5))
    x = lens.run(batch, ["embed"])["embed", -1]
    still = integrated_gradients(lens, batch, baseline=x, steps=2)
    assert still.scores.abs().max() == 0
    assert still.settings["gap"][0][0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_encoder_decoders(tower):
    inputs = zoo.inputs("t5", batch=2, length=7)
    lens, model = lens_of("t5"), zoo.build("t5")
    name = "inputs_embeds" if tower == "encoder" else "decoder_inputs_embeds"
    ids = {"encoder": "input_ids", "decoder": "decoder_input_ids"}
    x = vectors_of(model, inputs[ids[tower]])
    other = {k: v for k, v in inputs.items() if k in ids.values() and k != ids[tower]}
    at, answers = torch.full((2,), inputs["decoder_input_ids"].shape[1] - 1), torch.tensor([70, 71])
    got = gradient_x_input(lens, lens.prepare(**inputs), target=-1, answers=answers, tower=tower)
    g = gradient_at(x, lambda v: plain(model, v, inputs["attention_mask"], at, answers, name=name, **other))
    torch.testing.assert_close(got.scores[:, 0], (g * x).sum(-1), rtol=1e-4, atol=1e-5)
    assert got.tower == tower
    assert got.settings["site"].endswith("resid_pre.0")


def test_vision_transformer():
    """Gradients at the patch embeddings, special tokens in front, against autograd on the model's own encoder."""
    inputs = zoo.inputs("vit", batch=2)
    lens, model = lens_of("vit"), zoo.build("vit")
    kept = {}

    def keep(module, args, out):
        kept["x"] = out.detach().requires_grad_()
        return kept["x"]

    handle = model.vit.embeddings.register_forward_hook(keep)
    logits = model(**inputs).logits
    handle.remove()
    (g,) = torch.autograd.grad(logits[:, 2].sum(), kept["x"])
    got = gradient_x_input(lens, lens.prepare(**inputs), answers=[2, 2])
    torch.testing.assert_close(got.scores[:, 0], (g * kept["x"]).sum(-1).detach(), rtol=1e-4, atol=1e-5)
    assert got.image_map().isfinite().all()


def test_an_lvlm_with_pictures():
    """Image tokens have gradients at the vectors that enter the language tower; its vision tower at its patches."""
    inputs = zoo.inputs("llava", batch=2)
    lens, model = lens_of("llava"), zoo.build("llava")
    batch = lens.prepare(**inputs)
    features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    x = vectors_of(model, inputs["input_ids"])
    image = batch.image_mask
    x[image] = torch.cat(list(features)).detach().reshape(-1, x.shape[-1])
    last = torch.full((2,), x.shape[1] - 1)
    g = gradient_at(x, lambda v: plain(model, v, inputs["attention_mask"], last, torch.tensor([70, 71])))
    got = gradient_x_input(lens, batch, answers=[70, 71])
    torch.testing.assert_close(got.scores[:, 0], (g * x).sum(-1), rtol=1e-4, atol=1e-5)
    assert (got.scores[:, 0][image] != 0).all()
    patches = input_gradient(lens, batch, answers=[70, 71], tower="vision")
    assert patches.scores.shape == (2, 1, 17)
    assert (patches.scores[:, :, 1:] > 0).all()
    assert (patches.tower, patches.target_tower) == ("vision", "text")
    with pytest.raises(SettingsError, match="images are written over it"):
        input_gradient(lens, batch, site="embed")
    with pytest.raises(UnsupportedError, match="reads more than tokens"):
        integrated_gradients(lens, batch, baseline="pad", steps=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("llama", "right"), ("bert", "right"), ("t5", "right")])
def test_batched_is_single_and_padding_changes_nothing(method, name, side):
    lens = lens_of(name)
    rows = [list(range(70, 79)), list(range(90, 95))]
    more = {"decoder_input_ids": torch.tensor([[2, 70, 71], [2, 80, 81]])} if name == "t5" else {}
    options = {"steps": 3, "baseline": "mean"} if method is integrated_gradients else {}
    both = method(lens, lens.prepare(input_ids=rows, **more, padding_side=side), answers=[100, 101], **options)
    for i, row in enumerate(rows):
        alone = lens.prepare(input_ids=[row], **{k: v[i : i + 1] for k, v in more.items()})
        expected = method(lens, alone, answers=[100 + i], **options).scores
        assert expected.abs().max() > 0
        torch.testing.assert_close(both.select(i).scores, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_sees_nothing_of_the_future(method):
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=6))
    options = {"steps": 2} if method is integrated_gradients else {}
    scores = method(lens, batch, target=3, **options).scores
    assert (scores[..., 4:] == 0).all()
    assert (scores[..., :4] != 0).all()


def test_samples_with_fewer_targets():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=6))
    marked = torch.zeros(2, 6, dtype=torch.bool)
    marked[0, 2:5], marked[1, 3] = True, True
    got = input_gradient(lens, batch, target=marked)
    assert got.targets.tolist() == [[2, 3, 4], [3, -1, -1]]
    assert got.scores[1, 1:].isnan().all()
    single = input_gradient(lens, batch, target=3)
    torch.testing.assert_close(got.scores[0, 1], single.scores[0, 0])
    torch.testing.assert_close(got.scores[1, 0], single.scores[1, 0])


def test_what_is_wrong_is_said():
    lens, vit = lens_of("llama"), lens_of("vit")
    batch = lens.prepare(**zoo.inputs("llama", batch=1, length=5))
    with pytest.raises(UnknownNameError, match=r"norm 'l3'.*l2, l1, sum"):
        input_gradient(lens, batch, norm="l3")
    with pytest.raises(UnknownNameError, match=r"measure 'logits'.*logit, probability, logprob"):
        gradient_x_input(lens, batch, measure="logits")
    with pytest.raises(UnknownNameError, match=r"site of the input 'resid_post'.*embed, resid_pre"):
        gradient_x_input(lens, batch, site="resid_post")
    with pytest.raises(SettingsError, match=r"steps .* found 0"):
        integrated_gradients(lens, batch, steps=0)
    with pytest.raises(UnknownNameError, match=r"baseline 'black'.*mean, zero, pad"):
        integrated_gradients(lens, batch, baseline="black")
    with pytest.raises(InputError, match=r"baseline \(7,\) must be finite, of shape \(1, 5, 32\) or \(32,\)"):
        integrated_gradients(lens, batch, baseline=torch.zeros(7))
    with pytest.raises(InputError, match="must be finite"):
        integrated_gradients(lens, batch, baseline=torch.full((32,), torch.nan))
    pictures = vit.prepare(**zoo.inputs("vit", batch=1))
    with pytest.raises(SettingsError, match="site='embed' is not the input"):
        input_gradient(vit, pictures, site="embed")
    with pytest.raises(UnsupportedError, match="'pad'"):
        integrated_gradients(vit, pictures, baseline="pad")
