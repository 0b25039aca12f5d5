"""Chefer's relevance against autograd on the plain models, and what it promises."""

from functools import cache

import numpy as np
import pytest
import torch

import interp
from interp.attribution import attention_times_gradient, relevance
from interp.attribution.relevance import carried, cross_rule, normalised, self_rule
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from tests import zoo


@cache
def lens_of(name):
    return interp.wrap(zoo.build(name), zoo.processor(name), name=name)


@cache
def eager(name):
    return zoo.build(name, attn_implementation="eager")


def fused(pattern, gradient):
    """The positive part of pattern times gradient, meaned over heads, as a loop."""
    out = torch.zeros(pattern.shape[0], *pattern.shape[2:], dtype=torch.float64)
    for h in range(pattern.shape[1]):
        product = pattern[:, h].detach().double() * gradient[:, h].double()
        out += torch.where(product > 0, product, 0.0) / pattern.shape[1]
    return out


def by_autograd(outputs, names, score):
    """The fused matrices of the modules of each name, from the model's own attentions."""
    found = [(n, a) for n in names for a in outputs[n]]
    gradients = torch.autograd.grad(score.sum(), [a for _, a in found])
    out = {n: [] for n in names}
    for (n, a), g in zip(found, gradients, strict=True):
        out[n].append(fused(a, g))
    return out


def rolled_up(matrices):
    r = torch.eye(matrices[0].shape[-1], dtype=torch.float64).repeat(len(matrices[0]), 1, 1)
    for a in matrices:
        r = r + a @ r
    return r


