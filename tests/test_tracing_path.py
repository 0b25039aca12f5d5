"""Path patching against plain hooks on transformers' own modules, one whole run for each sender, written here."""

import pytest
import torch

import interp
from interp import edits
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.tracing import CausalMap, path_patching
from tests.zoo import build, inputs, processor

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Anna and Paul went to the store, Luke gave a drink to"
IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
OTHER = [[70, 80, 95, 100, 110, 77], [76, 81, 91, 103], [72, 82, 92, 107, 113]]
ANSWERS = {"answers": [120, 121, 122], "wrong": [130, 131, 132]}


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def pair(llama):
    return [llama.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER)]


# --- the slow way ----------------------------------------------------------------------------------------------------


class Hooks:
    """Forward hooks by module, taken away at the end."""

    def __init__(self):
        self.handles = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def entering(self, module, function):
        self.handles.append(module.register_forward_pre_hook(lambda m, a: (function(a[0]), *a[1:])))

    def leaving(self, module, function):
        def hook(m, a, out):
            return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

        self.handles.append(module.register_forward_hook(hook))


class Plain:
    """A model's modules, by layer: the output projections of attention, the MLPs, and the projections of inputs."""

    def __init__(self, model, name):
        if name == "gpt2":
            self.layers = model.transformer.h
            self.out = [[x.attn.c_proj] for x in self.layers]
            self.mlps = [x.mlp for x in self.layers]
        elif name == "bart":
            self.layers = model.model.decoder.layers
            self.out = [[x.self_attn.out_proj, x.encoder_attn.out_proj] for x in self.layers]
            self.mlps = [x.fc2 for x in self.layers]
        else:
            self.layers = model.model.layers
            self.out = [[x.self_attn.o_proj] if hasattr(x, "self_attn") else [] for x in self.layers]
            self.mlps = [getattr(x, "mlp", None) or x.feed_forward for x in self.layers]
        self.mixers = {i: x.mamba for i, x in enumerate(self.layers) if hasattr(x, "mamba")}
        self.model, self.name, self.known = model, name, {}
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // heads

    def input(self, layer, via, head):
        """The module that gives a head's queries, keys or values, and where in its output these stand."""
        if self.name == "gpt2":
            begin = "qkv".index(via) * self.model.config.n_embd + head * self.d_head
            return self.layers[layer].attn.c_attn, slice(begin, begin + self.d_head)
        module = getattr(self.layers[layer].self_attn, f"{via}_proj")
        return module, slice(head * self.d_head, (head + 1) * self.d_head)

    def logits(self, given):
        with torch.no_grad():
            return self.model(**given, use_cache=False).logits[0]

    def kept(self, given):
        """What every output projection is given, and what every MLP and mixer gives."""
        if id(given) in self.known:
            return self.known[id(given)]
        z, mlps = {}, {}
        with Hooks() as hooks:
            for i in range(len(self.layers)):
                for n, module in enumerate(self.out[i]):
                    hooks.entering(module, lambda x, k=(i, n): z.setdefault(k, x))
                hooks.leaving(self.mlps[i], lambda x, i=i: mlps.setdefault(i, x))
                if i in self.mixers:
                    hooks.leaving(self.mixers[i], lambda x, i=i: z.setdefault((i, "mixer"), x))
            self.logits(given)
        self.known[id(given)] = z, mlps
        return z, mlps

    def path(self, base, source, sender, receivers, via, positions, frozen):
        """All logits with the path patched; `base` and `source` are model inputs of one prompt."""
        held, mlps = self.kept(base)
        sent, _ = self.kept(source)
        noted = {}
        with Hooks() as hooks:
            for i in range(len(self.layers)):
                for n, module in enumerate(self.out[i]):
                    new = held[i, n].clone()
                    if n == 0 and i == sender[0]:
                        some = slice(sender[1] * self.d_head, (sender[1] + 1) * self.d_head)
                        new[:, positions, some] = sent[i, n][:, positions, some]
                    hooks.entering(module, lambda x, new=new: new)
                if frozen:
                    hooks.leaving(self.mlps[i], lambda x, i=i: mlps[i])
                if i in self.mixers:
                    hooks.leaving(self.mixers[i], lambda x, i=i: held[i, "mixer"])
            for receiver in receivers or ():
                module, some = self.input(receiver[0], via, receiver[1])
                hooks.leaving(module, lambda x, r=receiver, s=some: (noted.setdefault(r, x[..., s].clone()), x)[1])
            logits = self.logits(base)
        if receivers is None:
            return logits
        with Hooks() as hooks:
            for receiver in receivers:
                module, some = self.input(receiver[0], via, receiver[1])

                def change(x, new=noted[receiver], some=some):
                    x = x.clone()
                    x[..., some] = new
                    return x

                hooks.leaving(module, change)
            return self.logits(base)


