"""Attribution patching: exact where the model is linear, the gradient elsewhere, and near the exact patches."""

import numpy as np
import pytest
import torch

import interp
from interp import edits
from interp.errors import SettingsError, UnknownNameError, UnsupportedError
from interp.tracing import attribution_patching, patch_sweep
from tests.zoo import build, inputs, processor

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
OTHER = [[70, 80, 95, 100, 110, 75], [76, 81, 91, 101], [72, 82, 92, 107, 112]]
ANSWERS = {"answers": [120, 121, 122], "wrong": [130, 131, 132]}
SITES = ["resid_pre", "attn_out", "mlp_out", "z", "k", "pattern"]


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def pair(llama):
    return [llama.prepare(input_ids=ids, padding_side="left") for ids in (IDS, OTHER)]


def test_behind_the_last_layer_it_is_exact_to_first_order(llama, pair):
    """At the last stream the metric is a norm and a projection: differentiated here by hand."""
    last = llama.anatomy.depth["text"] - 1
    found = attribution_patching(llama, *pair, sites="resid_post", layers=last, **ANSWERS)
    streams = [llama.run(b, f"resid_post.{last}@last")["resid_post", last][:, 0] for b in pair]
    stream = streams[1].clone().requires_grad_(True)
    norm, head = llama.model.model.norm, llama.model.lm_head
    logits, rows = head(norm(stream)), torch.arange(3)
    metric = logits[rows, ANSWERS["answers"]] - logits[rows, ANSWERS["wrong"]]
    (gradient,) = torch.autograd.grad(metric.sum(), stream)
    wanted = metric + ((streams[0] - streams[1]) * gradient).sum(1)
    ends = {5: 0, 3: 1, 4: 2}  # the last position of each prompt
    for position, prompt in ends.items():
        value = found.values[position, prompt]
        torch.testing.assert_close(value, wanted[prompt].detach(), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.corrupt, found.values[0])  # the first position reaches nothing behind the last layer


def test_it_is_the_slope_of_the_exact_patch(llama, pair):
    """A patch of a small part of the way changes the metric by that part of the estimate."""
    found = attribution_patching(llama, *pair, sites=SITES, layers=1, softmax="linear", **ANSWERS)
    source, base = (llama.run(b, [f"{s}.1" for s in SITES]) for b in pair)
    small = 1e-2
    for i in range(0, len(found.cells), 5):
        number, _, head, group = found.cells[i].tolist()
        site = SITES[number]
        ranks = pair[1].mask.long().cumsum(1) - 1
        mask = pair[1].mask & (ranks == int(found.groups[group]))
        values = []
        for sign in (1, -1):

            def change(old, site=site, mask=mask, head=head, sign=sign):
                keep = mask[:, None, :, None] if site == "pattern" else mask.reshape(*mask.shape, *[1] * (old.ndim - 2))
                keep = keep.expand_as(old)
                if head >= 0:
                    one = torch.zeros(old.shape[1 if site == "pattern" else 2], dtype=torch.bool)
                    one[head] = True
                    keep = keep & (one[None, :, None, None] if site == "pattern" else one[None, None, :, None])
                return torch.where(keep, old + sign * small * (source[site, 1] - base[site, 1]), old)

            last = llama.run(pair[1], "logits@last", edits.splice(change, site=site, layers=1)).logits[:, 0]
            rows = torch.arange(3)
            values.append(last[rows, ANSWERS["answers"]] - last[rows, ANSWERS["wrong"]])
        slope = (values[0] - values[1]) / (2 * small)
        there = mask.any(1)
        wanted = (found.values[i] - found.corrupt)[there]
        torch.testing.assert_close(slope[there], wanted, atol=2e-4, rtol=2e-2)
        assert found.values[i][~there].isnan().all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt_neox", "bart", "whisper"])