def close(found, expected):
    """Equal up to float32, measured against the largest score; and the scores are not all zero."""
    expected = torch.as_tensor(expected).double()
    assert expected.abs().max() > 0
    torch.testing.assert_close(
        found.double() / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_equals_autograd_in_text_models(name):
    inputs = zoo.inputs(name, batch=2, length=7)
    at, answers, wrong = torch.tensor([[2, 6], [4, 5]]), [[70, 71], [72, 73]], [[80, 81], [82, 83]]
    lens = lens_of(name)
    got = relevance(lens, lens.prepare(**inputs), target=at, answers=answers, wrong=wrong)
    layer = attention_times_gradient(lens, lens.prepare(**inputs), target=at, answers=answers, wrong=wrong, layer=1)
    rows = torch.arange(2)
    for t in range(2):
        out = eager(name)(**inputs, output_attentions=True)
        logits = out.logits[rows, at[:, t]]
        score = logits[rows, torch.tensor(answers)[:, t]] - logits[rows, torch.tensor(wrong)[:, t]]
        matrices = by_autograd(out, ["attentions"], score)["attentions"]
        expected = rolled_up(matrices)[rows, at[:, t]]
        expected[rows, at[:, t]] -= 1
        close(got.scores[:, t], expected)
        close(layer.scores[:, t], matrices[1][rows, at[:, t]])
    assert torch.equal(got.targets, at)
    assert (got.scores >= 0).all()


def test_equals_autograd_in_a_vision_transformer():
    """The class token is found to be what the logits read; two classes have two maps."""
    inputs = zoo.inputs("vit", batch=2)
    lens = lens_of("vit")
    batch = lens.prepare(**inputs)
    maps = []
    for label in (1, 3):
        got = relevance(lens, batch, answers=[label, label])
        assert got.targets.tolist() == [[0], [0]]
        out = eager("vit")(**inputs, output_attentions=True)
        matrices = by_autograd(out, ["attentions"], out.logits[:, label])["attentions"]
        expected = rolled_up(matrices)[:, 0]
        expected[:, 0] -= 1
        close(got.scores[:, 0], expected)
        maps.append(got.scores[:, 0, 1:])
        assert got.image_map().shape == (32, 32)
    assert not torch.allclose(maps[0], maps[1], rtol=0.1)
    best = eager("vit")(**inputs).logits.argmax(-1)
    assert torch.equal(relevance(lens, batch).scores, relevance(lens, batch, answers=best).scores)
    named = [lens.model.config.id2label[int(i)] for i in best]
    assert torch.equal(relevance(lens, batch, answers=named).scores, relevance(lens, batch, answers=best).scores)


def divided(r):
    """The code's normalisation of R, with its division by zero put right."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype)
    total = (r - eye).sum(-1, keepdim=True)
    return torch.where(total > 1e-12, (r - eye) / total.clamp_min(1e-300), 0.0) + eye


@pytest.mark.parametrize("transpose", [True, False])
def test_equals_autograd_in_an_encoder_decoder(transpose):
    """Whole matrices here, rows there."""
    inputs = zoo.inputs("t5", batch=2, length=7)
    lens = lens_of("t5")
    at, answers, rows = torch.tensor([3, 1]), torch.tensor([70, 90]), torch.arange(2)
    out = eager("t5")(**inputs, output_attentions=True)
    names = ["encoder_attentions", "decoder_attentions", "cross_attentions"]
    found = by_autograd(out, names, out.logits[rows, at, answers])
    r_ii = rolled_up(found[names[0]])
    r_qq = rolled_up([torch.zeros_like(found[names[1]][0])])
    r_qi = torch.zeros_like(found[names[2]][0])
    for own, cross in zip(found[names[1]], found[names[2]], strict=True):
        r_qq, r_qi = r_qq + own @ r_qq, r_qi + own @ r_qi
        left = divided(r_qq)
        r_qi = r_qi + (left.mT if transpose else left) @ cross @ divided(r_ii)
    batch = lens.prepare(**inputs)
    asked = {"target": at[:, None], "answers": answers, "transpose": transpose}
    got = relevance(lens, batch, **asked)
    close(got.scores[:, 0], r_qi[rows, at])
    assert (got.tower, got.target_tower) == ("encoder", "decoder")
    split = relevance(lens, batch, **asked, memory=0)  # one layer at a time
    torch.testing.assert_close(split.scores, got.scores)
    own = r_qq[rows, at]
    own[rows, at] -= 1
    close(relevance(lens, batch, **asked, tower="decoder").scores[:, 0], own)
    layer = attention_times_gradient(lens, batch, target=at[:, None], answers=answers, tower="cross")
    close(layer.scores[:, 0], found[names[2]][-1][rows, at])


def test_rows_equal_whole_matrices():
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.rand(3, 6, 6, generator=draw, dtype=torch.float64) for _ in range(4)]
    whole = torch.eye(6, dtype=torch.float64).repeat(3, 1, 1)
    for a in matrices:
        whole, _ = self_rule(a, whole, whole)
    start = torch.eye(6, dtype=torch.float64)[None, [2, 5]].repeat(3, 1, 1)
    row = torch.zeros_like(start)
    for a in reversed(matrices):
        row = carried(row, start, a)
    torch.testing.assert_close(row + start, whole[:, [2, 5]])


def attend(x, y, wq, wk, wv, kept):
    pattern = torch.softmax((x @ wq) @ (y @ wk).T, -1)
    pattern.retain_grad()
    kept.append(pattern)
    return x + pattern @ (y @ wv)


def test_the_rules_on_a_co_attention_toy():
    """Two streams as in LXMERT: self-attention in both, co-attention both ways, self-attention of the text.

    The expected relevance is written out element by element from equations 5 to 10.
    """
    draw = torch.Generator().manual_seed(1)

    def weights(n):
        return [torch.randn(4, 4, generator=draw, dtype=torch.float64) / 2 for _ in range(n)]

    text = torch.randn(3, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    image = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    kept = []
    t, i = attend(text, text, *weights(3), kept), attend(image, image, *weights(3), kept)
    one, two = weights(3), weights(3)
    t, i = attend(t, i, *one, kept), attend(i, t, *two, kept)
    t, i = attend(t, t, *weights(3), kept), attend(i, i, *weights(3), kept)
    t = attend(t, i, *weights(3), kept)
    (t[0] @ torch.randn(4, generator=draw, dtype=torch.float64)).backward()
    tt, ii, ti, it, tt2, ii2, ti2 = (np.maximum((p * p.grad).detach().numpy(), 0) for p in kept)
    assert all(a.max() > 0 for a in (tt, ii, ti, it, tt2, ii2, ti2))

    def own(a, r):
        return np.array([[r[m, n] + sum(a[m, k] * r[k, n] for k in range(len(r))) for n in range(r.shape[1])]
                         for m in range(len(r))])  # fmt: skip

    def share(r):
        out = np.eye(len(r))
        for m in range(len(r)):
            rest = r[m] - np.eye(len(r))[m]
            if rest.sum() > 1e-15:
                out[m] += rest / rest.sum()
        return out

    r_tt, r_ii, r_ti, r_it = np.eye(3), np.eye(5), np.zeros((3, 5)), np.zeros((5, 3))
    r_tt, r_ii = own(tt, r_tt), own(ii, r_ii)
    new = (
        r_tt + np.einsum("mk,kn->mn", ti, r_it),
        r_ii + np.einsum("mk,kn->mn", it, r_ti),
        r_ti + np.einsum("km,kl,ln->mn", share(r_tt), ti, share(r_ii)),
        r_it + np.einsum("km,kl,ln->mn", share(r_ii), it, share(r_tt)),
    )
    r_tt, r_ii, r_ti, r_it = new
    r_tt, r_ti, r_ii, r_it = own(tt2, r_tt), own(tt2, r_ti), own(ii2, r_ii), own(ii2, r_it)
    last_tt = r_tt + np.einsum("mk,kn->mn", ti2, r_it)
    last_ti = r_ti + np.einsum("km,kl,ln->mn", share(r_tt), ti2, share(r_ii))

    tt, ii, ti, it, tt2, ii2, ti2 = map(torch.from_numpy, (tt, ii, ti, it, tt2, ii2, ti2))
    eye_t, eye_i = torch.eye(3, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    s_tt, s_ti = self_rule(tt, eye_t, torch.zeros(3, 5, dtype=torch.float64))
    s_ii, s_it = self_rule(ii, eye_i, torch.zeros(5, 3, dtype=torch.float64))
    (s_tt, s_ti), (s_ii, s_it) = cross_rule(ti, s_tt, s_ti, s_ii, s_it), cross_rule(it, s_ii, s_it, s_tt, s_ti)
    (s_tt, s_ti), (s_ii, s_it) = self_rule(tt2, s_tt, s_ti), self_rule(ii2, s_ii, s_it)
    s_tt, s_ti = cross_rule(ti2, s_tt, s_ti, s_ii, s_it)
    torch.testing.assert_close(s_tt, torch.from_numpy(last_tt))
    torch.testing.assert_close(s_ti, torch.from_numpy(last_ti))


def test_rows_without_positive_gradient_become_the_identity():
    excess = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert normalised(excess).tolist() == [[1.0, 0.0], [0.25, 1.75]]


def test_no_positive_gradient_at_all_gives_zero_and_no_nan():
    """The gradient of a logit minus itself is zero everywhere: so is every row, also those that are divided by sums."""
    for name in ("llama", "t5"):
        lens = lens_of(name)
        batch = lens.prepare(**zoo.inputs(name, batch=1, length=6))
        assert relevance(lens, batch, answers=[70], wrong=[70]).scores.abs().max() == 0


def test_a_decoder_sees_nothing_of_the_future():
    lens = lens_of("llama")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=6))
    scores = relevance(lens, batch, target=3).scores
    assert (scores[..., 4:] == 0).all()
    assert (scores[..., :3] > 0).any()


@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("llama", "right"), ("bert", "right"), ("t5", "right")])
def test_batched_is_single_and_padding_changes_nothing(name, side):
    lens = lens_of(name)
    rows = [list(range(70, 79)), list(range(90, 95))]
    more = {"decoder_input_ids": torch.tensor([[2, 70, 71], [2, 80, 81]])} if name == "t5" else {}
    batch = lens.prepare(input_ids=rows, **more, padding_side=side)
    both = relevance(lens, batch, answers=[100, 101])
    layer = attention_times_gradient(lens, batch, answers=[100, 101])
    for i, row in enumerate(rows):
        ids = {"input_ids": [row], **{k: v[i : i + 1] for k, v in more.items()}}
        alone = lens.prepare(**ids)
        close(both.select(i).scores, relevance(lens, alone, answers=[100 + i]).scores)
        close(layer.select(i).scores, attention_times_gradient(lens, alone, answers=[100 + i]).scores)


def test_works_on_an_lvlm_with_pictures():
    lens = lens_of("llava")
    inputs = zoo.inputs("llava", batch=2)
    got = relevance(lens, lens.prepare(**inputs), answers=[70, 71])
    out = eager("llava")(**inputs, output_attentions=True)
    matrices = by_autograd(out, ["attentions"], out.logits[:, -1][torch.arange(2), torch.tensor([70, 71])])
    expected = rolled_up(matrices["attentions"])[:, -1]
    expected[:, -1] -= 1
    close(got.scores[:, 0], expected)
    assert got.spans["image"].sum(1).tolist() == [16, 16]


def test_what_is_wrong_is_said():
    lens, t5 = lens_of("llama"), lens_of("t5")
    batch = lens.prepare(**zoo.inputs("llama", batch=2, length=6))
    with pytest.raises(InputError, match="3 answers were given for 2 samples"):
        relevance(lens, batch, answers=[1, 2, 3])
    with pytest.raises(InputError, match=r"answers.1. is 999; the model has 320 tokens"):
        relevance(lens, batch, answers=[1, 999])
    with pytest.raises(InputError, match="'two' is 3 tokens"):
        relevance(lens, batch, answers=["a", "two"])
    with pytest.raises(InputError, match=r"answers.0. holds 2 for 1 targets"):
        relevance(lens, batch, answers=[[1, 2], [3, 4]])
    with pytest.raises(InputError, match="give a list"):
        relevance(lens, batch, answers="a")
    with pytest.raises(SettingsError, match="need answers"):
        relevance(lens, batch, wrong=[1, 2])
    with pytest.raises(InputError, match="position 6 does not exist"):
        relevance(lens, batch, target=6)
    with pytest.raises(UnknownNameError, match=r"'laste'.*Did you mean 'last'"):
        relevance(lens, batch, target="laste")
    with pytest.raises(UnsupportedError, match="sources in 'encoder' and 'decoder' of t5, not in 'cross'"):
        relevance(t5, t5.prepare(**zoo.inputs("t5", batch=1, length=6)), tower="cross")
    with pytest.raises(UnsupportedError, match="stand in tower 'decoder' of t5, not in 'encoder'"):
        attention_times_gradient(t5, t5.prepare(**zoo.inputs("t5", batch=1, length=6)), tower="encoder")
    vit = lens_of("vit")
    with pytest.raises(UnknownNameError, match="class 'cat' does not exist"):
        relevance(vit, vit.prepare(**zoo.inputs("vit", batch=1)), answers=["cat"])
    clip = lens_of("clip")
    with pytest.raises(UnsupportedError, match="'logits' is refused"):
        relevance(clip, clip.prepare(**zoo.inputs("clip", batch=1)))


def test_a_classifier_that_reads_several_positions_asks_for_one():
    lens = lens_of("dinov2")
    batch = lens.prepare(**zoo.inputs("dinov2", batch=1))
    with pytest.raises(InputError, match=r"read from 17 positions.*target=0"):
        relevance(lens, batch)
    assert relevance(lens, batch, target=0).scores.max() > 0
