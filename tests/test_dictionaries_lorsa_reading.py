"""Reading a Lorsa: copies in place of layers, sources of its heads, behaviours by hand, relations, page and command."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.cli.dictionaries.opened import opened
from interp.data import SceneCorpus, corpus
from interp.dictionaries import Transcoder, evaluate, feature_edits, logit_effects, neighbours, top_contexts
from interp.dictionaries import lorsa as package
from interp.dictionaries.activations import ActivationStream
from interp.dictionaries.evaluation import DictionaryScores
from interp.dictionaries.lorsa import (
    Behaviours,
    HeadContexts,
    HeadRelations,
    Lorsa,
    PlacedLorsa,
    attention_rule,
    behaviours,
    head_behaviours,
    head_contexts,
    head_relations,
    head_shares,
)
from interp.edits import splice
from interp.errors import FileError, InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.report import write_lorsa_page
from tests.test_cli_attribute import call, saved
from tests.zoo import build, inputs, processor

WORDS = "the cat saw a dog and ran home over hills to sleep on warm grass until noon".split()
# One token for each letter: lengths from 1 to 60 tokens.
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 1 + (i * 5) % 11]) for i in range(23)]
OPTIONS = {"context": 16, "special": "bos", "separator": "none"}
SMALL = {"contexts": 5, "context": 14, "batch": 3, "resamples": 20}


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def scenes():
    return interp.load("scenes")


def started(lens, layer=1, *, n_ov=48, seed=0, batch=None, tower=None, **settings):
    """A Lorsa with the layer's queries and keys, and random OV heads of different lengths."""
    rule = attention_rule(lens, layer, batch, tower=tower, context=24)
    made = package.from_heads(rule, n_qk=len(rule.W_Q), n_ov=n_ov, seed=seed, **{"k": 5} | settings)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.W_V.mul_(torch.rand(n_ov, 1, generator=random) + 0.5)
        made.b_V.normal_(generator=random).mul_(0.1)
        made.b_D.normal_(generator=random).mul_(0.1)
        made.W_O.mul_(torch.rand(n_ov, 1, generator=random) + 0.5)
    return made.eval()


# --- at its layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "glm4", "mistral"])
def test_a_copy_in_place_of_its_layer_changes_nothing(name):
    lens = interp.wrap(build(name), processor(name), name=name)
    copy = Lorsa.exact_copy(lens, 1, context=20)
    scores = evaluate(copy, lens, TEXTS, **SMALL)
    assert scores.value("fvu") < 1e-8
    assert scores.value("kl_reconstruction") < 1e-7
    assert scores.value("ce_reconstruction") == pytest.approx(scores.value("ce_original"), abs=1e-5)
    assert scores.value("kl_recovered_zero") == pytest.approx(1, abs=1e-5)
    assert scores.settings["read"] == "resid_pre.1"
    assert scores.settings["target"] == "attn_out.1"
    with torch.no_grad():
        copy.W_V.copy_(copy.W_V.flip(0))
    wrong = evaluate(copy, lens, TEXTS, **SMALL)
    assert wrong.value("fvu") > 0.1
    assert wrong.value("kl_reconstruction") > 1e-5


def test_towers_that_look_both_ways(scenes):
    given = inputs("bert")
    bert = interp.wrap(build("bert"), processor("bert"), sample=given)
    scores = evaluate(Lorsa.exact_copy(bert, 0, context=20), bert, TEXTS, ablation=(), **SMALL)
    assert scores.value("fvu") < 1e-8
    with pytest.raises(UnsupportedError, match="causal"):
        head_behaviours(Lorsa.exact_copy(bert, 0, context=20), bert)
    pictures = SceneCorpus("test", 4)
    stream = ActivationStream(scenes, pictures, "vision:resid_pre.1", batch=1)
    next(stream)
    copy = Lorsa.exact_copy(scenes, 1, stream.inputs, tower="vision")
    scores = evaluate(copy, scenes, pictures, ablation=(), contexts=3, batch=2)
    assert scores.value("fvu") < 1e-8
    assert scores.settings["read"] == "vision:resid_pre.1"


