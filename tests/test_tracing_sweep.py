"""Sweeps of patches against the loop that makes one whole run for each cell, written here without the engine's help."""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

import interp
from interp import edits
from interp.data import scenes
from interp.errors import FileError, InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.tracing import CausalMap, patch_sweep, progress
from tests.conftest import packaged
from tests.zoo import build, inputs, processor

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
IOI = {"answers": [" Mary"], "wrong": [" John"]}
IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
OTHER = [[70, 80, 95, 100, 110, 75], [76, 81, 91, 101], [72, 82, 92, 107, 112]]
ANSWERS = {"answers": [120, 121, 122], "wrong": [130, 131, 132]}


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def pair(llama):
    return [llama.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER)]


def naive(lens, source, base, site, layers, mask, head=-1, held=()):
    """All logits of the base run in which one cell is set to the source run's values; `mask` is [batch, pos]. What is
    `held` (site and layer) is set to the base run's values there."""
    tower, _, name = site.rpartition(":")
    by_query = name in ("pattern", "scores")
    changes = []
    for kind, layer in held:
        value = lens.run(base, f"{kind}.{layer}")[kind, layer]
        keep = mask[..., None]
        changes.append(edits.splice(lambda old, v=value, m=keep: torch.where(m, v, old), site=kind, layers=layer))
    for layer in layers:
        read = interp.Read(name, layers=(layer,), tower=tower or None)
        value = lens.run(source, read)[read, layer]

        def change(old, value=value):
            keep = mask[:, None, :, None] if by_query else mask.reshape(*mask.shape, *[1] * (old.ndim - 2))
            keep = keep.expand_as(old)
            if head >= 0:
                axis = 1 if by_query else 2
                one = torch.zeros(old.shape[axis], dtype=torch.bool)
                one[head] = True
                keep = keep & one.reshape(*[-1 if a == axis else 1 for a in range(old.ndim)])
            return torch.where(keep, value, old)

        changes.append(edits.splice(change, site=name, layers=layer, tower=tower or None))
    return lens.run(base, "logits", changes).logits


def column(batch, position):
    ranks = batch.mask.long().cumsum(1) - 1
    return batch.mask & (ranks == position)


def difference(logits, mask, good, bad):
    last = logits[torch.arange(len(logits)), (mask * torch.arange(mask.shape[1])).argmax(1)]
    rows = torch.arange(len(last))
    return last[rows, torch.tensor(good)] - last[rows, torch.tensor(bad)]


# --- a real model against hooks that know nothing of this package ---------------------------------------------------


def hooked(model, ids, module, where, value, position, head=None):
    """The last logits when a module's output (or the input of one) is replaced at a position (and head)."""

    def swap(x):
        x = x.clone()
        if head is None:
            x[:, position] = value[:, position]
        else:
            x[:, position, head * 64 : head * 64 + 64] = value[:, position, head * 64 : head * 64 + 64]
        return x

    if where == "in":
        handle = module.register_forward_pre_hook(lambda m, a: (swap(a[0]), *a[1:]))
    else:
        handle = module.register_forward_hook(lambda m, a, o: (swap(o[0]), *o[1:]) if isinstance(o, tuple) else swap(o))
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        handle.remove()


def recorded(model, ids, modules):
    kept, handles = {}, []
    for name, (module, where) in modules.items():
        if where == "in":
            handles.append(module.register_forward_pre_hook(lambda m, a, n=name: kept.__setitem__(n, a[0])))
        else:
            hook = lambda m, a, o, n=name: kept.__setitem__(n, o[0] if isinstance(o, tuple) else o)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return kept, logits


