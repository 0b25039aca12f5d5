"""One suite for every back end: the same weights give the same reads, edits and scores; the model stays as it was."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import interp
from interp import edits, testing
from interp.errors import InputError, UnsupportedError
from interp.sites import SITES, to_transformer_lens
from tests.conftest import packaged
from tests.others import BACKENDS, bridged, hooked, made, nnsighted, random_hooked, tokenizer_of
from tests.zoo import build, inputs

pytest.importorskip("transformer_lens")
pytest.importorskip("nnsight")

MODELS = ("gpt2", "llama")
OTHERS = BACKENDS[1:]
IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
OTHER = [[70, 80, 95, 100, 110, 75], [76, 81, 91, 101], [72, 82, 92, 107, 112]]
ANSWERS = {"answers": [120, 121, 122], "wrong": [130, 131, 132]}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def lenses():
    """Every back end's lens of every model, made when first asked for."""
    held = {}

    def get(backend, name):
        if (backend, name) not in held:
            held[backend, name] = interp.wrap(made(backend, name), tokenizer_of(name), name=name)
        return held[backend, name]

    return get


@pytest.fixture(scope="module", params=[(b, m) for b in OTHERS for m in MODELS], ids=lambda p: "-".join(p))
def both(request, lenses):
    """A back end's lens and that of transformers, on the same weights."""
    backend, name = request.param
    found, plain = lenses(backend, name), lenses("transformers", name)
    assert (found.backend, plain.backend) == (backend, "transformers")
    return found, plain


def close(one, two, where=None):
    where = torch.ones_like(one, dtype=torch.bool) if where is None else where
    assert one.shape == two.shape
    assert torch.equal(one.isfinite(), two.isfinite())
    scale = float(two[where & two.isfinite()].detach().abs().max())
    torch.testing.assert_close(one[where], two[where], atol=TOLERANCE * scale, rtol=0)


def batches(both, side="left", ids=IDS):
    return [lens.prepare(input_ids=ids, padding_side=side) for lens in both]


def sites_of(lens):
    return [s for s, row in SITES.items() if row.per_layer and lens.refusal(s, 0) is None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_reads(both, side):
    """Every site of every layer of a padded batch; what is refused is the same, too."""
    one, two = both
    sites = sites_of(two)
    assert sites_of(one) == sites
    assert len(sites) == 13
    batch, other = batches(both, side)
    read, wanted = one.run(batch, [*sites, "embed", "logits"]), two.run(other, [*sites, "embed", "logits"])
    real = batch.mask
    close(read.logits[real], wanted.logits[real])
    close(read["embed"][real], wanted["embed"][real])
    for site in sites:
        for layer in range(3):
            found, there = read[site, layer], wanted[site, layer]
            assert found.shape == there.shape, site
            if site in ("pattern", "scores"):  # of real queries, and of real keys where the mask is added
                keep = real[:, None, :, None] & real[:, None, None, :]
                keep = keep & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
                close(found[keep.expand_as(found)], there[keep.expand_as(there)])
            else:
                close(found[real], there[real])


def test_the_same_scores(both):
    batch, other = batches(both)
    found, wanted = (
        interp.attribution.rollout(x, b, target="last").scores for x, b in zip(both, (batch, other), strict=True)
    )
    close(found.nan_to_num(), wanted.nan_to_num())
    for lens in both:
        assert lens.prepare("a b 7").inputs["input_ids"].tolist() == tokenizer_of(lens.name)(["a b 7"]).input_ids
    words = [75, 80, 90, 100]
    found, wanted = (
        interp.heads.pursuit(x, b, words, random_lists=0, matched=False)
        for x, b in zip(both, (batch, other), strict=True)
    )
    close(found.scores, wanted.scores)
    assert float(wanted.scores.abs().max()) > 1e-3
    maps = []
    for lens in both:
        clean, corrupt = (lens.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER))
        maps.append(interp.tracing.patch_sweep(lens, clean, corrupt, sites=["resid_pre", "z", "mlp_out"], **ANSWERS))
    close(maps[0].values.nan_to_num(), maps[1].values.nan_to_num())