def test_losses_are_those_of_whole_runs(llama):
    made = started(llama)
    rule = attention_rule(llama, 1, context=24)
    scores = evaluate(made, llama, TEXTS, special="bos", **SMALL)
    stream = ActivationStream(llama, corpus(TEXTS), ["resid_pre.1", "attn_out.1"], batch=1, context=14, special="bos")
    special = set(llama.processor.all_special_ids) - {llama.processor.unk_token_id}
    ce = kl = error = active = 0.0
    count = 0
    for one in [next(stream) for _ in range(5)]:
        x, ids, mask = rule.inputs(one["resid_pre.1"]), one.ids[0], one.mask[0]
        y = made(x)[0].detach()
        error += float((y - one["attn_out.1"][0])[mask].square().sum())
        active += float((made.encode(x)[0][mask] != 0).sum())

        def change(old, y=y, mask=mask):
            return torch.where(mask[:, None], y, old)

        batch = llama.prepare(input_ids=[ids.tolist()])
        p, q = (
            llama.run(batch, "logits", edits).logits[0].double().log_softmax(-1)
            for edits in ((), splice(change, site="attn_out", layers=1))
        )
        for t in range(int(mask.int().argmax()), len(ids) - 1):
            if int(ids[t]) not in special and int(ids[t + 1]) not in special:
                ce -= float(q[t, ids[t + 1]])
                kl += float((p[t].exp() * (p[t] - q[t])).sum())
                count += 1
    assert scores.value("ce_reconstruction") == pytest.approx(ce / count, abs=1e-5)
    assert scores.value("kl_reconstruction") == pytest.approx(kl / count, abs=1e-5)
    assert scores.value("mse") == pytest.approx(error / scores.tokens, rel=1e-4)
    assert scores.value("l0") == pytest.approx(active / scores.tokens)
    assert scores.error_term < 1e-4
    one_by_one = evaluate(made, llama, TEXTS, special="bos", **SMALL | {"batch": 1})
    torch.testing.assert_close(one_by_one.table, scores.table, atol=1e-4, rtol=1e-4)
    assert evaluate(made, llama, TEXTS, everywhere=True, special="bos", **SMALL).value("kl_reconstruction") > 0