def test_smollm_against_plain_hooks(smollm):
    clean, corrupt = smollm.prepare([CLEAN]), smollm.prepare([CORRUPT])
    assert clean.mask.shape[1] == 14
    model, layers = smollm.model, smollm.model.model.layers
    good, bad = (smollm.processor(x, add_special_tokens=False)["input_ids"][0] for x in (" Mary", " John"))
    some = {
        "resid_pre": (0, 12, 29),
        "attn_out": (0, 16, 29),
        "mlp_out": (0, 9, 29),
        "z": (17,),
    }
    modules = {}
    for site, chosen in some.items():
        for i in chosen:
            layer = layers[i]
            modules[site, i] = {
                "resid_pre": (layer, "in"),
                "attn_out": (layer.self_attn, "out"),
                "mlp_out": (layer.mlp, "out"),
                "z": (layer.self_attn.o_proj, "in"),
            }[site]
    kept, logits = recorded(model, clean.inputs["input_ids"], modules)
    worst = 0.0
    for site, chosen in some.items():
        found = patch_sweep(smollm, clean, corrupt, sites=site, layers=chosen, **IOI)
        assert float(found.clean) == pytest.approx(float(logits[good] - logits[bad]), abs=1e-4)
        for (_, layer, head, group), value in zip(found.cells.tolist(), found.values[:, 0].tolist(), strict=True):
            position = int(found.groups[group])
            if position not in ((9, 11, 13) if layer == 0 else (9, 13)):
                continue
            module, where = modules[site, layer]
            ids = corrupt.inputs["input_ids"]
            last = hooked(model, ids, module, where, kept[site, layer], position, None if head < 0 else head)
            worst = max(worst, abs(float(last[good] - last[bad]) - value))
    assert worst < 1e-4, worst


def test_smollm_names_and_invariants(smollm):
    """Everything at one layer, or the last token of the last stream, brings all back; what comes before the names
    differ brings nothing."""
    clean, corrupt = smollm.prepare([CLEAN]), smollm.prepare([CORRUPT])
    groups = {"everything": "all", "last": "last", "before": slice(0, 9)}
    found = patch_sweep(
        smollm, clean, corrupt, sites=("resid_pre", "resid_post"), layers=(0, 13, 29), positions=groups, **IOI
    )
    frame = found.frame().set_index(["site", "layer", "group"])
    effect = frame["effect"]
    for layer in (0, 13, 29):
        assert effect["resid_pre", layer, "everything"] == pytest.approx(1, abs=1e-5)
        assert effect["resid_pre", layer, "before"] == 0
        assert effect["resid_post", layer, "everything"] == pytest.approx(1, abs=1e-5)
    assert effect["resid_post", 29, "last"] == pytest.approx(1, abs=1e-6)
    assert effect["resid_pre", 0, "last"] == 0  # the same token
    assert found.settings["way"] == "carried"


# --- families: every site, on the way that each of them takes ------------------------------------------------------


SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mixer_out", "z", "q", "k", "v", "pattern"]
CROSS = ["cross:attn_out", "cross:z", "cross:q", "cross:pattern"]
FAMILIES = ["llama", "gpt2", "mistral", "gemma3", "gpt_oss", "falcon", "qwen3_moe", "mamba", "jamba", "whisper", "bart"]
WHOLE = ["gptj", "t5", "bert"]


