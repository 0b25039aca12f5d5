"""Head methods: exact small cases, invariants, independent formulas."""

import inspect

import pytest
import torch

import interp
from interp import edits, heads
from interp.data.prompts import repeated_tokens
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads.common import next_token_loss
from interp.heads.patterns import pattern_targets, prefix_matching
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
GOOD, BAD = [120, 121, 122], [130, 131, 132]
DECODERS = ["llama", "gpt2", "gemma2", "granite", "cohere", "olmo2", "gpt_neox", "opt", "gpt_oss", "mixtral"]


@pytest.fixture(scope="module", params=DECODERS)
def lens(request):
    return interp.wrap(build(request.param), processor(request.param), name=request.param)


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


def test_direct_effects_and_the_rest_are_the_logit_difference(lens):
    """Heads, biases, MLPs and the embedding, each through the frozen final norm, sum to the logit difference."""
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    scores = heads.direct_effect(lens, batch, answers=GOOD, wrong=BAD)
    last = len(lens.anatomy.towers["text"].layers) - 1
    trace = lens.run(
        batch,
        [f"resid_post.{last}@last", "resid_pre.0@last", "attn_out@last", "mlp_out@last", "result@last", "logits@last"],
    )
    stream = trace["resid_post", last][:, 0]
    rest = trace["resid_pre", 0] + sum(trace["mlp_out"].values())
    rest = rest + sum(trace["attn_out", i] - trace["result", i].sum(2) for i in trace["attn_out"])
    unembed = lens.anatomy.unembed
    direction = unembed.direction(torch.tensor(GOOD)) - unembed.direction(torch.tensor(BAD))
    from_rest = (unembed.linear(rest, stream)[:, 0] * direction).sum(-1)
    total = scores.per_prompt.nan_to_num().sum((1, 2)) + from_rest
    norm = lens.anatomy.unembed.fitted[0]
    total = total + (norm.bias * direction).sum(-1)
    logits = trace.logits[:, 0]
    head = lens.anatomy.unembed
    if any(float(s({"logits": torch.tensor(2.0)})) != 2 * float(s({"logits": torch.tensor(1.0)})) for s in head.after):
        logits = head.module(head.norm_modules[0](stream))  # before the soft cap
    rows = torch.arange(3)
    difference = logits[rows, GOOD] - logits[rows, BAD]
    bias = getattr(head.module, "bias", None)
    difference = difference if bias is None else difference - (bias[GOOD] - bias[BAD])
    torch.testing.assert_close(total, difference, atol=1e-4, rtol=1e-3)


def test_direct_effect_batched_equals_single(lens):
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    together = heads.direct_effect(lens, batch, answers=GOOD, wrong=BAD).per_prompt
    for i in range(3):
        alone = heads.direct_effect(lens, lens.prepare(input_ids=[IDS[i]]), answers=[GOOD[i]], wrong=[BAD[i]])
        torch.testing.assert_close(together[i], alone.per_prompt[0], atol=1e-5, rtol=1e-4, equal_nan=True)


def test_importance_is_the_derivative_of_a_head_mask(lens):
    """Against a mask that is really there: finite differences of scaling each head in each sample."""
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    scores = heads.importance(lens, batch)
    metric = next_token_loss(batch)
    for layer, head in [(0, 1), (1, 3), (2, 0)]:
        gaps = []
        # A kink (ReLU) or a router's choice may lie within a large step, rounding spoils a small one.
        for step in (1e-2, 3e-3, 1e-3, 3e-4):
            values = [
                metric(lens.run(batch, ["logits"], edits.scale_heads(1 + s * step, pairs=[(layer, head)])).logits)
                for s in (1, -1)
            ]
            slope = (values[0] - values[1]) / (2 * step)
            gaps.append((scores.per_prompt[:, layer, head] - slope.abs()).abs() / slope.abs().clamp_min(0.05))
        assert torch.stack(gaps).amin(0).max() < 0.03, (layer, head)