def compare(lens, name, base, source, found, good, bad, *, receivers=None, via="q", frozen=False, every=1):
    """Every cell of a map against the slow way; prompts are model inputs of one prompt each."""
    plain, worst = Plain(lens.model, name), 0.0
    for i in range(0, len(found.cells), every):
        _, layer, head, group = found.cells[i].tolist()
        for n, (one, other) in enumerate(zip(base, source, strict=True)):
            width = one.get("decoder_input_ids", one["input_ids"]).shape[1]
            positions = {"last": [width - 1], "all": list(range(width))}.get(found.groups[group])
            positions = [int(found.groups[group])] if positions is None else positions
            if positions[0] >= width:
                assert found.values[i, n].isnan()
                continue
            last = plain.path(one, other, (layer, head), receivers, via, positions, frozen)[-1]
            worst = max(worst, abs(float(last[good[n]] - last[bad[n]]) - float(found.values[i, n])))
    return worst


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "qwen3", "bart", "jamba"])
def test_families_equal_the_plain_hooks(name):
    """Grouped queries, norms behind attention, parallel layers, norms of queries, of the stream, recurrent layers."""
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    key = "decoder_input_ids" if name == "bart" else "input_ids"
    other, width = given[key].clone(), given[key].shape[1]
    other[:, width - 3 :] = (other[:, width - 3 :] + 3) % 50 + 5
    changed = {**given, key: other}
    clean, corrupt = lens.prepare(**given), lens.prepare(**changed)
    rows = [[{k: v[n : n + 1] for k, v in x.items()} for n in range(len(clean))] for x in (given, changed)]
    good, bad = [11] * len(clean), [13] * len(clean)
    answers = {"answers": good, "wrong": bad}
    layers = lens.layers_with("z")
    part = lens.anatomy.attention(None, layers[-1], "z")
    receivers = [(layers[-1], 0), (layers[-1], part.n_kv_heads - 1)]
    for mlps in ("recomputed", "frozen"):
        found = path_patching(lens, clean, corrupt, mlps=mlps, **answers)
        assert compare(lens, name, *rows, found, good, bad, frozen=mlps == "frozen", every=2) < 2e-5
        assert float((found.values - found.clean).abs().max()) > 1e-3
        for via in ("q", "k", "v") if len(layers) > 1 else ():
            options = {"receivers": receivers, "via": via}
            where = [width - 3, width - 1] if via == "q" else "all"
            found = path_patching(lens, clean, corrupt, mlps=mlps, positions=where, **options, **answers)
            options["frozen"] = mlps == "frozen"
            assert compare(lens, name, *rows, found, good, bad, every=3, **options) < 2e-5
            assert float((found.values - found.clean).abs().max()) > 1e-6


