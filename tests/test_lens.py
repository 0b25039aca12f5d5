"""Lens: reads, entries, caches, gradients and what wrapping leaves alone."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import interp
from interp import edits
from interp.engine.entry import Entry
from interp.engine.recorder import any_nan
from interp.testing import hooks_of, plain_output
from tests.zoo import build, inputs, processor


@pytest.fixture(scope="module")
def lens():
    return interp.wrap(build("llama"), processor("llama"), name="tiny")


@pytest.fixture(scope="module")
def batch(lens):
    return lens.prepare(["The cat sat on the mat.", "A dog ran."])


def test_wrapping_copies_and_changes_nothing():
    model = build("llama")
    before = {n: (p.data_ptr(), p.requires_grad, p._version) for n, p in model.named_parameters()}
    config = model.config.to_dict()
    gc.collect()
    held = sum(t.nbytes for t in gc.get_objects() if type(t) is torch.nn.Parameter)
    lens = interp.wrap(model)
    lens.run(lens.prepare(**inputs("llama")), ["pattern", "z", "logits"])
    gc.collect()
    assert sum(t.nbytes for t in gc.get_objects() if type(t) is torch.nn.Parameter) == held
    assert {n: (p.data_ptr(), p.requires_grad, p._version) for n, p in model.named_parameters()} == before
    assert model.config.to_dict() == config
    assert lens.model is model


def test_training_mode_is_given_back(lens, batch):
    lens.model.train()
    try:
        noisy = lens.run(batch, ["resid_post.2"])["resid_post", 2]
        assert all(m.training for m in lens.model.modules())
    finally:
        lens.model.eval()
    assert torch.equal(noisy, lens.run(batch, ["resid_post.2"])["resid_post", 2])


def test_results_hold_no_graph(lens, batch):
    trace = lens.run(batch, ["z"], gradients=["z"], metric=lambda logits: logits[:, -1, 0])
    assert all(not t.requires_grad for t in [*trace.values.values(), *trace.gradients.values()])
    assert all(p.grad is None and p.requires_grad for p in lens.model.parameters())


def test_lookups(lens, batch):
    trace = lens.run(batch, ["resid_post", "pattern@last", "pattern.1/0", "embed", "logits@last"])
    assert sorted(trace["resid_post"]) == [0, 1, 2]
    assert trace["pattern@last", 1].shape[2] == 1
    assert trace["pattern.1/0", 1].shape[1] == 1
    assert trace["embed"].shape == trace["resid_post", 0].shape
    assert trace["blocks.2.hook_resid_post"].equal(trace["resid_post", 2])
    assert trace.logits.shape[1] == 1
    assert trace.nbytes == sum(t.nbytes for t in trace.values.values())
    with pytest.raises(interp.errors.UnknownNameError, match="ambiguous"):
        trace["pattern", 1]
    with pytest.raises(interp.errors.UnknownNameError, match=r"It holds: .*resid_post"):
        trace["z", 1]
    with pytest.raises(interp.errors.UnknownNameError, match=r"were: \[0, 1, 2\]"):
        trace["resid_post", 7]
    assert trace["resid_post", -1].equal(trace["resid_post", 2])
    both = lens.run(batch, ["resid_post.1", "resid_post.1@last", "resid_post.-1"])
    assert both["resid_post", 1].shape[1] == batch.mask.shape[1]
    assert both["resid_post.1@last", 1].shape[1] == 1
    assert both["resid_post.-1"].equal(both["resid_post", -1])


def test_transformer_lens_names_read_the_same_tensor(lens, batch):
    trace = lens.run(batch, ["blocks.1.attn.hook_z", "z.1"])
    assert len(trace.values) == 1
    assert trace["blocks.1.attn.hook_z"].equal(trace["z", 1])


def test_a_repeated_run_gives_the_same_and_leaves_nothing(lens, batch):
    """The plan of a run that only reads is remembered; the hooks are not, and edits are not part of it."""
    reads = ["resid_pre", "z", "attn_out", "mlp_out", "pattern@last", "resid_post@text|mean"]
    before, first = hooks_of(lens.model), lens.run(batch, reads)
    remembered = len(lens.anatomy.plans)
    edited = lens.run(batch, reads, edits.ablate(layers=0, heads=1))
    assert not edited["z", 0].equal(first["z", 0])
    again = lens.run(batch, reads)
    assert list(again.values) == list(first.values)
    assert all(again.values[key].equal(value) for key, value in first.values.items())
    assert len(lens.anatomy.plans) == remembered
    assert hooks_of(lens.model) == before


def test_a_read_and_an_edited_read_see_the_same_module(lens, batch):
    """Reads of z and attn_out share a hook, unless z is edited; the values are the same either way."""
    plain = lens.run(batch, ["z", "attn_out"])
    same = lens.run(batch, ["z", "attn_out"], edits.splice(lambda x: x.clone(), site="z"))
    alone = {**lens.run(batch, ["z"]).values, **lens.run(batch, ["attn_out"]).values}
    for key, value in plain.values.items():
        assert value.equal(same.values[key])
        assert value.equal(alone[key])
    double = lens.run(batch, ["z", "attn_out"], edits.splice(lambda x: x * 2, site="z", layers=0))
    assert double["z", 0].equal(plain["z", 0] * 2)
    torch.testing.assert_close(double["attn_out", 0], plain["attn_out", 0] * 2)


@pytest.mark.parametrize("read", ["pattern@last", "attn_out@last", "resid_mid@last", "mlp_out|norm", "k@0"])
def test_a_run_holds_no_more_than_was_asked_for(lens, batch, read):
    """The streams of lower layers are free while a higher layer runs."""
    streams, alive = [], []
    first, _, last = lens.model.model.layers
    hooks = [
        first.register_forward_hook(lambda m, a, out: streams.append(weakref.ref(out))),
        last.register_forward_hook(lambda m, a, out: alive.append(streams[0]() is not None)),
    ]
    lens.run(batch, [read, "logits"])
    for hook in hooks:
        hook.remove()
    assert alive == [False]


def test_sums_that_find_a_nan():
    inf, one = torch.tensor([1.0, torch.inf]), torch.ones(2, 3)
    assert not any_nan([one, one.double(), one.half(), one.bfloat16(), one.long(), inf, -inf])
    for bad in (one.half(), one.double(), one.clone()):
        bad[1, 1] = torch.nan
        assert any_nan([one, bad, one.half()])
    assert not any_nan([])
    assert not any_nan([one.half() * 60000])


def test_refusals_and_vocabulary(lens):
    assert lens.vocabulary == lens.model.config.vocab_size
    assert lens.refusal("pattern", 1) is None
    assert "mixer_out" in lens.refusal("mixer_out", -1)
    with pytest.raises(interp.errors.UnsupportedError) as raised:
        interp.Lens.run(lens, lens.prepare(["a"]), ["mixer_out.1"])
    assert lens.refusal("mixer_out", 1) == str(raised.value)
    with pytest.raises(interp.errors.UnknownNameError, match="layer 9"):
        lens.refusal("pattern", 9)
    with pytest.raises(interp.errors.SettingsError, match="not per layer"):
        lens.refusal("logits", 0)


def test_logits_of_chosen_positions(lens, batch):
    whole = lens.run(batch, ["logits"]).logits
    last = lens.run(batch, ["logits@last"]).logits
    torch.testing.assert_close(last[:, 0], whole[:, -1])
    some = lens.run(batch, ["logits@0"]).logits
    for i in range(2):
        first = int(batch.mask[i].int().argmax())
        assert torch.equal(some[i, 0], whole[i, first])
    right = lens.prepare(["The cat sat on the mat.", "A dog ran."], padding_side="right")
    torch.testing.assert_close(lens.run(right, ["logits@last"]).logits, last, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole, plain_output(lens, batch)["logits"])


def test_unembed_is_the_models_own_head(lens, batch):
    trace = lens.run(batch, ["resid_post.2", "logits"])
    assert torch.equal(lens.unembed(trace["resid_post", 2]), trace.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "qwen2_vl", "llava", "bart", "whisper"])
def test_entry_behind_any_prefix(name):
    """Every start column, with an edit in the part that is computed: equal to the edited full run."""
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    batch = lens.prepare(**given)
    full = lens.run(batch, ["resid_pre"], cache=True)
    width, last = batch.mask.shape[1], len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
    change = edits.splice(lambda x: x * 1.5, site="mlp_out", layers=last, positions="last")
    wanted = lens.run(batch, [f"resid_post.{last}"], change)["resid_post", last]
    for start in {1, width // 2, width - 1}:
        for layer in {0, 1, last}:
            resid = full["resid_pre", layer][:, start:]
            entry = Entry(layer, resid, start=start, prefix=full.cache)
            found = lens.run(batch, [f"resid_post.{last}"], change, entry=entry)["resid_post", last]
            torch.testing.assert_close(found, wanted[:, start:], atol=2e-5, rtol=1e-4)


def test_entry_inside_an_image_that_is_seen_both_ways_is_refused():
    given = inputs("gemma3_vl")
    lens = interp.wrap(build("gemma3_vl"), sample=given)
    batch = lens.prepare(**given)
    full = lens.run(batch, ["resid_pre.1"], cache=True)
    behind = int(batch.image_mask.int().cumsum(1).argmax(1).max()) + 1
    inside = int(batch.image_mask[0].nonzero()[2])
    resid = full["resid_pre", 1]
    lens.run(batch, ["resid_post.1"], entry=Entry(1, resid[:, behind:], start=behind, prefix=full.cache))
    with pytest.raises(interp.errors.UnsupportedError, match="not causal"):
        lens.run(batch, ["resid_post.1"], entry=Entry(1, resid[:, inside:], start=inside, prefix=full.cache))


def test_a_prefix_can_be_used_many_times(lens, batch):
    full = lens.run(batch, ["resid_pre.1"], cache=True)
    kept = [x.keys.clone() for x in full.cache.key_values.layers]
    entry = Entry(1, full["resid_pre", 1][:, 5:], start=5, prefix=full.cache)
    first = lens.run(batch, ["resid_post.2"], entry=entry)["resid_post", 2]
    assert torch.equal(lens.run(batch, ["resid_post.2"], entry=entry)["resid_post", 2], first)
    assert all(torch.equal(a, x.keys) for a, x in zip(kept, full.cache.key_values.layers, strict=True))


def test_entry_skips_the_layers_below(lens, batch):
    full = lens.run(batch, ["resid_pre.2"])
    seen = []
    handles = [
        x.self_attn.q_proj.register_forward_hook(lambda *a, i=i: seen.append(i))
        for i, x in enumerate(lens.model.model.layers)
    ]
    try:
        lens.run(batch, ["resid_post.2"], entry=Entry(2, full["resid_pre", 2]))
    finally:
        for h in handles:
            h.remove()
    assert seen == [2]


def test_gradients_with_respect_to_every_site(lens, batch):
    """The gradient of a metric that reads the site's own value is that metric's plain derivative."""
    reads = [
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "mlp_act",
        "q",
        "k",
        "v",
        "scores",
        "pattern",
        "z",
    ]
    trace = lens.run(batch, ["logits"], gradients=[f"{s}.2" for s in reads] + ["embed"], metric=lambda x: x[:, -1, 7])
    for site in reads:
        gradient = trace.gradient(site, 2)
        assert gradient.abs().sum() > 0, site
        assert gradient.shape == lens.run(batch, [f"{site}.2"])[site, 2].shape
    # The stream's gradient at the last layer's end is the unembedding row through the norm's Jacobian, by autograd.
    post = lens.run(batch, ["resid_post.2"])["resid_post", 2][:, -1].clone().requires_grad_()
    wanted = torch.autograd.grad(lens.anatomy.unembed(post)[:, 7].sum(), post)[0]
    torch.testing.assert_close(trace.gradient("resid_post", 2)[:, -1], wanted, atol=1e-6, rtol=1e-4)
    assert trace.metric.shape == (2,)
    assert trace.gradient("embed").shape == (2, batch.mask.shape[1], 32)


def test_gradients_of_chosen_heads_and_positions(lens, batch):
    whole = lens.run(batch, gradients=["z.1"], metric=lambda x: x[:, -1, 7]).gradient("z", 1)
    some = lens.run(batch, gradients=["z.1/2@last"], metric=lambda x: x[:, -1, 7]).gradient("z.1/2@last", 1)
    torch.testing.assert_close(some[:, 0, 0], whole[:, -1, 2])


def test_threads_take_turns(lens, batch):
    """Runs, generations and single layers in several threads are what they are one after the other."""
    prefix = lens.run(batch, "resid_pre.0", cache=True).cache
    left = lens.prepare(["The cat sat on the mat.", "A dog ran."], padding_side="left")
    samples, start = torch.arange(2), batch.mask.shape[1] - 1

    def work(i):
        """A different read, edit and kind of run for each."""
        off = edits.scale_heads(float(i), layers=1, heads=[i % 4])
        if i % 3 == 2:
            return lens.generate(left, off, max_new_tokens=4, min_new_tokens=4).sequences
        if i % 3:
            return lens.stepper(batch, prefix).rows(samples, start).step(1, torch.full((2, 1, 32), 0.1), off)
        return lens.run(batch, ["pattern.2", "resid_post.1", "logits"], off).logits

    wanted = [work(i) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, list(range(24)) * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted * 2, strict=True))
    assert not hooks_of(lens.model)


def test_towers_found_later_are_added():
    """Without a processor the vision tower is found on the first batch with images."""
    lens = interp.wrap(build("llava"))
    assert set(lens.anatomy.towers) == {"text"}
    batch = lens.prepare(**inputs("llava"))
    assert lens.run(batch, ["vision:resid_post.0"])["vision:resid_post", 0].abs().sum() > 0
    assert set(lens.anatomy.towers) == {"text", "vision"}


def test_a_model_that_shows_itself_with_images_only():
    lens = interp.wrap(build("mllama"))
    assert "not seen yet" in repr(lens)
    with pytest.raises(interp.errors.AnatomyError, match="first batch with images"):
        _ = lens.anatomy
    batch = lens.prepare(**inputs("mllama"))
    assert lens.run(batch, ["cross:pattern"])["cross:pattern", 1].shape[1] == 4


def test_encoder_decoder_texts():
    lens = interp.wrap(build("bart"), processor("bart"))
    batch = lens.prepare(["The cat sat.", "A dog"], targets=["Le chat", "Un"])
    assert batch.source_mask.sum() == 12 + 5
    assert batch.mask.sum() == 7 + 2
    pattern = lens.run(batch, ["cross:pattern.0"])["cross:pattern", 0]
    assert pattern[1, :, :2, 5:].abs().sum() == 0
    with pytest.raises(interp.errors.InputError, match="1 targets for 2"):
        lens.prepare(["a", "b"], targets=["c"])


def test_reprs(lens, batch):
    assert repr(lens) == "Lens(tiny, LlamaForCausalLM, text: 3 layers of 32)"
    assert "2 samples, 23 columns, 33 tokens" in repr(batch)
    assert "resid_post x3" in repr(lens.run(batch, ["resid_post"]))
