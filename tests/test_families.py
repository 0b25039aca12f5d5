"""The contract of wrapping, on tiny random models of every family of the zoo."""

from contextlib import contextmanager

import pytest
import torch

import interp
from interp import testing
from interp.engine.attention import tapped
from interp.errors import AnatomyError, UnsupportedError
from interp.testing import CHECKS
from tests.zoo import ZOO, build, inputs

SHARED = {"albert": "one module is called several times"}
FAMILIES = [n for n in ZOO if n not in SHARED]
REQUIRED = [
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "olmo2",
    "cohere",
    "stablelm",
    "starcoder2",
    "granite",
    "glm4",
    "deepseek_v3",
    "gpt_oss",
    "opt",
    "bert",
    "roberta",
    "distilbert",
    "modernbert",
    "vit",
    "dinov2",
    "clip",
    "siglip",
    "t5",
    "bart",
    "whisper",
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "paligemma",
    "gemma3_vl",
    "mllama",
]

# What a family cannot give, and the words of its refusal.
REFUSALS = {
    "gptj": {"entry": "holds more than the stream"},
    "bloom": {"entry": "holds more than the stream"},
    "t5": {"entry": "holds more than the stream"},
    "paligemma": {"entry": "differs from the full run"},
    "mllama": {"entry": "cross-attention layers keep their keys apart"},
    "llama4": {"padding": "left padding is refused"},
    "bart": {"padding": "left padding is refused"},
    "mbart": {"padding": "left padding is refused"},
    "marian": {"padding": "left padding is refused"},
    "clip": {"gradient": "no logits"},
    "siglip": {"gradient": "no logits"},
}
NO_PATTERN = ("gptj", "bloom", "falcon", "deberta_v2", "mamba", "mamba2")


def test_the_zoo_holds_every_required_family():
    assert len(FAMILIES) >= 60
    assert set(REQUIRED) <= set(FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def wrapped(request):
    name = request.param
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    return name, lens, lens.prepare(**given), given


@pytest.mark.parametrize("check", [c for c in CHECKS if c not in ("batched", "memory")])
def test_contract(wrapped, check):
    name, lens, batch, _ = wrapped
    expected = REFUSALS.get(name, {}).get(check)
    plain_tokens = "decoder_input_ids" in batch.inputs or not any(k.startswith("pixel") for k in batch.inputs)
    if check == "padding" and ("input_ids" not in batch.inputs or not plain_tokens):
        expected = "only batches of tokens"
    if expected is None:
        CHECKS[check](lens, batch)
        return
    with pytest.raises(UnsupportedError, match=expected):
        CHECKS[check](lens, batch)


def test_batched_equals_single(wrapped):
    _name, lens, batch, _given = wrapped
    testing.check_batched(lens, batch)


@contextmanager
def eager_weights(model):
    """The weights that transformers' own eager functions return, by attention module, call by call."""
    seen: dict[int, list[torch.Tensor]] = {}

    def handler(call, delegate):
        out, weights = delegate(call)
        seen.setdefault(id(call.module), []).append(weights)
        return out, weights

    holders = {m: handler for m in model.modules() if getattr(m, "config", None) is not None}
    with tapped(holders):
        yield seen


def test_pattern_equals_eager(wrapped):
    name, lens, batch, given = wrapped
    reads = [r for r in testing.readable(lens) if r.site == "pattern"]
    if name in NO_PATTERN:
        assert not reads
        with pytest.raises(UnsupportedError, match="pattern"):
            lens.run(batch, ["pattern"])
        return
    assert reads
    found = lens.run(batch, reads)
    eager = interp.wrap(build(name, attn_implementation="eager"), sample=given)
    if lens.model.config._attn_implementation == "sdpa":  # where it takes Gemma 2 at all, it leaves the cap out
        for module in eager.model.modules():
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
    with eager_weights(eager.model) as seen, torch.no_grad():
        eager.model(**given)
    compared = 0
    for (read, layer), pattern in found.values.items():
        module = eager.anatomy.attention(read.tower, layer).module
        blocks = seen[id(module)]
        if len(blocks) > 1:
            whole, row = torch.zeros_like(pattern), 0
            for b in blocks:
                n = b.shape[-1]
                whole[:, :, row : row + n, row : row + n] = b
                row += n
            blocks = [whole]
        wanted = blocks[0].float()
        # Eager masks with the lowest number instead of minus infinity: rows without any key become uniform there.
        rows = pattern.sum(-1) > 0
        assert rows.float().mean() > 0.5
        torch.testing.assert_close(pattern[rows], wanted[rows], atol=1e-5, rtol=0)
        compared += 1
    assert compared == len(found.values)


def test_nothing_asked_of_attention_leaves_the_table_alone(wrapped):
    from transformers.modeling_utils import AttentionInterface

    _name, lens, batch, _ = wrapped
    before = dict(AttentionInterface._global_mapping)
    seen = []
    handle = lens.model.register_forward_hook(lambda *a: seen.append(dict(AttentionInterface._global_mapping)))
    try:
        testing._run_through(lens, batch, [r for r in testing.readable(lens) if r.site.startswith("resid")])
    finally:
        handle.remove()
    assert seen == [before]


@pytest.mark.parametrize("name", SHARED)
def test_shared_layers_are_refused(name):
    with pytest.raises(AnatomyError, match=SHARED[name]):
        interp.wrap(build(name), sample=inputs(name))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    "site", ["pattern", "scores", "q", "k", "v", "z", "result", "attn_out", "mlp_out", "resid_mid"]
)
def test_state_space_layers_refuse_attention(name, site):
    lens = interp.wrap(build(name))
    batch = lens.prepare(**inputs(name))
    with pytest.raises(UnsupportedError, match=site):
        lens.run(batch, [site])
    trace = lens.run(batch, ["resid_pre", "resid_post", "mixer_out"])
    total = trace["resid_pre", 1] + trace["mixer_out", 1]
    torch.testing.assert_close(total, trace["resid_post", 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "cohere"])