def test_the_same_under_an_edit(both):
    results = []
    for lens, batch in zip(both, batches(both), strict=True):
        change = [
            edits.ablate(site="z", layers=1, heads=[0, 2]),
            edits.splice(lambda x: x.flip(-1), site="pattern", layers=0),
            edits.steer(torch.linspace(-1, 1, 32), site="resid_post", layers=2, positions="last"),
        ]
        logits = lens.run(batch, ["logits@last"], change).logits
        grown = lens.generate(batch, edits=change, max_new_tokens=6, reads=["resid_post.2"])
        plain = lens.generate(batch, max_new_tokens=6)
        results.append((logits, lens.run(batch, ["logits@last"]).logits, grown, plain))
    (logits, before, grown, plain), wanted = results
    close(logits, wanted[0])
    assert float((logits - before).abs().max()) > 1e-2
    assert torch.equal(grown.tokens, wanted[2].tokens)
    assert torch.equal(plain.tokens, wanted[3].tokens)
    assert grown.texts == wanted[2].texts
    assert not torch.equal(grown.tokens, plain.tokens)
    close(grown.trace["resid_post", 2][:, 6:], wanted[2].trace["resid_post", 2][:, 6:])


def test_the_contract(both):
    """The battery that every wrapped model has to pass: gradients, entries, no-op edits, memory, hooks removed."""
    one, two = both
    found = testing.contract(one, one.prepare(input_ids=[r[:4] for r in IDS]))
    wanted = testing.contract(two, two.prepare(input_ids=[r[:4] for r in IDS]))
    refused = {k for k, v in found.items() if isinstance(v, str)}
    assert refused == {k for k, v in wanted.items() if isinstance(v, str)} == set()


def state(model):
    """All that wrapping could change in a model."""
    from transformers.modeling_utils import AttentionInterface

    root = getattr(model, "_module", model)
    config = getattr(root, "config", None)
    config = getattr(getattr(root, "original_model", None), "config", config)
    hooks = {}
    for name, m in root.named_modules():
        held = [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
        hooks[name] = [list(h) for h in held], id(m.__dict__.get("forward")), m.training, type(m)
    values = {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in root.named_parameters()}
    buffers = {n: (id(b), b.clone()) for n, b in root.named_buffers()}
    cfg = copy.deepcopy(vars(root.cfg)) if hasattr(root, "cfg") else None
    table = dict(AttentionInterface._global_mapping)
    settings = None if config is None else (config.to_dict(), config._attn_implementation, id(config))
    return hooks, values, buffers, settings, cfg, table


def same(one, two):
    for a, b in zip(one[1:3], two[1:3], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name][0] == b[name][0], name
            assert torch.equal(a[name][1].nan_to_num(), b[name][1].nan_to_num()), name
            assert a[name][2:] == b[name][2:], name
    assert (one[0], *one[3:]) == (two[0], *two[3:])


def own_results(model, backend, ids):
    """Logits, and one activation by the library's own means."""
    if backend == "nnsight":
        layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        with model.trace(ids):
            post = layers[1].output.save()
            logits = model.lm_head.output.save()
        return logits, post[0] if isinstance(post, tuple) else post
    if backend == "transformers":
        out = model(ids, output_hidden_states=True)
        return out.logits, out.hidden_states[2]
    logits, cache = model.run_with_cache(ids)
    return logits, cache["blocks.1.hook_resid_post"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_stays_as_it_was(backend, name):
    """Parameters, buffers, configuration, hooks, modes and the attention table; its own tools go on as before."""
    model = made(backend, name)
    ids = torch.tensor(IDS[:1])
    logits, stream = own_results(model, backend, ids)
    before = state(model)
    lens = interp.wrap(model, tokenizer_of(name))
    batch = lens.prepare(input_ids=ids)
    trace = lens.run(batch, ["logits", "resid_post.1", "pattern"], edits.scale_heads([(0, 0)], 1.0))
    lens.generate(batch, max_new_tokens=2, edits=edits.ablate(site="z", layers=0, heads=0))
    same(state(model), before)
    again = own_results(model, backend, ids)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], stream)
    close(trace.logits, logits)
    close(trace["resid_post", 1], stream)
    del lens, trace
    same(state(model), before)