def test_smollm_equals_the_plain_hooks(smollm):
    clean, corrupt = smollm.prepare([CLEAN]), smollm.prepare([CORRUPT])
    assert torch.equal(clean.mask, corrupt.mask)
    good, bad = (smollm.processor(x, add_special_tokens=False)["input_ids"] for x in (" Mary", " John"))
    prompts = [[{"input_ids": b.inputs["input_ids"]}] for b in (clean, corrupt)]
    for mlps in ("recomputed", "frozen"):
        options = {"senders": ["8.2", "12.5", "24.3", "25.7"], "answers": [" Mary"], "wrong": [" John"]}
        to_logits = path_patching(smollm, clean, corrupt, mlps=mlps, **options)
        frozen = {"frozen": mlps == "frozen"}
        assert compare(smollm, "llama", *prompts, to_logits, good, bad, **frozen) < 1e-4
        receivers = [(26, 1), (25, 4)]
        to_heads = path_patching(smollm, clean, corrupt, receivers=receivers, mlps=mlps, positions=[9, 13], **options)
        assert compare(smollm, "llama", *prompts, to_heads, good, bad, receivers=receivers, every=3, **frozen) < 1e-4
        options["senders"] = options["senders"][:3]
        values = path_patching(
            smollm, clean, corrupt, receivers=["25.1"], via="v", mlps=mlps, positions="all", **options
        )
        more = {"receivers": [(25, 1)], "via": "v", **frozen}
        assert compare(smollm, "llama", *prompts, values, good, bad, every=2, **more) < 1e-4


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma", "gemma3_vl"])
def test_images_equal_whole_runs(name):
    """Through keys of image tokens, which some families see in both directions; whole runs by edits stand in."""
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    torch.manual_seed(0)
    noisy = {k: v + 0.3 * torch.randn_like(v) if k.startswith("pixel") else v for k, v in given.items()}
    clean, corrupt = lens.prepare(**given), lens.prepare(**noisy)
    depth, image = lens.anatomy.depth["text"], clean.span("image")
    options = {"answers": [11] * len(clean), "wrong": [13] * len(clean), "positions": "image", "receivers": [(1, 0)]}
    found = path_patching(lens, clean, corrupt, via="k", **options)
    base, source = (lens.run(b, "z") for b in (clean, corrupt))

    def hold(old, layer, head=None):
        new = base["z", layer].clone()
        if head is not None:
            new[:, :, head] = torch.where(image[..., None], source["z", layer][:, :, head], new[:, :, head])
        return new

    for (_, layer, head, _), value in zip(found.cells.tolist(), found.values, strict=True):
        held = [
            edits.splice(lambda x, i=i, h=head if i == layer else None: hold(x, i, h), site="z", layers=i)
            for i in range(depth)
        ]
        got = lens.run(clean, "k.1", held)["k", 1]
        give = edits.splice(
            lambda x, got=got: torch.where(image[..., None, None] & (torch.arange(x.shape[2]) == 0)[:, None], got, x),
            site="k",
            layers=1,
        )
        last = lens.run(clean, "logits@last", give).logits[:, 0]
        torch.testing.assert_close(value, last[:, 11] - last[:, 13], atol=2e-5, rtol=1e-4)


# --- what must hold --------------------------------------------------------------------------------------------------


def test_the_last_layer_has_one_path(llama, pair):
    """Above the last layer's heads there is its MLP alone: the path is the patch of the head, at the last position."""
    last = llama.anatomy.depth["text"] - 1
    heads = [(last, h) for h in range(llama.anatomy.attention(None, last).n_heads)]
    found = path_patching(llama, *pair, senders=heads, positions="each", direction="denoise", **ANSWERS)
    exact = interp.tracing.patch_sweep(llama, *pair, sites="z", layers=last, **ANSWERS)
    torch.testing.assert_close(found.values, exact.values, atol=1e-5, rtol=1e-4, equal_nan=True)
    ends = [5, 3, 4]
    for (_, _, _, group), row in zip(found.cells.tolist(), found.values, strict=True):
        for n, end in enumerate(ends):
            if group != end and group < len(IDS[n]):
                assert row[n] == found.corrupt[n]  # frozen attention takes nothing to the last position


def test_ways_and_batches_agree(llama, pair):
    """A prompt alone or padded on either side, few rows or many, both directions, one product or layer by layer."""
    options = {"positions": {"all": "all", "last": "last"}, **ANSWERS}
    top = llama.anatomy.depth["text"] - 1
    for more in ({}, {"mlps": "frozen"}, {"receivers": [(top, 1)], "via": "k"}, {"receivers": [f"{top}.0"]}):
        one = path_patching(llama, *pair, **more, **options)
        assert float((one.values - one.clean).abs().max()) > 1e-5
        few = path_patching(llama, *pair, rows=2, **more, **options)
        torch.testing.assert_close(few.values, one.values, atol=1e-5, rtol=1e-4)
        right = [llama.prepare(input_ids=ids, padding_side="right") for ids in (IDS, OTHER)]
        other = path_patching(llama, *right, **more, **options)
        torch.testing.assert_close(other.values, one.values, atol=1e-5, rtol=1e-4)
        mirrored = path_patching(llama, *reversed(pair), direction="denoise", **more, **options)
        torch.testing.assert_close(mirrored.values, one.values, atol=1e-6, rtol=1e-5)
        for n in range(3):
            alone = [llama.prepare(input_ids=[ids[n]]) for ids in (IDS, OTHER)]
            single = {k: [v[n]] for k, v in ANSWERS.items()}
            found = path_patching(llama, *alone, **more, **{**options, **single})
            torch.testing.assert_close(found.values[:, 0], one.values[:, n], atol=1e-5, rtol=1e-4)


