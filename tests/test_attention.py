"""Recomputed attention, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from interp.engine.attention import AttentionCall, attention_pattern, attention_scores, mix_values
from interp.errors import UnsupportedError


class Holder(torch.nn.Module):
    is_causal = True


def call(mask=None, causal=True, heads=2, kv=1, n=3, **options):
    g = torch.Generator().manual_seed(0)
    module = Holder()
    module.is_causal = causal
    q = torch.randn(1, heads, n, 4, generator=g)
    k = torch.randn(1, kv, n, 4, generator=g)
    v = torch.randn(1, kv, n, 4, generator=g)
    return AttentionCall(module, q, k, v, mask, options)


def plain(c, allowed, scaling=0.5, cap=None, sink=None):
    """The formula in loops."""
    _, heads, n, _ = c.query.shape
    out = torch.zeros(heads, n, n)
    for h in range(heads):
        for i in range(n):
            logits = {}
            for j in range(n):
                if allowed(i, j):
                    s = float(c.query[0, h, i] @ c.key[0, h * c.key.shape[1] // heads, j]) * scaling
                    logits[j] = cap * math.tanh(s / cap) if cap else s
            total = sum(math.exp(s) for s in logits.values()) + (math.exp(float(sink[h])) if sink is not None else 0.0)
            for j, s in logits.items():
                out[h, i, j] = math.exp(s) / total
    return out


@pytest.mark.parametrize(
    ("options", "causal", "kwargs"),
    [
        ({"scaling": 0.5}, True, {}),
        ({"scaling": 0.5}, False, {}),
        ({"scaling": 0.25, "softcap": 1.5}, True, {"scaling": 0.25, "cap": 1.5}),
        ({"scaling": 0.5, "s_aux": torch.tensor([0.3, -1.0])}, True, {"sink": torch.tensor([0.3, -1.0])}),
        ({}, True, {}),
    ],
)
def test_against_the_formula_in_loops(options, causal, kwargs):
    c = call(causal=causal, **options)
    allowed = (lambda i, j: j <= i) if causal else (lambda i, j: True)
    found = attention_pattern(attention_scores(c), c)
    torch.testing.assert_close(found[0], plain(c, allowed, **kwargs), atol=1e-6, rtol=1e-5)
    out = mix_values(found, c)
    torch.testing.assert_close(out[0, :, 1], found[0, 1] @ c.value[0, 0])


def test_chosen_heads_and_rows_are_those_of_the_whole():
    c = call(heads=4, kv=2, n=5, scaling=0.5, s_aux=torch.randn(4))
    whole = attention_pattern(attention_scores(c), c)
    heads, rows = torch.tensor([3, 1]), torch.tensor([[4, 0]])
    some = attention_pattern(attention_scores(c, heads, rows), c, heads)
    torch.testing.assert_close(some[0], whole[0][heads][:, [4, 0]])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 5, 5).bool().tril(), torch.ones(1, 5).bool()])
def test_a_slice_of_rows_is_the_same_rows_of_the_whole(causal, mask):
    c = call(mask=mask, causal=causal, heads=4, kv=2, n=5)
    whole = attention_pattern(attention_scores(c), c)
    for rows in (slice(4, 5), slice(3, 5), slice(0, 1), slice(0, 5)):
        index = torch.arange(rows.start, rows.stop)[None]
        found = attention_pattern(attention_scores(c, rows=rows), c, closed=False)
        torch.testing.assert_close(found, whole[:, :, rows])
        torch.testing.assert_close(attention_scores(c, rows=rows), attention_scores(c, rows=index))


def test_masks_of_every_form_agree():
    keep = torch.tensor([[[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]]).bool()
    c = call(mask=keep, scaling=0.5)
    wanted = plain(c, lambda i, j: bool(keep[0, 0, i, j]))
    torch.testing.assert_close(attention_pattern(attention_scores(c), c)[0], wanted, atol=1e-6, rtol=1e-5)
    c.mask = torch.zeros(1, 1, 3, 3).masked_fill(~keep, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention_pattern(attention_scores(c), c)[0], wanted, atol=1e-6, rtol=1e-5)
    c.mask = torch.zeros(1, 1, 3, 3).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(attention_pattern(attention_scores(c), c)[0], wanted, atol=1e-6, rtol=1e-5)


def test_a_padding_mask_of_flash_attention_is_causal_too():
    c = call(mask=torch.tensor([[0, 1, 1]]), scaling=0.5)
    found = attention_pattern(attention_scores(c), c)
    assert found[0, :, 0].abs().sum() == 0
    assert found[0, :, 1, 0].abs().sum() == 0
    torch.testing.assert_close(found[0, :, 1:].sum(-1), torch.ones(2, 2))


def test_masked_rows_are_zero_and_their_gradient_finite():
    keep = torch.tensor([[[[0, 0, 0], [1, 1, 0], [1, 1, 1]]]]).bool()
    c = call(mask=keep, scaling=0.5)
    c.query.requires_grad_()
    found = attention_pattern(attention_scores(c), c)
    assert found[0, :, 0].abs().sum() == 0
    found.sum().backward()
    assert c.query.grad is not None
    assert c.query.grad.isfinite().all()


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="temperature_tuning"):
        attention_scores(call(scaling=0.5, temperature_tuning=2.0))
    attention_scores(call(scaling=0.5, temperature_tuning=None))


def test_an_unknown_configuration_field_refuses_the_pattern_by_name():
    import interp
    from tests.zoo import build, inputs

    model = build("llama")
    model.config.attn_quantum_sinks = 3
    lens = interp.wrap(model)
    batch = lens.prepare(**inputs("llama"))
    for site in ("pattern", "scores"):
        with pytest.raises(UnsupportedError, match="attn_quantum_sinks"):
            lens.run(batch, [site])
    assert lens.run(batch, ["z", "attn_out"])["z", 0].abs().sum() > 0


def test_a_recomputation_that_misses_the_kernel_refuses_the_pattern(monkeypatch):
    """A kernel that does more than its arguments say is found out by the numbers."""
    from transformers.modeling_utils import AttentionInterface

    import interp
    from tests.zoo import build, inputs

    plain = AttentionInterface._global_mapping["sdpa"]

    def warmer(module, query, *rest, **options):
        return plain(module, query * 1.5, *rest, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", warmer)
    lens = interp.wrap(build("llama"))
    with pytest.raises(UnsupportedError, match="miss the kernel's output by"):
        lens.run(lens.prepare(**inputs("llama")), ["pattern"])


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_soft_cap_is_left_out_where_the_kernel_does(kernel):
    """sdpa has none: the releases of transformers that hand it one let it go by."""
    given = call(causal=False, softcap=1.5)
    given.module.config = SimpleNamespace(_attn_implementation=kernel)
    raw = 0.5 * given.query @ given.key.mT
    wanted = raw if kernel == "sdpa" else torch.tanh(raw / 1.5) * 1.5
    torch.testing.assert_close(attention_scores(given), wanted)
