"""Evaluation of dictionaries: losses of spliced runs against whole runs, and planted truths for every other score."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy.sparse import csr_array

import interp
from interp.data import TextCorpus, corpus
from interp.dictionaries import SAE, Fidelity, Transcoder, load, save
from interp.dictionaries.activations import ActivationStream
from interp.dictionaries.evaluation import (
    DictionaryScores,
    density_classes,
    evaluate,
    feature_absorption,
    separation_scores,
    single_token_words,
    sparse_probing,
)
from interp.dictionaries.evaluation.absorption import absorption
from interp.dictionaries.evaluation.logistic import f1, fit, fit_sparse, split
from interp.dictionaries.evaluation.placed import at_places
from interp.dictionaries.evaluation.pooled import pooled
from interp.dictionaries.evaluation.separation import separations
from interp.edits import splice
from interp.errors import FileError, InputError, SettingsError, UnknownNameError, UnsupportedError
from tests.test_cli_attribute import call, saved
from tests.zoo import build, processor

WORDS = "the cat saw a dog and ran home over hills to sleep on warm grass until noon".split()
# One token for each letter: lengths from 1 to 60 tokens.
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 1 + (i * 5) % 11]) for i in range(23)]


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


def signed_identity(d, *, k=None, scale=1.0):
    """A dictionary of latents +x_i and -x_i that gives back `scale` times what it reads; with k, its largest k."""
    sae = SAE(d_in=d, d_sae=2 * d, architecture="topk", k=d if k is None else k, rescale_acts_by_decoder_norm=False)
    with torch.no_grad():
        rows = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(scale * rows)
        sae.b_dec.zero_()
        sae.b_enc.zero_()
    return sae


def plain(lens, sae, read, texts, *, target=None, contexts, batch=3, everywhere=False, **options):
    """The losses by whole runs with splice edits, one context at a time: [name, context], and what was counted."""
    target = target or read
    stream = ActivationStream(lens, corpus(texts), [*dict.fromkeys([read, target])], batch=batch, **options)
    rows, taken = [], [(c, i) for c in stream for i in range(len(c))][:contexts]
    pooled = torch.cat([c[target][i][c.mask[i]] for c, i in taken])
    special = set(lens.processor.all_special_ids) - {lens.processor.unk_token_id}
    site = interp.Read.of(target)
    for c, i in taken:
        length = int(c.real[i].sum())
        ids = c.ids[i, :length]
        where = c.real[i, :length] if everywhere else c.mask[i, :length]
        x = c[read][i, :length]
        put = {
            "original": c[target][i, :length],
            "reconstruction": sae(x),
            "zero": torch.zeros_like(c[target][i, :length]),
            "mean": pooled.mean(0).expand(length, -1),
        }
        alone = lens.prepare(input_ids=[ids.tolist()])
        logs = {}
        for name, value in put.items():

            def change(old, value=value, where=where):
                flat = old.flatten(2).clone()
                flat[0, where] = value[where].to(flat)
                return flat.view(old.shape)

            edits = [] if name == "original" else splice(change, site=site.site, layers=site.layers)
            logs[name] = lens.run(alone, "logits", edits).logits[0].double().log_softmax(-1)
        first = int(where.int().argmax()) if bool(where.any()) else length
        counted = [t for t in range(first, length - 1) if int(ids[t]) not in special and int(ids[t + 1]) not in special]
        row = {"predictions": float(len(counted))}
        for name, value in logs.items():
            row[f"ce_{name}"] = -sum(float(value[t, ids[t + 1]]) for t in counted)
            gap = logs["original"].exp() * (logs["original"] - value)
            row[f"kl_{name}"] = sum(float(gap[t].sum()) for t in counted)
        rows.append(row)
    return rows


def same_losses(scores, rows, atol=1e-4):
    assert len(scores) == len(rows)
    for name in scores.columns[scores.columns.index("predictions") :]:
        mine = scores.table[:, scores.columns.index(name)]
        torch.testing.assert_close(mine, torch.tensor([r[name] for r in rows]).double(), atol=atol, rtol=1e-5)


def random_sae(d_in, *, d_out=None, seed=0):
    made = (SAE if d_out is None else Transcoder)(
        d_in=d_in, d_sae=24, architecture="topk", k=4, seed=seed, decoder_init_norm=1.0,
        **({} if d_out is None else {"d_out": d_out, "skip": True}),
    )  # fmt: skip
    with torch.no_grad():
        made.b_dec.normal_(generator=torch.Generator().manual_seed(seed + 1)).mul_(0.3)
        if d_out is not None:
            made.W_skip.normal_(generator=torch.Generator().manual_seed(seed + 2)).mul_(0.2)
    return made


# --- evaluate -------------------------------------------------------------------------------------------------------

SITES = ["resid_pre.1", "resid_mid.1", "resid_post.0", "resid_post.2", "mlp_out.1", "attn_out.2", "z.1"]


@pytest.mark.parametrize("read", SITES)
def test_losses_are_those_of_whole_runs(llama, read):
    sae = random_sae(32)
    options = {"context": 14, "batch": 3}
    scores = evaluate(sae, llama, TEXTS, read=read, contexts=5, resamples=20, **options)
    rows = plain(llama, sae, read, TEXTS, contexts=5, **options)
    same_losses(scores, rows)
    total = {n: sum(r[n] for r in rows) for n in rows[0]}
    ce = (total["ce_mean"] - total["ce_reconstruction"]) / (total["ce_mean"] - total["ce_original"])
    if total["ce_mean"] > total["ce_original"]:
        assert scores.value("ce_recovered_mean") == pytest.approx(ce, rel=1e-3)
    assert scores.value("kl_recovered_zero") == pytest.approx(
        1 - total["kl_reconstruction"] / total["kl_zero"], rel=1e-3
    )
    assert scores.error_term < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "qwen3_moe", "mamba", "bloom", "falcon"])
def test_other_families(family):
    lens = interp.wrap(build(family), processor(family), name=family)
    width = lens.anatomy.towers["text"].d_model
    sae = random_sae(width)
    for read in ("resid_post.0", "mixer_out.1" if family == "mamba" else "mlp_out.1"):
        scores = evaluate(sae, lens, TEXTS, read=read, context=14, contexts=4, batch=3, resamples=5)
        same_losses(scores, plain(lens, sae, read, TEXTS, context=14, contexts=4))


@pytest.mark.parametrize(
    "options", [{"everywhere": True}, {"packed": False}, {"special": "bos"}, {"drop_first": False}]
)
def test_what_is_replaced_and_what_counts(llama, options):
    sae = random_sae(32)
    options = {"context": 14, "batch": 3} | options
    scores = evaluate(sae, llama, TEXTS, read="mlp_out.1", contexts=5, resamples=5, **options)
    same_losses(scores, plain(llama, sae, "mlp_out.1", TEXTS, contexts=5, **options))


def test_a_transcoder_reads_one_site_and_replaces_another(llama):
    made = random_sae(32, d_out=32)
    options = {"context": 14, "batch": 3}
    scores = evaluate(made, llama, TEXTS, read="resid_mid.1", target="mlp_out.1", contexts=5, resamples=5, **options)
    same_losses(scores, plain(llama, made, "resid_mid.1", TEXTS, target="mlp_out.1", contexts=5, **options))
    made.metadata |= {"read": "resid_mid.1", "target": "mlp_out.1"}
    assert evaluate(made, llama, TEXTS, contexts=5, resamples=5, **options).equals(scores)
    with pytest.raises(SettingsError, match="lies below"):
        evaluate(made, llama, TEXTS, read="resid_mid.1", target="mlp_out.0")


def test_the_identity_recovers_everything_and_zero_is_the_ablation(llama):
    good = evaluate(signed_identity(32), llama, TEXTS, read="resid_post.1", context=14, contexts=6, resamples=50)
    for name in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"):
        assert good.value(name) == 1 or name in good.undefined
    assert good.value("kl_reconstruction") == 0
    assert good.value("fvu") == 0
    assert good.value("ce_reconstruction") == good.value("ce_original")
    none = evaluate(signed_identity(32, scale=0.0), llama, TEXTS, read="resid_post.1", context=14, contexts=6)
    assert none.value("kl_reconstruction") == none.value("kl_zero") > 0
    assert none.value("kl_recovered_zero") == 0
    assert none.value("ce_reconstruction") == none.value("ce_zero")


def test_fidelity_is_that_of_all_tokens_and_batches_change_nothing(llama):
    sae = signed_identity(32, k=5)
    scores = evaluate(sae, llama, TEXTS, read="resid_mid.1", context=14, contexts=5, batch=2)
    stream = ActivationStream(llama, corpus(TEXTS), "resid_mid.1", context=14, batch=5)
    x = next(stream).rows()["resid_mid.1"]
    fidelity = Fidelity(32, 64)
    fidelity.update(x, sae(x), sae.encode(x))
    known = fidelity.result().numbers()
    for name in ("fvu", "explained_variance", "mse", "l0", "l1", "l2_ratio", "cosine", "relative_reconstruction_bias"):
        assert scores.value(name) == pytest.approx(known[name], rel=1e-5), name
    assert scores.tokens == known["tokens"]
    assert scores.value("dead") == known["dead"] == len(scores.dead)
    assert torch.allclose(scores.density, fidelity.result().density)
    one = evaluate(sae, llama, TEXTS, read="resid_mid.1", context=14, contexts=5, batch=1)
    torch.testing.assert_close(one.table, scores.table, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("read", "below", "first"), [("resid_post.0", 1, 1), ("resid_pre.2", 2, 2), ("mlp_out.1", 2, 1)]
)
def test_only_layers_above_the_site_run_again(read, below, first):
    model = build("llama")
    lens = interp.wrap(model, processor("llama"), name="llama")
    calls = torch.zeros(3, dtype=torch.int64)
    for i, layer in enumerate(model.model.layers):
        # A skipped layer is called, too, but hands its input on: its attention tells whether it ran.
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    options = {"read": read, "context": 14, "batch": 3, "resamples": 1}
    evaluate(random_sae(32), lens, TEXTS, contexts=3, **options)
    one = calls.clone()
    evaluate(random_sae(32), lens, TEXTS, contexts=6, **options)
    # Another batch is read twice (for the mean, then for the values), and run four times above.
    assert (calls - 2 * one).tolist() == [2 * (i < below) + 4 * (i >= first) for i in range(3)]


def test_without_ablations_there_is_fidelity_alone():
    bert = interp.wrap(build("bert"), processor("bert"), name="bert")
    sae = random_sae(bert.anatomy.towers[bert.anatomy.main].d_model)
    scores = evaluate(sae, bert, TEXTS, read="resid_post.0", ablation=(), context=14, contexts=4)
    assert "ce_original" not in scores.columns
    assert scores.error_term is None
    with pytest.raises(UnsupportedError, match="ablation="):
        evaluate(sae, bert, TEXTS, read="resid_post.0", context=14, contexts=4)


def test_pictures_of_a_model_that_sees():
    lens = interp.load("scenes")
    width = lens.anatomy.towers["text"].d_model
    shown = corpus("scenes", split="test", n=3)
    for read, tokens in (("resid_post.1", "image"), ("mlp_out.1", "all")):
        sae = random_sae(width)
        scores = evaluate(sae, lens, shown, read=read, tokens=tokens, contexts=3, batch=2, resamples=5)
        stream = ActivationStream(lens, shown, read, batch=3, tokens=tokens)
        c = next(stream)
        site = interp.Read.of(read)

        def change(old, c=c, sae=sae):
            out = old.clone()
            out[c.mask] = sae(old[c.mask])
            return out

        log, other = (
            lens.run(stream.inputs, "logits", edits).logits.double().log_softmax(-1)
            for edits in ((), splice(change, site=site.site, layers=site.layers))
        )
        gap = (log.exp() * (log - other)).sum(-1)
        ids, image = stream.inputs.inputs["input_ids"], stream.inputs.image_mask
        special = torch.isin(ids, torch.tensor(stream.special))
        plain_ = c.real & ~special
        counted = plain_[:, :-1] & (plain_ & ~image)[:, 1:] & c.mask.int().cummax(1).values.bool()[:, :-1]
        want = [float(gap[i, :-1][counted[i]].sum()) for i in range(3)]
        mine = scores.table[:, scores.columns.index("kl_reconstruction")]
        torch.testing.assert_close(mine, torch.tensor(want).double(), atol=1e-4, rtol=1e-4)
        assert float(mine.sum()) > 0
    seen = random_sae(lens.anatomy.towers["vision"].d_model)
    scores = evaluate(seen, lens, shown, read="vision:resid_post.0", contexts=3, batch=2, resamples=5, drop_first=False)
    assert scores.value("kl_reconstruction") > 0
    assert scores.error_term < 1e-4


def test_a_real_model(smollm):
    texts = [" ".join(WORDS * 3), "In the beginning God created the heaven and the earth. " * 3]
    sae = signed_identity(576, k=100)
    options = {"context": 16, "batch": 2}
    for read in ("resid_post.20", "z.25"):
        scores = evaluate(sae, smollm, texts, read=read, contexts=2, resamples=5, **options)
        same_losses(scores, plain(smollm, sae, read, texts, contexts=2, **options), atol=2e-3)


def test_scores_are_kept_and_shown(llama, tmp_path):
    scores = evaluate(signed_identity(32, k=5), llama, TEXTS, read="mlp_out.1", context=14, contexts=6, resamples=100)
    again = interp.scores.load(scores.save(tmp_path / "run"))
    assert isinstance(again, DictionaryScores)
    assert again.equals(scores)
    frame = scores.summary().set_index("metric")
    for name in ("fvu", "l0", "ce_reconstruction", "kl_recovered_zero"):
        row = frame.loc[name]
        assert row["low"] <= row["value"] <= row["high"]
        assert row["low"] < row["high"] or name == "l0"
    assert np.isnan(frame.loc["dead", "low"])
    contexts = scores.frame()
    assert len(contexts) == 6
    weight = contexts["predictions"] / contexts["predictions"].sum()
    assert float((contexts["ce_zero"] * weight).sum()) == pytest.approx(scores.value("ce_zero"))
    assert "kl_recovered_zero" in scores._repr_html_()
    (tmp_path / "run" / "scores.json").write_text("{}")
    with pytest.raises(FileError):
        interp.scores.load(tmp_path / "run")


def test_density_classes():
    found = density_classes(torch.tensor([0.0, 0.0, 5e-6, 1e-5, 5e-3, 0.5, 1.0]))
    assert list(found.values()) == [2, 1, 1, 0, 1, 0, 2]


def test_bad_input(llama):
    sae = random_sae(32)
    with pytest.raises(SettingsError, match="read="):
        evaluate(sae, llama, TEXTS)
    with pytest.raises(UnknownNameError):
        evaluate(sae, llama, TEXTS, read="resid_post.1", ablation=("resample",))
    with pytest.raises(InputError, match="32 wide"):
        evaluate(random_sae(16), llama, TEXTS, read="resid_post.1", context=14)
    with pytest.raises(SettingsError, match="one layer"):
        evaluate(sae, llama, TEXTS, read="resid_post.0,1", context=14)
    scaled = SAE(d_in=32, d_sae=8, k=2, normalize_activations="expected_average_only_in")
    with pytest.raises(SettingsError, match="fold"):
        evaluate(scaled, llama, TEXTS, read="resid_post.1", context=14)
    with pytest.raises(InputError, match="token"):
        evaluate(sae, llama, TextCorpus(["a"]), read="resid_post.1", context=14)
    with pytest.raises(SettingsError, match="target="):
        evaluate(random_sae(32, d_out=32), llama, TEXTS, read="resid_post.1")


# --- probes ---------------------------------------------------------------------------------------------------------


def data_of(seed, rows=120, columns=4):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, columns)) * [1, 10, 0.1, 1][:columns] + 3
    return x, (x - 3) @ np.array([1.0, 0.05, -3, 0])[:columns] + random.normal(size=rows) > 0


@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regressions_are_at_their_optimum(balanced):
    x, y = data_of(0)
    y[:80] &= x[:80, 0] > 3.5  # classes of different size
    scaled = torch.tensor((x - x.mean(0)) / x.std(0))
    weight = torch.ones(len(y), dtype=torch.float64)
    if balanced:
        weight = torch.where(torch.tensor(y), len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    sign = torch.tensor(np.where(y, 1.0, -1.0))
    for l1, probe in (
        (None, fit(x, y, l2=0.7, balanced=balanced)),
        (0.05, fit_sparse(x, y, l1=0.05, balanced=balanced)),
    ):
        w = torch.tensor(probe.weight * x.std(0), requires_grad=True)
        b = torch.tensor(probe.bias + probe.weight @ x.mean(0), requires_grad=True)
        losses = torch.nn.functional.softplus(-sign * (scaled @ w + b)) * weight
        (losses.sum() + 0.35 * w.square().sum() if l1 is None else losses.sum() / weight.sum()).backward()
        assert abs(float(b.grad)) < 1e-3
        if l1 is None:
            assert w.grad.abs().max() < 1e-3
        else:
            on = w.detach().abs() > 0
            assert 0 < on.sum() < 4
            torch.testing.assert_close(w.grad[on], -l1 * w.detach()[on].sign(), atol=1e-4, rtol=0)
            assert (w.grad[~on].abs() <= l1 + 1e-4).all()


def test_f1_and_split():
    said, y = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 1, 0], bool)
    assert f1(said, y) == pytest.approx(2 / 3)
    assert f1(~y & False, y) == 0
    strata = np.repeat(["a", "b", "c"], [10, 3, 1])
    held = split(strata, 0.2, np.random.default_rng(0))
    assert [int(held[strata == s].sum()) for s in "abc"] == [2, 1, 0]


def one_token_sae(lens, letter, *, d_sae=8, at=3):
    """A dictionary on the embeddings in which latent `at` is active at one token alone, the others at random."""
    rows = lens.model.get_input_embeddings().weight.detach()
    (number,) = lens.processor(letter, add_special_tokens=False)["input_ids"]
    sae = SAE(d_in=rows.shape[1], d_sae=d_sae, architecture="standard", apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.b_enc.fill_(-0.02)
        sae.W_enc[:, at] = rows[number] / rows[number].square().sum()
        sae.b_enc[at] = -0.99
    active = (sae.encode(rows)[:, at] > 0).nonzero()[:, 0].tolist()
    assert active == [number]
    return sae


def test_a_planted_latent_is_found_by_sparse_probing(llama):
    sae = one_token_sae(llama, "q")
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh"), 9)) for _ in range(60)]
    labels = ["yes" if i % 3 == 0 else "no" for i in range(60)]
    texts = [t[:4] + "q" + t[4:] if label == "yes" else t for t, label in zip(texts, labels, strict=True)]
    frame = sparse_probing(sae, llama, texts, labels, read="embed", k=(1, 2), context=16, shuffles=10, l2=0.1)
    one = frame.iloc[0]
    assert (one["label"], one["probe"], one["k"]) == ("yes", "latents", 1)
    assert one["latents"] == [3]
    assert one["accuracy"] == 1
    assert one["texts"] == 12
    assert one["majority"] == pytest.approx(8 / 12)
    assert one["null"] < 0.85
    assert list(frame["probe"]) == ["latents", "latents", "dense"]
    again = sparse_probing(sae, llama, texts, labels, read="embed", k=(1, 2), context=16, shuffles=10, l2=0.1)
    assert frame.equals(again)
    three = sparse_probing(
        sae, llama, texts, [f"{x}{i % 2}" for i, x in enumerate(labels)], read="embed", k=(1,), shuffles=0
    )
    assert len(three) == 4 * 2
    assert three["null"].isna().all()


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_pooled_rows_are_those_of_single_texts(llama, pool):
    sae = random_sae(32)
    texts = ["a cat", "the dog saw a cat run over the hill", "no"]
    found = pooled(sae, llama, texts, read="resid_post.1", pool=pool, batch=2, context=16, drop_first=True)
    for i, text in enumerate(texts):
        ids = llama.processor(text, add_special_tokens=False)["input_ids"]
        rows = []
        for start in range(0, len(ids), 16):
            one = llama.prepare(input_ids=[ids[start : start + 16]])
            rows.append(llama.run(one, "resid_post.1")["resid_post", 1][0, 1:])
        x = torch.cat(rows)
        f = sae.encode(x).detach()
        want = {"max": f.amax(0), "mean": f.mean(0), "last": f[-1]}[pool]
        torch.testing.assert_close(found.latents[i], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.dense[i], x[-1] if pool == "last" else x.mean(0), atol=1e-4, rtol=1e-4)


# --- first letters --------------------------------------------------------------------------------------------------


def planted_words():
    """Activations of words: a direction for each letter and one for each word; latents that say them, some doubly."""
    random = np.random.default_rng(0)
    d, letters, each = 60, "abc", 60
    basis = np.linalg.qr(random.normal(size=(d, d)))[0]
    words = [f"{letter}{i:02d}" for letter in letters for i in range(each)]
    x = random.normal(size=(len(words), d)) * 0.02
    latents = np.zeros((len(words), 8), dtype=np.float32)
    decoder = np.zeros((8, d))
    for j in range(3):
        decoder[j] = basis[j]  # the letters' own latents
    decoder[3] = (basis[0] + basis[10]) / 2**0.5  # absorbs the first letter of a0?
    decoder[4] = basis[20]  # says nothing of letters
    for i, word in enumerate(words):
        j = letters.index(word[0])
        x[i] += 2 * basis[j]
        if word[0] == "a" and word[1] == "0":
            x[i] += 2 * basis[10]
            latents[i, 3] = 2 * 2**0.5
        else:
            latents[i, j] = 2
        latents[i, 4] = 1
    return words, x, latents, decoder


def options_of(**changes):
    known = {"held_out": 0.3, "k": 5, "rise": 0.03, "l1": 0.01, "candidates": 8, "least_f1": 0.6}
    return known | {"random": np.random.default_rng(1)} | changes


def test_planted_absorption_is_found():
    words, x, latents, decoder = planted_words()
    held = split(np.array([w[0] for w in words]), 0.3, np.random.default_rng(1))
    mine = np.array([w[0] == "a" for w in words])
    # One word to learn from is too few for the latent to count as one that stands for the letter.
    absent = [*np.flatnonzero(mine & held)[:3], np.flatnonzero(mine & ~held)[0]]
    latents[mine, 0], latents[:, 3] = 2, 0
    latents[absent, 0], latents[absent, 3] = 0, 2 * 2**0.5
    gone = [words[i] for i in absent[:3]]
    frame = absorption(words, x, csr_array(latents), decoder, **options_of(rise=0.05)).set_index("letter")
    assert frame["kept"].all()
    assert (frame["probe_f1"] > 0.9).all()
    assert [frame.loc[letter, "latents"] for letter in "abc"] == [[0], [1], [2]]
    assert [w for w, _ in frame.loc["a", "absorbed"]] == gone
    assert all(j == 3 for _, j in frame.loc["a", "absorbed"])
    assert frame.loc["a", "full"] == pytest.approx(len(gone) / frame.loc["a", "found"])
    assert frame.loc["a", "fraction"] == pytest.approx(len(gone) / frame.loc["a", "found"])
    assert frame.loc[["b", "c"], ["full", "fraction"]].to_numpy().max() == 0


def test_a_split_latent_is_no_absorption():
    words, x, latents, decoder = planted_words()
    frame = absorption(words, x, csr_array(latents), decoder, **options_of()).set_index("letter")
    assert sorted(frame.loc["a", "latents"]) == [0, 3]  # ten words of sixty: it raises F1
    assert frame.loc["a", "full"] == 0


def test_partial_absorption_is_a_fraction():
    words, x, latents, decoder = planted_words()
    for i, word in enumerate(words):
        if word[0] == "b":
            latents[i, 1], latents[i, 5] = 1, 1
            latents[i, 6] = 0.5 if word[1] == "3" else 0
    decoder[5], decoder[6] = basis_of(decoder[1], 0.6), -decoder[1]
    latents[:, 5] = np.where([w[0] == "b" for w in words], 1, 1)
    frame = absorption(words, x, csr_array(latents), decoder, **options_of()).set_index("letter")
    assert frame.loc["b", "latents"] == [1]
    # 1 along the letter from its own latent and 0.6 from the other: 0.375 of the total is too little, but in ten words
    # of sixty a third one takes 0.5 away: 0.6 of 1.1.
    held = split(np.array([w[0] for w in words]), 0.3, np.random.default_rng(1))
    mine = [w[1] == "3" for i, w in enumerate(words) if w[0] == "b" and held[i]]
    assert frame.loc["b", "fraction"] == pytest.approx(0.375 * np.mean(mine), abs=0.03)
    assert any(mine)
    decoder[5] = basis_of(decoder[1], 0.9)
    frame = absorption(words, x, csr_array(latents), decoder, **options_of()).set_index("letter")
    assert frame.loc["b", "fraction"] == pytest.approx(0.9 / 1.9, abs=0.06)
    assert frame.loc["b", "full"] == 0


def basis_of(row, cosine):
    other = np.random.default_rng(5).normal(size=row.shape)
    other -= (other @ row) * row / (row @ row)
    return cosine * row + (1 - cosine**2) ** 0.5 * other / np.linalg.norm(other)


def test_letters_that_cannot_be_scored_are_left_out():
    words, x, latents, decoder = planted_words()
    words = ["d" + w[1:] if w in ("c00", "c01", "c02") else w for w in words]
    noise = [i for i, w in enumerate(words) if w[0] in "bc"]
    x[noise] = 0.02 * np.random.default_rng(2).normal(size=(len(noise), x.shape[1]))
    frame = absorption(words, x, csr_array(latents), decoder, **options_of(least_f1=0.8)).set_index("letter")
    assert frame["kept"].tolist() == [True, False, False, False]
    assert frame["full"].isna().tolist() == [False, True, True, True]
    assert frame["probe_f1"].isna().tolist() == [False, False, False, True]  # of d there are three words


def test_words_and_first_letters_of_a_real_model(smollm):
    words = single_token_words(smollm, most=600, seed=1)
    assert list(words) == sorted(words)
    assert all(smollm.processor.decode([number]) == f" {word}" for word, number in words.items())
    assert words == single_token_words(smollm, most=600, seed=1)
    frame = feature_absorption(signed_identity(576), smollm, read="resid_post.0", words=words, shots=1, held_out=0.3)
    assert frame["words"].sum() == 599
    assert frame["kept"].any()
    assert frame.loc[frame["kept"], "full"].between(0, 1).all()
    with pytest.raises(InputError, match="not their one token"):
        feature_absorption(
            signed_identity(576), smollm, read="resid_post.3", words=words, template="{word} is", shots=0
        )


# --- entities -------------------------------------------------------------------------------------------------------


def entities_of(each=30):
    random = np.random.default_rng(0)
    known, types = np.tile([True, False], each), np.repeat(["city", "song"], each)
    active = random.random((2 * each, 40)) < 0.3
    active[:, 7] = np.where(random.random(2 * each) < 0.9, known, ~known)  # knows in both types
    active[:, 8] = known & (types == "city")  # in one type only
    active[:, 9] = ~known
    x = random.normal(size=(2 * each, 6))
    x[:, 0] += 4 * known
    return x, csr_array(active.astype(np.float32)), known, types


def test_planted_entities_are_told_apart():
    x, latents, known, types = entities_of()
    frame = separations(x, latents, known, types, 1e-6, 0.5, 100, 3)
    assert (frame.loc[0, "kind"], frame.loc[0, "latent"]) == ("direction", -1)
    assert frame.loc[0, "s_known_held"] > 0.7
    rows = frame[frame["kind"] == "latent"].set_index("latent")
    assert rows.loc[9, "s_unknown"] == rows.loc[9, "s_unknown_held"] == 1
    assert rows.index[0] == 9
    assert rows.loc[7, "s_known"] > 0.5
    assert rows.loc[8, "held: city"] == 1
    assert abs(rows.loc[8, "held: song"]) < 1e-6
    assert rows.loc[8, "s_known"] == pytest.approx(0, abs=1e-6)
    assert rows.loc[[7], "p_known"].max() < 0.05
    assert rows.loc[[9], "p_unknown"].max() < 0.05
    others = rows.drop([7, 8, 9])
    assert (others[["p_known", "p_unknown"]] < 0.05).to_numpy().sum() <= 2
    # By hand, on the half that was chosen on.
    held = split(np.array([f"{t} {k}" for t, k in zip(types, known, strict=True)]), 0.5, np.random.default_rng(3))
    dense = latents.toarray() > 0
    for latent in (0, 7):
        by = []
        for name in ("city", "song"):
            yes, no = (dense[~held & (types == name) & (known == k), latent].mean() for k in (True, False))
            by.append(yes - no)
        assert rows.loc[latent, "s_known"] == pytest.approx(min(by), abs=1e-6)
        assert rows.loc[latent, "s_unknown"] == pytest.approx(-max(by), abs=1e-6)


def test_shuffled_labels_are_significant_as_rarely_as_they_should():
    x, latents, known, types = entities_of()
    random = np.random.default_rng(5)
    hits = 0
    for i in range(20):
        mixed = known.copy()
        for name in ("city", "song"):
            rows = np.flatnonzero(types == name)
            mixed[rows] = known[random.permutation(rows)]
        frame = separations(x, latents, mixed, types, 1e-6, 0.5, 40, i)
        hits += bool((frame["p_known"] < 0.05).any())
    assert hits <= 4


def test_entities_are_read_at_their_last_token(llama):
    sae = random_sae(32)
    prompts = [
        "the cat ran home",
        "a cat, a cat sat",
        "see the dog go",
        "dog or dog",
        "cat",
        "a cat!",
        "dog?",
        "my dog",
    ]
    names = ["cat", "cat", "dog", "dog"] * 2
    names = ["cat", "cat", "dog", "dog", "cat", "cat", "dog", "dog"]
    places = [(p.rfind(n), p.rfind(n) + 3) for p, n in zip(prompts, names, strict=True)]
    x, latents, tokens = at_places(sae, llama, prompts, places, read="z.1", batch=3)
    for i, prompt in enumerate(prompts):
        one = llama.prepare([prompt])
        column = int(one.find(names[i], occurrence=-1)[0].nonzero()[-1])
        want = llama.run(one, "z.1")["z", 1][0, column].flatten()
        np.testing.assert_allclose(x[i], want, atol=1e-4)
        np.testing.assert_allclose(latents[[i]].toarray()[0], sae.encode(want).detach(), atol=1e-4)
        assert len(tokens[i]) == 3
    options = {"read": "z.1", "permutations": 5}
    known, types = [True, False] * 4, ["a"] * 8
    frame = separation_scores(sae, llama, prompts, names, known, types, **options)
    assert len(frame) == 25
    density = torch.zeros(24)
    density[[2, 5]] = 0.5
    fewer = separation_scores(sae, llama, prompts, names, known, types, density=density, **options)
    assert set(frame["latent"]) - set(fewer["latent"]) == {2, 5}
    with pytest.raises(InputError, match="does not hold"):
        separation_scores(sae, llama, prompts, ["cow"] * 8, known, types, **options)
    with pytest.raises(InputError, match="two known"):
        separation_scores(sae, llama, prompts, names, [True] * 8, types, **options)


def test_bad_input_of_probes(llama):
    sae = random_sae(32)
    with pytest.raises(InputError, match="labels"):
        sparse_probing(sae, llama, ["ab", "cd"], ["x"], read="resid_post.1")
    with pytest.raises(InputError, match="too small"):
        sparse_probing(sae, llama, ["ab", "cd", "ef"], ["x", "x", "y"], read="resid_post.1")
    with pytest.raises(SettingsError, match="from 1 to 24"):
        sparse_probing(sae, llama, ["ab"] * 4, "xxyy", read="resid_post.1", k=(25,))
    with pytest.raises(InputError, match="text 3 has no token"):
        sparse_probing(sae, llama, ["ab", "cd", "ef", ""], "xxyy", read="resid_post.1", context=8)
    with pytest.raises(UnknownNameError, match="max"):
        sparse_probing(sae, llama, ["ab"] * 4, "xxyy", read="resid_post.1", pool="maximum")
    with pytest.raises(SettingsError, match="SAEs only"):
        feature_absorption(random_sae(32, d_out=32), llama, read="resid_post.1")
    with pytest.raises(InputError, match="no words"):
        feature_absorption(sae, llama, read="resid_post.1")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model, a dictionary of it and a text, as folders and files."""
    root = tmp_path_factory.mktemp("asked")
    model = saved(root, "llama")
    sae = signed_identity(32, k=6)
    save(sae, root / "sae", metadata={"model_name": str(model), "read": "resid_post.1"})
    save(sae, root / "hooked", metadata={"hook_name": "blocks.1.hook_resid_post"})
    (root / "texts.txt").write_text("\n\n".join(TEXTS))
    return SimpleNamespace(model=model, sae=root / "sae", hooked=root / "hooked", texts=root / "texts.txt")


