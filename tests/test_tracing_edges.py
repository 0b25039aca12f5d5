"""Edge attribution against plain autograd and exact patches of single edges, on transformers' own modules."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import interp
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.tracing import EdgeScores, attribution_patching, edge_attribution, path_patching
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
OTHER = [[70, 80, 95, 100, 110, 75], [76, 81, 91, 101], [72, 82, 92, 107, 112]]
ANSWERS = {"answers": [120, 121, 122], "wrong": [130, 131, 132]}


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def pair(llama):
    return [llama.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER)]


class Plain:
    """A model of the Llama form, one prompt at a time: what components add, and runs with one edge moved."""

    def __init__(self, model, *, parallel=False):
        self.model, self.layers, self.parallel = model, model.model.layers, parallel
        self.d = model.model.layers[0].self_attn.head_dim
        self.heads = model.config.num_attention_heads

    def _run(self, ids, before=(), after=(), grad=False):
        handles = [m.register_forward_pre_hook(f) for m, f in before] + [m.register_forward_hook(f) for m, f in after]
        try:
            with torch.set_grad_enabled(grad):
                return self.model(input_ids=ids, use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()

    def added(self, ids):
        """What each component adds to the stream [pos, d_model], by layer and head."""
        out, before, after = {}, [], []
        before.append((self.layers[0], lambda m, a: out.__setitem__((-1, -1), a[0][0])))
        for i, layer in enumerate(self.layers):
            before.append((layer.self_attn.o_proj, lambda m, a, i=i: out.__setitem__(("z", i), a[0][0])))
            after.append((layer.mlp, lambda m, a, o, i=i: out.__setitem__((i, -1), o[0])))
        self._run(ids, before, after)
        for i, layer in enumerate(self.layers):
            z = out.pop(("z", i))
            for h in range(self.heads):
                some = slice(h * self.d, (h + 1) * self.d)
                out[i, h] = z[:, some] @ layer.self_attn.o_proj.weight[:, some].T
        return out

    def logits(self, ids, target, moved, grad=False):
        """The last logits where what a target reads is moved [pos, d_model]."""
        layer, head, via = target
        if via == "logits":
            return self._run(ids, [(self.model.model.norm, lambda m, a: (a[0] + moved, *a[1:]))], grad=grad)
        block = self.layers[layer]
        norm = block.input_layernorm if via != "mlp" or self.parallel else block.post_attention_layernorm
        kept = {}
        before = [(norm, lambda m, a: kept.__setitem__("stream", a[0]))]
        if via == "mlp":
            before.append((block.mlp, lambda m, a: (norm.forward(kept["stream"] + moved), *a[1:])))
            return self._run(ids, before, grad=grad)
        module, some = getattr(block.self_attn, f"{via}_proj"), slice(head * self.d, (head + 1) * self.d)

        def change(m, a, out):
            new = functional.linear(norm.forward(kept["stream"] + moved), module.weight, module.bias)
            return torch.cat([out[..., : some.start], new[..., some], out[..., some.stop :]], -1)

        return self._run(ids, before, [(module, change)], grad=grad)


def edges(found):
    names = ("q", "k", "v", "mlp", "logits")
    for at, to in found.valid.nonzero().tolist():
        layer, head, number = found.targets[to].tolist()
        yield (at, to), tuple(found.sources[at].tolist()), (layer, head, names[number])


def metric(logits, n):
    return logits[ANSWERS["answers"][n]] - logits[ANSWERS["wrong"][n]]


@pytest.mark.parametrize("name", ["llama", "cohere", "qwen2"])
def test_every_edge_is_plain_autograd(name):
    """Grouped queries, parallel layers, biases: each prompt's own gradient at what a target reads, times the source."""
    lens = interp.wrap(build(name), processor(name))
    batches = [lens.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER)]
    plain = Plain(lens.model, parallel=name == "cohere")
    wanted = []
    found = edge_attribution(lens, *batches, **ANSWERS)
    for n in range(3):
        source, base = (torch.tensor([ids[n]]) for ids in (IDS, OTHER))
        moved = {k: v - plain.added(base)[k] for k, v in plain.added(source).items()}
        slopes, mine = {}, torch.full(found.valid.shape, torch.nan)
        for place, one, target in edges(found):
            if target not in slopes:
                zero = torch.zeros_like(moved[-1, -1], requires_grad=True)
                value = metric(plain.logits(base, target, zero, grad=True), n)
                (slopes[target],) = torch.autograd.grad(value, zero)
            mine[place] = (moved[one] * slopes[target]).sum()
        wanted.append(mine)
        alone = [lens.prepare(input_ids=[ids[n]]) for ids in (IDS, OTHER)]
        single = edge_attribution(lens, *alone, **{k: [v[n]] for k, v in ANSWERS.items()})
        torch.testing.assert_close(single.scores, mine, atol=1e-5, rtol=1e-3, equal_nan=True)
        assert single.errors.isnan().all()
    each = torch.stack(wanted)
    torch.testing.assert_close(found.scores, each.mean(0), atol=1e-5, rtol=1e-3, equal_nan=True)
    torch.testing.assert_close(found.errors, each.std(0) / 3**0.5, atol=1e-5, rtol=1e-3, equal_nan=True)
    layers, heads, shared = len(plain.layers), plain.heads, lens.anatomy.attention(None, 0).n_kv_heads
    attention = sum((1 + i * (heads + 1)) * (heads + 2 * shared) for i in range(layers))
    mlps = sum(1 + i * (heads + 1) + (0 if name == "cohere" else heads) for i in range(layers))
    assert len(found) == attention + mlps + 1 + layers * (heads + 1)


