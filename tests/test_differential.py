"""The same activations from independent implementations, on the same weights of SmolLM2."""

import copy

import pytest
import torch

from interp.sites import to_transformer_lens

pytestmark = pytest.mark.slow
PROMPTS = ["When Mary and John went to the store, John gave a drink to", "The keys to the cabinet"]
TOLERANCE = 1e-4


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def ours(smollm):
    batch = smollm.prepare(PROMPTS[0])
    sites = [
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "z",
        "q",
        "v",
        "pattern",
        "scores",
        "logits",
    ]
    return batch, smollm.run(batch, [*sites, "result.7"])


def test_transformer_lens(smollm, ours):
    """TransformerBridge where it is there (3.x and later), around the very same model object."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    batch, trace = ours
    bridge = bridges.TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=copy.deepcopy(smollm.model),
        tokenizer=smollm.processor,
        dtype=torch.float32,
    )
    logits, cache = bridge.run_with_cache(batch.inputs["input_ids"])
    assert relative(trace.logits, logits) < TOLERANCE
    compared = 0
    for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "pattern"):
        for layer in range(30):
            name = to_transformer_lens(site, layer)
            if name not in cache:
                continue
            theirs = cache[name]
            mine = trace[site, layer]
            assert relative(mine, theirs.reshape(mine.shape)) < TOLERANCE, name
            compared += 1
    assert compared >= 5 * 30


def test_nnsight(smollm, ours):
    nnsight = pytest.importorskip("nnsight")
    batch, trace = ours
    wrapped = nnsight.NNsight(copy.deepcopy(smollm.model))
    saved: list = []
    with torch.no_grad(), wrapped.trace(**batch.inputs):
        for layer in wrapped.model.layers:
            z = layer.self_attn.o_proj.input.save()
            attn = layer.self_attn.o_proj.output.save()
            mlp = layer.mlp.output.save()
            post = layer.output.save()
            saved.append((z, attn, mlp, post))
        logits = wrapped.lm_head.output.save()
    assert len(saved) == 30
    assert relative(trace.logits, logits) < TOLERANCE
    for i, (z, attn, mlp, post) in enumerate(saved):
        post = post[0] if isinstance(post, tuple) else post
        assert relative(trace["z", i].flatten(2), z) < TOLERANCE
        assert relative(trace["attn_out", i], attn) < TOLERANCE
        assert relative(trace["mlp_out", i], mlp) < TOLERANCE
        assert relative(trace["resid_post", i], post.reshape(trace["resid_post", i].shape)) < TOLERANCE


def test_transformers_eager_attentions_and_hidden_states(smollm, ours):
    """transformers' own eager attention maps and hidden states, from a copy of the model."""
    batch, trace = ours
    model = copy.deepcopy(smollm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch.inputs, output_attentions=True, output_hidden_states=True)
    for i, pattern in enumerate(out.attentions):
        assert float((trace["pattern", i] - pattern).abs().max()) < 1e-5
        assert relative(trace["resid_pre", i], out.hidden_states[i]) < 1e-5
    assert relative(trace.logits, out.logits) < 1e-5


def test_result_by_the_plain_formula(smollm, ours):
    _, trace = ours
    layer = smollm.model.model.layers[7]
    z = trace["z", 7]
    weight = layer.self_attn.o_proj.weight
    for head in range(9):
        wanted = z[:, :, head] @ weight[:, head * 64 : (head + 1) * 64].T
        assert relative(trace["result", 7][:, :, head], wanted) < 1e-5
    assert relative(trace["result", 7].sum(2), trace["attn_out", 7]) < 1e-5