def able(lens, sites):
    out = []
    for site in sites:
        tower, _, name = site.rpartition(":")
        try:
            lens.layers_with(name, tower=tower or None)
        except (UnsupportedError, UnknownNameError):
            continue
        out.append(site)
    return out


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("name", FAMILIES + WHOLE)
def test_every_site_equals_the_loop(name, window):
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    other, width = given[key].clone(), given[key].shape[1]
    other[:, width // 2] = (other[:, width // 2] + 3) % 50 + 5
    clean, corrupt = lens.prepare(**given), lens.prepare(**{**given, key: other})
    sites = able(lens, SITES + (CROSS if key == "decoder_input_ids" else []))
    direction = "denoise" if window == 1 else "noise"
    answers = {"answers": [11] * len(clean), "wrong": [13] * len(clean)}
    found = patch_sweep(
        lens,
        clean,
        corrupt,
        sites=sites,
        positions=[1, width // 2, width - 1],
        window=window,
        direction=direction,
        **answers,
    )
    assert found.settings["way"].startswith("whole" if name in WHOLE else "carried"), found.settings["way"]
    source, base = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    for i in range(0, len(found.cells), 5 if window == 1 else 11):
        number, layer, head, group = found.cells[i].tolist()
        tower, _, site = sites[number].rpartition(":")
        layers = lens.layers_with(site, tower=tower or None)
        layers = [j for j in layers if layer - window // 2 <= j < layer + (window + 1) // 2]
        logits = naive(lens, source, base, sites[number], layers, column(base, int(found.groups[group])), head)[:, -1]
        torch.testing.assert_close(found.values[i], logits[:, 11] - logits[:, 13], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "jamba"])
def test_severed_sweeps_equal_the_loop(name, window):
    """One kind of module is held at the patched positions of all layers, but where it is patched itself."""
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    other = given["input_ids"].clone()
    other[:, 3:6] = (other[:, 3:6] + 3) % 50 + 5
    clean, corrupt = lens.prepare(**given), lens.prepare(**{**given, "input_ids": other})
    answers = {"answers": [11] * len(clean), "wrong": [13] * len(clean)}
    inside = {"attn_out": ("q", "k", "v", "z", "pattern", "attn_out"), "mlp_out": ("mlp_out",)}
    sites = able(lens, [*SITES[:5], "z", "k", "pattern"])
    for severed in inside:
        options = {"positions": [3, 5], "window": window, "severed": severed}
        found = patch_sweep(lens, clean, corrupt, sites=sites, **options, **answers)
        whole = patch_sweep(lens, clean, corrupt, sites=sites, **{**options, "severed": None}, **answers)
        assert not torch.allclose(found.values, whole.values, atol=1e-4)
        assert found.settings["severed"] == severed
        for i in range(0, len(found.cells), 4):
            number, layer, head, group = found.cells[i].tolist()
            layers = lens.layers_with(sites[number])
            layers = [j for j in layers if layer - window // 2 <= j < layer + (window + 1) // 2]
            held = [
                (severed, j)
                for j in lens.layers_with(severed)
                if sites[number] not in inside[severed] or j not in layers
            ]
            mask = column(corrupt, int(found.groups[group]))
            logits = naive(lens, clean, corrupt, sites[number], layers, mask, head, held)[:, -1]
            torch.testing.assert_close(found.values[i], logits[:, 11] - logits[:, 13], atol=2e-5, rtol=1e-4)
    with pytest.raises(SettingsError, match="adds to the stream"):
        patch_sweep(lens, clean, corrupt, sites=sites, severed="resid_pre", **answers)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma", "gemma3_vl", "qwen3_vl"])
def test_images_and_groups_with_gaps_equal_the_loop(name):
    """Images seen in both directions are recomputed from the first column; layers that are given the image again need
    whole runs, but not for the text behind it."""
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    torch.manual_seed(0)
    noisy = {k: v + 0.3 * torch.randn_like(v) if k.startswith("pixel") else v for k, v in given.items()}
    clean, corrupt = lens.prepare(**given), lens.prepare(**noisy)
    image = clean.image_mask
    gaps = image.clone()
    gaps[:, ::2] = False
    gaps[:, -1] = True
    groups = {"image": "image", "gaps": gaps, "last": "last"}
    sites = able(lens, ["resid_pre", "attn_out", "mlp_out", "z", "k", "pattern"])
    answers = {"answers": [11] * len(clean), "wrong": [13] * len(clean)}
    found = patch_sweep(lens, clean, corrupt, sites=sites, layers=(0, 1), positions=groups, **answers)
    masks = {"image": image, "gaps": gaps, "last": clean.span("last")}
    for i in range(0, len(found.cells), 3):
        number, layer, head, group = found.cells[i].tolist()
        logits = naive(lens, clean, corrupt, sites[number], [layer], masks[found.groups[group]], head)[:, -1]
        torch.testing.assert_close(found.values[i], logits[:, 11] - logits[:, 13], atol=2e-5, rtol=1e-4)
    last = patch_sweep(lens, clean, corrupt, sites=["attn_out", "v"], positions="last", **answers)
    assert last.settings["way"] == "carried"
    for i, (number, layer, head, _) in enumerate(last.cells.tolist()):
        logits = naive(lens, clean, corrupt, last.sites[number], [layer], clean.span("last"), head)[:, -1]
        torch.testing.assert_close(last.values[i], logits[:, 11] - logits[:, 13], atol=2e-5, rtol=1e-4)


def test_a_forward_without_a_cache(llama, pair):
    """Every column is computed anew, and the numbers are those of the model that keeps keys; a cache is refused."""

    class Keyless(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, position_ids=None):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(input_ids, attention_mask, position_ids, use_cache=False)

    model = copy.deepcopy(build("llama"))
    model.__class__ = Keyless
    lens = interp.wrap(model)
    with pytest.raises(UnsupportedError, match=r"Keyless keeps no keys and values: its forward takes no past_key_val"):
        lens.run(pair[0], "resid_pre.0", cache=True)
    for site in ("resid_pre", "k", "mlp_out"):
        one, two = (patch_sweep(x, *pair, sites=[site], min_gap=0.0, **ANSWERS) for x in (lens, llama))
        assert one.settings["way"] == two.settings["way"] == "carried"
        torch.testing.assert_close(one.values, two.values, atol=1e-5, rtol=0, equal_nan=True)


def test_a_forward_that_ignores_the_cache():
    """GPT-1 takes any keyword and keeps nothing."""
    sizes = {"vocab_size": 140, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    lens = interp.wrap(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval())
    source, base = (lens.prepare(input_ids=ids[:1]) for ids in (IDS, OTHER))
    found = patch_sweep(lens, source, base, sites=["resid_post"], answers=[120], wrong=[130], min_gap=0.0)
    assert found.settings["way"] == "carried"
    for (_, layer, _, group), value in zip(found.cells.tolist(), found.values[:, 0], strict=True):
        logits = naive(lens, source, base, "resid_post", [layer], column(base, int(found.groups[group])))
        torch.testing.assert_close(difference(logits, base.mask, [120], [130])[0], value, atol=1e-5, rtol=0)


def test_keys_of_the_encoder():
    """Positions of cross-attention's keys and values are the encoder's."""
    given = inputs("whisper")
    lens = interp.wrap(build("whisper"), sample=given)
    torch.manual_seed(0)
    noisy = {**given, "input_features": given["input_features"] + torch.randn_like(given["input_features"])}
    clean, corrupt = lens.prepare(**given), lens.prepare(**noisy)
    size, width = len(clean), lens.run(clean, "encoder:resid_pre.0")["encoder:resid_pre", 0].shape[1]
    half = torch.zeros(size, width, dtype=torch.bool)
    half[:, 3 : width // 2] = True
    answers = {"answers": [11] * size, "wrong": [13] * size}
    found = patch_sweep(lens, clean, corrupt, sites=("cross:k", "cross:v"), positions={"half": half}, **answers)
    for i, (number, layer, head, _) in enumerate(found.cells.tolist()):
        logits = naive(lens, clean, corrupt, found.sites[number], [layer], half, head)[:, -1]
        torch.testing.assert_close(found.values[i], logits[:, 11] - logits[:, 13], atol=2e-5, rtol=1e-4)
    with pytest.raises(InputError, match="the encoder's positions"):
        patch_sweep(lens, clean, corrupt, sites="cross:k", positions="last", **answers)


def test_whisper_at_its_cross_attention():
    lens = packaged("whisper-tiny-en")
    torch.manual_seed(0)
    sound = torch.randn(1, 80, 3000) * 0.1
    start = torch.tensor([[50257, 50362, 314, 716, 257]])
    clean = lens.prepare(input_features=sound, decoder_input_ids=start)
    corrupt = lens.prepare(input_features=sound + 0.5 * torch.randn_like(sound), decoder_input_ids=start)
    answers = {"answers": [1310], "wrong": [845]}
    sites = ("cross:attn_out", "cross:z", "resid_mid", "cross:v")
    found = patch_sweep(lens, clean, corrupt, sites=sites, layers=2, positions="all", **answers)
    for i in (4, 11):
        number, layer, head, _ = found.cells[i].tolist()
        mask = torch.ones(1, 1500 if sites[number] == "cross:v" else 5, dtype=torch.bool)
        last = naive(lens, clean, corrupt, sites[number], [layer], mask, head)[:, -1]
        assert float(found.values[i]) == pytest.approx(float(last[0, 1310] - last[0, 845]), abs=1e-4)


def test_scenes():
    lens = interp.load("scenes")
    one, two = (x.image for x in list(scenes.scenes("test", 2)))
    text = "<image> what is in the picture ?"
    clean, corrupt = lens.prepare([text], [one]), lens.prepare([text], [two])
    head = lens.run(clean, "logits@last").logits[0, -1].topk(2).indices.tolist()
    groups = {"image": "image", "text": "text", "last": "last", "all": "all"}
    answers = {"answers": head[:1], "wrong": head[1:]}
    found = patch_sweep(lens, clean, corrupt, sites=("resid_pre", "attn_out"), positions=groups, **answers)
    masks = {name: clean.span(name) for name in groups}
    for i, (number, layer, _, group) in enumerate(found.cells.tolist()):
        last = naive(lens, clean, corrupt, found.sites[number], [layer], masks[found.groups[group]])[0, -1]
        assert float(found.values[i]) == pytest.approx(float(last[head[0]] - last[head[1]]), abs=1e-4)
    frame = found.frame().query("site == 'resid_pre'").set_index(["layer", "group"])
    assert frame["effect"][0, "image"] == pytest.approx(1, abs=1e-5)  # only the image differs
    assert frame["effect"][0, "text"] == 0


def test_the_compiled_circuit_and_nothing_else():
    """`reverse` answers at the last position with the first token: one head takes it there."""
    lens = interp.load("tracr-reverse")
    clean, corrupt = lens.prepare(["a b c"]), lens.prepare(["b b c"])
    answers = {"answers": ["a"], "wrong": ["b"]}
    streams = patch_sweep(lens, clean, corrupt, sites="resid_post", **answers).grid()
    assert ((streams.round(5) == 1).sum(1) == 1).all()
    assert ((streams.round(5) == 0).sum(1) == 3).all()
    place = streams.to_numpy().argmax(1).tolist()
    assert place == sorted(place)
    assert (place[0], place[-1]) == (1, 3)
    heads = patch_sweep(lens, clean, corrupt, sites="z", **answers)
    (found,) = (heads.effects.round(decimals=5) != 0).nonzero()
    _, layer, _, group = heads.cells[found[0]].tolist()
    assert (layer, heads.groups[group]) == (place.index(3), "3")
    assert float(heads.effects[found[0]]) == pytest.approx(1, abs=1e-5)


# --- batches -------------------------------------------------------------------------------------------------------


def test_batched_and_padded_equal_single(llama, pair):
    """A prompt alone, padded on the left or on the right: the same numbers at its own positions."""
    options = {"sites": ["resid_pre", "attn_out", "z", "k", "pattern"], "layers": (0, 2)}
    right = [llama.prepare(input_ids=ids, padding_side="right") for ids in (IDS, OTHER)]
    both = [patch_sweep(llama, *batches, **options, **ANSWERS) for batches in (pair, right)]
    torch.testing.assert_close(both[0].values, both[1].values, atol=1e-5, rtol=1e-4, equal_nan=True)
    for i in range(3):
        alone = [llama.prepare(input_ids=[ids[i]]) for ids in (IDS, OTHER)]
        single = {k: [v[i]] for k, v in ANSWERS.items()}
        one = patch_sweep(llama, *alone, **options, **single)
        keys = {tuple(c): j for j, c in enumerate(both[0].cells.tolist())}
        rows = [keys[tuple(c)] for c in one.cells.tolist()]
        torch.testing.assert_close(one.values[:, 0], both[0].values[rows, i], atol=1e-5, rtol=1e-4)
        others = sorted(set(range(len(both[0].cells))) - set(rows))
        assert both[0].values[others, i].isnan().all()  # positions that only longer prompts have
    assert both[0].exists.sum().item() == 15


def test_several_batches_are_one(llama, pair):
    parts = [[llama.prepare(input_ids=ids[i : i + 1]) for i in range(3)] for ids in (IDS, OTHER)]
    whole = patch_sweep(llama, *pair, sites="mlp_out", **ANSWERS)
    found = patch_sweep(llama, *parts, sites="mlp_out", **ANSWERS)
    torch.testing.assert_close(found.values, whole.values, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert torch.equal(found.cells, whole.cells)


@pytest.mark.parametrize("limits", [{"rows": 1}, {"rows": 7}, {"memory": 1}, {"memory": 200_000}])
def test_the_size_of_a_pass_changes_nothing(llama, pair, limits):
    options = {"sites": ["resid_pre", "z", "v"], **ANSWERS}
    whole = patch_sweep(llama, *pair, **options)
    found = patch_sweep(llama, *pair, **options, **limits)
    torch.testing.assert_close(found.values, whole.values, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_noise_is_denoise_mirrored(llama, pair):
    options = {"sites": ["resid_mid", "q"], **ANSWERS}
    one = patch_sweep(llama, *pair, direction="noise", **options)
    two = patch_sweep(llama, *reversed(pair), direction="denoise", **options)
    assert torch.equal(one.values.nan_to_num(), two.values.nan_to_num())
    assert torch.equal(one.effects, two.effects)
    assert torch.equal(one.clean, two.corrupt)


def test_only_what_can_differ_is_computed(llama):
    """Before the first difference the value is the base run's, bit for bit, and costs nothing."""
    clean, corrupt = (llama.prepare(input_ids=[ids]) for ids in ([70, 80, 90, 100], [70, 80, 95, 100]))
    found = patch_sweep(llama, clean, corrupt, sites=["resid_pre", "attn_out", "k"], answers=[5], wrong=[6])
    depth = llama.anatomy.depth["text"]
    early = found.cells[:, 3] < 2
    assert torch.equal(found.values[early], found.corrupt.expand(int(early.sum()), 1))
    heads = llama.anatomy.attention(None, 0).n_kv_heads
    # The stream of the first layer differs in one column, its attention in two, and behind the last layer only the last
    # position counts.
    assert found.settings["computed"] == (2 * depth - 1) + (2 * depth - 1) + 2 * depth * heads


def test_heads_together_are_all_heads(llama, pair):
    options = {"layers": 1, "positions": "all", **ANSWERS}
    together = patch_sweep(llama, *pair, sites="z", heads="all", **options)
    out = patch_sweep(llama, *pair, sites="attn_out", **options)
    torch.testing.assert_close(together.values, out.values, atol=1e-5, rtol=1e-4)
    assert together.cells.tolist() == [[0, 1, -1, 0]]
    some = patch_sweep(llama, *pair, sites="z", heads=[-1, 0], **options)
    every = patch_sweep(llama, *pair, sites="z", **options)
    count = len(every.cells)
    assert torch.equal(some.cells[:, 2], torch.tensor([count - 1, 0]))
    torch.testing.assert_close(some.values, every.values[[count - 1, 0]], atol=1e-5, rtol=1e-4)


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_what_they_are_called(llama, pair):
    mask = column(pair[0], 2)
    logits = naive(llama, *pair, "attn_out", [1], mask)
    rows, end = torch.arange(3), pair[0].mask.shape[1] - 1
    last, source = logits[:, end], llama.run(pair[0], "logits").logits
    good = torch.tensor(ANSWERS["answers"])
    log = last.log_softmax(-1)
    wanted = {
        "logit": last[rows, good],
        "probability": log.exp()[rows, good],
        "log_probability": log[rows, good],
        "loss": -log[rows, good],
    }
    options = {"sites": "attn_out", "layers": 1, "positions": 2}
    for name, value in wanted.items():
        found = patch_sweep(llama, *pair, metric=name, answers=ANSWERS["answers"], **options)
        torch.testing.assert_close(found.values[0], value, atol=1e-5, rtol=1e-4)
        assert found.metric == name
    wanted = (source[:, end].softmax(-1) * (source[:, end].log_softmax(-1) - log)).sum(-1)
    found = patch_sweep(llama, *pair, **options)
    assert found.metric == "kl"
    torch.testing.assert_close(found.values[0], wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.clean, torch.zeros(3), atol=1e-6, rtol=0)
    found = patch_sweep(llama, *pair, metric="loss", **options)
    for i in range(3):
        real = pair[0].mask[i]
        ids, own = pair[0].inputs["input_ids"][i][real], logits[i][real]
        loss = torch.nn.functional.cross_entropy(own[:-1], ids[1:])
        assert float(found.values[0, i]) == pytest.approx(float(loss), abs=1e-5)


def test_a_function_of_logits(llama, pair):
    """It is given whole copies of the batch, whatever was computed."""
    good, bad = (torch.tensor(ANSWERS[k]) for k in ("answers", "wrong"))

    def own(logits):
        assert logits.shape[1] == 1
        assert len(logits) % 3 == 0
        rows, copies = torch.arange(len(logits)), len(logits) // 3
        return logits[rows, -1, good.repeat(copies)] - logits[rows, -1, bad.repeat(copies)]

    options = {"sites": ["resid_pre", "z"]}
    found = patch_sweep(llama, *pair, metric=own, **options)
    wanted = patch_sweep(llama, *pair, **options, **ANSWERS)
    torch.testing.assert_close(found.values, wanted.values, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert found.metric == "own"
    with pytest.raises(SettingsError, match="one number for each row"):
        patch_sweep(llama, *pair, metric=lambda logits: logits.sum(), **options)


def test_noise_on_the_embeddings(llama):
    """The corrupt run may be the clean prompt with changed embeddings, as in causal tracing."""
    batch = llama.prepare(input_ids=[[70, 80, 90, 100, 110]] * 2)
    torch.manual_seed(0)
    noise = torch.randn(2, 2, llama.anatomy.towers["text"].d_model)
    change = edits.splice(lambda x: x + noise, site="embed", positions=(1, 2))
    found = patch_sweep(llama, batch, batch, sites="resid_post", corrupt_edits=change, answers=[5, 5], wrong=[6, 6])
    full = llama.run(batch, ["resid_post", "logits"])
    for i, (_, layer, _, group) in enumerate(found.cells.tolist()):
        value = full["resid_post", layer][:, [group]]
        again = edits.patch("resid_post", value, layer=layer, positions=group)
        last = llama.run(batch, "logits@last", [change, again]).logits[:, 0]
        torch.testing.assert_close(found.values[i], last[:, 5] - last[:, 6], atol=1e-5, rtol=1e-4)
    with pytest.raises(SettingsError, match="corrupt_edits change 'embed' or 'resid_pre' of layer 0"):
        patch_sweep(llama, batch, batch, corrupt_edits=edits.ablate(layers=1), answers=[5, 5])


# --- interrupts ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_stopped_sweep_goes_on(name, tmp_path, monkeypatch):
    lens = interp.wrap(build(name), processor(name), name=name)
    pair = [lens.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER)]
    options = {"sites": ["resid_pre", "mlp_out"], "rows": 6, "answers": ANSWERS["answers"]}
    whole = patch_sweep(lens, *pair, **options)
    left = [4]
    advance = progress.Bar.advance

    def stop(self, count):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        advance(self, count)

    monkeypatch.setattr(progress.Bar, "advance", stop)
    with pytest.raises(Stop):
        patch_sweep(lens, *pair, checkpoint=tmp_path / "sweep", **options)
    monkeypatch.undo()
    kept = sorted(p.name for p in (tmp_path / "sweep").glob("pass-*"))
    assert kept
    times = {p: (tmp_path / "sweep" / p).stat().st_mtime_ns for p in kept}
    again = patch_sweep(lens, *pair, checkpoint=tmp_path / "sweep", **options)
    assert again.equals(whole)
    assert times == {p: (tmp_path / "sweep" / p).stat().st_mtime_ns for p in kept}
    with pytest.raises(SettingsError, match=r"of another sweep: .*rows.* differ"):
        patch_sweep(lens, *pair, checkpoint=tmp_path / "sweep", **{**options, "rows": 5})
    with pytest.raises(SettingsError, match="inputs differ"):
        patch_sweep(lens, *reversed(pair), checkpoint=tmp_path / "sweep", **options)
    noise = edits.splice(lambda x: x.flip(-1), site="embed")
    with pytest.raises(SettingsError, match="base run gave other values"):
        patch_sweep(lens, *pair, checkpoint=tmp_path / "sweep", corrupt_edits=noise, **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        patch_sweep(lens, *pair, checkpoint=tmp_path / "other", **options)


def test_nothing_is_left_behind(llama, pair):
    before = [set(vars(m)) for m in llama.model.modules()]
    logits = llama.run(pair[0], "logits").logits
    patch_sweep(llama, *pair, sites=["z", "k", "pattern"], progress=True, **ANSWERS)
    with pytest.raises(SettingsError):
        patch_sweep(llama, *pair, metric=lambda logits: 1, sites="k")
    assert before == [set(vars(m)) for m in llama.model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
    assert torch.equal(llama.run(pair[0], "logits").logits, logits)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": "resid"}, UnknownNameError, "resid"),
        ({"sites": "logits"}, UnsupportedError, "cannot be patched layer by layer"),
        ({"sites": []}, SettingsError, "at least one"),
        ({"sites": ["z", "z"]}, SettingsError, "different names"),
        ({"sites": "z.1"}, SettingsError, "choose the rest apart"),
        ({"sites": "vision:z"}, UnknownNameError, "vision"),
        ({"layers": 9}, UnknownNameError, "layer 9 does not exist"),
        ({"layers": [1, 1]}, SettingsError, "twice"),
        ({"sites": "z", "heads": 12}, UnknownNameError, "head 12 of layer 0 does not exist"),
        ({"heads": 0}, SettingsError, "none of the sites resid_pre has heads"),
        ({"positions": 6}, InputError, "position 6 does not exist: the longest prompt has 6"),
        ({"positions": -1}, InputError, "count from the end"),
        ({"positions": "subject"}, UnknownNameError, "subject"),
        ({"positions": []}, SettingsError, "positions="),
        ({"positions": {"image": "image"}}, InputError, "no image tokens"),
        ({"positions": {"far": [[9]]}}, SettingsError, "positions="),
        ({"positions": {"far": 5}}, InputError, "position 5 does not exist in sample 1"),
        ({"window": 0}, SettingsError, "window"),
        ({"rows": 0}, SettingsError, "rows"),
        ({"memory": -1}, SettingsError, "memory"),
        ({"min_gap": -1.0}, SettingsError, "min_gap"),
        ({"direction": "forward"}, UnknownNameError, "forward"),
        ({"metric": "logits"}, UnknownNameError, "logits"),
        ({"metric": "kl"}, SettingsError, "takes no answers"),
        ({"metric": "logit"}, SettingsError, "takes no wrong answers"),
        ({"answers": [1]}, InputError, "1 answers were given for 3 prompts"),
        ({"answers": None}, SettingsError, "wrong answers need answers"),
    ],
)
def test_bad_options(llama, pair, options, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        patch_sweep(llama, *pair, **{**ANSWERS, **options})


def test_bad_batches(llama, pair):
    other = llama.prepare(input_ids=[[70, 80, 90, 100, 110, 75], [71, 81, 91], [72, 82, 92, 102, 112]])
    with pytest.raises(InputError, match="prompt 1 of batch 0 has 4 clean and 3 corrupt tokens"):
        patch_sweep(llama, pair[0], other, **ANSWERS)
    with pytest.raises(InputError, match="prompt 0 of batch 0 is the same"):
        patch_sweep(llama, pair[0], pair[0], **ANSWERS)
    half = llama.prepare(input_ids=[*OTHER[:2], IDS[2]], padding_side="left")
    with pytest.raises(InputError, match="prompt 2 of batch 0 is the same"):
        patch_sweep(llama, pair[0], half, **ANSWERS)
    right = llama.prepare(input_ids=OTHER, padding_side="right")
    with pytest.raises(InputError, match="padded differently"):
        patch_sweep(llama, pair[0], right, **ANSWERS)
    with pytest.raises(InputError, match="2 clean and 1 corrupt batches"):
        patch_sweep(llama, [pair[0]] * 2, [pair[1]], **ANSWERS)
    with pytest.raises(InputError, match="2 clean and 3 corrupt prompts"):
        patch_sweep(llama, llama.prepare(input_ids=IDS[:2]), pair[1], **ANSWERS)
    with pytest.raises(InputError, match="not a Batch"):
        patch_sweep(llama, [pair[0].inputs], [pair[1]], **ANSWERS)
    with pytest.raises(InputError, match="the same in the clean and the corrupt run"):
        patch_sweep(llama, *pair, metric=lambda logits: logits[:, 0, 0] * 0, sites="z", layers=0)


def test_a_picture_model_has_no_logits_to_measure():
    lens = interp.wrap(build("vit"))
    batch = lens.prepare(**inputs("vit"))
    with pytest.raises(UnsupportedError, match="logits of a language model"):
        patch_sweep(lens, batch, batch)


def test_a_model_that_makes_nan_is_told(pair):
    lens = interp.wrap(build("llama"), processor("llama"), name="llama")
    norm = lens.model.model.layers[2].input_layernorm
    norm.weight.data = torch.full_like(norm.weight, torch.nan)
    with pytest.raises(interp.errors.NonFiniteError):
        patch_sweep(lens, *pair, **ANSWERS)


def test_the_result(llama, pair):
    found = patch_sweep(llama, *pair, sites=["resid_pre", "z"], **ANSWERS)
    assert isinstance(found, CausalMap)
    assert found.settings["prompts"] == 3
    assert found.single
    frame = found.frame()
    assert list(frame.columns[:4]) == ["site", "layer", "position", "token"]
    assert len(frame) == len(found.cells) == 3 * 6 + 3 * 4 * 6
    assert dataclasses.is_dataclass(found)