def test_it_follows_exact_edges(llama):
    """Patched one by one, the edges of a random model change the metric nearly as estimated; those of the embeddings,
    which are all that differs between the prompts, need gradients on the way."""
    plain, batches = Plain(llama.model), [llama.prepare(input_ids=[x[0]]) for x in (IDS, OTHER)]
    at_base, on_the_way = (
        edge_attribution(llama, *batches, steps=steps, answers=[120], wrong=[130]) for steps in (0, 10)
    )
    source, base = (torch.tensor([ids[0]]) for ids in (IDS, OTHER))
    one, two = plain.added(source), plain.added(base)
    some = list(edges(at_base))[::2]
    moved = [metric(plain.logits(base, v, one[u] - two[u]), 0) - at_base.corrupt[0] for _, u, v in some]
    wanted, inner = np.array([float(x) for x in moved]), np.array([u[0] >= 0 for _, u, _ in some])
    got, far = (np.array([float(x.scores[place]) for place, _, _ in some]) for x in (at_base, on_the_way))
    assert np.corrcoef(got[inner], wanted[inner])[0, 1] > 0.97
    assert np.polyfit(got[inner], wanted[inner], 1)[0] == pytest.approx(1, abs=0.15)
    assert np.corrcoef(far, wanted)[0, 1] > max(0.85, np.corrcoef(got, wanted)[0, 1])


def test_where_the_model_is_linear_it_is_exact():
    """Without norms, values of the last layer and the logits are linear in what is read."""
    model = build("llama")
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x: x
    plain, last = Plain(model), model.config.num_hidden_layers - 1
    model.model.layers[last].mlp.act_fn.forward = torch.ones_like  # a gate that is always open
    lens = interp.wrap(model, processor("llama"))
    batches = [lens.prepare(input_ids=[x[0]]) for x in (IDS, OTHER)]
    found = edge_attribution(lens, *batches, answers=[120], wrong=[130])
    source, base = (torch.tensor([ids[0]]) for ids in (IDS, OTHER))
    one, two = plain.added(source), plain.added(base)
    seen = set()
    for place, u, target in edges(found):
        if target[2] == "logits" or (target[0] == last and target[2] in ("v", "mlp")):
            value = metric(plain.logits(base, target, one[u] - two[u]), 0)
            assert float(found.scores[place]) == pytest.approx(float(value - found.corrupt[0]), abs=2e-5, rel=1e-4)
            seen.add(target[2])
    assert seen == {"logits", "v", "mlp"}


def test_sums(llama, pair):
    """All that reaches a target sums to the stream's own product; all targets behind the embeddings to its gradient."""
    for steps in (0, 2):
        found = edge_attribution(llama, *pair, steps=steps, **ANSWERS)
        last = llama.anatomy.depth["text"] - 1
        to_logits = found.scores[:, -1].sum()
        options = {"positions": "all", "steps": steps, **ANSWERS}
        stream = attribution_patching(llama, *pair, sites="resid_post", layers=last, **options)
        assert float(to_logits) == pytest.approx(float((stream.values[0] - stream.corrupt).mean()), abs=1e-5)
        # Every way of the embeddings ends in a target, and the direct one in the logits.
        stream = attribution_patching(llama, *pair, sites="resid_pre", layers=0, **options)
        total = found.scores[0].nansum()
        assert float(total) == pytest.approx(float((stream.values[0] - stream.corrupt).mean()), abs=1e-4)
    mirrored = edge_attribution(llama, *reversed(pair), direction="noise", steps=2, **ANSWERS)
    torch.testing.assert_close(mirrored.scores, found.scores, equal_nan=True)


def test_padding_and_batches_change_nothing(llama, pair):
    right = [llama.prepare(input_ids=ids, padding_side="right") for ids in (IDS, OTHER)]
    one, two = (edge_attribution(llama, *b, steps=1, **ANSWERS) for b in (pair, right))
    torch.testing.assert_close(one.scores, two.scores, atol=1e-5, rtol=1e-3, equal_nan=True)
    apart = [[llama.prepare(input_ids=ids[:2]), llama.prepare(input_ids=ids[2:])] for ids in (IDS, OTHER)]
    three = edge_attribution(llama, *apart, steps=1, **ANSWERS)
    torch.testing.assert_close(one.scores, three.scores, atol=1e-5, rtol=1e-3, equal_nan=True)
    torch.testing.assert_close(one.errors, three.errors, atol=1e-5, rtol=1e-3, equal_nan=True)


