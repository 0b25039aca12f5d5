"""Lorsa: against plain loops, exact copies of real layers, masks, first weights, training, files, reading."""

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import interp
from interp import Read
from interp.dictionaries import SAE, Job, TrainSettings, train
from interp.dictionaries import lorsa as package
from interp.dictionaries.activations import Contexts, State, Together, statistics
from interp.dictionaries.lorsa import AttentionPairs, Lorsa, attention_rule
from interp.errors import FileError, InputError, NonFiniteError, SettingsError, UnknownNameError, UnsupportedError
from tests.zoo import build, inputs

D, S = 10, 7
SMALL = {"d_in": D, "n_qk": 2, "n_ov": 8, "d_qk": 6, "d_out": 5, "context": 16, "dtype": "float64", "k": 3}


def drawn(**settings):
    """A Lorsa with random biases, gains and directions of different lengths."""
    lorsa = Lorsa(**{**SMALL, **settings})
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lorsa.named_parameters():
            if name in ("b_Q", "b_K", "b_V", "b_D", "q_gain", "k_gain"):
                parameter.add_(torch.randn(parameter.shape, generator=random, dtype=parameter.dtype) * 0.3)
        lorsa.W_O.mul_(torch.rand(lorsa.cfg.n_ov, 1, generator=random, dtype=lorsa.W_O.dtype) + 0.3)
    return lorsa.eval()


def stream(batch=2, pos=S, seed=0):
    return torch.randn(batch, pos, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def plain(lorsa, x):
    """Pre-activations of one sequence [pos, d_in], head by head and position by position."""
    cfg, out = lorsa.cfg, torch.zeros(len(x), lorsa.cfg.n_ov, dtype=torch.float64)
    n = cfg.rotary_dim // 2

    def turned(row, t):
        row = row.clone()
        for i in range(n):
            a, b = (i, i + n) if cfg.rotary_pairing == "half" else (2 * i, 2 * i + 1)
            angle = t * cfg.rotary_base ** (-2 * i / cfg.rotary_dim)
            first, second = float(row[a]), float(row[b])
            row[a] = first * math.cos(angle) - second * math.sin(angle)
            row[b] = second * math.cos(angle) + first * math.sin(angle)
        return row

    def vector(name, g, t):
        row = x[t] @ getattr(lorsa, f"W_{name}")[g] + getattr(lorsa, f"b_{name}")[g]
        if cfg.qk_norm:
            row = row / (row.square().mean() + cfg.qk_norm_eps).sqrt() * getattr(lorsa, f"{name.lower()}_gain")[g]
        return turned(row, t)

    for i in range(cfg.n_ov):
        g = i // (cfg.n_ov // cfg.n_qk)
        for t in range(len(x)):
            seen = [s for s in range(len(x)) if (s <= t or not cfg.causal) and abs(t - s) < (cfg.window or 10**6)]
            scores = torch.stack([vector("Q", g, t) @ vector("K", g, s) for s in seen])
            scores = scores * (cfg.scale or cfg.d_qk**-0.5)
            if cfg.softcap:
                scores = cfg.softcap * torch.tanh(scores / cfg.softcap)
            weights = scores.softmax(0)
            for weight, s in zip(weights, seen, strict=True):
                out[t, i] += weight * (x[s] @ lorsa.W_V[i] + lorsa.b_V[i])
    return out


RULES = [
    {},
    {"rotary_dim": 6},
    {"rotary_dim": 4, "rotary_pairing": "interleaved"},
    {"qk_norm": True, "rotary_dim": 4, "scale": 0.7},
    {"softcap": 0.5, "window": 3},
    {"causal": False, "window": 2},
    {"causal": False, "n_ov": 30},
    {"n_ov": 30, "rotary_dim": 2},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pre_activations_are_those_of_plain_loops(rule):
    lorsa, x = drawn(**rule), stream()
    for row, found in zip(x, lorsa.pre_activations(x), strict=True):
        torch.testing.assert_close(found, plain(lorsa, row), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_padding_and_packing_change_nothing(rule):
    lorsa, x = drawn(**rule), stream()
    alone = lorsa.pre_activations(x)
    for left, right in ((0, 3), (2, 0), (1, 2)):
        parts = [torch.full((2, n, D), 1e4, dtype=x.dtype) for n in (left, right)]
        padded = torch.cat([parts[0], x, parts[1]], 1)
        real = torch.zeros(padded.shape[:2], dtype=torch.bool)
        real[:, left : left + S] = True
        found = lorsa.pre_activations(padded, real=real)[:, left : left + S]
        torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)
        assert bool((lorsa(padded, real=real)[~real] == 0).all())
    both = x.flatten(0, 1)[None]
    segments = torch.tensor([[4] * S + [9] * S])
    found = lorsa.pre_activations(both, segments=segments)[0].unflatten(0, (2, S))
    torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


def test_a_causal_lorsa_does_not_see_the_future_and_another_does():
    x = stream().requires_grad_()
    for causal in (True, False):
        (grad,) = torch.autograd.grad(drawn(causal=causal, rotary_dim=4).pre_activations(x)[:, 2].sum(), x)
        assert bool((grad[:, 3:] == 0).all()) is causal
        assert bool((grad[:, :3] != 0).any())


def contributions(lorsa, pre):
    return pre * lorsa.W_O.norm(dim=1)


def test_selection_ranks_by_contribution():
    x, k = stream(), 3
    lorsa = drawn(architecture="topk", k=k)
    pre = lorsa.pre_activations(x)
    size = contributions(lorsa, pre).relu()
    kept = size >= size.topk(k, -1).values[..., -1:]
    assert not torch.equal(kept, pre.relu() >= pre.relu().topk(k, -1).values[..., -1:])  # lengths matter here
    torch.testing.assert_close(lorsa.encode(x), pre.relu() * kept)
    torch.testing.assert_close(lorsa(x), (pre.relu() * kept) @ lorsa.W_O + lorsa.b_D)
    batch = drawn(architecture="batchtopk", k=2).train()
    flat = size.flatten().sort(descending=True).values
    torch.testing.assert_close(batch.encode(x), pre * (size >= flat[2 * 2 * S - 1]))
    batch.loss(x, torch.zeros(2, S, 5, dtype=x.dtype))
    assert float(batch.topk_threshold) == pytest.approx(0.01 * float(flat[2 * 2 * S - 1].detach()))
    batch.eval()
    torch.testing.assert_close(batch.encode(x), pre * (size > batch.topk_threshold))
    jump = drawn(architecture="jumprelu", jumprelu_init_threshold=0.2)
    torch.testing.assert_close(jump.encode(x), pre * (size > 0.2))
    torch.testing.assert_close(drawn(architecture="relu").encode(x), pre.relu())
    torch.testing.assert_close(drawn(architecture="identity").encode(x), pre)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "identity", "jumprelu"])
