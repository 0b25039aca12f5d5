"""Causal tracing of facts against the published loop in plain hooks, roles, answers of several tokens, bad input."""

import math

import pytest
import torch

import interp
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.tracing import CausalMap, causal_trace
from interp.tracing.causal_trace import ROLES, roles
from tests.conftest import packaged
from tests.zoo import build, processor

TEXTS = ["ab cde fg h", "the xyz is", "qq rst uv w x"]
SUBJECTS = ["cde", "xyz", "rst"]


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


def loop(lens, text, subject, answer, *, site, layers, window, samples, size, seed, tokens, longest, severed=None):
    """The published procedure: for each layer and token whole runs of all noise samples, with plain hooks."""
    model = lens.model
    ids = lens.processor([text], return_tensors="pt")["input_ids"]
    mark = lens.prepare([text]).find(subject)[0]
    whole = torch.cat([ids, torch.tensor([answer[:-1]], dtype=torch.long)], 1)
    generator = torch.Generator().manual_seed(seed)
    draws = size * torch.randn(samples, longest, model.config.hidden_size, generator=generator)
    width, blocks = ids.shape[1], model.model.layers
    mark = torch.nn.functional.pad(mark, (0, len(answer) - 1))
    parts = {"resid_post": lambda b: b, "mlp_out": lambda b: b.mlp, "attn_out": lambda b: b.self_attn}
    part = parts[site]

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    clean = {}
    handles = [
        part(b).register_forward_hook(lambda m, a, o, i=i: clean.__setitem__(i, first(o))) for i, b in enumerate(blocks)
    ]
    with torch.no_grad():
        logits = model(whole).logits
    [h.remove() for h in handles]

    def probability(logits):
        told = logits[:, width - 1 : width - 1 + len(answer)].log_softmax(-1)
        return told[:, range(len(answer)), answer].sum(1).exp()

    def corrupt(module, args, out):
        out = out.clone()
        out[:, mark] += draws[:, : int(mark.sum())]
        return out

    spoilt = {}

    def run(patched, token, held=()):
        def put_back(i, values=clean):
            def hook(module, args, out):
                new = first(out).clone()
                new[:, token] = values[i][:, token]
                return (new, *out[1:]) if isinstance(out, tuple) else new

            return hook

        handles = [model.get_input_embeddings().register_forward_hook(corrupt)]
        handles += [parts[severed](blocks[i]).register_forward_hook(put_back(i, spoilt)) for i in held]
        handles += [part(blocks[i]).register_forward_hook(put_back(i)) for i in patched]
        if severed and not spoilt:  # the first pass notes the corrupt outputs
            handles += [
                parts[severed](b).register_forward_hook(lambda m, a, o, i=i: spoilt.__setitem__(i, first(o)))
                for i, b in enumerate(blocks)
            ]
        with torch.no_grad():
            found = probability(model(whole.expand(samples, -1)).logits).mean()
        [h.remove() for h in handles]
        return found

    values, low = {}, run([], 0)
    for layer in layers:
        around = range(max(0, layer - window // 2), min(len(blocks), layer - window // 2 + window))
        for token in tokens:
            held = range(len(blocks)) if severed else ()
            values[layer, token] = run(around, token, held)
    return probability(logits)[0], low, values


@pytest.mark.parametrize(
    ("site", "window", "severed"),
    [
        ("resid_post", 1, None),
        ("mlp_out", 2, None),
        ("attn_out", 1, None),
        ("resid_post", 1, "mlp_out"),
        ("resid_post", 1, "attn_out"),
        ("attn_out", 2, "mlp_out"),
        ("mlp_out", 2, "attn_out"),
        ("mlp_out", 1, "mlp_out"),
    ],
)
def test_every_position_is_that_of_the_published_loop(llama, site, window, severed):
    options = {"site": site, "window": window, "severed": severed}
    found = causal_trace(llama, TEXTS, SUBJECTS, positions="each", samples=3, sigma=0.5, noise=2.0, seed=4, **options)
    longest = max(int(llama.prepare([t]).find(s).sum()) for t, s in zip(TEXTS, SUBJECTS, strict=True))
    answers = [int(llama.run(llama.prepare([t]), "logits@last").logits[0, -1].argmax()) for t in TEXTS]
    assert found.settings["kept"] == [0, 1, 2]
    for n, (text, subject, answer) in enumerate(zip(TEXTS, SUBJECTS, answers, strict=True)):
        batch = llama.prepare([text])
        tokens = range(int(batch.find(subject)[0].int().argmax()), batch.mask.shape[1])
        options |= {"layers": range(3), "samples": 3, "size": 1.0, "seed": 4}
        clean, corrupt, values = loop(llama, text, subject, [answer], tokens=tokens, longest=longest, **options)
        assert float(found.clean[n]) == pytest.approx(float(clean), abs=1e-5)
        assert float(found.corrupt[n]) == pytest.approx(float(corrupt), abs=1e-5)
        for (_, layer, _, group), row in zip(found.cells.tolist(), found.values, strict=True):
            token = int(found.groups[group])
            assert bool(found.exists[group, n]) == (token in tokens)
            if token in tokens:
                assert float(row[n]) == pytest.approx(float(values[layer, token]), abs=1e-5), (layer, token)


def test_answers_of_several_tokens_have_their_joint_probability(llama):
    text, subject = TEXTS[0], SUBJECTS[0]
    ids = []
    for _ in range(3):
        batch = llama.prepare(input_ids=[llama.processor(text)["input_ids"] + ids])
        ids.append(int(llama.run(batch, "logits@last").logits[0, -1].argmax()))
    found = causal_trace(
        llama, [text], [subject], answers=[ids], positions="each", samples=2, sigma=0.5, noise=2.0, layers=[1]
    )
    batch = llama.prepare([text])
    tokens = range(int(batch.find(subject)[0].int().argmax()), batch.mask.shape[1])
    options = {"site": "resid_post", "layers": [1], "window": 1, "samples": 2, "size": 1.0, "seed": 1}
    longest = int(batch.find(subject).sum())
    clean, corrupt, values = loop(llama, text, subject, ids, tokens=tokens, longest=longest, **options)
    assert float(found.clean) == pytest.approx(float(clean), abs=1e-6)
    assert float(found.corrupt) == pytest.approx(float(corrupt), abs=1e-6)
    assert [int(g) for g in found.groups] == list(tokens)
    for (_, layer, _, group), row in zip(found.cells.tolist(), found.values, strict=True):
        assert float(row[0]) == pytest.approx(float(values[layer, int(found.groups[group])]), abs=1e-6)


def test_roles_by_hand(llama):
    mark = torch.tensor([False, True, True, True, False, False, False])
    assert roles(mark) == [None, "first subject", "middle subject", "last subject", "first after", "further", "last"]
    assert roles(torch.tensor([True, False, False])) == ["last subject", "first after", "last"]
    assert roles(torch.tensor([False, True])) == [None, "last"]
    options = {"samples": 2, "sigma": 0.5, "layers": [0, 2]}
    each = causal_trace(llama, TEXTS, SUBJECTS, positions="each", **options)
    by_role = causal_trace(llama, TEXTS, SUBJECTS, **options)
    assert set(by_role.groups) <= set(ROLES)
    for n, (text, subject) in enumerate(zip(TEXTS, SUBJECTS, strict=True)):
        named = roles(llama.prepare([text]).find(subject)[0])
        for (_, layer, _, group), row in zip(by_role.cells.tolist(), by_role.values, strict=True):
            places = [i for i, name in enumerate(named) if name == by_role.groups[group]]
            assert bool(by_role.exists[group, n]) == bool(places)
            mine = [
                float(values[n])
                for (_, other, _, g), values in zip(each.cells.tolist(), each.values, strict=True)
                if other == layer and int(each.groups[g]) in places
            ]
            if places:
                assert float(row[n]) == pytest.approx(sum(mine) / len(mine), abs=1e-6)


def test_the_last_token_of_the_last_layer_brings_everything_back(llama, tmp_path):
    found = causal_trace(llama, TEXTS, SUBJECTS, samples=2, sigma=0.5, layers=[2])
    last = found.frame().set_index("group")
    assert last["effect"]["last"] == pytest.approx(1.0, abs=1e-4)
    found.save(tmp_path / "map")
    assert CausalMap.load(tmp_path / "map").equals(found)
    # Prompts traced in other company give the same numbers: the noise is of the sample and the token.
    alone = causal_trace(llama, TEXTS[1:2], SUBJECTS[1:2], samples=2, sigma=0.5, layers=[2])
    assert float(alone.corrupt) == pytest.approx(float(found.corrupt[1]), abs=1e-5)


def test_prompts_that_the_model_does_not_complete_are_left_out(llama):
    right = int(llama.run(llama.prepare([TEXTS[0]]), "logits@last").logits[0, -1].argmax())
    other = llama.processor("~", add_special_tokens=False)["input_ids"]
    answers = [[right], other, other]
    found = causal_trace(llama, TEXTS, SUBJECTS, answers=answers, samples=2, sigma=0.5, layers=[1])
    assert found.settings["kept"] == [0]
    assert found.settings["left_out"] == 2
    with pytest.raises(InputError, match="none of the 3 answers"):
        causal_trace(llama, TEXTS, SUBJECTS, answers=["~"] * 3)


def test_bad_input(llama):
    with pytest.raises(InputError, match="prompt 1: sample 0 holds 'zzz' 0 times"):
        causal_trace(llama, TEXTS, ["cde", "zzz", "rst"])
    with pytest.raises(InputError, match="a subject"):
        causal_trace(llama, TEXTS, SUBJECTS[:2])
    for option in ({"noise": 0.0}, {"samples": 0}, {"sigma": math.inf}):
        with pytest.raises(SettingsError, match="noise and sigma are above 0"):
            causal_trace(llama, TEXTS, SUBJECTS, **option)
    with pytest.raises(UnknownNameError, match="site"):
        causal_trace(llama, TEXTS, SUBJECTS, site="resid_pst")
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        causal_trace(interp.wrap(build("llama"), name="bare"), TEXTS, SUBJECTS)


@pytest.mark.slow
def test_early_and_late_sites_of_a_real_model():
    """The last subject token in early layers, the last token in late ones, as the paper finds it in GPT-2 XL."""
    packaged("smollm2-135m")
    lens = interp.load("smollm2-135m", device="cpu")
    texts = ["The Eiffel Tower is located in the city of", "The Colosseum is located in the city of"]
    found = causal_trace(
        lens, texts, ["The Eiffel Tower", "The Colosseum"], answers=[" Paris", " Rome"], samples=2, layers=[8, 27]
    )
    effect = found.frame().set_index(["layer", "group"])["effect"]
    assert effect[8, "last subject"] > 0.3 > 0.1 > effect[8, "last"]
    assert effect[27, "last"] > 0.7 > 0.1 > effect[27, "last subject"]
