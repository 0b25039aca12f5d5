"""Latents read: what is found is what plain loops find, effects and edits are their formulas, pages hide nothing."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import interp
from interp import dictionaries
from interp.cli.app import app
from interp.data import SceneCorpus, corpus
from interp.dictionaries import SAE, Transcoder
from interp.dictionaries.activations import ActivationStream, Contexts
from interp.dictionaries.features import (
    FeatureContexts,
    LocalChat,
    OpenAIChat,
    detection_score,
    explain,
    feature_edits,
    fuzzing_score,
    logit_effects,
    neighbours,
    top_contexts,
)
from interp.dictionaries.features import logits as logits_module
from interp.dictionaries.features import search as search_module
from interp.dictionaries.features.explain import LEFT, RIGHT
from interp.errors import EditError, FileError, InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.report import write_feature_page
from tests.zoo import build, processor

WORDS = "the cat saw a dog and ran home over hills to sleep on warm grass until noon".split()
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 1 + (i * 5) % 11]) for i in range(23)]
OPTIONS = {"context": 16, "special": "bos", "separator": "none"}


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def gpt2():
    return interp.wrap(build("gpt2"), processor("gpt2"), name="gpt2")


@pytest.fixture(scope="module")
def tiny():
    return interp.load("scenes")


def dictionary(width, d_sae=24, *, seed=0, read="resid_post.1", **settings):
    made = SAE(
        d_in=width, d_sae=d_sae, seed=seed, metadata={"read": read}, **{"architecture": "topk", "k": 3} | settings
    )
    with torch.no_grad():
        made.b_dec.normal_(generator=torch.Generator().manual_seed(seed), std=0.1)
        made.W_dec.mul_(torch.linspace(0.5, 3, d_sae)[:, None])
    return made.eval()


def width_of(lens):
    return lens.anatomy.towers[lens.anatomy.main].d_model


def letters(lens, letter):
    (found,) = lens.processor(letter, add_special_tokens=False)["input_ids"]
    return found


def detector(vectors, read):
    """One latent for each vector: 0.1 where the activation is that vector, 0 where it is not."""
    made = SAE(d_in=vectors.shape[1], d_sae=len(vectors), architecture="standard", metadata={"read": read})
    with torch.no_grad():
        unit = vectors / vectors.square().sum(1, keepdim=True)
        made.W_enc.copy_(unit.t())
        made.W_dec.copy_(vectors)
        made.b_enc.fill_(-0.9)
        made.b_dec.zero_()
    return made


def letter_detector(lens, text):
    table = lens.model.get_input_embeddings().weight.detach()
    return detector(table[[letters(lens, c) for c in text]], "embed")


def plain(made, lens, texts, *, batch=4, **options):
    """Every context's tokens, ids and latents, one run of the model after the other."""
    stream = ActivationStream(lens, corpus(texts), made.metadata["read"], batch=1, **OPTIONS | options)
    rows = []
    with torch.no_grad():
        for one in stream:
            acts = made.encode(one[stream.reads[0]][0]) * one.mask[0][:, None]
            rows.append((int(one.number[0]), one.ids[0], one.mask[0], acts))
    return rows


def search(made, lens, texts=TEXTS, **options):
    return top_contexts(made, lens, corpus(texts), **OPTIONS | options)


# --- contexts


def test_a_latent_for_each_letter_is_found_where_the_letter_stands(llama):
    texts = ["zebra and zoo", "a quiet day", "z", "no such letter here", "lazy crazy zzz"]
    made = letter_detector(llama, "zq")
    found = search(made, llama, texts, packed=False, k=4, context=32, window=2)
    used = sum(map(len, texts))  # the bos in front is the first position that is left out
    assert found.tokens == used
    assert found.active.tolist() == [sum(t.count(c) for t in texts) for c in "zq"]
    assert torch.allclose(found.density, found.active / used)
    assert torch.allclose(found.maximum, torch.full((2,), 0.1), atol=1e-5)
    assert torch.allclose(found.mean, torch.full((2,), 0.1), atol=1e-5)
    assert sorted(e.document for e in found.examples(0)) == [0, 2, 4]
    assert [e.document for e in found.examples(1)] == [1]
    (quiet,) = found.examples(1)
    assert quiet.tokens[quiet.peak] == "q"
    assert quiet.text == "a qui"
    assert np.flatnonzero(quiet.activations).tolist() == [quiet.peak]
    for latent, letter in enumerate("zq"):
        for example in found.examples(latent, "silent"):
            assert letter not in example.text
            assert not example.activations.any()
    assert len(found.examples(1, "silent")) >= 4


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "abstopk"])
def test_top_contexts_are_those_of_plain_loops(llama, architecture):
    made = dictionary(width_of(llama), architecture=architecture)
    found = search(made, llama, k=4, batch=5, window=3)
    rows = plain(made, llama, TEXTS)
    every = torch.cat([acts[mask] for _, _, mask, acts in rows])
    active = every != 0
    assert found.tokens == len(every)
    assert torch.equal(found.active, active.sum(0))
    torch.testing.assert_close(found.mean, every.sum(0) / active.sum(0).clamp_min(1), atol=1e-6, rtol=1e-4)
    for latent in range(made.cfg.d_sae):
        peaks = sorted(((float(acts[:, latent].abs().max()), n) for n, _, _, acts in rows), reverse=True)
        wanted = [p for p in peaks if p[0] > 0][:4]
        mine = found.examples(latent)
        # Contexts that begin alike have equal activations but for rounding, so that values are compared, not numbers.
        np.testing.assert_allclose([abs(e.value) for e in mine], [p for p, _ in wanted], atol=1e-5)
        assert len({e.number for e in mine}) == len(wanted)
        for example in mine:
            _, ids, _, acts = rows[example.number]
            at = int(acts[:, latent].abs().argmax())
            assert example.position == at
            first, last = max(at - 3, 0), min(at + 4, len(ids))
            assert (example.start, len(example.tokens)) == (first, last - first)
            np.testing.assert_allclose(example.activations, acts[first:last, latent], atol=1e-5)
            assert list(example.tokens) == [llama.processor.decode([i]) for i in ids[first:last].tolist()]
            assert example.value == example.activations[example.peak]
        if mine:
            assert float(found.maximum[latent]) == mine[0].value