SMALL = ("--contexts", 6, "--context", 14, "--resamples", 20, "--batch-size", 3, "--device", "cpu")


def test_the_command_writes_what_the_function_gives(asked, tmp_path):
    out = tmp_path / "run"
    command = ("evaluate", "sae", asked.sae, "--data", asked.texts, "--out", out, *SMALL)
    said = call(*command)
    assert "kl_recovered_mean" in said
    lens = interp.load(str(asked.model))
    text = corpus(asked.texts, seed=0)
    want = evaluate(
        load(asked.sae), lens, text, contexts=6, context=14, batch=3, resamples=20
    )  # what it reads is in the file
    kept = DictionaryScores.load(out / "scores")
    assert torch.equal(kept.table, want.table)
    assert kept.settings["read"] == "resid_post.1"
    numbers = pd.read_parquet(out / "numbers.parquet").set_index("metric")
    assert numbers.loc["ce_recovered_zero", "value"] == pytest.approx(want.value("ce_recovered_zero"), nan_ok=True)
    assert len(pd.read_parquet(out / "contexts.parquet")) == 6
    assert np.allclose(pd.read_parquet(out / "latents.parquet")["density"], want.density)
    page = (out / "report.html").read_text()
    for text in ("kl_recovered_zero", "How often latents are active", "A check", "resid_post.1"):
        assert text in page
    assert "not computed again" in call(*command)
    (out / "report.html").unlink()
    call("report", out)
    assert (out / "report.html").is_file()
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    again = tmp_path / "again"
    call("evaluate", "sae", "--config", out / "settings.yaml", "--out", again)
    assert DictionaryScores.load(again / "scores").equals(kept)
    assert settings["contexts"] == 6
    assert "other settings: contexts" in call(*command, "--contexts", 5, code=2)
    call(*command, "--contexts", 5, "--overwrite")
    assert len(DictionaryScores.load(out / "scores")) == 5