@pytest.mark.parametrize("backend", OTHERS)
def test_no_weight_is_copied(backend):
    """Every parameter lies in the given model's memory; a weight that is changed there, or moved, is changed here."""
    model = made(backend, "gpt2")
    lens = interp.wrap(model, tokenizer_of("gpt2"))
    root = getattr(model, "_module", model)
    spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in root.parameters()]
    for name, p in lens.model.named_parameters():
        assert any(first <= p.data_ptr() < last for first, last in spans), name
    batch = lens.prepare(input_ids=IDS[:1])
    before = lens.run(batch, "logits").logits
    with torch.no_grad():
        for p in root.parameters():
            p.mul_(0.9)
    after = lens.run(batch, "logits").logits
    assert float((after - before).abs().max()) > 1e-2
    close(after, own_results(model, backend, batch.inputs["input_ids"])[0])
    root.to(torch.float64)
    wide = lens.run(batch, "logits").logits
    assert wide.dtype == torch.float64
    close(wide.float(), after)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "qwen3"])
def test_processed_weights(name):
    """Folded norms and centred weights are other weights of the same function, and the same ones in both classes."""
    lenses = [interp.wrap(f(name, processed=True), name=name) for f in (hooked, bridged)]
    plain = interp.wrap(build(name), name=name)
    one, two, three = (
        x.run(b, ["resid_post", "attn_out", "result", "logits"])
        for x, b in zip((*lenses, plain), batches((*lenses, plain)), strict=True)
    )
    real = batches(lenses)[0].mask
    for site in ("resid_post", "attn_out", "result"):
        for layer in range(3):
            close(one[site, layer][real], two[site, layer][real])
    close(one.logits.log_softmax(-1)[real], three.logits.log_softmax(-1)[real])
    close(two.logits.log_softmax(-1)[real], three.logits.log_softmax(-1)[real])
    if name == "gpt2":
        assert float((one["resid_post", 0] - three["resid_post", 0])[real].abs().max()) > 1e-2
        assert float(one["resid_post", 2].mean(-1)[real].abs().max()) < 1e-5  # centred


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2", "gemma2", "gemma3", "phi3", "olmo2", "mixtral"])
def test_more_bridges(name):
    """A bridge of any architecture gives what the model inside gives, or is refused by name."""
    lens, plain = interp.wrap(bridged(name), name=name), interp.wrap(build(name), name=name)
    batch, other = batches((lens, plain))
    one, two = lens.run(batch, ["z", "pattern@last", "logits"]), plain.run(other, ["z", "pattern@last", "logits"])
    close(one.logits[batch.mask], two.logits[batch.mask])
    for layer in range(len(plain.anatomy.towers["text"].layers)):
        close(one["z", layer][batch.mask], two["z", layer][batch.mask])
        close(one["pattern", layer], two["pattern", layer])


def test_a_bridge_with_images():
    """The vision tower of a vision-language model is read as without the bridge."""
    given = inputs("llava")
    lens, plain = interp.wrap(bridged("llava"), sample=given), interp.wrap(build("llava"), sample=given)
    assert set(lens.anatomy.towers) == {"text", "vision"}
    reads = ["resid_post", "z", "vision:resid_post", "vision:pattern", "vision:z", "logits"]
    one, two = (x.run(x.prepare(**given), reads) for x in (lens, plain))
    close(one.logits, two.logits)
    for read in reads[:-1]:
        close(one[read, 1], two[read, 1])