def test_batches_padding_and_the_choice_of_latents_change_nothing(llama, monkeypatch):
    made = dictionary(width_of(llama))
    random = np.random.default_rng(0)
    # No two begin alike: equal activations, up to rounding, would have no order.
    signs = list("abcdefghijklmnopqrstuvwxyz0123456789")
    texts = [signs[n] + "".join(random.permutation(signs)[: 2 + n % 9]) for n in range(36)]
    one = search(made, llama, texts, k=3, packed=False, batch=1)
    many = search(made, llama, texts, k=3, packed=False, batch=7)
    assert not torch.equal(one.token[:, -1] == -1, torch.zeros(len(one.token), dtype=torch.bool))  # lengths differ
    monkeypatch.setattr(search_module, "_HELD", 1)  # one context at a time
    split = search(made, llama, texts, k=3, packed=False, batch=7)
    some = search(made, llama, texts, k=3, packed=False, batch=4, latents=[17, 2])
    for other in (many, split):
        assert torch.equal(one.active, other.active)
        for group in ("top", "sampled", "silent"):
            same_windows(getattr(one, group), getattr(other, group))
    assert some.latents.tolist() == [17, 2]
    for group in ("top", "sampled", "silent"):
        for latent in (17, 2):
            mine, theirs = some.examples(latent, group), one.examples(latent, group)
            assert [(e.number, e.position, e.tokens) for e in mine] == [
                (e.number, e.position, e.tokens) for e in theirs
            ]
    chosen = one.select([17, 2])
    assert [e.number for e in chosen.examples(17)] == [e.number for e in some.examples(17)]


def same_windows(one, other):
    there = one.context >= 0
    assert torch.equal(there, other.context >= 0)
    for name in ("context", "centre", "start", "length"):
        assert torch.equal(getattr(one, name)[there], getattr(other, name)[there])
    torch.testing.assert_close(one.acts, other.acts, atol=1e-5, rtol=1e-4)


def test_sampled_windows_are_about_active_tokens_and_not_among_the_largest(llama):
    made = dictionary(width_of(llama))
    found = search(made, llama, k=2, sampled=6, window=2)
    seen = 0
    for latent in range(made.cfg.d_sae):
        top = {e.number for e in found.examples(latent)}
        drawn = found.examples(latent, "sampled")
        seen += len(drawn)
        assert all(e.value != 0 for e in drawn)
        assert not top & {e.number for e in drawn}
        assert [abs(e.value) for e in drawn] == sorted((abs(e.value) for e in drawn), reverse=True)
        assert all(not e.activations.any() for e in found.examples(latent, "silent"))
    assert seen > 20