def test_loss_and_gradient_are_those_of_the_dense_form(architecture):
    lorsa, x = drawn(architecture=architecture, k=2, rotary_dim=4).train(), stream()
    target = torch.randn(2, S, 5, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    mask, real = torch.ones(2, S, dtype=torch.bool), torch.ones(2, S, dtype=torch.bool)
    mask[:, 0] = False
    real[1, 5:] = False
    loss = lorsa.loss(x, target, mask=mask, real=real)
    used = mask & real
    pre = lorsa.pre_activations(x, real=real)[used]
    kept = (loss.dense() != 0).to(x.dtype)
    y = (pre * kept) @ lorsa.W_O + lorsa.b_D
    mse = (y - target[used]).square().sum() / int(used.sum())
    torch.testing.assert_close(loss.parts["mse_loss"], mse)
    names = ("W_Q", "W_K", "W_V", "W_O", "b_V", "b_D")
    one, two = (
        torch.autograd.grad(value, [getattr(lorsa, n) for n in names], retain_graph=True)
        for value in (loss.parts["mse_loss"], mse)
    )
    for name, a, b in zip(names, one, two, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(loss.counts(), (loss.dense() != 0).sum(0))
    spoilt = target.clone()
    spoilt[~used] = 1e6
    torch.testing.assert_close(lorsa.loss(x, spoilt, mask=mask, real=real).parts["mse_loss"], mse)


def test_dead_heads_learn_from_the_residual():
    lorsa, x = drawn(architecture="topk", k=1).train(), stream()
    target = torch.randn(2, S, 5, dtype=x.dtype)
    dead = ~(lorsa.loss(x, target).counts() > 0)
    assert bool(dead.any())
    loss = lorsa.loss(x, target, dead=dead)
    grad = torch.autograd.grad(loss.parts["auxiliary_reconstruction_loss"], lorsa.W_O)[0]
    assert bool((grad[~dead] == 0).all())
    assert bool((grad[dead] != 0).any())


class Largest(TorchDispatchMode):
    """The largest tensor that is made, in elements."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.parametrize("n_qk", [4, 64])
def test_no_pattern_of_single_ov_heads_is_made(n_qk):
    n_ov, pos = 1024, 96
    lorsa = Lorsa(d_in=16, n_qk=n_qk, n_ov=n_ov, d_qk=16, architecture="topk", k=4)
    with Largest() as largest:
        lorsa.loss(torch.randn(2, pos, 16), torch.randn(2, pos, 16)).total.backward()
    assert largest.size <= max(2 * n_qk * pos * pos, 2 * pos * n_ov, n_ov * 16)


FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "mistral", "glm4", "phi", "bert", "modernbert", "vit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_copies_are_the_layer(name):
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    batch = lens.prepare(**given)
    (tower,) = lens.anatomy.towers
    for layer in (0, 1):
        for architecture in ("identity", "relu"):
            own = batch if name == "vit" else None
            lorsa = Lorsa.exact_copy(lens, layer, own, architecture=architecture, context=20)
            heads = lens.anatomy.attention(tower, layer).n_heads
            d_value = lens.anatomy.attention(tower, layer).d_value
            assert lorsa.cfg.n_ov == heads * d_value * (2 if architecture == "relu" else 1)
            assert max(lorsa.metadata["proof"].values()) < 1e-5
            rule = attention_rule(lens, layer, own, context=20)
            trace = lens.run(batch, [f"resid_pre.{layer}", f"pattern.{layer}", f"z.{layer}", f"attn_out.{layer}"])
            x = rule.inputs(trace["resid_pre", layer])
            pattern = trace["pattern", layer]
            torch.testing.assert_close(package.patterns(lorsa, x), pattern, atol=1e-5, rtol=0)
            wanted = rule.target(trace["z", layer].flatten(2))
            assert float((lorsa(x) - wanted).abs().max() / wanted.abs().max()) < 1e-5
            if rule.plain:
                torch.testing.assert_close(wanted, trace["attn_out", layer], atol=1e-5, rtol=1e-5)
    assert rule.plain is (name not in ("gemma2", "glm4"))


def test_rules_are_found():
    def rule(name, layer):
        return attention_rule(interp.wrap(build(name)), layer, context=20)

    assert (rule("mistral", 1).window, rule("mistral", 1).causal) == (4, True)
    assert (rule("modernbert", 1).window, rule("modernbert", 1).causal) == (3, False)
    assert rule("gemma2", 1).softcap == pytest.approx(2.0, abs=1e-6)
    assert rule("gemma2", 0).window == 4
    assert rule("granite", 0).scale == pytest.approx(0.3)
    assert (rule("glm4", 0).pairing, 2 * rule("phi", 0).cos.shape[1]) == ("interleaved", 4)
    assert rule("bert", 0).norm is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt_oss", "sink"), ("bloom", "attention table"), ("deepseek_v3", "linear map"), ("olmo2", "norm of each head"),
     ("llama4", "rotation"), ("qwen3_next", "is not the layer")],
)  # fmt: skip
def test_other_rules_are_refused(name, words):
    with pytest.raises(UnsupportedError, match=words):
        Lorsa.exact_copy(interp.wrap(build(name)), 1, context=20)


def test_a_copy_with_a_transposed_head_or_without_biases_fails_its_proof():
    lens = interp.wrap(build("gpt2"))
    rule = attention_rule(lens, 1, context=20)
    copy = Lorsa.exact_copy(lens, 1, context=20)
    package.prove(copy, rule, lens)
    for name in ("W_Q", "b_Q", "W_V", "b_V", "W_O"):
        wrong = Lorsa.exact_copy(lens, 1, context=20)
        with torch.no_grad():
            getattr(wrong, name).copy_(getattr(wrong, name).flip(0))
        with pytest.raises(UnsupportedError, match="is not the layer"):
            package.prove(wrong, rule, lens)


@pytest.fixture(scope="module")
def scenes():
    return interp.load("scenes")


def test_a_padded_text_of_a_real_model(scenes):
    lorsa = Lorsa.exact_copy(scenes, 1, context=24)
    rule = attention_rule(scenes, 1, context=24)
    for side in ("left", "right"):
        batch = scenes.prepare(["is there a red circle?", "yes"], padding_side=side)
        trace = scenes.run(batch, ["resid_pre.1", "z.1"])
        x, wanted = rule.inputs(trace["resid_pre", 1]), rule.target(trace["z", 1].flatten(2))
        found = lorsa(x, real=batch.mask)
        torch.testing.assert_close(found[batch.mask], wanted[batch.mask], atol=1e-5, rtol=1e-5)


def test_attention_replaced_by_its_copy_leaves_the_logits(scenes):
    lorsa, rule = Lorsa.exact_copy(scenes, 1, context=24), attention_rule(scenes, 1, context=24)
    batch = scenes.prepare(["is there a red circle?", "yes"])
    before = scenes.run(batch, ["logits"]).logits[batch.mask]
    after = scenes.run(batch, ["logits"], package.replace_attention(lorsa, rule, batch.mask)).logits[batch.mask]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    nothing = package.replace_attention(lorsa, rule, batch.mask, change=torch.zeros_like, error=True)
    assert float((scenes.run(batch, ["logits"], nothing).logits[batch.mask] - before).abs().max()) > 1e-2
    poor = package.shaped(rule, n_qk=8, n_ov=64, k=4)
    same = package.replace_attention(poor, rule, batch.mask, error=True)
    torch.testing.assert_close(scenes.run(batch, ["logits"], same).logits[batch.mask], before, atol=1e-4, rtol=1e-4)


def llama():
    lens = interp.wrap(build("llama"))
    rule = attention_rule(lens, 1, context=20)
    batch = lens.prepare(input_ids=torch.randint(10, 60, (6, 20), generator=torch.Generator().manual_seed(0)))
    trace = lens.run(batch, ["resid_pre.1", "z.1"])
    return lens, rule, batch, rule.inputs(trace["resid_pre", 1]), trace["z", 1].flatten(2)


@pytest.mark.parametrize("subspace", [None, "values", "outputs"])
def test_first_weights_from_the_heads(subspace):
    _, rule, _, x, z = llama()
    lorsa = package.from_heads(rule, n_qk=8, n_ov=64, x=x, subspace=subspace, k=4)
    copied = package.patterns(lorsa, x)
    heads = len(rule.W_Q)
    one = package.exact_copy(interp.wrap(build("llama")), 1, context=20)
    torch.testing.assert_close(copied, package.patterns(one, x).repeat_interleave(2, 1))
    torch.testing.assert_close(lorsa.W_O.norm(dim=1), torch.ones(64))
    long = lorsa.W_V.norm(dim=1)
    torch.testing.assert_close(long, long[:1].expand(64))
    if subspace is None:
        torch.testing.assert_close(lorsa.b_D, rule.b_O)
        assert float(long[0].detach()) == pytest.approx(1)
        return
    # No other length, and no other bias, has a smaller error on the batch.
    y = rule.target(z)

    def error(factor=1.0, shift=0.0):
        other = copy.deepcopy(lorsa)
        with torch.no_grad():
            other.W_V.mul_(factor)
            other.b_D.add_(shift)
            return float((other(x) - y).square().sum())

    assert error() < min(error(0.97), error(1.03), error(shift=0.01 * y.std()), error(shift=-0.01 * y.std()))
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    real[:, 12:] = False
    spoilt = torch.where(real[..., None], x, 1e3)
    few = package.from_heads(rule, n_qk=8, n_ov=64, x=x[:, :12], subspace=subspace, k=4)
    padded = package.from_heads(rule, n_qk=8, n_ov=64, x=spoilt, real=real, subspace=subspace, k=4)
    for name in ("W_O", "W_V", "b_D"):
        torch.testing.assert_close(getattr(padded, name), getattr(few, name), atol=1e-4, rtol=1e-3)
    for head in range(heads):
        rows = slice(head * 64 // heads, (head + 1) * 64 // heads)
        # Output directions lie in what the head can write, value directions in what it can read.
        for weight, space in ((lorsa.W_O[rows], rule.W_O[head]), (lorsa.W_V[rows], rule.W_V[head].T)):
            basis = torch.linalg.qr(space.T)[0]
            torch.testing.assert_close(weight @ basis @ basis.T, weight, atol=1e-4, rtol=1e-4)


def test_first_weights_that_do_not_fit():
    _, rule, _, x, _ = llama()
    with pytest.raises(SettingsError, match="no multiple of the layer's 4 heads"):
        package.from_heads(rule, n_qk=6, n_ov=60)
    with pytest.raises(InputError, match="give x"):
        package.from_heads(rule, n_qk=4, n_ov=64, subspace="values")
    with pytest.raises(UnknownNameError, match="subspace"):
        package.from_heads(rule, n_qk=4, n_ov=64, x=x, subspace="value")
    with pytest.raises(SettingsError, match="longer context"):
        package.shaped(rule, n_qk=4, n_ov=64, context=64)


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "batchtopk"])
def test_folding_leaves_the_output(architecture):
    lorsa, x = drawn(architecture=architecture, k=3, jumprelu_init_threshold=0.1, rotary_dim=4), stream()
    if architecture == "batchtopk":
        lorsa.topk_threshold.fill_(0.1)
    assert bool((lorsa.encode(x) == 0).any())
    torch.testing.assert_close(package.unit_norm(lorsa)(x), lorsa(x))
    torch.testing.assert_close(package.unit_norm(lorsa).W_O.norm(dim=1), torch.ones(8, dtype=x.dtype))
    torch.testing.assert_close(package.fold_scales(lorsa, 3.0, 0.5)(x), lorsa(3.0 * x) / 0.5)


def test_files(tmp_path):
    lorsa, x = drawn(architecture="jumprelu", qk_norm=True, rotary_dim=4), stream()
    lorsa.cos.mul_(0.9)  # angles of a layer, not those of the base
    package.save(lorsa, tmp_path / "one", metadata={"layer": 3})
    same = package.load(tmp_path / "one")
    assert torch.equal(same(x), lorsa(x))
    assert same.metadata == {"layer": 3}
    assert same.cfg == lorsa.cfg
    held = json.loads((tmp_path / "one" / "lorsa.json").read_text())
    held["settings"]["n_ov"] = 16
    (tmp_path / "one" / "lorsa.json").write_text(json.dumps(held))
    with pytest.raises(FileError, match=r"as \[8, "):
        package.load(tmp_path / "one")
    with pytest.raises(FileError, match="cannot read"):
        package.load(tmp_path / "none")


def test_a_checkpoint_of_the_reference_opens(tmp_path):
    lorsa = drawn(architecture="topk", k=3, qk_norm=True, rotary_dim=4, d_out=D, rotary_pairing="half")
    x = stream()
    names = ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_D")
    tensors = {name: getattr(lorsa, name).detach().clone() for name in names}
    with torch.no_grad():  # the reference has one gain for all heads
        lorsa.q_gain.copy_(lorsa.q_gain[0].expand_as(lorsa.q_gain))
        lorsa.k_gain.copy_(lorsa.k_gain[0].expand_as(lorsa.k_gain))
    tensors |= {"ln_q.w": lorsa.q_gain[0].detach().clone(), "ln_k.w": lorsa.k_gain[0].detach().clone()}
    tensors |= {"dataset_average_activation_norm.in": torch.tensor(2.0), "mask": torch.ones(1)}
    tensors["dataset_average_activation_norm.out"] = torch.tensor(5.0)
    held = {"sae_type": "lorsa", "d_model": D, "n_qk_heads": 2, "d_qk_head": 6, "n_ctx": 16, "rotary_dim": 4}
    held |= {"rotary_adjacent_pairs": False, "attn_scale": 6**0.5, "use_post_qk_ln": True, "act_fn": "topk", "top_k": 3}
    held |= {"hook_point_in": "in", "hook_point_out": "out", "norm_activation": "dataset-wise"}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(held))
    found = package.load_reference(tmp_path)
    # Its forward pass, by the formulas: scaled input, plain heads, top-k by contribution, scaled back.
    s_in, s_out = D**0.5 / 2, D**0.5 / 5
    pre = torch.stack([plain(lorsa, row * s_in) for row in x])
    size = contributions(lorsa, pre).relu()
    z = pre.relu() * (size >= size.topk(3, -1).values[..., -1:])
    torch.testing.assert_close(found(x), (z @ lorsa.W_O + lorsa.b_D) / s_out)
    (tmp_path / "config.json").write_text(json.dumps(held | {"act_fn": "batchtopk"}))
    with pytest.raises(UnsupportedError, match="threshold"):
        package.load_reference(tmp_path)


@pytest.mark.parametrize("rule", [{"rotary_dim": 4}, {"softcap": 0.5, "window": 3}, {"causal": False}], ids=str)
def test_z_patterns_sum_to_the_pre_activation(rule):
    lorsa, x = drawn(architecture="topk", k=3, **rule), stream()
    real = torch.ones(2, S, dtype=torch.bool)
    real[0, 5:] = False
    where = package.fired(lorsa, x, real=real)
    latents = lorsa.encode(x, real=real)
    assert len(where) == int((latents != 0).sum())
    zp = package.z_patterns(lorsa, x, where, real=real)
    torch.testing.assert_close(zp.sum(1), latents[where.sample, where.query, where.head])
    torch.testing.assert_close(where.value, latents[where.sample, where.query, where.head])
    assert bool((zp[where.sample == 0][:, 5:] == 0).all())
    one = where.of(int(where.head[0]))
    assert bool((one.value.diff() <= 0).all())
    i, row = int(where.head[0]), x[int(where.sample[0])][:5] if int(where.sample[0]) == 0 else x[1]
    pattern = package.patterns(lorsa, row[None])[0, i // lorsa.cfg.group, int(where.query[0])]
    torch.testing.assert_close(zp[0, : len(row)], pattern * (row @ lorsa.W_V[i] + lorsa.b_V[i]))


def test_behaviours_by_hand():
    lens, _, _, _, _ = llama()
    batch = lens.prepare(input_ids=torch.tensor([[5, 6, 7, 5, 6, 7]]))
    lorsa = Lorsa(d_in=4, n_qk=1, n_ov=2, d_qk=2, architecture="relu")
    with torch.no_grad():
        for parameter in (lorsa.W_Q, lorsa.W_K, lorsa.W_V):
            parameter.zero_()
        lorsa.b_V.copy_(torch.tensor([1.0, -1.0]))  # looks everywhere alike; the second never fires
    scores = package.behaviours(lorsa, torch.zeros(1, 6, 4), batch)
    later = sum(1 / (t + 1) for t in range(1, 6)) / 5
    assert float(scores["first"][0]) == pytest.approx(later)
    assert float(scores["previous"][0]) == pytest.approx(later)
    repeated = (1 / 4 + 1 / 5 + 1 / 6) / 3
    assert float(scores["duplicate"][0]) == pytest.approx(repeated)
    assert float(scores["induction"][0]) == pytest.approx(repeated)
    assert bool(scores["first"][1].isnan())


def test_head_shares():
    _, rule, _, x, z = llama()
    lorsa = package.from_heads(rule, n_qk=4, n_ov=16, x=x, subspace="outputs", architecture="topk", k=5)
    shares = package.head_shares(lorsa, rule, x, z)
    torch.testing.assert_close(
        shares.nansum(1)[~shares.isnan().any(1)], torch.ones(int((~shares.isnan().any(1)).sum()))
    )
    latents, outs = lorsa.encode(x), z.unflatten(-1, (4, -1))
    i = int(latents.sum((0, 1)).argmax())
    each = [float((latents[..., i] * (outs[:, :, h] @ rule.W_O[h] @ lorsa.W_O[i])).sum()) for h in range(4)]
    torch.testing.assert_close(shares[i], torch.tensor(each) / sum(each), atol=1e-4, rtol=1e-4)


class Repeated:
    """Random texts through the layer, as an `ActivationStream` gives them: padded, first positions left out."""

    def __init__(self, lens, rule, batch=4, rank=0, world=1, uneven=False):
        self.lens, self.rule, self.batch, self.at, self.uneven = lens, rule, batch, 0, uneven
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)
        self.d_in = dict.fromkeys(rule.reads, 32)
        self.settings = {"batch": batch}

    def __iter__(self):
        return self

    def __next__(self):
        random = torch.Generator().manual_seed(self.at)
        ids = torch.randint(10, 60, (self.batch, 20), generator=random)[self.share]
        self.at += 1
        trace = self.lens.run(self.lens.prepare(input_ids=ids), list(self.rule.reads))
        values = {read: trace[Read.of(read), 1].flatten(2) for read in self.rule.reads}
        real = torch.ones(ids.shape, dtype=torch.bool)
        mask = real.clone()
        mask[:, 0] = False
        if self.uneven:  # each context has another number of tokens to use
            mask &= (
                torch.rand(self.batch, 20, generator=random)[self.share]
                < torch.linspace(0.2, 1, self.batch)[self.share, None]
            )
        return Contexts(values, mask, real, ids, torch.zeros_like(ids), torch.arange(len(ids)))

    def state(self):
        return State({"at": self.at})

    def restore(self, state):
        self.at = state.values["at"]

    def close(self):
        pass


def trained(folder=None, steps=30, frozen=False, **settings):
    lens, rule, _, x, _ = llama()
    lorsa = package.from_heads(rule, n_qk=4, n_ov=64, x=x, **{"subspace": "outputs", "k": 8, **settings})
    if frozen:
        lorsa.freeze_qk()
    first = {name: value.clone() for name, value in lorsa.state_dict().items()}
    run = TrainSettings(steps=steps, lr=3e-3, log_every=10, checkpoint_every=10, scale_rows=1000)
    source = AttentionPairs(Repeated(lens, rule), rule)
    return lorsa, first, train(lorsa, source, run, folder=folder)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_training_lowers_the_error(architecture):
    lorsa, _, found = trained(architecture=architecture, l1_coefficient=1e-4, l0_coefficient=1e-6, subspace=None)
    fvu = found.metrics["fvu"]
    assert fvu.iloc[-1] < 0.9 * fvu.iloc[0]
    assert found.tokens == 30 * 4 * 19
    assert not lorsa.training


def test_frozen_queries_stay_and_scales_are_folded():
    _, rule, _, x, z = llama()
    for scaled in ("none", "expected_average_only_in"):
        _, first, found = trained(frozen=True, normalize_activations=scaled, steps=20)
        out = found.dictionaries["dictionary"]
        assert out.cfg.normalize_activations == "none"
        for name in ("W_Q", "W_K", "b_K"):  # of the layer, whatever activations were multiplied with
            torch.testing.assert_close(getattr(out, name), first[name], atol=0 if scaled == "none" else 1e-6, rtol=1e-6)
        assert not torch.allclose(out.W_V, first["W_V"])
    y = rule.target(z)[:, 1:]
    assert float((out(x)[:, 1:] - y).square().sum() / (y - y.mean((0, 1))).square().sum()) < 1.0


def test_first_weights_are_for_activations_as_they_are():
    """The first logged loss with scales is that without, times the target's scale squared."""
    lens, rule, _, x, _ = llama()
    losses = {}
    for scaled in ("none", "expected_average_only_in"):
        options = {"x": x, "subspace": "values", "k": 8, "normalize_activations": scaled}
        lorsa = package.from_heads(rule, n_qk=4, n_ov=64, **options)
        source = AttentionPairs(Repeated(lens, rule), rule)
        scale = statistics(source, rows=1000)["y.1"].scale if scaled != "none" else 1.0
        found = train(lorsa, source, TrainSettings(steps=1, log_every=1, scale_rows=1000)).metrics
        losses[scaled] = float(found["mse_loss"].iloc[0]) / scale**2
    assert losses["none"] == pytest.approx(losses["expected_average_only_in"], rel=1e-4)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    whole, _, _ = trained(tmp_path / "whole", architecture="batchtopk")
    lens, rule, _, x, _ = llama()
    lorsa = package.from_heads(rule, n_qk=4, n_ov=64, x=x, subspace="outputs", k=8, architecture="batchtopk")

    class Stop(Exception):
        pass

    source = Repeated(lens, rule)

    def stop(row):
        if row["step"] == 20 and source.at <= 21:
            raise Stop

    run = TrainSettings(steps=30, lr=3e-3, log_every=10, checkpoint_every=10, scale_rows=1000)
    with pytest.raises(Stop):
        train(lorsa, AttentionPairs(source, rule), run, folder=tmp_path / "part", on_log=stop)
    again, _, _ = trained(tmp_path / "part", architecture="batchtopk")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    read = package.load(tmp_path / "part" / "dictionary")
    assert torch.equal(read.W_O, whole.W_O)
    assert (read.metadata["steps"], read.metadata["layer"], read.metadata["tokens"]) == (30, 1, 30 * 4 * 19)
    assert (read.metadata["read"], read.metadata["target"]) == ("x.1", "y.1")
    with pytest.raises(SettingsError, match=r"dictionary dictionary: frozen \(there null, here \[\"W_K"):
        trained(tmp_path / "part", architecture="batchtopk", frozen=True)


def test_it_is_trained_beside_an_sae_on_the_same_contexts_and_alone_on_no_rows():
    lens, rule, _, x, _ = llama()
    make = {"n_qk": 4, "n_ov": 64, "x": x, "subspace": "outputs", "k": 8}
    both, alone, sae = package.from_heads(rule, **make), package.from_heads(rule, **make), SAE(d_in=32, d_sae=64, k=4)
    run = TrainSettings(steps=6, lr=3e-3, log_every=3)
    jobs = {"lorsa": Job(both, "x.1", "y.1"), "sae": Job(sae, "y.1")}
    found = train(jobs, AttentionPairs(Repeated(lens, rule, uneven=True), rule), run)
    one = train(alone, AttentionPairs(Repeated(lens, rule, uneven=True), rule), run)
    assert torch.equal(both.W_Q, alone.W_Q)
    columns = ["step", "loss", "fvu", "l0"]
    mine = found.metrics[found.metrics["dictionary"] == "lorsa"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, one.metrics[columns])

    class Flat(AttentionPairs):
        def __next__(self):
            return super().__next__().rows()

    rows = Flat(Repeated(lens, rule, uneven=True), rule)
    plain = train(SAE(d_in=32, d_sae=64, k=4), rows, run, read="y.1").dictionaries["dictionary"]
    assert torch.equal(plain.W_enc, sae.W_enc)
    with pytest.raises(InputError, match="whole contexts"):
        train(alone, rows, run)
    with pytest.raises(InputError, match="a Lorsa needs a target"):
        train({"a": Job(alone, "x.1")}, rows, run)


def test_shares_of_processes_together_are_what_one_reads():
    lens, rule, _, _, _ = llama()
    whole = AttentionPairs(Repeated(lens, rule, uneven=True), rule)
    shares = [AttentionPairs(Repeated(lens, rule, rank=r, world=2, uneven=True), rule) for r in (0, 1)]
    found, wanted = next(Together(shares)), next(whole)
    assert found.used == wanted.used == int(wanted.mask.sum())
    for name in ("x.1", "y.1"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)
    short = Contexts({"x.1": wanted["x.1"][:, :3]}, wanted.mask[:, :3], wanted.real[:, :3], None,
                     wanted.document[:, :3], wanted.number)  # fmt: skip
    long = Contexts({"x.1": wanted["x.1"]}, wanted.mask, wanted.real, wanted.ids, wanted.document, wanted.number)
    both = Contexts.joined([short, long])
    assert torch.equal(both["x.1"][:4, :3], short["x.1"])
    assert torch.equal(both["x.1"][4:], long["x.1"])
    assert not bool(both.real[:4, 3:].any() | both.mask[:4, 3:].any())
    assert bool((both.document[:4, 3:] == -1).all())
    assert both.ids is None


def test_pairs_that_do_not_fit():
    lens, rule, _, _, _ = llama()
    source = Repeated(lens, rule)
    with pytest.raises(SettingsError, match="each once"):
        AttentionPairs(source, [rule, rule])
    with pytest.raises(InputError, match=r"needs text:resid_pre\.0"):
        AttentionPairs(source, attention_rule(lens, 0, context=20))
    with pytest.raises(InputError, match="20 positions, but the rule of the layer was measured on 12"):
        next(AttentionPairs(source, attention_rule(lens, 1, context=12)))


def test_low_precision_is_for_products_only():
    _, rule, _, x, z = llama()
    lorsa, y = package.from_heads(rule, n_qk=4, n_ov=64, x=x, subspace="outputs", k=8).train(), rule.target(z)
    wanted = lorsa.loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = lorsa.loss(x, y)
    assert found.reconstruction.dtype == torch.float32
    assert float(found.total) == pytest.approx(float(wanted.total), rel=0.05)
    assert float(found.total) != float(wanted.total)
    found.total.backward()
    assert bool(lorsa.W_Q.grad.isfinite().all())


TWO = """
import sys, torch
torch.set_num_threads(1)
from interp.dictionaries import TrainSettings, train
from interp.dictionaries.lorsa import AttentionPairs, from_heads
from interp.dictionaries.training import Processes
from tests.test_dictionaries_lorsa import Repeated, llama
processes = Processes.join("cpu")
lens, rule, _, x, _ = llama()
lorsa = from_heads(rule, n_qk=4, n_ov=64, x=x, subspace="outputs", k=8, architecture="batchtopk")
source = AttentionPairs(Repeated(lens, rule, rank=processes.rank, world=processes.world, uneven=True), rule)
train(lorsa, source, TrainSettings(steps=15, lr=3e-3, log_every=1, dead_feature_window=3), folder=sys.argv[1])
"""


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lens, rule, _, x, _ = llama()
    lorsa = package.from_heads(rule, n_qk=4, n_ov=64, x=x, subspace="outputs", k=8, architecture="batchtopk")
    run = TrainSettings(steps=15, lr=3e-3, log_every=1, dead_feature_window=3)
    one = train(lorsa, AttentionPairs(Repeated(lens, rule, uneven=True), rule), run).metrics
    two = pd.read_parquet(tmp_path / "two" / "metrics.parquet")
    for column in ("loss", "mse_loss", "auxiliary_reconstruction_loss", "fvu", "l0", "dead"):
        np.testing.assert_allclose(two[column], one[column], rtol=2e-5, atol=1e-5, err_msg=column)


def test_bad_input():
    for settings, words in (
        ({"n_ov": 9}, "take n_ov=8"),
        ({"k": 0}, "k lies above 0"),
        ({"rotary_dim": 8}, "at most d_qk=6"),
        ({"rotary_dim": 3}, "even"),
        ({"d_qk": 0}, "d_qk"),
        ({"window": 0}, "window"),
        ({"scale": -1.0}, "scale"),
    ):
        with pytest.raises(SettingsError, match=words):
            Lorsa(**{**SMALL, **settings})
    with pytest.raises(UnknownNameError, match="topk"):
        Lorsa(**SMALL, architecture="top-k")
    with pytest.raises(UnknownNameError, match="n_heads"):
        Lorsa(**SMALL, n_heads=3)
    with pytest.raises(SettingsError, match="needs d_qk"):
        Lorsa(d_in=3, n_qk=1, n_ov=1)
    lorsa, x = drawn(architecture="relu"), stream()
    with pytest.raises(InputError, match="at least two positions"):
        lorsa(x[:, :1])
    with pytest.raises(InputError, match="context of 16"):
        lorsa(stream(pos=17))
    with pytest.raises(InputError, match=r"\[batch, pos, 10\]"):
        lorsa(x[..., :3])
    with pytest.raises(InputError, match="real is"):
        lorsa(x, real=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="target is"):
        lorsa.loss(x, x)
    with pytest.raises(InputError, match="no position counts"):
        lorsa.loss(x, x[..., :5], mask=torch.zeros(2, S, dtype=torch.bool))
    x[1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"\[1, 2, 3\]"):
        lorsa(x)
    lens = interp.wrap(build("llama"))
    with pytest.raises(UnknownNameError, match="layer 9"):
        attention_rule(lens, 9)
    with pytest.raises(UnsupportedError, match="attention table"):
        attention_rule(interp.wrap(build("mamba")), 1)
    with pytest.raises(SettingsError, match="float32"):
        attention_rule(interp.wrap(build("llama").to(torch.bfloat16)), 1)
    with pytest.raises(InputError, match="give a batch"):
        attention_rule(interp.wrap(build("vit"), sample=inputs("vit")), 1)
    rule = attention_rule(interp.wrap(build("gemma2")), 1, context=20)
    with pytest.raises(UnsupportedError, match="norm or factor"):
        package.replace_attention(lorsa, rule, torch.ones(1, 4, dtype=torch.bool))
