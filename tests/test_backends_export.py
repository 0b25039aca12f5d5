"""Traces as TransformerLens caches: its own functions accept them and agree with ours and with its own caches."""

import pytest
import torch

import interp
from interp import heads
from interp.data import repeated_tokens
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.sites import SITES, from_transformer_lens, to_transformer_lens
from tests.others import hooked, tokenizer_of
from tests.zoo import build

pytest.importorskip("transformer_lens")

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101, 85, 88]]
READS = ["embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "z", "pattern", "logits"]
ANSWERS, WRONG = [120, 121], [130, 131]


def close(one, two):
    assert one.shape == two.shape
    torch.testing.assert_close(one, two, atol=1e-4 * float(two.abs().max()), rtol=0)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox", "qwen3"])
def lens(request):
    return interp.wrap(build(request.param), tokenizer_of(request.param), name=request.param)


@pytest.fixture(scope="module")
def cache(lens):
    return lens.run(lens.prepare(input_ids=IDS), READS).to_transformer_lens()


@pytest.fixture(scope="module")
def theirs(lens):
    """The same weights as a HookedTransformer."""
    return hooked(lens.name)


def test_names_both_ways():
    for name, row in SITES.items():
        if row.lens_name is not None:
            hook = to_transformer_lens(name, 3 if row.per_layer else None)
            assert from_transformer_lens(hook) == (name, 3 if row.per_layer else None)


def test_the_same_as_its_own_cache(lens, cache, theirs):
    _, own = theirs.run_with_cache(torch.tensor(IDS))
    compared = 0
    for name, value in cache.items():
        if name in own:
            close(value.reshape(own[name].shape), own[name])
            compared += 1
    assert compared >= 3 * 7 + 2
    assert ("hook_pos_embed" in cache.cache_dict) == (lens.name == "gpt2")
    if lens.name == "gpt2":
        close(cache["hook_pos_embed"], own["hook_pos_embed"])
    assert torch.equal(cache["resid_post", -1], cache["blocks.2.hook_resid_post"])
    close(cache.decompose_resid(layer=3).sum(0), own["resid_post", 2])  # biases are in attn_out and mlp_out


def test_head_results_and_logit_attributions(lens, cache):
    """`stack_head_results`, `logit_attrs` and `accumulated_resid` agree with our direct effects and logits."""
    batch = lens.prepare(input_ids=IDS)
    stack, labels = cache.stack_head_results(return_labels=True, pos_slice=-1)
    parts = lens.anatomy.towers["text"].layers[0].attention["attn"]
    assert labels[:2] == ["L0H0", "L0H1"]
    result = lens.run(batch, "result")
    wanted = torch.stack([result["result", i][:, -1, h] for i in range(3) for h in range(parts.n_heads)])
    close(stack, wanted)
    found = cache.logit_attrs(stack, torch.tensor(ANSWERS), torch.tensor(WRONG), pos_slice=-1)
    ours = heads.direct_effect(lens, batch, answers=ANSWERS, wrong=WRONG)
    close(found.T.reshape(2, 3, -1), ours.per_prompt)
    every = cache.decompose_resid(pos_slice=-1)
    whole = cache.logit_attrs(every, torch.tensor(ANSWERS), torch.tensor(WRONG), pos_slice=-1).sum(0)
    logits = lens.run(batch, "logits").logits[:, -1]
    picked = torch.tensor(ANSWERS), torch.tensor(WRONG)
    difference = logits.gather(1, picked[0][:, None]) - logits.gather(1, picked[1][:, None])
    norm, head = cache.model.norm, lens.anatomy.unembed
    columns = head.direction(picked[0]) - head.direction(picked[1])
    bias = getattr(head.module, "bias", None)
    shift = columns @ norm.bias + (0.0 if bias is None else bias[picked[0]] - bias[picked[1]])
    close(whole + shift.detach(), difference[:, 0])


def test_the_logit_lens(lens, cache):
    """Streams through the final norm, computed anew by TransformerLens, times W_U: at the end the model's logits."""
    streams = cache.accumulated_resid(layer=-1, apply_ln=True, incl_mid=False)
    last = streams[-1] @ cache.model.W_U.detach()
    logits = lens.run(lens.prepare(input_ids=IDS), "logits").logits
    head = lens.anatomy.unembed
    bias = cache.model.norm.bias @ head.direction(torch.arange(logits.shape[-1])).T.detach()
    bias = bias + (0.0 if head.module.bias is None else head.module.bias.detach())
    close(last + bias, logits)


def test_neurons(lens, cache):
    results = cache.stack_neuron_results(layer=-1, pos_slice=-1)
    found = results.unflatten(0, (3, -1)).sum(1)
    for i in range(3):
        close(found[i] + cache.model.blocks[i].mlp.b_out, cache["mlp_out", i][:, -1])


def test_the_induction_head_detector(lens):
    """Over all rows there, over the rows that can show it here: the same mass of attention."""
    from transformer_lens.head_detector import detect_head

    ids = repeated_tokens(1, 8, allowed_ids=range(60, 140), seed=0)
    batch = lens.prepare(input_ids=ids)
    cache = lens.run(batch, "pattern").to_transformer_lens().remove_batch_dim()
    for kind, name, rows in (
        ("induction", "induction_head", 8),
        ("previous", "previous_token_head", 15),
        ("duplicate", "duplicate_token_head", 8),
    ):
        found = detect_head(cache.model, ids, name, cache=cache)
        close(found * 16 / rows, heads.patterns(lens, batch, score=kind).scores)


def test_result_of_post_norms_has_to_be_read():
    """Gemma 2 norms what attention gives: z W_O is not what is added, and is refused; what was read is taken."""
    lens = interp.wrap(build("gemma2"), name="gemma2")
    batch = lens.prepare(input_ids=IDS)
    cache = lens.run(batch, ["z", "resid_post"]).to_transformer_lens()
    with pytest.raises(UnsupportedError, match="read `result`"):
        cache.stack_head_results()
    with pytest.raises(UnsupportedError, match="no single projection ends its MLP"):
        _ = cache.model.blocks[0].mlp.W_out
    trace = lens.run(batch, ["result", "attn_out", "resid_post"])
    stack = trace.to_transformer_lens().stack_head_results()
    close(stack.unflatten(0, (len(cache.model.blocks), -1)).sum(1)[1], trace["attn_out", 1])


def test_what_does_not_go_out(lens):
    batch = lens.prepare(input_ids=IDS)
    with pytest.raises(SettingsError, match=r"pattern@last.* holds a part"):
        lens.run(batch, "pattern@last").to_transformer_lens()
    with pytest.raises(UnsupportedError, match="no hook for the tensor that 'k' names"):
        lens.run(batch, "k").to_transformer_lens()
    with pytest.raises(InputError, match="nothing for a cache"):
        lens.run(batch, "logits").to_transformer_lens()
    with pytest.raises(UnsupportedError, match=r"only the traces of lens\.run"):
        lens.generate(batch, max_new_tokens=1, reads="resid_post").trace.to_transformer_lens()