def test_contexts_are_drawn_in_proportion_to_their_active_tokens():
    """Three contexts with 1, 2 and 5 active tokens, and one with the largest activation; positions evenly within."""
    made = SAE(d_in=2, d_sae=2, architecture="standard")
    with torch.no_grad():
        made.W_enc.copy_(torch.eye(2))
        made.b_enc.zero_()
        made.b_dec.zero_()
    x = torch.zeros(4, 8, 2)
    x[0, 3, 0] = 1
    x[1, 2:4, 0] = 1
    x[2, 1:6, 0] = 1
    x[3, :, 0] = 9
    mask = torch.ones(4, 8, dtype=torch.bool)
    contexts = Contexts({"x": x}, mask, mask, torch.zeros(4, 8).long(), torch.zeros(4, 8).long(), torch.arange(4))
    which, where = Counter(), Counter()
    for seed in range(1000):
        running = search_module._Search(made, torch.arange(2), 1, 1, 0, 1, seed)
        with torch.no_grad():
            running.take(contexts, x)
        _, drawn, _ = running.groups()
        context, column = int(drawn.context[0, 0]), int(drawn.centre[0, 0])
        which[context] += 1
        where[column] += context == 2
        assert int(drawn.context[1, 0]) == -1
    # Two of four are drawn (k + sampled), and the largest left out: its chance to be the first of them is 8/16.
    first = {n: w / 16 for n, w in ((0, 1), (1, 2), (2, 5))}
    second = {n: 8 / 16 * w / 8 for n, w in ((0, 1), (1, 2), (2, 5))}
    assert set(which) == {0, 1, 2}
    for n in which:
        assert abs(which[n] / 1000 - first[n] - second[n]) < 0.05
    assert set(+where) == {1, 2, 3, 4, 5}
    assert max(where.values()) / sum(where.values()) < 0.27


def test_a_latent_that_is_active_in_every_context_has_silent_windows(llama):
    texts = ["e" + "xyz" * 12 for _ in range(6)]
    found = search(letter_detector(llama, "e"), llama, texts, packed=False, context=48, window=3, drop_first=False)
    assert int(found.active[0]) == 6
    silent = found.examples(0, "silent")
    assert silent
    assert all("e" not in e.text for e in silent)


def test_contexts_are_saved_and_limited(llama, tmp_path):
    made = dictionary(width_of(llama))
    found = search(made, llama, k=3, contexts=5, batch=3)
    assert found.settings["contexts"] == 5
    assert {e.number for n in range(24) for e in found.examples(n)} <= set(range(5))
    found.save(tmp_path / "c")
    assert FeatureContexts.load(tmp_path / "c").equals(found)
    frame = found.windows()
    assert len(frame) == sum(len(found.examples(n, g)) for n in range(24) for g in ("top", "sampled", "silent"))
    assert list(found.frame()["latent"]) == list(range(24))


def test_what_cannot_be_searched_is_refused(llama, gpt2):
    made = dictionary(width_of(llama))
    with pytest.raises(SettingsError, match="give read="):
        search(SAE(d_in=width_of(llama), d_sae=8, architecture="standard"), llama)
    with pytest.raises(SettingsError, match="one layer"):
        search(made, llama, read="resid_post")
    with pytest.raises(UnknownNameError, match="latent 24"):
        search(made, llama, latents=[24])
    with pytest.raises(SettingsError, match="each once"):
        search(made, llama, latents=[2, 2])
    with pytest.raises(InputError, match="wide"):
        search(dictionary(8), llama)
    with pytest.raises(SettingsError, match="k is at least 1"):
        search(made, llama, k=0)
    with pytest.raises(SettingsError, match="no threshold yet"):
        search(dictionary(width_of(llama), architecture="batchtopk"), llama)
    with pytest.raises(SettingsError, match="scaled activations"):
        search(dictionary(width_of(llama), normalize_activations="expected_average_only_in"), llama)
    found = search(made, llama, k=1)
    with pytest.raises(UnknownNameError, match="group"):
        found.examples(0, "most")
    with pytest.raises(UnknownNameError, match="latent 99"):
        found.examples(99)


# --- pictures