def test_importance_options(llama):
    batch = llama.prepare(input_ids=IDS, padding_side="left")
    plain = heads.importance(llama, batch, answers=GOOD, wrong=BAD)
    by_token = heads.importance(llama, batch, answers=GOOD, wrong=BAD, absolute="token")
    assert (by_token.per_prompt >= plain.per_prompt - 1e-6).all()
    layer = heads.importance(llama, batch, answers=GOOD, wrong=BAD, normalize="layer").scores
    torch.testing.assert_close(layer.norm(dim=1), torch.ones(3))
    whole = heads.importance(llama, batch, answers=GOOD, wrong=BAD, normalize="global").scores
    torch.testing.assert_close(whole, plain.scores / plain.scores.norm())
    with pytest.raises(UnknownNameError, match="layer"):
        inspect.unwrap(heads.importance)(llama, batch, normalize="layers")  # past the tests' type check


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablation_is_one_full_run_per_head(lens, mode):
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    scores = heads.ablation(lens, batch, answers=GOOD, wrong=BAD, mode=mode, max_copies=3)
    reference = lens.run(batch, ["z"]) if mode == "mean" else None
    rows = torch.arange(3)

    def difference(change=()):
        logits = lens.run(batch, ["logits"], change).logits[:, -1]
        return logits[rows, GOOD] - logits[rows, BAD]

    base = difference()
    for layer, head in [(0, 0), (0, 3), (1, 2), (2, 1)]:
        without = difference(edits.ablate(mode=mode, reference=reference, pairs=[(layer, head)]))
        torch.testing.assert_close(scores.per_prompt[:, layer, head], without - base, atol=2e-5, rtol=1e-4)


def test_ablation_of_the_loss(llama):
    batch = llama.prepare(input_ids=IDS, padding_side="left")
    scores = heads.ablation(llama, batch)
    metric = next_token_loss(batch)
    base = metric(llama.run(batch, ["logits"]).logits)
    without = metric(llama.run(batch, ["logits"], edits.ablate(pairs=[(1, 1)])).logits)
    torch.testing.assert_close(scores.per_prompt[:, 1, 1], without - base, atol=1e-5, rtol=1e-4)
    assert scores.settings["mode"] == "zero"


def test_next_token_loss_is_transformers_own(llama):
    ids = torch.tensor([IDS[0]])
    batch = llama.prepare(input_ids=ids)
    wanted = llama.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(next_token_loss(batch)(llama.run(batch, ["logits"]).logits)[0], wanted.detach())
    padded = llama.prepare(input_ids=IDS, padding_side="left")
    found = next_token_loss(padded)(llama.run(padded, ["logits"]).logits)
    torch.testing.assert_close(found[0], wanted.detach(), atol=1e-5, rtol=1e-5)


def test_pattern_targets_by_hand(llama):
    """a b c a b: the second a and b have been seen at 0 and 1; after them stand 1 and 2."""
    batch = llama.prepare(input_ids=[[70, 71, 72, 70, 71], [70, 71, 72]], padding_side="left")
    targets = pattern_targets(batch, 2)
    keys, queries = targets["induction"]
    assert queries[0].tolist() == [False, False, False, True, True]
    assert keys[0, 3].nonzero()[:, 0].tolist() == [1]
    assert keys[0, 4].nonzero()[:, 0].tolist() == [2]
    keys, queries = targets["duplicate"]
    assert keys[0, 3].nonzero()[:, 0].tolist() == [0]
    assert not queries[1].any()
    keys, queries = targets["previous"]
    assert queries[1].tolist() == [False, False, False, True, True]
    assert keys[1, 3].nonzero()[:, 0].tolist() == [2]
    keys, queries = targets["first"]
    assert keys[1, 4].nonzero()[:, 0].tolist() == [2]
    keys, queries = targets["local"]
    assert keys[0, 4].nonzero()[:, 0].tolist() == [3, 4]
    # Directly repeated: the token after the earlier copy is the query itself, which does not count.
    again = llama.prepare(input_ids=[[70, 70]])
    assert not pattern_targets(again, 2)["induction"][1].any()


def test_patterns_on_repeated_tokens_is_the_published_score(lens):
    batch = lens.prepare(input_ids=repeated_tokens(3, 8, allowed_ids=range(70, 300), seed=1))
    scores = heads.patterns(lens, batch, memory=1)
    trace = lens.run(batch, ["pattern"])
    for layer, pattern in trace["pattern"].items():
        wanted = torch.stack([prefix_matching(p, 8) for p in pattern])
        # Ours also counts the last query, whose earlier copy is followed by the first token of the second copy.
        queries = torch.arange(8, 16)
        by_hand = torch.stack([pattern[:, :, q, q - 7] for q in queries], -1).mean(-1)
        torch.testing.assert_close(scores.per_prompt[:, layer], by_hand, atol=1e-5, rtol=1e-4)
        assert (wanted - by_hand).abs().max() < 0.2