def test_the_softmax_is_exact(name):
    """Against the pattern of a run in which one cell is patched, times the gradient of the pattern: grouped queries,
    capped scores, sinks, two kinds of attention."""
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    other = given[key].clone()
    other[:, 2:6] = (other[:, 2:6] + 3) % 50 + 5
    changed = {**given, key: other}
    if "input_features" in given:
        changed["input_features"] = 0.5 * given["input_features"]
    clean, corrupt = lens.prepare(**given), lens.prepare(**changed)
    rows, layer = torch.arange(len(clean)), lens.layers_with("z")[-1]

    def metric(logits):
        return logits[rows, -1, 11] - logits[rows, -1, 13]

    for tower in ("", *(["cross:"] if key == "decoder_input_ids" else [])):
        pattern = f"{tower}pattern.{layer}"
        base = lens.run(corrupt, pattern, gradients=pattern, metric=metric)
        slope = base.gradient(pattern, layer)
        for site in (f"{tower}q", f"{tower}k"):
            source = lens.run(clean, f"{site}.{layer}")[site, layer]
            width = source.shape[1]
            every, some = torch.ones(len(clean), width, dtype=torch.bool), torch.zeros(len(clean), width).bool()
            some[:, 1:4] = True
            groups = {"every": every, "some": some}
            for heads in ("each", "all"):
                found = attribution_patching(
                    lens,
                    clean,
                    corrupt,
                    sites=site,
                    layers=layer,
                    positions=groups,
                    heads=heads,
                    answers=[11] * len(clean),
                    wrong=[13] * len(clean),
                )
                assert found.settings["softmax"] == "exact"
                for (_, _, head, group), value in zip(found.cells.tolist(), found.values, strict=True):
                    chosen = groups[found.groups[group]][..., None, None].expand_as(source)
                    if head >= 0:
                        chosen = chosen & (torch.arange(source.shape[2]) == head)[:, None]
                    change = edits.splice(
                        lambda x, c=chosen, new=source: torch.where(c, new, x),
                        site=site.rpartition(":")[2],
                        layers=layer,
                        tower=tower[:-1] or None,
                    )
                    patched = lens.run(corrupt, pattern, change)[pattern, layer]
                    wanted = ((patched - base[pattern, layer]) * slope).sum((1, 2, 3))
                    torch.testing.assert_close(value - found.corrupt, wanted, atol=2e-5, rtol=1e-3)


def test_layers_in_turn_and_gates(llama, pair, monkeypatch):
    """Scores of few layers are held at a time; where a gate lies behind attention, keys are refused."""
    whole = attribution_patching(llama, *pair, sites="k", **ANSWERS)
    monkeypatch.setattr("interp.tracing.exact_softmax._HELD", 1)
    torch.testing.assert_close(
        attribution_patching(llama, *pair, sites="k", **ANSWERS).values, whole.values, equal_nan=True
    )
    gated = interp.wrap(build("qwen3_next"), sample=inputs("qwen3_next"))
    batches = [gated.prepare(**inputs("qwen3_next", seed=i)) for i in (0, 1)]
    answers = {"answers": [5, 5], "wrong": [6, 6]}
    assert attribution_patching(gated, *batches, sites="q", **answers).values.isfinite().all()
    with pytest.raises(UnsupportedError, match="use softmax='linear'"):
        attribution_patching(gated, *batches, sites="k", **answers)
    assert attribution_patching(gated, *batches, sites="k", softmax="linear", **answers).values.isfinite().all()