def test_the_command_without_losses_and_with_names_of_saelens(asked, tmp_path):
    out = tmp_path / "run"
    common = ("--data", asked.texts, "--out", out, *SMALL)
    assert "which model" in call("evaluate", "sae", asked.hooked, *common, code=2)
    call("evaluate", "sae", asked.hooked, "--model", asked.model, "--ablation", "none", *common)
    scores = DictionaryScores.load(out / "scores")
    assert scores.settings["read"] == "resid_post.1"
    assert "ce_original" not in scores.columns
    assert "Loss of the model" not in (out / "report.html").read_text()


def test_bad_input_of_the_command(asked, tmp_path):
    out = tmp_path / "run"
    assert "no data" in call("evaluate", "sae", asked.sae, "--out", out, code=2)
    assert "--out" in call("evaluate", "sae", asked.sae, "--data", asked.texts, code=2)
    assert "cfg.json" in call("evaluate", "sae", tmp_path, "--data", asked.texts, "--out", out, code=2)
    line = call("evaluate", "sae", asked.sae, "--data", asked.texts, "--out", out, "--ablation", "one", code=2)
    assert "zero" in line
    line = call("evaluate", "sae", asked.sae, "--data", asked.texts, "--out", out, "--read", "embed.1", code=2)
    assert "embed" in line
    both = ("--ablation", "none,zero")
    assert "none" in call("evaluate", "sae", asked.sae, "--data", asked.texts, "--out", out, *both, code=2)
    path = tmp_path / "run.yaml"
    path.write_text("contxt: 3\n")
    assert "context" in call("evaluate", "sae", asked.sae, "--config", path, "--out", out, code=2)
    assert not (out / "report.html").exists()