def test_patterns_of_a_perfect_head(llama):
    """A head whose attention is put by hand on the right keys scores one."""
    ids = repeated_tokens(2, 5, allowed_ids=range(70, 300), seed=2)
    batch = llama.prepare(input_ids=ids)
    targets = pattern_targets(batch, 4)
    for kind in ("induction", "previous", "duplicate", "first"):
        keys, queries = targets[kind]
        ideal = keys.float() / keys.sum(-1, keepdim=True).clamp_min(1)
        change = edits.splice(lambda p, i=ideal: i[:, None].expand_as(p).clone(), site="pattern", layers=1, heads=2)
        trace = llama.run(batch, ["pattern.1/2"], change)
        mass = (trace["pattern", 1][:, 0] * keys).sum(-1)[queries]
        torch.testing.assert_close(mass, torch.ones_like(mass))


def test_patterns_padding_and_batching(llama):
    rows = [[70, 71, 72, 70, 71, 72], [80, 81, 80, 81]]
    together = heads.patterns(llama, llama.prepare(input_ids=rows, padding_side="left")).per_prompt
    right = heads.patterns(llama, llama.prepare(input_ids=rows, padding_side="right")).per_prompt
    torch.testing.assert_close(together, right, atol=1e-5, rtol=1e-4)
    for i, row in enumerate(rows):
        alone = heads.patterns(llama, llama.prepare(input_ids=[row])).per_prompt[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_shown_is_an_error(llama):
    batch = llama.prepare(input_ids=[[70, 71, 72]])
    with pytest.raises(InputError, match="repeated_tokens"):
        heads.patterns(llama, batch)
    found = heads.patterns(llama, batch, score="previous")
    assert "induction" not in found.extra
    with pytest.raises(UnknownNameError, match="previous"):
        heads.patterns(llama, batch, score="previus")


def test_bad_answers(llama):
    batch = llama.prepare(["The cat", "A dog"])
    with pytest.raises(InputError, match="1 answers were given for 2"):
        heads.direct_effect(llama, batch, answers=[70])
    with pytest.raises(InputError, match=r"answers\[0\].*is 4 tokens"):
        heads.direct_effect(llama, batch, answers=["abcd", "e"])
    with pytest.raises(InputError, match="padding_side='left'"):
        heads.ablation(llama, llama.prepare(["The cat", "A dog"], padding_side="right"), answers=[70, 71])
    with pytest.raises(SettingsError, match="need answers"):
        heads.importance(llama, batch, wrong=[70, 71])
    with pytest.raises(TypeError, match="normalise"):
        heads.importance(llama, batch, normalise="layer")


def test_models_without_a_plain_head_are_refused():
    lens = interp.wrap(build("bert"), processor("bert"))
    batch = lens.prepare(["The cat"])
    with pytest.raises(UnsupportedError, match="head"):
        heads.direct_effect(lens, batch, answers=[70])
    state = interp.wrap(build("mamba"), processor("mamba"))
    with pytest.raises(UnsupportedError, match="attention"):
        heads.patterns(state, state.prepare(["The cat"]))


def test_layers_without_heads_are_empty_rows():
    lens = interp.wrap(build("jamba"), processor("jamba"))
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    scores = heads.importance(lens, batch)
    have = [x.index for x in lens.anatomy.towers["text"].layers if "attn" in x.attention]
    for layer in range(len(lens.anatomy.towers["text"].layers)):
        assert bool(scores.scores[layer].isnan().all()) == (layer not in have)


def test_image_models_rank_heads_of_the_language_tower():
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given)
    batch = lens.prepare(**given)
    effect = heads.direct_effect(lens, batch, answers=[70, 71])
    assert effect.scores.shape == (3, 4)
    removed = heads.ablation(lens, batch, answers=[70, 71])
    logits = lens.run(batch, ["logits@last"], edits.ablate(pairs=[(2, 1)])).logits[:, 0]
    plain = lens.run(batch, ["logits@last"]).logits[:, 0]
    rows = torch.arange(2)
    wanted = logits[rows, [70, 71]] - plain[rows, [70, 71]]
    torch.testing.assert_close(removed.per_prompt[:, 2, 1], wanted, atol=1e-5, rtol=1e-4)