def test_a_latent_of_one_patch_is_found_in_its_picture(tiny):
    scenes = SceneCorpus("test", 6)
    stream = ActivationStream(tiny, scenes, "resid_pre.0", batch=1)
    rows = [one["resid_pre.0"][0] for one in stream]
    patches = torch.stack([row[1:65] for row in rows])  # a bos stands in front
    direction = patches[4, 19] - patches.mean((0, 1))
    target, patch = divmod(int((patches @ direction).argmax()), 64)
    made = SAE(d_in=160, d_sae=1, architecture="standard", metadata={"read": "resid_pre.0"})
    with torch.no_grad():
        made.W_enc.copy_(direction[:, None])
        made.b_enc.zero_()
        made.b_dec.zero_()
    found = top_contexts(made, tiny, scenes, batch=4, k=2, tokens="image")
    example = found.example(0)
    assert (example.document, example.position) == (target, 1 + patch)
    assert example.start == 0
    assert len(example.tokens) == len(rows[target])
    assert example.kinds.count("image") == 64
    np.testing.assert_allclose(example.activations[1:65], (patches[target] @ direction).relu(), rtol=1e-4, atol=1e-4)
    assert not example.activations[65:].any()  # text was not used
    grid = example.image_map()
    assert grid.shape == (72, 72)
    bright = grid == grid.max()
    assert bright.sum() == 81
    top, left = 9 * (patch // 8), 9 * (patch % 8)
    assert bool(bright[top : top + 9, left : left + 9].all())
    again = type(found)._restore(found._tensors(), json.loads(json.dumps(found._fields())))
    assert torch.equal(again.example(0).image_map(), grid)


def test_latents_of_a_vision_tower_have_maps(tiny):
    made = dictionary(48, read="vision:resid_post.1", architecture="standard")
    width = ActivationStream(tiny, SceneCorpus("test", 1), "vision:resid_post.1").d_in["vision:resid_post.1"]
    made = dictionary(width, read="vision:resid_post.1", architecture="standard")
    found = top_contexts(made, tiny, SceneCorpus("test", 5), batch=2, k=3)
    latent = int(found.active.argmax())
    example = found.example(latent)
    grid = example.image_map()
    values = example.activations[[k == "image" for k in example.kinds]]
    assert float(grid[~grid.isnan()].max()) == pytest.approx(values.max())


# --- neighbours and logits


@pytest.mark.parametrize("by", ["decoder", "encoder"])
def test_neighbours_are_those_of_the_plain_cosine(by):
    made = dictionary(16)
    with torch.no_grad():
        made.W_dec[5] = 2 * made.W_dec[11]
        made.W_enc[:, 6] = -made.W_enc[:, 3]
    found = neighbours(made, [11, 3], 4, by=by)
    weights = (made.W_dec if by == "decoder" else made.W_enc.t()).detach()
    for latent in (11, 3):
        cosine = torch.cosine_similarity(weights[latent], weights)
        wanted = sorted((-float(c), n) for n, c in enumerate(cosine) if n != latent)[:4]
        assert [n for n, _ in found.of(latent)] == [n for _, n in wanted]
        np.testing.assert_allclose([c for _, c in found.of(latent)], [-c for c, _ in wanted], atol=1e-6)
    if by == "decoder":
        assert found.of(11)[0][0] == 5
    assert neighbours(made, 0, 100).index.shape == (1, 23)
    assert len(found.frame()) == 8
    with pytest.raises(UnknownNameError):
        neighbours(made, 0, by="both")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logit_effects_are_the_change_of_logits_where_the_norm_stands_still(name, request, monkeypatch):
    """With the norm's scale held, logits are linear: the effect is their change for a unit of the latent."""
    lens = request.getfixturevalue(name)
    last = len(lens.anatomy.towers["text"].layers) - 1
    made = dictionary(width_of(lens), architecture="standard", read=f"resid_post.{last}")
    monkeypatch.setattr(logits_module, "_TOKENS", 7)
    batch = lens.prepare(["abc"])
    found = logit_effects(made, lens, [4, 9], 5, batch=batch)
    assert found.layers_behind == 0
    norm, stream = lens.anatomy.unembed.norm_modules[0], lens.run(batch, f"resid_post.{last}")["resid_post", last][0]
    gain, centred = norm.weight.detach(), name == "gpt2"

    def scale(x):
        x = x - x.mean(-1, keepdim=True) if centred else x
        return (x.square().mean(-1) + (norm.eps if centred else norm.variance_epsilon)).rsqrt()

    table = lens.model.get_output_embeddings().weight.detach()
    for latent in (4, 9):
        row = made.W_dec[latent].detach()
        row = row - row.mean() if centred else row
        effect = (gain * row * scale(stream).mean()) @ table.t()
        effect = effect - effect.mean()
        best, worst = effect.topk(5), (-effect).topk(5)
        n = found.latents.tolist().index(latent)
        assert torch.equal(found.promoted[n], best.indices)
        assert torch.equal(found.suppressed[n], worst.indices)
        torch.testing.assert_close(found.promotes[n], best.values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.suppresses[n], -worst.values, atol=1e-5, rtol=1e-4)
        up, down = found.of(latent)
        assert up[0][0] == lens.processor.decode([int(best.indices[0])])
        assert down[0][1] < 0
    free = logit_effects(made, lens, [4, 9], 5)
    assert torch.equal(free.promoted, found.promoted)
    assert "up to a factor" in free.unit
    assert len(free.frame()) == 20


def test_logit_effects_of_other_sites_are_refused(llama):
    width = llama.run(llama.prepare(["ab"]), "z.1")["z", 1].flatten(2).shape[-1]
    with pytest.raises(UnsupportedError, match="residual stream"):
        logit_effects(dictionary(width, read="z.1"), llama, [0])
    made = dictionary(width_of(llama), read="resid_pre.1")
    depth = len(llama.anatomy.towers["text"].layers)
    assert logit_effects(made, llama, [0], 2).layers_behind == depth - 1
    bert = interp.wrap(build("vit"), name="vit")
    with pytest.raises(UnsupportedError):
        logit_effects(dictionary(width_of(bert), read="resid_post.0"), bert, [0])


# --- edits


@pytest.fixture(scope="module")
def prompts(llama):
    return llama.prepare(["the cat", "a dog ran"])


@pytest.mark.parametrize("how", ["value", "scale", "add"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_edits_are_the_formula_and_keep_the_error(llama, prompts, how, normalize):
    made = dictionary(width_of(llama), architecture="jumprelu", normalize_activations=normalize)
    x = llama.run(prompts, "resid_post.1")["resid_post", 1]
    with torch.no_grad():
        f = made.encode(x)
        new = f.clone()
        some = f.sum((0, 1)).topk(2).indices.tolist()
        assert bool((f[..., some] > 0).any())
        strength = torch.tensor([2.0, -0.5])
        new[..., some] = {"value": strength.expand(*f.shape[:2], 2), "scale": f[..., some] * strength}.get(
            how, f[..., some] + strength
        )
        wanted = x + made.decode(new, x) - made.decode(f, x)
    edits = feature_edits(made, some, **{how: strength})
    found = llama.run(prompts, "resid_post.1", edits)["resid_post", 1]
    torch.testing.assert_close(found[prompts.mask], wanted[prompts.mask], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, x)


def test_edits_of_no_strength_change_no_bit(llama, prompts):
    made = dictionary(width_of(llama))
    x = llama.run(prompts, "resid_post.1")["resid_post", 1]
    with torch.no_grad():
        f = made.encode(x)
    usual = llama.run(prompts, "logits")["logits"]
    for edits in (
        feature_edits(made, list(range(24)), scale=1.0),
        feature_edits(made, 3, add=0.0),
        feature_edits(made, int((f == 0).all((0, 1)).nonzero()[0]), value=0.0),
    ):
        assert torch.equal(llama.run(prompts, "logits", edits)["logits"], usual)
    made.train()
    feature_edits(made, 3, add=0.0)
    assert made.training


def test_edits_by_sample_and_position_batched_as_single(llama, prompts):
    made = dictionary(width_of(llama))
    strengths = torch.tensor([[4.0, 0.0], [-1.0, 2.0]])
    edits = feature_edits(made, [2, 7], add=strengths, positions="last")
    found = llama.run(prompts, "resid_post.1", edits)["resid_post", 1]
    usual = llama.run(prompts, "resid_post.1")["resid_post", 1]
    rows = made.kind.decoder(made).detach()[[2, 7]]
    torch.testing.assert_close(found[:, -1] - usual[:, -1], strengths @ rows, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[:, :-1], usual[:, :-1])
    for n in range(2):
        alone = prompts[n]
        one = llama.run(alone, "logits", feature_edits(made, [2, 7], add=strengths[n : n + 1], positions="last"))
        both = llama.run(prompts, "logits", edits)["logits"][n][prompts.mask[n]]
        torch.testing.assert_close(one["logits"][0], both, atol=1e-4, rtol=1e-4)


def transcoder(lens, **settings):
    width = width_of(lens)
    made = Transcoder(
        d_in=width,
        d_sae=24,
        architecture="topk",
        k=3,
        metadata={"read": "resid_mid.1", "target": "mlp_out.1"},
        **settings,
    )
    return made.eval()


def test_transcoders_write_at_their_target(llama, prompts):
    made = transcoder(llama, skip=True)
    trace = llama.run(prompts, ["resid_mid.1", "mlp_out.1"])
    x, y = trace["resid_mid", 1], trace["mlp_out", 1]
    with torch.no_grad():
        f = made.encode(x)
        new = f.clone()
        new[..., [1, 5]] = torch.tensor([3.0, 0.0])
        wanted = y + made.decode(new, x) - made.decode(f, x)
    edits = feature_edits(made, [1, 5], value=[3.0, 0.0])
    found = llama.run(prompts, ["resid_mid.1", "mlp_out.1"], edits)
    assert torch.equal(found["resid_mid", 1], x)
    torch.testing.assert_close(found["mlp_out", 1][prompts.mask], wanted[prompts.mask], atol=1e-5, rtol=1e-4)
    usual = llama.run(prompts, "logits")["logits"]
    assert torch.equal(llama.run(prompts, "logits", feature_edits(made, 1, scale=1.0))["logits"], usual)
    with pytest.raises(EditError, match="not reached before"):
        llama.run(prompts, "logits", feature_edits(made, 1, value=1.0, read="resid_mid.2", target="mlp_out.1"))
    with pytest.raises(EditError, match="not reached before"):
        llama.run(prompts, "logits", edits[1:])  # what an earlier run left is not taken


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_generation_with_a_cache_is_that_without(llama, kind):
    made = dictionary(width_of(llama)) if kind == "sae" else transcoder(llama)
    batch = llama.prepare(["the cat", "a dog ran"], padding_side="left")
    edits = feature_edits(made, [3, 8], add=[25.0, -10.0])
    found = llama.generate(batch, edits, max_new_tokens=6, min_new_tokens=6)
    usual = llama.generate(batch, max_new_tokens=6, min_new_tokens=6)
    assert not torch.equal(found.tokens, usual.tokens)
    end = llama.model.generation_config.eos_token_id
    for n in range(2):
        ids = batch.inputs["input_ids"][n][batch.mask[n]].tolist()
        for step in range(6):
            one = llama.prepare(input_ids=[ids])
            logits = llama.run(one, "logits@last", edits)["logits"][0, 0].clone()
            if end is not None:
                logits[end] = -torch.inf
            ids.append(int(logits.argmax()))
            assert ids[-1] == int(found.tokens[n, step])
    beams = llama.generate(batch, edits, max_new_tokens=4, num_beams=2)
    single = llama.generate(llama.prepare(["the cat"]), edits, max_new_tokens=4, num_beams=2)
    assert beams.texts[0] == single.texts[0]


def test_heads_side_by_side_can_be_edited(llama, prompts):
    z = llama.run(prompts, "z.1")["z", 1]
    made = dictionary(z.flatten(2).shape[-1], read="z.1")
    found = llama.run(prompts, "z.1", feature_edits(made, 4, add=2.0))["z", 1]
    row = made.kind.decoder(made).detach()[4].view(z.shape[2:])
    torch.testing.assert_close(found - z, (2 * row).expand_as(z), atol=1e-5, rtol=1e-4)


def test_edits_that_do_not_fit_are_refused(llama, prompts):
    made = dictionary(width_of(llama))
    with pytest.raises(SettingsError, match="one of value, scale and add"):
        feature_edits(made, 1)
    with pytest.raises(SettingsError, match="one of value, scale and add"):
        feature_edits(made, 1, value=1.0, add=1.0)
    with pytest.raises(EditError, match="latents 2"):
        feature_edits(made, [1, 2], value=[1.0, 2.0, 3.0])
    with pytest.raises(EditError, match="NaN"):
        feature_edits(made, 1, value=float("nan"))
    with pytest.raises(UnknownNameError):
        feature_edits(made, 24, value=1.0)
    with pytest.raises(SettingsError, match="target is for transcoders"):
        feature_edits(made, 1, value=1.0, target="mlp_out.1")
    with pytest.raises(EditError, match="wide"):
        llama.run(prompts, "logits", feature_edits(dictionary(6), 1, value=1.0))
    with pytest.raises(EditError, match="3 samples"):
        llama.run(prompts, "logits", feature_edits(made, 1, value=torch.ones(3, 1)))


# --- explanations


class Endpoint(BaseHTTPRequestHandler):
    """An endpoint that speaks the chat protocol, for one model and one key."""

    failures: ClassVar[int] = 0
    seen: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, self.headers.get("Authorization"), body))
        if type(self).failures:
            type(self).failures -= 1
            self.answer(503, b"busy")
        elif self.headers.get("Authorization") not in (None, "Bearer sesame"):
            self.answer(401, b'{"error": "wrong key"}')
        elif body["model"] == "broken":
            self.answer(200, b"<html>")
        elif body["model"] == "empty":
            self.answer(200, json.dumps({"choices": [{"message": {"content": None}}]}).encode())
        else:
            said = f"{body['model']} heard: {body['messages'][-1]['content']}"
            self.answer(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.failures, Endpoint.seen = 0, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_chat_by_http(endpoint, monkeypatch):
    waited = []
    monkeypatch.setattr("interp.dictionaries.features.chat.time.sleep", waited.append)
    chat = OpenAIChat(endpoint + "/", "m1", api_key="sesame", max_tokens=7)
    assert "sesame" not in repr(chat)
    messages = [{"role": "user", "content": "häl\n<lo>"}]
    assert chat(messages) == "m1 heard: häl\n<lo>"
    path, key, body = Endpoint.seen[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer sesame")
    assert body == {"model": "m1", "messages": messages, "temperature": 0.0, "max_tokens": 7}
    Endpoint.failures = 2
    assert chat(messages).startswith("m1")
    assert waited == [1.0, 2.0]
    Endpoint.failures = 9
    with pytest.raises(FileError, match="503: busy"):
        chat(messages)
    assert len(waited) == 5
    Endpoint.failures = 0
    with pytest.raises(FileError, match=r"401.*wrong key"):
        OpenAIChat(endpoint, "m1", api_key="guess")(messages)
    assert len(waited) == 5
    for model in ("broken", "empty"):
        with pytest.raises(InputError, match="answered"):
            OpenAIChat(endpoint, model)(messages)
    with pytest.raises(FileError, match="cannot be reached"):
        OpenAIChat("http://127.0.0.1:9/v1", "m1", retries=0)(messages)
    with pytest.raises(SettingsError, match="base_url"):
        OpenAIChat("file:///etc/passwd", "m1")


@pytest.fixture(scope="module")
def lettered(llama):
    """Latents for letters, and texts in which each of them is active in many contexts."""
    random = np.random.default_rng(0)
    texts = ["".join(random.permutation(list("bcdfghjklmnp" + "qvz"[n % 3] * 3))) for n in range(60)]
    made = letter_detector(llama, "qvz")
    return made, search(made, llama, texts, packed=False, context=32, window=4, k=4, sampled=8, silent=8)


def test_an_explanation_is_asked_for_with_marked_tokens(lettered):
    _, found = lettered
    asked = []

    def chat(messages):
        asked.append(messages)
        return "\n the letter that is marked\nand more"

    lines = explain(found, chat, latents=[0, 2], examples=3)
    assert lines == {0: "the letter that is marked", 2: "the letter that is marked"}
    text = asked[0][-1]["content"]
    assert text.count("reactions:") == 3
    assert f"{LEFT}q" in text
    assert f"{LEFT}v" not in text
    assert "'q' 10" in text
    for part in text.split(LEFT)[1:]:
        assert set(part.split(RIGHT)[0]) == {"q"}
    with pytest.raises(InputError, match="no explanation"):
        explain(found, lambda messages: " \n")
    with pytest.raises(SettingsError):
        explain(found, chat, threshold=0)


def oracle(messages):
    """A judge that reads: the description is a letter, and marks are where they are."""
    task, given = messages[0]["content"], messages[1]["content"]
    head, body = given.split("\n\nPassages:\n")
    letter = head.removeprefix("Description: ")
    out = []
    for line in body.splitlines():
        number, text = line.split(". ", 1)
        inside = "".join(part.split(RIGHT)[0] for part in text.split(LEFT)[1:]) if LEFT in task else text
        fits = letter in inside and set(inside) <= {letter} if LEFT in task else letter in inside
        out.append(f"{number} {'yes' if fits else 'no'}")
    return "\n".join(out)


@pytest.mark.parametrize("score", [detection_score, fuzzing_score])
def test_scores_of_judges_that_are_known(lettered, score):
    _, found = lettered
    right = dict(enumerate("qvz"))
    known = score(found, right, oracle, per_call=3)
    assert known.latents == (0, 1, 2)
    assert [a.value for a in known.accuracy] == [1.0] * 3
    assert all(0.5 < a.low < a.high <= 1 for a in known.accuracy)
    # Another letter fits no window that activates the latent, but some windows that do not.
    if score is fuzzing_score:
        assert [b.value for b in known.baseline] == [0.5] * 3
        assert known.gain.value == 0.5
    else:
        assert 0 < known.mean_baseline.value < 0.5
    assert known.mean.value == 1.0
    assert known.gain.value == pytest.approx(1 - known.mean_baseline.value)
    assert min(known.windows) >= 10
    assert known.unanswered == (0, 0, 0)
    always = score(found, right, lambda m: "\n".join(f"{n}: YES." for n in range(1, 9)))
    assert always.mean.value == 0.5
    mute = score(found, right, lambda m: "I would rather not.")
    assert mute.mean.value == 0.5
    assert mute.unanswered == tuple(2 * n for n in mute.windows)
    alone = score(found, {1: "v"}, oracle)
    assert alone.mean_baseline is None
    assert alone.baseline == ()
    assert np.isnan(alone.mean.low)
    assert list(known.frame()["accuracy"]) == [1.0] * 3
    assert score(found, right, oracle, seed=5).settings["seed"] == 5


def test_a_judge_that_is_half_right_scores_so(lettered):
    """Right on every window that activates the latent, and on half of the others: three quarters."""
    _, found = lettered
    flip = [0]

    def chat(messages):
        lines = []
        for line in oracle(messages).splitlines():
            if line.endswith("no"):
                flip[0] += 1
                line = line.replace("no", "yes") if flip[0] % 2 else line
            lines.append(line)
        return "\n".join(lines)

    scores = detection_score(found, {0: "q"}, chat)
    assert scores.mean.value == pytest.approx(0.75)
    assert scores.accuracy[0].low < 0.75 < scores.accuracy[0].high


def test_what_cannot_be_scored_is_refused(lettered, llama, tiny):
    made, found = lettered
    few = search(made, llama, ["bcd", "fgh"], packed=False, context=32)
    assert explain(few, oracle) == {}
    with pytest.raises(InputError, match="both kinds"):
        detection_score(few, {0: "q"}, oracle)
    with pytest.raises(SettingsError):
        detection_score(found, {0: "q"}, oracle, windows=0)
    with pytest.raises(SettingsError):
        fuzzing_score(found, {0: "q"}, oracle, threshold=2)
    images = top_contexts(
        dictionary(160, read="resid_post.3"), tiny, SceneCorpus("test", 3), tokens="image", latents=None, k=1
    )
    seen = int(images.active.argmax())
    with pytest.raises(UnsupportedError, match="image tokens"):
        explain(images, oracle, latents=seen)


def test_a_local_model_chats(smollm):
    chat = LocalChat(smollm, max_new_tokens=5)
    said = chat([{"role": "user", "content": "The capital of France is"}])
    assert isinstance(said, str)
    assert said == chat([{"role": "user", "content": "The capital of France is"}])
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        LocalChat(interp.wrap(build("llama")))
    with pytest.raises(SettingsError):
        LocalChat(smollm, max_new_tokens=0)


# --- page and command


def test_the_page_shows_latents_and_escapes_everything(lettered, llama, tmp_path):
    made, found = lettered
    evil = "<script>alert(1)</script>"
    lines = {0: evil, 1: "v", 2: "z"}
    page = write_feature_page(
        tmp_path,
        found,
        effects=None,
        neighbours=neighbours(made, found.latents, 2),
        explanations=lines,
        scores=[detection_score(found, lines, oracle)],
        examples=3,
    ).read_text()
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page
    for latent in range(3):
        assert f"Latent {latent}</h2>" in page
    assert "Detection: mean" in page
    assert "another latent" in page
    chips = page.split('<p class="chips">')[1].split("</p>")[0]
    assert ">q</span>" in chips
    assert "q = 0.1" in chips
    assert page.count('class="panel"') == 3 * (3 + 2)
    with pytest.raises(SettingsError, match="not the one"):
        write_feature_page(tmp_path, found, corpus=corpus(["other"]))


def test_html_in_texts_stays_text(llama, tmp_path):
    found = search(letter_detector(llama, "<"), llama, ["<b>x</b>&amp;", "no"], packed=False, context=32)
    page = write_feature_page(tmp_path, found).read_text()
    chips = page.split('<p class="chips">')[1].split("</p>")[0]
    assert ">&lt;</span>" in chips
    assert ">&amp;</span>" in chips
    assert "<b>" not in chips


def test_the_page_of_pictures_lays_maps_over_them(tiny, tmp_path):
    scenes = SceneCorpus("test", 4)
    found = top_contexts(dictionary(160, read="resid_post.3"), tiny, scenes, tokens="image", k=2)
    found = found.select([int(found.active.argmax())])
    with_pictures = write_feature_page(tmp_path / "a", found, corpus=scenes, examples=2).read_text()
    without = write_feature_page(tmp_path / "b", found, examples=2).read_text()
    assert with_pictures.count("data:image/png") == without.count("data:image/png") >= 2
    assert len(with_pictures) > len(without)  # noise under the colours


def test_the_command_writes_page_and_tables(tmp_path, endpoint):
    import pandas as pd

    made = dictionary(160, read="resid_post.3")
    folder = dictionaries.save(made, tmp_path / "sae", metadata={"model_name": "scenes"})
    run = CliRunner()
    ask = ["features", str(folder), "--data", "scenes", "--contexts", "4", "--out", str(tmp_path / "out")]
    done = run.invoke(app, [*ask, "--top", "3", "--examples", "2"])
    assert done.exit_code == 0, done.output
    frame = pd.read_parquet(tmp_path / "out" / "latents.parquet")
    assert len(frame) == 3
    assert set(pd.read_parquet(tmp_path / "out" / "windows.parquet")["latent"]) == set(frame["latent"])
    assert len(pd.read_parquet(tmp_path / "out" / "logits.parquet")) == 3 * 2 * 8
    saved = interp.scores.load(tmp_path / "out" / "contexts")
    assert saved.latents.tolist() == frame["latent"].tolist()
    assert "Latent" in (tmp_path / "out" / "report.html").read_text()
    again = run.invoke(app, [*ask, "--latents", "1,2"])
    assert again.exit_code == 2
    assert "not empty" in again.output
    for wrong, said in (
        (["--latents", "1,x", "--overwrite"], "numbers"),
        (["--latents", "1", "--top", "2"], "either"),
        (["--latents", "900", "--overwrite"], "does not exist"),
        (["--chat-url", endpoint, "--overwrite"], "--chat-model"),
    ):
        done = run.invoke(app, [*ask, *wrong])
        assert done.exit_code == 2, done.output
        assert said in done.output
    chat = ["--tokens", "text", "--chat-url", endpoint, "--chat-model", "m"]
    few = run.invoke(app, [*ask, "--latents", "1,2", "--overwrite", *chat])
    assert few.exit_code == 0, few.output
    assert "no score: detection" in few.output
    ask[ask.index("--contexts") + 1] = "40"
    talked = run.invoke(app, [*ask, "--latents", "1,2", "--examples", "2", "--overwrite", *chat])
    assert talked.exit_code == 0, talked.output
    told = pd.read_parquet(tmp_path / "out" / "latents.parquet")
    assert {"explanation", "detection_accuracy", "fuzzing_baseline"} <= set(told.columns)
    assert Endpoint.seen