def test_results(llama, pair, tmp_path):
    found = edge_attribution(llama, *pair, **ANSWERS)
    frame = found.frame()
    assert len(frame) == len(found) == int(found.valid.sum())
    row = frame[(frame["source"] == "1.2") & (frame["target"] == "2.1") & (frame["via"] == "k")].iloc[0]
    at = found.sources.tolist().index([1, 2])
    to = found.targets.tolist().index([2, 1, 1])
    assert row["score"] == found.scores[at, to].item()
    top = found.top(5)
    assert top["score"].abs().is_monotonic_decreasing
    assert set(found.top(3, via="logits")["target"]) == {"logits"}
    assert set(found.top(3, by="score", target="mlp.1", largest=False)["via"]) == {"mlp"}
    assert "3 prompts" in repr(found)
    found.save(tmp_path / "edges")
    assert EdgeScores.load(tmp_path / "edges").equals(found)
    for bad in ({"by": "size"}, {"via": "z"}, {"target": "9.9"}):
        with pytest.raises(UnknownNameError):
            found.top(3, **bad)
    with pytest.raises(SettingsError, match="from 1"):
        found.top(0)


def test_metrics_images_and_refusals(llama, pair):
    divergence = edge_attribution(llama, *pair)
    assert divergence.metric == "kl"
    own = edge_attribution(llama, *pair, metric=lambda x: x[:, -1, 7])
    named = edge_attribution(llama, *pair, metric="logit", answers=[7, 7, 7])
    torch.testing.assert_close(own.scores, named.scores, atol=1e-6, rtol=1e-4, equal_nan=True)
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given)
    noisy = {k: v + 0.3 if k.startswith("pixel") else v for k, v in given.items()}
    found = edge_attribution(
        lens, lens.prepare(**given), lens.prepare(**noisy), answers=[11, 11], wrong=[13, 13], steps=2
    )
    assert float(found.scores[0].nansum().abs()) > 1e-4
    for name in ("jamba", "olmo2", "gpt2", "gemma2"):
        known = inputs(name)
        other = {**known, "input_ids": (known["input_ids"] + 3) % 50 + 5}
        lens = interp.wrap(build(name), sample=known)
        batches = lens.prepare(**known), lens.prepare(**other)
        options = {"answers": [11, 11], "wrong": [13, 13]}
        if name == "jamba":
            with pytest.raises(UnsupportedError, match="not attn and mlp"):
                edge_attribution(lens, *batches, **options)
            continue
        found = edge_attribution(lens, *batches, **options)
        last = len(lens.anatomy.towers["text"].layers) - 1
        stream = attribution_patching(lens, *batches, sites="resid_post", layers=last, positions="all", **options)
        wanted = float((stream.values[0] - stream.corrupt).mean())
        assert float(found.scores[:, -1].sum()) == pytest.approx(wanted, abs=1e-4)  # norms behind attention add up
    bart = interp.wrap(build("bart"), sample=inputs("bart"))
    batches = [bart.prepare(**inputs("bart", seed=i)) for i in (0, 1)]
    with pytest.raises(UnsupportedError):
        edge_attribution(bart, *batches, answers=[5, 5])
    with pytest.raises(SettingsError, match="steps is"):
        edge_attribution(llama, *pair, steps=-1, **ANSWERS)
    with pytest.raises(InputError, match="same in the clean"):
        edge_attribution(llama, pair[0], pair[0], **ANSWERS)


def test_smollm(smollm):
    """Paths with frozen MLPs are exact patches of single edges: into the logits, and into one head's queries."""
    clean = smollm.prepare(["When Mary and John went to the store, John gave a drink to"])
    corrupt = smollm.prepare(["When Mary and John went to the store, Mary gave a drink to"])
    options = {"answers": [" Mary"], "wrong": [" John"]}
    found = edge_attribution(smollm, clean, corrupt, **options)
    assert found.top(1)[["source", "target"]].iloc[0].tolist() == ["23.3", "logits"]
    frame = found.frame().set_index(["source", "target", "via"])["score"]
    for target, via, receivers in (("logits", "logits", "logits"), ("23.0", "q", ["23.0"])):
        exact = path_patching(
            smollm, clean, corrupt, receivers=receivers, positions="all", mlps="frozen", direction="denoise", **options
        )
        wanted = (exact.values[:, 0] - exact.corrupt).numpy()
        got = [frame[f"{layer}.{head}", target, via] for _, layer, head, _ in exact.cells.tolist()]
        assert np.corrcoef(got, wanted)[0, 1] > 0.95, target