def test_one_product_is_the_frozen_run(llama, pair, monkeypatch):
    from interp.tracing.paths import Paths

    options = {"mlps": "frozen", "positions": "each", **ANSWERS}
    both = [path_patching(llama, *pair, **options, receivers=r) for r in ("logits", [(2, 0), (1, 1)])]
    monkeypatch.setattr(Paths, "_adds", lambda self: False)
    for one in both:
        receivers = one.settings["receivers"]
        found = path_patching(llama, *pair, **options, receivers=receivers)
        assert (one.settings["way"], found.settings["way"]) == ("one product", "frozen runs")
        torch.testing.assert_close(found.values, one.values, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_metrics_and_results(llama, pair, tmp_path):
    named = path_patching(llama, *pair, metric="logit", answers=[7, 7, 7])
    own = path_patching(llama, *pair, metric=lambda x: x[:, -1, 7], rows=4)
    torch.testing.assert_close(own.values, named.values, atol=1e-5, rtol=1e-4)
    divergence = path_patching(llama, *pair)
    assert divergence.metric == "kl"
    assert float(divergence.corrupt.abs().max()) < 1e-5
    found = path_patching(llama, *pair, senders=[(1, 2), (0, 0)], receivers=[(2, 1)], via="v", **ANSWERS)
    assert found.settings["receivers"] == ["2.1"]
    assert [row[1:3] for row in found.cells.tolist()] == [[0, 0], [1, 2]]
    assert found.top(1).columns.tolist()[:4] == ["site", "layer", "group", "head"]
    found.save(tmp_path / "paths")
    assert CausalMap.load(tmp_path / "paths").equals(found)
    frame = found.top(2, by="abs")
    again = path_patching(llama, *pair, senders=frame, receivers=["2.1"], via="v", **ANSWERS)
    assert torch.equal(again.values, found.values)


def test_bad_input(llama, pair):
    run = {**ANSWERS}
    with pytest.raises(UnknownNameError, match="input of receivers"):
        path_patching(llama, *pair, via="z", **run)
    with pytest.raises(UnknownNameError, match="way with MLPs"):
        path_patching(llama, *pair, mlps="ablated", **run)
    with pytest.raises(SettingsError, match="or 'logits'"):
        path_patching(llama, *pair, receivers="logit", **run)
    with pytest.raises(SettingsError, match=r"such as '9\.6'"):
        path_patching(llama, *pair, senders=["a.b"], **run)
    with pytest.raises(SettingsError, match="not below the highest receiver"):
        path_patching(llama, *pair, senders=[(2, 0)], receivers=[(1, 0)], **run)
    with pytest.raises(SettingsError, match="no head lies below"):
        path_patching(llama, *pair, receivers=[(0, 0)], **run)
    with pytest.raises(SettingsError, match="twice"):
        path_patching(llama, *pair, senders=[(2, -1), (2, 3)], **run)
    with pytest.raises(UnknownNameError, match="key/value heads"):
        path_patching(llama, *pair, receivers=[(2, 3)], via="k", **run)
    with pytest.raises(UnknownNameError, match="layer 9"):
        path_patching(llama, *pair, senders=[(9, 0)], **run)
    with pytest.raises(SettingsError, match="rows is"):
        path_patching(llama, *pair, rows=0, **run)
    with pytest.raises(InputError, match="same in the clean"):
        path_patching(llama, pair[0], pair[0], **run)
    t5 = interp.wrap(build("t5"), sample=inputs("t5"))
    batches = [t5.prepare(**inputs("t5", seed=i)) for i in (0, 1)]
    with pytest.raises(UnsupportedError, match="paths cannot be patched"):
        path_patching(t5, *batches, answers=[5, 5])