GATED = {
    "gated_mlp": True,
    "act_fn": "silu",
    "normalization_type": "RMS",
    "final_rms": True,
    "positional_embedding_type": "rotary",
    "n_key_value_heads": 2,
}
LOCAL = {"use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"]}
CONFIGS = {
    "LNPre": {"normalization_type": "LNPre"},
    "RMSPre": GATED | {"normalization_type": "RMSPre"},
    "attention only, no norm": {"attn_only": True, "normalization_type": None},
    "SoLU": {"act_fn": "solu_ln"},
    "SoLU folded": {"act_fn": "solu_ln", "normalization_type": "LNPre"},
    "BLOOM": {"positional_embedding_type": "alibi", "post_embedding_ln": True},
    "GPT-Neo": LOCAL | {"use_attn_scale": False},
    "GPT-J": {
        "positional_embedding_type": "rotary",
        "rotary_dim": 2,
        "rotary_adjacent_pairs": True,
        "parallel_attn_mlp": True,
    },
    "Gemma 2": GATED
    | LOCAL
    | {
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 2.0,
        "output_logits_soft_cap": 3.0,
        "attn_scale": 3.0,
    },
    "Gemma 3": GATED | LOCAL | {"use_qk_norm": True, "rotary_base_local": 1000, "rotary_scaling_factor": 8.0},
    "OLMo 2": GATED | {"original_architecture": "Olmo2ForCausalLM", "n_key_value_heads": None},
    "sinks": GATED | {"use_attention_sinks": True},
    "Llama 3": GATED | {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 8},
    "yarn": GATED | {"use_yarn_rope": True, "yarn_attention_factor": 1.2, "yarn_original_max_position_embeddings": 8},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "experts": GATED | {"num_experts": 4, "experts_per_token": 2},
    "other output vocabulary": {"d_vocab_out": 7},
    "xIELU": {"act_fn": "xielu"},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_hooked_configurations(config):
    """Against TransformerLens's own cache, padded on the left, and against generation without a cache."""
    model = random_hooked(**CONFIGS[config])
    lens = interp.wrap(model)
    generator = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(50, (2, 9), generator=generator), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    batch = lens.prepare(input_ids=ids, attention_mask=mask)
    logits, cache = model.run_with_cache(ids, attention_mask=mask, prepend_bos=False)
    close(lens.run(batch, "logits").logits[batch.mask], logits[batch.mask])
    compared = 0
    for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act", "z", "v", "pattern"):
        for layer in range(2):
            name = to_transformer_lens(site, layer)
            if name not in cache or lens.refusal(site, layer) is not None:
                continue
            found, wanted = lens.run(batch, [f"{site}.{layer}"])[site, layer], cache[name]
            close(found[batch.mask], wanted[batch.mask]) if site != "pattern" else close(found[1], wanted[1])
            compared += 1
    assert compared >= 12
    some = ("unchanged", "proof", "no_op", "padding", "ablation", "stop", "entry", "removed")
    checks = testing.contract(lens, lens.prepare(input_ids=ids[:, :4]), only=some)
    assert not [v for v in checks.values() if isinstance(v, str)], checks
    if model.cfg.d_vocab_out == model.cfg.d_vocab:
        for _ in range(5):
            newest = model(ids, attention_mask=mask, prepend_bos=False)[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, newest], 1), nn.functional.pad(mask, (0, 1), value=1)
        assert torch.equal(lens.generate(batch, max_new_tokens=5).sequences, ids)


REFUSED = {
    "positional_embedding_type='shortformer'": {"positional_embedding_type": "shortformer"},
    "attention_dir='bidirectional'": {"attention_dir": "bidirectional"},
    "use_logn_attn=True": GATED | {"n_key_value_heads": None, "use_logn_attn": True, "train_seq_length": 8},
    "use_dynamic_ntk_rope=True": GATED | {"n_key_value_heads": None, "use_dynamic_ntk_rope": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_hooked_transformer_may_not_have(what):
    with pytest.raises(UnsupportedError, match=what):
        interp.wrap(random_hooked(**REFUSED[what]))


def test_prompts_begin_as_they_do_there():
    """Without a processor of its own a lens has the bridge's tokenizer, which begins prompts as `to_tokens` does."""
    bridge = bridged("llama")
    lens = interp.wrap(bridge)
    found = lens.prepare("a b 7").inputs["input_ids"].tolist()
    assert found == bridge.to_tokens("a b 7").tolist()
    assert found[0][0] == bridge.tokenizer.bos_token_id


@pytest.mark.parametrize("make", [hooked, bridged])
def test_hooks_that_change_the_model_are_refused(make):
    """A lens does not run the hook points: a hook that only looks is no harm, one that changes something is told."""
    model, seen = make("gpt2"), []
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: seen.append(1))
    interp.wrap(model)
    assert seen
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: 0.5 * x)
    with pytest.raises(UnsupportedError, match="2 hooks, which are not run here: reset_hooks"):
        interp.wrap(model)
    model.reset_hooks()
    interp.wrap(model)