def test_a_transcoder_of_the_same_layer_is_scored_alike(llama):
    """What writes the same is as good: OV heads that look at themselves alone are a transcoder."""
    made = started(llama, k=4)
    made.cfg = made.cfg.changed(window=1)
    rule = attention_rule(llama, 1, context=24)
    twin = Transcoder(d_in=32, d_sae=48, d_out=32, architecture="topk", k=4, rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        twin.W_enc.copy_(made.W_V.T)
        twin.b_enc.copy_(made.b_V)
        twin.W_dec.copy_(made.W_O)
        twin.b_dec.copy_(made.b_D)
        # The norm in front is all that is left: its gain goes into the encoder, its scale into the activations.
        norm = rule.norm
        assert norm is not None
        twin.W_enc.mul_(norm.weight[:, None])
    twin.cfg = twin.cfg.changed(normalize_activations="constant_norm_rescale")
    twin.metadata |= {"read": "resid_pre.1", "target": "attn_out.1"}
    ours, theirs = (evaluate(m, llama, TEXTS, **SMALL) for m in (made, twin))
    for name in ("fvu", "l0", "ce_reconstruction", "kl_recovered_mean", "dead"):
        assert ours.value(name) == pytest.approx(theirs.value(name), rel=1e-3), name


def test_what_is_no_place_for_a_lorsa_is_refused(llama, tmp_path):
    made = started(llama)
    with pytest.raises(SettingsError, match="layer 1, not of layer 0"):
        evaluate(made, llama, TEXTS, read="resid_pre.0")
    with pytest.raises(SettingsError, match=r"resid_pre\.LAYER"):
        evaluate(made, llama, TEXTS, read="resid_post.1")
    with pytest.raises(SettingsError, match=r"stands for attn_out\.1"):
        evaluate(made, llama, TEXTS, target="mlp_out.1")
    bare = Lorsa(made.cfg).eval()
    with pytest.raises(SettingsError, match="which layer"):
        evaluate(bare, llama, TEXTS)
    assert PlacedLorsa(bare, llama, layer=1).read == "resid_pre.1"
    assert evaluate(bare, llama, TEXTS, read="resid_pre.1", ablation=(), **SMALL).value("l0") <= 5
    with pytest.raises(InputError, match="reads 16"):
        PlacedLorsa(Lorsa(d_in=16, n_qk=1, n_ov=2, d_qk=4, k=1), interp.wrap(build("llama")), layer=1)
    with pytest.raises(SettingsError, match="scaled"):
        PlacedLorsa(started(llama, normalize_activations="expected_average_only_in"), llama)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lorsa_of_the_reference_reads_the_norm_without_its_gain(name):
    lens = interp.wrap(build(name), processor(name), name=name)
    norm = attention_rule(lens, 1, context=24).norm
    assert norm is not None
    with torch.no_grad():
        for parameter in norm.parameters():  # a gain and a bias that matter
            parameter.add_(torch.rand(32, generator=torch.Generator().manual_seed(1)) * 0.5)
    lens = interp.wrap(lens.model, processor(name), name=name)
    ours, theirs = started(lens), started(lens)
    norm = attention_rule(lens, 1, context=24).norm
    gain, bias = norm.weight.detach(), getattr(norm, "bias", torch.zeros(32))
    with torch.no_grad():
        for w, b in (("W_Q", "b_Q"), ("W_K", "b_K")):
            getattr(theirs, b).add_(torch.einsum("d,hdk->hk", bias, getattr(theirs, w)))
            getattr(theirs, w).mul_(gain[:, None])
        theirs.b_V.add_(theirs.W_V @ bias)
        theirs.W_V.mul_(gain)
    theirs.metadata = {"imported": "llamascopium", "hook_point_in": "blocks.1.ln1.hook_normalized"}
    one, other = (evaluate(m, lens, TEXTS, **SMALL) for m in (ours, theirs))
    torch.testing.assert_close(one.table, other.table, atol=1e-3, rtol=1e-4)
    theirs.metadata.pop("imported")
    assert abs(evaluate(theirs, lens, TEXTS, **SMALL).value("fvu") - one.value("fvu")) > 1e-3


# --- contexts and their sources


def plain(made, lens, rule, texts, **options):
    """Every context's ids, mask, latents, patterns and values, one run of the model after the other."""
    stream = ActivationStream(lens, corpus(texts), f"resid_pre.{rule.layer}", batch=1, **OPTIONS | options)
    rows = []
    with torch.no_grad():
        for one in stream:
            if not bool(one.mask.any()):
                continue
            x = rule.inputs(one[stream.reads[0]])
            latents = made.encode(x)[0] * one.mask[0][:, None]
            rows.append((int(one.number[0]), one.ids[0], latents, package.patterns(made, x)[0], made.values(x)[0]))
    return rows


@pytest.mark.parametrize("packed", [True, False])
def test_sources_are_those_of_plain_loops(llama, packed, tmp_path):
    made, rule = started(llama), attention_rule(llama, 1, context=24)
    rows = plain(made, llama, rule, TEXTS, packed=packed)
    found = head_contexts(made, llama, corpus(TEXTS), k=3, sampled=2, silent=1, window=2, packed=packed, **OPTIONS)
    checked = 0
    for head in range(made.cfg.n_ov):
        peaks = sorted(((float(row[2][:, head].max()), row[0]) for row in rows), reverse=True)
        top = found.examples(head)
        assert [e.value for e in top] == pytest.approx([v for v, _ in peaks[:3] if v > 0], rel=1e-4)
        for e in [*top, *found.examples(head, "sampled")]:
            _, ids, latents, patterns, values = next(row for row in rows if row[0] == e.number)
            given = patterns[head // made.cfg.group, e.position] * values[:, head]
            np.testing.assert_allclose(e.given, given, atol=1e-5)
            assert e.given.sum() == pytest.approx(e.value, abs=1e-5)
            assert e.value == pytest.approx(float(latents[e.position, head]), abs=1e-5)
            assert not e.given[e.position + 1 :].any()
            assert len(e.context_tokens) == len(ids) == len(e.given)
            assert e.context_tokens[e.position] == e.tokens[e.peak]
            best = e.sources(2)
            assert best[0].position == int(given.abs().argmax())
            assert best[0].share == pytest.approx(float(given[best[0].position]) / e.value, abs=1e-4)
            checked += 1
        for e in found.examples(head, "silent"):
            assert not e.activations.any()
            assert not e.sources()
    assert checked > 100
    if not packed:  # beginnings that texts share are equally strong, and which is kept is a matter of rounding
        return
    alone = head_contexts(
        made, llama, corpus(TEXTS), heads=[7, 3], k=3, sampled=2, silent=1, window=2, packed=packed, batch=1, **OPTIONS
    )
    part = found.select([7, 3])
    assert isinstance(part, HeadContexts)
    for group in ("top", "sampled"):
        torch.testing.assert_close(part.given[group], alone.given[group], atol=1e-5, rtol=1e-4)
    found.save(tmp_path)
    assert interp.scores.load(tmp_path).equals(found)
    plainly = top_contexts(made, llama, corpus(TEXTS), k=3, sampled=2, silent=1, window=2, packed=packed, **OPTIONS)
    assert torch.equal(plainly.top.acts, found.top.acts)


def test_the_strongest_heads_are_kept(llama):
    made = started(llama)
    found = head_contexts(made, llama, corpus(TEXTS), k=2, **OPTIONS)
    size = found.maximum * made.W_O.detach().norm(dim=1)
    few = head_contexts(made, llama, corpus(TEXTS), most=4, k=2, **OPTIONS)
    assert few.latents.tolist() == size.argsort(descending=True)[:4].tolist()


def test_patches_feed_a_head(scenes, tmp_path):
    made = started(scenes, 1, n_ov=64, k=8)
    made.cfg = made.cfg.changed(context=100)
    rule = attention_rule(scenes, 1, context=100)
    made.cos, made.sin = rule.cos, rule.sin
    pictures = SceneCorpus("test", 5)
    found = head_contexts(made, scenes, pictures, k=2, sampled=0, silent=0, batch=2, tokens="text")
    stream = ActivationStream(scenes, pictures, "resid_pre.1", batch=1)
    rows = {int(one.number[0]): rule.inputs(one["resid_pre.1"]) for one in stream}
    seen = 0
    for head in found.latents.tolist():
        for e in found.examples(head):
            x = rows[e.number]
            with torch.no_grad():
                given = package.patterns(made, x)[0, head // made.cfg.group, e.position] * made.values(x)[0, :, head]
            np.testing.assert_allclose(e.given, given, atol=1e-4)
            assert e.kinds.count("image") == 64
            grid = e.source_map()
            patches = torch.from_numpy(e.given[[k == "image" for k in e.context_kinds]]).view(8, 8)
            torch.testing.assert_close(grid[4::9, 4::9].float(), patches, atol=1e-6, rtol=1e-5)
            seen += 1
    assert seen > 20
    page = write_lorsa_page(tmp_path, found.select(found.latents[found.active > 0][:2]), corpus=pictures).read_text()
    assert "[64 image tokens: " in page
    assert "data:image/png" in page


def test_heads_of_a_vision_tower_have_source_maps(scenes):
    pictures = SceneCorpus("test", 5)
    stream = ActivationStream(scenes, pictures, "vision:resid_pre.1", batch=1)
    next(stream)
    made = started(scenes, 1, batch=stream.inputs, tower="vision", n_ov=64, k=6)
    found = head_contexts(made, scenes, pictures, most=3, k=2, batch=2)
    for head in found.latents.tolist():
        for e in found.examples(head):
            assert e.given.sum() == pytest.approx(e.value, rel=1e-4)
            grid = e.source_map()
            given = e.given[[kind == "image" for kind in e.context_kinds]]
            assert float(grid[~grid.isnan()].max()) == pytest.approx(given.max(), rel=1e-5)


def test_contexts_that_do_not_fit_are_refused(llama, scenes):
    made = started(llama)
    with pytest.raises(InputError, match="more than the context"):
        head_contexts(made, llama, corpus(TEXTS), context=40)
    with pytest.raises(SettingsError, match="most"):
        head_contexts(made, llama, corpus(TEXTS), most=0)
    with pytest.raises(UnknownNameError, match="does not exist"):
        head_contexts(made, llama, corpus(TEXTS), heads=[48], **OPTIONS)
    found = head_contexts(made, llama, corpus(TEXTS), heads=[3, 4], k=1, **OPTIONS)
    with pytest.raises(UnknownNameError):
        found.select([5])
    pictures = SceneCorpus("test", 2)
    stream = ActivationStream(scenes, pictures, "vision:resid_pre.1", batch=1)
    next(stream)
    tower = started(scenes, 1, batch=stream.inputs, tower="vision")
    with pytest.raises(InputError, match="pictures"):
        PlacedLorsa(tower, scenes).rule  # noqa: B018


# --- behaviours


N = 12  # tokens of the hand-built heads


def pattern_head(looks_at, *, window=None):
    """A Lorsa of one head that attends by content, on x = [token, token before it], both one-hot."""
    made = Lorsa(d_in=2 * N, n_qk=1, n_ov=1, d_qk=N, d_out=4, architecture="relu", scale=200.0, window=window)
    with torch.no_grad():
        for parameter in (made.W_Q, made.W_K, made.W_V, made.b_V):
            parameter.zero_()
        made.b_V.fill_(1.0)
        if looks_at == "induction":  # keys whose token before is the query's token
            made.W_Q[0, :N] = torch.eye(N)
            made.W_K[0, N:] = torch.eye(N)
        elif looks_at == "duplicate":
            made.W_Q[0, :N] = torch.eye(N)
            made.W_K[0, :N] = torch.eye(N)
        elif looks_at == "first":  # token 0 stands in front
            made.b_Q[0, 0] = 1.0
            made.W_K[0, 0, 0] = 1.0
    return made.eval()


def two_hot(ids):
    x = torch.zeros(*ids.shape, 2 * N)
    x.scatter_(2, ids[..., None], 1.0)
    x[:, 1:].scatter_(2, N + ids[:, :-1, None], 1.0)
    return x


def test_hand_built_heads_have_the_scores_that_they_should(llama):
    ids = torch.tensor([[0, 5, 6, 7, 8, 5, 6, 7, 8], [0, 9, 3, 4, 2, 9, 3, 4, 2]])
    batch = llama.prepare(input_ids=ids)
    x = two_hot(ids)

    def score(looks_at, **options):
        return behaviours(pattern_head(looks_at, **options), x, batch)

    found = score("induction")
    assert float(found["induction"][0]) == pytest.approx(1, abs=1e-4)
    assert int(found.counts["induction"][0]) == 8
    assert float(found["duplicate"][0]) == pytest.approx(0, abs=1e-4)
    # The token looks at itself and at its earlier copy alike.
    assert float(score("duplicate")["duplicate"][0]) == pytest.approx(0.5, abs=1e-4)
    assert float(score("first")["first"][0]) == pytest.approx(1, abs=1e-4)
    pair = score("all", window=2)
    assert float(pair["previous"][0]) == pytest.approx(0.5)
    assert float(pair["local"][0]) == pytest.approx(1)
    assert score("induction").labels(firings=8) == [("induction",)]
    assert score("induction").labels(least=0.99, firings=9) == [()]  # it fired at eight that can show it
    assert score("first").labels() == [("sink",)]
    left = llama.prepare(input_ids=[ids[0].tolist(), ids[1, :7].tolist()], padding_side="left")
    right = llama.prepare(input_ids=[ids[0].tolist(), ids[1, :7].tolist()], padding_side="right")
    padded = torch.zeros(2, 9, 2 * N)
    padded[0], padded[1, :7] = x[0], x[1, :7]
    shifted = padded.clone()
    shifted[1] = padded[1].roll(2, 0)
    shifted[1, :2] = 1e3
    one, other = (behaviours(pattern_head("duplicate"), v, b) for v, b in ((padded, right), (shifted, left)))
    for kind in one.scores:
        torch.testing.assert_close(one[kind], other[kind], equal_nan=True)
        assert torch.equal(one.counts[kind], other.counts[kind])


def test_labels_and_frame():
    nan = float("nan")
    made = Behaviours(
        {"induction": torch.tensor([0.9, 0.2, nan, 0.6]), "local": torch.tensor([0.1, 0.7, nan, 0.9])},
        {"induction": torch.tensor([9, 9, 0, 4]), "local": torch.tensor([9, 9, 0, 9])},
    )
    assert made.labels() == [("induction",), ("local",), (), ("local",)]
    assert made.labels(firings=4)[3] == ("induction",)
    assert made.labels(least=0.95) == [()] * 4
    frame = made.frame()
    assert frame["labels"].tolist() == ["induction", "local", "", "local"]
    assert frame["induction_firings"].tolist() == [9, 9, 0, 4]
    with pytest.raises(SettingsError):
        made.labels(least=0)


def letters_lorsa(lens, orders, *, window, writes):
    """Head i: value 0.5 at the i-th letter and below 0 elsewhere; writes towards the letter that `writes` names."""
    letters = [*orders[0]]
    tokens = [lens.processor(c, add_special_tokens=False)["input_ids"][0] for c in letters]
    rule = attention_rule(lens, 0, context=24)
    made = package.shaped(rule, n_qk=1, n_ov=len(letters), architecture="relu")
    table = lens.model.get_input_embeddings().weight.detach()
    begin = lens.processor.bos_token_id
    rows = rule.inputs(table[[*tokens, begin]])
    wanted = torch.cat([torch.eye(len(letters)), torch.zeros(1, len(letters))])
    unembed = lens.model.get_output_embeddings().weight.detach()
    gain = lens.anatomy.unembed.fitted[0].gain
    with torch.no_grad():
        for parameter in (made.W_Q, made.W_K, made.b_Q, made.b_K):
            parameter.zero_()
        made.W_V.copy_(torch.linalg.lstsq(rows, wanted).solution.T)
        made.b_V.fill_(-0.5)
        named = [tokens[letters.index(writes[c])] for c in letters]
        made.W_O.copy_((unembed[named] - unembed.mean(0)) / gain)
    made.cfg = made.cfg.changed(window=window)
    return made.eval()


def test_successors_by_hand(llama):
    orders = ["abcdef"]
    following = dict(zip("abcdef", "bcdefa", strict=True))
    options = {"orders": orders, "order_rows": 3, "rows": 2, "length": 4, "k": 1}
    found = head_behaviours(letters_lorsa(llama, orders, window=1, writes=following), llama, **options)
    # Each letter that has a next one: the head fires at it in every row, and is fed by it alone.
    torch.testing.assert_close(found["successor"][:5], torch.ones(5))
    assert found.counts["successor"].tolist() == [3, 3, 3, 3, 3, 0]
    assert bool(found["successor"][5].isnan())
    turned = dict(zip("abcdef", "cdefab", strict=True))
    other = head_behaviours(letters_lorsa(llama, orders, window=1, writes=turned), llama, **options)
    torch.testing.assert_close(other["successor"][:5], torch.zeros(5))
    # A head that looks everywhere alike, and promotes what follows `c`: its part is that of `c` among all.
    wide = letters_lorsa(llama, orders, window=None, writes=following)
    with torch.no_grad():
        wide.W_V.zero_()
        wide.b_V.fill_(1.0)
    one = head_behaviours(wide, llama, **options | {"order_rows": 1})
    begin = int(llama.processor("a")["input_ids"][0] == llama.processor.bos_token_id)
    parts = [(1 if t >= 2 else 0) / (t + 1 + begin) for t in range(6)]
    assert float(one["successor"][2]) == pytest.approx(sum(parts) / 6)


def test_behaviours_of_bad_input(llama, scenes):
    made = started(llama)
    with pytest.raises(SettingsError, match="length"):
        head_behaviours(made, llama, length=1)
    with pytest.raises(SettingsError, match="window"):
        behaviours(made, torch.zeros(1, 4, 32), llama.prepare(input_ids=[[4, 5, 6, 7]]), window=0)
    with pytest.raises(InputError, match="batch"):
        behaviours(made, torch.zeros(1, 5, 32), llama.prepare(input_ids=[[4, 5, 6, 7]]))
    none = head_behaviours(made, llama, orders=[["xylophone", "yesterday"]], rows=2)
    assert "successor" not in none.scores


# --- relations and logits


def test_relations_by_hand(llama):
    """Heads of the layer that write along axes of their own: a Lorsa head along an axis is that head's alone."""
    rule = attention_rule(llama, 1, context=24)
    heads, d_value, width = rule.W_O.shape
    w_o = torch.zeros_like(rule.W_O)
    for h in range(heads):
        w_o[h, :, h] = 1.0
    rule = dataclasses.replace(rule, W_O=w_o)
    made = package.shaped(rule, n_qk=heads, n_ov=heads, architecture="relu")
    with torch.no_grad():
        made.W_O.zero_()
        made.W_O[0, 0] = 1.0
        made.W_O[1, 1] = -2.0
        made.W_O[2, :2] = torch.tensor([1.0, 3.0])
        made.b_V.copy_(torch.tensor([1.0, 1.0, 1.0, -9.0]))
        made.W_V.zero_()
    z = torch.ones(1, 6, heads * d_value)
    shares = head_shares(made, rule, torch.zeros(1, 6, width), z)
    torch.testing.assert_close(shares[0], torch.eye(heads)[0])
    torch.testing.assert_close(shares[1], torch.eye(heads)[1])
    torch.testing.assert_close(shares[2], torch.tensor([0.25, 0.75, 0.0, 0.0]))
    assert bool(shares[3].isnan().all())
    found = HeadRelations(shares, torch.tensor([6, 6, 6, 0]), 6, {"layer": 1})
    assert found.drawn_on(0.5).tolist() == [1, 1, 1, 0]
    assert found.drawn_on(0.8).tolist() == [1, 1, 2, 0]
    assert found.several(0.8) == pytest.approx(1 / 3)
    assert found.of(2, 2) == [(1, 0.75), (0, 0.25)]
    assert found.of(3) == []
    assert found.frame()["main"].tolist() == [0, 1, 1, -1]
    even = HeadRelations(torch.full((1, 4), 0.25), torch.tensor([1]), 1, {"layer": 1})
    assert [int(even.drawn_on(m)) for m in (0.25, 0.5, 0.51, 1.0)] == [1, 2, 3, 4]
    with pytest.raises(SettingsError):
        even.several(0)


def test_relations_on_a_corpus_are_those_of_all_tokens(llama):
    made, rule = started(llama), attention_rule(llama, 1, context=24)
    stream = ActivationStream(llama, corpus(TEXTS), list(rule.reads), batch=1, **OPTIONS)
    rows = [next(stream) for _ in range(5)]
    sums = torch.zeros(48, 4)
    with torch.no_grad():
        for one in rows:
            resid, z = (one[read] for read in stream.reads)
            latents, outs = made.encode(rule.inputs(resid))[0], z[0].unflatten(-1, (4, -1))
            for t in one.mask[0].nonzero()[:, 0].tolist():
                for h in range(4):
                    sums[:, h] += latents[t] * (made.W_O @ (outs[t, h] @ rule.W_O[h]))
    wanted = sums / sums.sum(1, keepdim=True)
    found = head_relations(made, llama, corpus(TEXTS), contexts=5, batch=2, **OPTIONS)
    torch.testing.assert_close(found.shares, wanted, atol=1e-3, rtol=1e-3, equal_nan=True)
    assert found.tokens == sum(int(one.mask.sum()) for one in rows)
    with pytest.raises(SettingsError):
        head_relations(made, llama, corpus(TEXTS), contexts=0)


def test_logit_effects_and_neighbours_are_those_of_what_heads_write(llama):
    made = started(llama)
    twin = Transcoder(d_in=32, d_sae=48, d_out=32, architecture="standard", metadata={"target": "attn_out.1"})
    with torch.no_grad():
        twin.W_dec.copy_(made.W_O)
    one, other = (logit_effects(m, llama, [3, 9], 4) for m in (made, twin))
    assert torch.equal(one.promoted, other.promoted)
    torch.testing.assert_close(one.suppresses, other.suppresses)
    assert one.layers_behind == other.layers_behind
    near, far = neighbours(PlacedLorsa(made, llama), [3], 4), neighbours(twin, [3], 4)
    assert torch.equal(near.index, far.index)
    assert torch.equal(neighbours(made, [3], 4).index, far.index)
    with pytest.raises(UnsupportedError, match="replace_attention"):
        feature_edits(made, 3, value=1.0)  # type: ignore[arg-type]
    # Behind a norm: what reaches the stream is the direction times the norm's gain.
    gemma = interp.wrap(build("gemma2"), processor("gemma2"), name="gemma2")
    behind = started(gemma)
    found = PlacedLorsa(behind, gemma)
    (norm,) = gemma.anatomy.attention(None, 1, "z").chain
    torch.testing.assert_close(found.W_dec, behind.W_O * norm.gain)
    stream = gemma.run(gemma.prepare(TEXTS[4:6]), ["z.1", "attn_out.1"])
    y = found.rule.target(stream["z", 1].flatten(2))
    torch.testing.assert_close(found.to_stream(y), stream["attn_out", 1], atol=1e-4, rtol=1e-4)


# --- page and commands


def test_the_page_marks_query_and_sources_and_escapes(llama, tmp_path):
    made = started(llama)
    text = corpus(["<b>the</b> cat & <i>dog</i>", "a <b> saw </b> <i> cat </i>"])
    found = head_contexts(made, llama, text, most=3, k=2, sampled=1, packed=False, context=24)
    heads = found.latents.tolist()
    page = write_lorsa_page(
        tmp_path,
        found,
        effects=logit_effects(made, llama, heads, 3),
        neighbours=neighbours(PlacedLorsa(made, llama), heads, 3),
        behaviours=head_behaviours(made, llama, rows=4),
        relations=head_relations(made, llama, text, context=24, packed=False),
        explanations={heads[0]: "<script>alert(1)</script>"},
        examples=2,
    ).read_text()
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert "<i>" not in page.replace("<i style", "")
    examples = [e for h in heads for g, n in (("top", 2), ("sampled", 1)) for e in found.examples(h, g)[:n]]
    assert page.count('class="panel"') == len(examples) >= 3
    assert page.count("background:#6a3d9a") == len(examples)  # one query each
    assert page.count("where the head fires; it gave itself") == len(examples)
    e = found.example(heads[0])
    source = next(s for s in e.sources() if s.position != e.position)
    assert f"({source.share:.0%})" in page
    for words in ("Draws on the layer&#39;s heads", "Behaviour", "Labels", "Direct effect", "Nearest by decoder"):
        assert words in page
    with pytest.raises(SettingsError, match="not the one"):
        write_lorsa_page(tmp_path, found, corpus=corpus(["other"]))
    with pytest.raises(SettingsError, match="examples"):
        write_lorsa_page(tmp_path, found, examples=0)


def test_far_sources_stand_on_the_page_and_what_gave_nothing_does_not(llama, tmp_path):
    """A head that looks at the first token of a long context."""
    made = package.shaped(attention_rule(llama, 0, context=60), n_qk=1, n_ov=1, architecture="relu")
    with torch.no_grad():
        for parameter in (made.W_Q, made.W_K, made.W_V, made.b_K):
            parameter.zero_()
        made.b_V.fill_(1.0)
    text = corpus(["x" + "a" * 45 + "qrs"])
    placed = PlacedLorsa(made.eval(), llama)
    found = head_contexts(placed, llama, text, k=1, window=1, context=60, packed=False)
    e = found.example(0)
    given = torch.zeros_like(found.given["top"])
    first = 1 if e.context_kinds[0] == "special" else 0
    centre = 40
    given[0, 0, first] = e.value
    top = dataclasses.replace(
        found.top,
        centre=torch.full_like(found.top.centre, centre),
        start=torch.full_like(found.top.start, centre - 1),
        length=torch.full_like(found.top.length, 3),
        acts=torch.full_like(found.top.acts, e.value),
    )
    shown = dataclasses.replace(found, top=top, given={"top": given, "sampled": found.given["sampled"]})
    page = write_lorsa_page(tmp_path, shown).read_text()
    chips = page.split('<p class="chips">')[1].split("</p>")[0]
    assert f"{first}: x gave" in chips
    assert "(100%)" in chips
    assert ">\N{HORIZONTAL ELLIPSIS}<" in chips
    assert f"{centre}: " in chips
    assert f" {centre - 20}: " not in chips.replace('"', " ")


def test_the_page_of_pictures_shows_what_patches_gave(scenes, tmp_path):
    pictures = SceneCorpus("test", 4)
    stream = ActivationStream(scenes, pictures, "vision:resid_pre.1", batch=1)
    next(stream)
    made = started(scenes, 1, batch=stream.inputs, tower="vision", n_ov=64, k=6)
    found = head_contexts(made, scenes, pictures, most=2, k=2, sampled=0)
    with_pictures = write_lorsa_page(tmp_path / "a", found, corpus=pictures).read_text()
    without = write_lorsa_page(tmp_path / "b", found).read_text()
    assert with_pictures.count("data:image/png") == without.count("data:image/png") == 4
    assert "patch " in with_pictures


def test_the_commands_take_the_folder_of_a_lorsa(tmp_path):
    model = saved(tmp_path, "llama")
    lens = interp.load(str(model))
    made = started(lens)
    made.metadata["model_name"] = str(model)
    folder = package.save(made, tmp_path / "lorsa")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    common = ("--data", tmp_path / "texts.txt", "--device", "cpu")
    out = tmp_path / "run"
    small = ("--contexts", 5, "--batch-size", 3, "--resamples", 20)
    said = call("evaluate", "sae", folder, *common, "--out", out, *small)
    assert "kl_recovered_mean" in said
    want = evaluate(
        made, lens, corpus(tmp_path / "texts.txt", seed=0), contexts=5, context=24, batch=3, resamples=20
    )  # 256 tokens are more than it knows
    kept = DictionaryScores.load(out / "scores")
    torch.testing.assert_close(kept.table, want.table)
    page = (out / "report.html").read_text()
    assert "topk Lorsa" in page
    assert "resid_pre.1 to attn_out.1" in page
    assert "not computed again" in call("evaluate", "sae", folder, *common, "--out", out, *small)
    shown = tmp_path / "shown"
    call("features", folder, *common, "--out", shown, "--top", 3, "--examples", 2)
    frame = pd.read_parquet(shown / "latents.parquet")
    assert len(frame) == 3
    assert isinstance(interp.scores.load(shown / "contexts"), HeadContexts)
    assert len(pd.read_parquet(shown / "relations.parquet")) == 48
    assert "induction" in pd.read_parquet(shown / "behaviours.parquet").columns
    page = (shown / "report.html").read_text()
    assert f"Head {frame['latent'][0]}</h2>" in page
    assert "fed by" in page
    assert "stands for attn_out" in call(
        "features", folder, *common, "--out", tmp_path / "no", "--target", "mlp_out.1", code=2
    )
    (folder / "cfg.json").write_text("{}")
    assert "two dictionaries" in call("evaluate", "sae", folder, *common, "--out", tmp_path / "no", code=2)
    with pytest.raises(FileError, match="two dictionaries"):
        opened(folder)