def test_parallel_blocks_have_no_middle(name):
    lens = interp.wrap(build(name))
    with pytest.raises(UnsupportedError, match="parallel"):
        lens.run(lens.prepare(**inputs(name)), ["resid_mid"])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_have_no_single_last_projection(name):
    lens = interp.wrap(build(name))
    with pytest.raises(UnsupportedError, match="experts"):
        lens.run(lens.prepare(**inputs(name)), ["mlp_act"])
    assert lens.run(lens.prepare(**inputs(name)), ["mlp_out.0"])["mlp_out", 0].abs().sum() > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2", "dinov2", "t5"])
def test_heads_and_bias_sum_to_attn_out(name):
    lens = interp.wrap(build(name), sample=inputs(name))
    batch = lens.prepare(**inputs(name))
    trace = lens.run(batch, ["result.1", "attn_out.1", "z.1"])
    part = lens.anatomy.attention(None, 1)
    gap = trace["attn_out", 1] - trace["result", 1].sum(2)
    # Without heads only the bias is left: the same at every position unless a post-norm scales it.
    if part.bias() is None and not part.chain:
        assert gap.abs().max() < 1e-5
    assert (gap - gap[:1, :1]).abs().max() < 1e-4 or part.chain
    assert trace["result", 1].shape == (*trace["attn_out", 1].shape[:2], part.n_heads, trace["attn_out", 1].shape[-1])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5", "qwen2_5_vl"])
def test_memory_stays_flat(name):
    lens = interp.wrap(build(name), sample=inputs(name))
    testing.check_memory(lens, lens.prepare(**inputs(name)))


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "mamba", "bert", "dinov2", "t5", "qwen2_5_vl", "mllama"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_proved_and_patterns_are_float32(name, dtype):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    lens = interp.wrap(build(name).to(dtype), sample=given)
    batch = lens.prepare(**given)
    testing.check_unchanged(lens, batch)
    for read in (r for r in testing.readable(lens) if r.site == "pattern"):
        for pattern in lens.run(batch, [read])[read].values():
            assert pattern.dtype == torch.float32