def test_edits_of_nnsight_are_refused():
    model = nnsighted("gpt2")
    with model.edit(inplace=True):
        model.lm_head.output[:] = 0
    with pytest.raises(UnsupportedError, match="edits of its own"):
        interp.wrap(model)
    model.clear_edits()
    interp.wrap(model)


def test_nnsight_by_its_older_names(tmp_path):
    """LanguageModel; weights that are loaded when they are first needed; a bare NNsight; a part of a model."""
    import nnsight

    model = build("llama")
    model.save_pretrained(tmp_path)
    lazy = nnsight.LanguageModel(str(tmp_path), tokenizer=tokenizer_of("llama"))
    assert not lazy.dispatched
    lens = interp.wrap(lazy)
    assert lens.processor is lazy.tokenizer
    wanted = model(torch.tensor(IDS[:1])).logits
    close(lens.run(lens.prepare(input_ids=IDS[:1]), "logits").logits, wanted)
    with lazy.trace(torch.tensor(IDS[:1])):
        logits = lazy.lm_head.output.save()
    close(logits, wanted)
    bare = interp.wrap(nnsight.NNsight(build("llama")))
    close(bare.run(bare.prepare(input_ids=IDS[:1]), "logits").logits, wanted)
    inner = interp.wrap(nnsight.NNsight(build("llama")).model)
    assert "logits" in inner.anatomy.refused


def test_no_model_of_a_back_end():
    import nnsight
    from transformer_lens import HookedEncoder, HookedTransformerConfig

    with pytest.raises(InputError, match="got Linear"):
        interp.wrap(nn.Linear(2, 2))
    with pytest.raises(InputError, match="wraps a Linear"):
        interp.wrap(nnsight.NNsight(nn.Linear(2, 2)))
    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_mlp=8, d_vocab=9, act_fn="gelu", device="cpu"
    )
    with pytest.raises(UnsupportedError, match="a HookedEncoder is refused"):
        interp.wrap(HookedEncoder(config))


def test_folding_into_a_hooked_transformer():
    """`fold` writes into the HookedTransformer's own W_O, and takes it back."""
    model = hooked("llama")
    lens = interp.wrap(model, name="llama")
    batch = lens.prepare(input_ids=IDS[:1])
    wanted = lens.run(batch, "logits", edits.scale_heads([(1, 2)], 0.0)).logits
    before = model.blocks[1].attn.W_O.clone()
    with interp.heads.fold(lens, [(1, 2)], scale=0.0):
        assert float(model.blocks[1].attn.W_O[2].detach().abs().max()) == 0.0
        close(model(torch.tensor(IDS[:1])), wanted)
    assert torch.equal(model.blocks[1].attn.W_O, before)


def test_other_libraries_are_not_imported():
    script = (
        "import sys, interp; from tests.zoo import build; interp.wrap(build('gpt2'));"
        "print([m for m in ('transformer_lens', 'nnsight') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["HookedTransformer", "TransformerBridge"])
def test_a_real_model(backend):
    from experiments.benchmarks.peers import hooked_transformer

    plain = packaged("smollm2-135m")
    if backend == "HookedTransformer":
        model = hooked_transformer(plain)
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            hf_model=copy.deepcopy(plain.model),
            tokenizer=plain.processor,
            dtype=torch.float32,
        )
    lens = interp.wrap(model, plain.processor)
    prompts = ["When Mary and John went to the store, John gave a drink to", "The keys to the cabinet"]
    one, two = lens.prepare(prompts), plain.prepare(prompts)
    reads = ["resid_post", "z", "pattern@last", "logits@last"]
    found, wanted = lens.run(one, reads), plain.run(two, reads)
    close(found.logits, wanted.logits)
    for layer in range(30):
        close(found["z", layer][one.mask], wanted["z", layer][one.mask])
        close(found["resid_post", layer][one.mask], wanted["resid_post", layer][one.mask])
    assert lens.generate(one, max_new_tokens=8).texts == plain.generate(two, max_new_tokens=8).texts