def test_runs_groups_and_steps(llama, pair):
    """Both runs are exact, a group is the sum of its positions, all heads the sum of heads, padding changes nothing."""
    exact = patch_sweep(llama, *pair, sites="z", **ANSWERS)
    each = attribution_patching(llama, *pair, sites="z", **ANSWERS)
    torch.testing.assert_close(each.clean, exact.clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(each.corrupt, exact.corrupt, atol=1e-5, rtol=1e-4)
    assert torch.equal(each.cells, exact.cells)
    whole = attribution_patching(llama, *pair, sites="z", positions="all", heads="all", **ANSWERS)
    moved = (each.values - each.corrupt).nan_to_num()
    for layer in range(len(whole.cells)):
        total = moved[each.cells[:, 1] == layer].sum(0)
        torch.testing.assert_close(whole.values[layer] - whole.corrupt, total, atol=1e-4, rtol=1e-3)
    for steps in (0, 3):
        both = attribution_patching(llama, *pair, sites=["attn_out", "q", "k"], steps=steps, **ANSWERS)
        alone = [llama.prepare(input_ids=[ids[2]]) for ids in (IDS, OTHER)]
        one = attribution_patching(
            llama, *alone, sites=["attn_out", "q", "k"], steps=steps, **{k: [v[2]] for k, v in ANSWERS.items()}
        )
        rows = both.cells[:, 3] < 5
        torch.testing.assert_close(both.values[rows, 2], one.values[:, 0], atol=1e-5, rtol=1e-3)
    mirrored = attribution_patching(llama, *reversed(pair), sites="z", direction="noise", **ANSWERS)
    assert torch.equal(mirrored.values.nan_to_num(), each.values.nan_to_num())


def test_many_steps_add_up_at_the_input(llama, pair):
    """Gradients along the way integrate to the whole change: the more steps, the nearer."""
    gap = []
    for steps in (4, 64):
        found = attribution_patching(llama, *pair, sites="resid_pre", layers=0, positions="all", steps=steps, **ANSWERS)
        gap.append(float((found.values[0] - found.clean).abs().max()))
    assert gap[1] < gap[0] / 4
    assert gap[1] < 0.05 * float((found.clean - found.corrupt).abs().max())


def test_metrics_and_the_divergence(llama, pair):
    """The divergence is differentiated too; a function of logits gets the batch."""
    found = attribution_patching(llama, *pair, sites="attn_out")
    assert found.metric == "kl"
    assert float(found.clean.abs().max()) < 1e-5
    own = attribution_patching(llama, *pair, sites="attn_out", metric=lambda x: x[:, -1, 7])
    named = attribution_patching(llama, *pair, sites="attn_out", metric="logit", answers=[7, 7, 7])
    torch.testing.assert_close(own.values, named.values, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_images_and_encoders():
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given)
    noisy = {k: v + 0.3 if k.startswith("pixel") else v for k, v in given.items()}
    batches = lens.prepare(**given), lens.prepare(**noisy)
    answers = {"answers": [11, 11], "wrong": [13, 13]}
    found = attribution_patching(
        lens, *batches, sites=["resid_pre", "z"], positions={"image": "image", "text": "text"}, steps=2, **answers
    )
    assert found.values.isfinite().all()
    given = inputs("whisper")
    lens = interp.wrap(build("whisper"), sample=given)
    noisy = {**given, "input_features": given["input_features"] * 0.5}
    batches = lens.prepare(**given), lens.prepare(**noisy)
    found = attribution_patching(lens, *batches, sites=["cross:z", "cross:v"], positions="all", **answers)
    assert found.values.isfinite().all()
    with pytest.raises(UnsupportedError, match="steps must be 0"):
        attribution_patching(lens, *batches, steps=2, **answers)
    with pytest.raises(UnknownNameError, match="softmax"):
        attribution_patching(lens, *batches, softmax="soft", **answers)
    with pytest.raises(SettingsError, match="steps is"):
        attribution_patching(lens, *batches, steps=-1, **answers)


def test_it_follows_the_exact_patches_of_smollm(smollm):
    """Correlation over all cells that can differ, indirect object identification."""
    clean, corrupt = smollm.prepare([CLEAN]), smollm.prepare([CORRUPT])
    options = {"answers": [" Mary"], "wrong": [" John"]}
    for site, steps, least in (("z", 0, 0.95), ("attn_out", 0, 0.95), ("mlp_out", 5, 0.95)):
        layers = range(15, 30) if site == "z" else None
        exact = patch_sweep(smollm, clean, corrupt, sites=site, layers=layers, **options)
        found = attribution_patching(smollm, clean, corrupt, sites=site, layers=layers, steps=steps, **options)
        live = (exact.values != exact.base).any(1)
        r = np.corrcoef(exact.effects[live], found.effects[live])[0, 1]
        assert r > least, (site, r)


def test_the_exact_softmax_is_nearer_on_smollm(smollm):
    """Queries and keys of the pair: 0.83 and 0.89 with the gradient alone."""
    clean, corrupt = smollm.prepare([CLEAN]), smollm.prepare([CORRUPT])
    options = {"answers": [" Mary"], "wrong": [" John"], "layers": range(16, 24)}
    for site, least in (("q", 0.9), ("k", 0.99)):
        exact = patch_sweep(smollm, clean, corrupt, sites=site, **options)
        live = (exact.values != exact.base).any(1)
        r = {}
        for softmax in ("linear", "exact"):
            found = attribution_patching(smollm, clean, corrupt, sites=site, softmax=softmax, **options)
            r[softmax] = np.corrcoef(exact.effects[live], found.effects[live])[0, 1]
        assert r["exact"] > least, (site, r)
        assert r["exact"] > r["linear"] + 0.03, (site, r)
