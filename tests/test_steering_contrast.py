"""Contrastive decoding: against slow recomputation with the papers' formulas, caches, beams, padding, bad input."""

import math

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import interp
from interp import edits, evaluation, steering
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.without_image import without_image
from tests.test_heads_vision import wrapped
from tests.zoo import build, processor

NEW = 6
FAMILIES = ["llava", "qwen2_vl", "gemma3_vl", "smolvlm", "mistral3"]
PROMPTS = [scenes.CAPTION_PROMPT, "what color is the background ?", scenes.CAPTION_PROMPT]


def prompts(lens, rows=(0, 1, 2)):
    drawn = list(scenes.scenes("test", 3))
    texts = [evaluation.image_prompt(lens, PROMPTS[i]) for i in rows]
    return lens.prepare(texts, [drawn[i].image for i in rows], padding_side="left")


@pytest.fixture(scope="module")
def lens():
    return interp.load("scenes", device="cpu")


@pytest.fixture(scope="module")
def batch(lens):
    """Prompts of two lengths, so that one is padded."""
    return prompts(lens)


def longer(lens, batch, tokens):
    """The batch with tokens behind its prompts."""
    inputs = dict(batch.inputs)
    for name, value in inputs.items():
        if name != "position_ids" and isinstance(value, torch.Tensor) and value.shape == batch.mask.shape:
            more = tokens if name == "input_ids" else torch.full_like(tokens, int(name == "attention_mask"))
            inputs[name] = torch.cat([value, more.to(value)], 1)
    return lens.prepare(**inputs)


MADE = {
    "vcd": lambda lens, batch: steering.VisualContrast(lens, batch, strength=2.0, cutoff=0.2),
    "m3id": lambda lens, batch: steering.M3ID(lens, batch, rate=0.4, confidence=0.9, start=1),
    "avisc": lambda lens, batch: steering.BlindTokenContrast(lens, batch, strength=2.0, cutoff=0.2),
}


def other_prompt(name, lens, batch):
    """The other prompt, made anew, with its edits when tokens stand behind it."""
    if name == "m3id":
        return without_image(lens, batch, "drop").batch, lambda new: []
    if name == "avisc":
        hidden = batch.span("image") & ~blind_by_hand(lens, batch)
        pad = torch.nn.functional.pad
        return batch, lambda new: edits.ablate(site="resid_pre", layers=0, positions=pad(hidden, (0, new)))
    noise = without_image(lens, batch, "noise", seed=0).batch.inputs["pixel_values"]
    kept = 1.0
    for i in range(501):
        kept *= 1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)))
    pixels = kept**0.5 * batch.inputs["pixel_values"] + (1 - kept) ** 0.5 * noise
    return lens.prepare(**{**batch.inputs, "pixel_values": pixels}), lambda new: []


def formula(name, plain, other, step):
    """The papers' formulas on logits, in plain loops over rows."""
    out = []
    for z, n in zip(plain, other, strict=True):
        if name == "m3id":
            one, two = z.log_softmax(-1), n.log_softmax(-1)
            gamma = math.exp(-0.4 * (step + 1))
            sure = float(one.max()) >= math.log(0.9)
            out.append(one if sure else one + (1 - gamma) / gamma * (one - two))
            continue
        mixed = (1 + 2.0) * z - 2.0 * n
        mixed[z < z.max() + math.log(0.2)] = -torch.inf
        out.append(mixed)
    return torch.stack(out)


def hooks(lens):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lens.model.modules())


def ends(lens):
    config = lens.model.generation_config.eos_token_id
    return [config] if isinstance(config, int) else list(config or [])


def slowly(name, lens, batch, new=NEW):
    """Greedy contrastive decoding without any cache."""
    other, made = other_prompt(name, lens, batch)
    tokens = batch.inputs["input_ids"][:, :0]
    for step in range(new):
        plain = lens.run(longer(lens, batch, tokens), ["logits@last"]).logits[:, -1]
        plain[:, ends(lens)] = -torch.inf
        there = lens.run(longer(lens, other, tokens), ["logits@last"], made(step)).logits[:, -1]
        tokens = torch.cat([tokens, formula(name, plain, there, step).argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("family", ["scenes", *FAMILIES])
def test_token_for_token_what_recomputing_gives(lens, batch, family, name):
    if family != "scenes":
        lens, batch = wrapped(family)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    before = hooks(lens)
    made = MADE[name](lens, batch)
    found = lens.generate(batch, logits_processor=[made], **options).tokens
    assert torch.equal(found, slowly(name, lens, batch))
    assert not torch.equal(found, lens.generate(batch, **options).tokens)
    # The same processor again, as users of transformers know how to plug it in, then plain generation as before.
    inputs = lens._positioned(batch).inputs
    plugged = lens.model.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([made]), **options)
    assert torch.equal(plugged[:, batch.mask.shape[1] :], found)
    assert hooks(lens) == before


@pytest.mark.parametrize("name", MADE)
def test_batched_is_single(lens, batch, name):
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    together = lens.generate(batch, logits_processor=[MADE[name](lens, batch)], **options).tokens
    for i in range(len(batch)):
        one = prompts(lens, (i,))
        assert bool(one.mask.all())
        alone = lens.generate(one, logits_processor=[MADE[name](lens, one)], **options).tokens[0]
        assert torch.equal(alone, together[i])


def test_strength_zero_is_bit_identical(lens, batch):
    scores = torch.randn(3, 20)
    ids = batch.inputs["input_ids"]
    for made in (
        steering.VisualContrast(lens, batch, strength=0.0),
        steering.M3ID(lens, batch, rate=0.0),
        steering.M3ID(lens, batch, ceiling=0.0),
        steering.BlindTokenContrast(lens, batch, strength=0.0),
    ):
        assert made(ids, scores) is scores
        assert torch.equal(
            lens.generate(batch, logits_processor=[made], max_new_tokens=NEW).tokens,
            lens.generate(batch, max_new_tokens=NEW).tokens,
        )


def test_weights_gate_and_ceiling(lens, batch):
    """M3ID's weight grows with the step, is held by the ceiling, and spares rows that are sure."""
    made = steering.M3ID(lens, batch, rate=0.02, confidence=0.3, ceiling=5.0)
    unsure, sure = torch.full((100,), 0.01), torch.full((100,), 0.5 / 99)
    sure[0] = 0.5
    rows = torch.stack([unsure, sure]).log()
    for step in (0, 1, 50, 100, 10_000):
        gamma = math.exp(-0.02 * min(step, 200))
        assert made._weight(rows, step).tolist() == pytest.approx([min((1 - gamma) / gamma, 5.0), 0.0], rel=1e-4)
    # A row with no weight keeps its scores bit for bit beside one that is contrasted.
    scores = torch.randn(3, lens.vocabulary)
    scores[1, 0] = 50.0
    late = steering.M3ID(lens, batch, rate=0.02, start=50)
    changed = late(batch.inputs["input_ids"], scores)
    assert torch.equal(changed[1], scores[1])
    assert not torch.equal(changed[0], scores[0])


def test_cut_off_and_barred_tokens(lens, batch):
    torch.manual_seed(0)
    made = steering.VisualContrast(lens, batch, strength=1.0, cutoff=0.1)
    ids = batch.inputs["input_ids"]
    scores = torch.randn(3, lens.vocabulary)
    scores[:, 7] = -torch.inf
    found, whole = made(ids, scores), made.uncut(ids, scores)
    chance = scores.softmax(-1)
    implausible = chance < 0.1 * chance.amax(-1, keepdim=True)
    assert torch.equal(found == -torch.inf, implausible)
    assert torch.equal(whole == -torch.inf, scores == -torch.inf)
    for one in (found, whole):
        assert torch.allclose(one.exp().sum(-1), torch.ones(3), atol=1e-5)
        assert not bool(one.isnan().any())
    # What is plausible keeps its order under either.
    a, b = (~implausible[0]).nonzero()[:2, 0].tolist()
    assert float(found[0, a] - found[0, b]) == pytest.approx(float(whole[0, a] - whole[0, b]), abs=1e-4)


def blind_by_hand(lens, batch, share=0.5, deviations=1.0):
    """AvisC's selection in plain loops."""
    depth = len(lens.anatomy.towers["text"].layers)
    trace = lens.run(batch, ["pattern"])
    image, out = batch.span("image"), torch.zeros_like(batch.mask)
    for b in range(len(batch)):
        rows = [trace["pattern", layer][b, :, -1].mean(0)[image[b]] for layer in range(depth)]
        sums = [float(row.sum()) for row in rows]
        order = sorted(range(depth), key=lambda layer: -sums[layer])
        taken, held = [], 0.0
        for layer in order:
            taken.append(layer)
            held += sums[layer] / sum(sums)
            if held >= share:
                break
        mean = torch.stack([rows[layer] for layer in taken]).mean(0)
        std = ((mean - mean.mean()) ** 2).mean().sqrt()
        out[b, image[b]] = mean >= mean.mean() + deviations * std
    return out


@pytest.mark.parametrize("family", ["scenes", "llava", "qwen2_vl", "smolvlm"])
def test_blind_tokens_by_hand(lens, batch, family):
    if family != "scenes":
        lens, batch = wrapped(family)
    for share, deviations in ((0.5, 1.0), (0.9, 0.3), (0.01, 0.0)):
        found = steering.blind_tokens(lens, batch, share=share, deviations=deviations)
        assert torch.equal(found, blind_by_hand(lens, batch, share, deviations))
        assert bool(found.any())
        assert not bool((found & ~batch.span("image")).any())


def test_no_blind_token_hides_the_whole_image(lens, batch):
    none = steering.BlindTokenContrast(lens, batch, deviations=1000.0)
    assert not bool(none.blind.any())
    hidden = edits.ablate(site="resid_pre", layers=0, positions=batch.span("image"))
    wanted = lens.run(batch, ["logits@last"], hidden).logits[:, -1]
    assert torch.equal(none.branch.logits(batch.inputs["input_ids"]), wanted)
    every = steering.BlindTokenContrast(lens, batch, blind=batch.span("image"))
    assert torch.equal(every.branch.logits(batch.inputs["input_ids"]), lens.run(batch, ["logits@last"]).logits[:, -1])


class Slow(LogitsProcessor):
    """The same contrast, each row's other prompt read anew at every step."""

    def __init__(self, name, lens, batch):
        self.name, self.lens, self.batch = name, lens, batch
        self.other, self.made = other_prompt(name, lens, batch)

    def __call__(self, input_ids, scores):
        size, width = self.batch.mask.shape
        copies = len(input_ids) // size
        out = torch.empty_like(scores)
        for j in range(copies):
            tokens = input_ids[j::copies, width:]
            made = self.made(tokens.shape[1])
            there = self.lens.run(longer(self.lens, self.other, tokens), ["logits@last"], made).logits[:, -1]
            out[j::copies] = formula(self.name, scores[j::copies], there, tokens.shape[1])
        return out.log_softmax(-1)


@pytest.mark.parametrize("family", ["scenes", "llava", "gemma3_vl"])
@pytest.mark.parametrize("name", MADE)
def test_beams_carry_their_own_other_prompts(lens, batch, family, name):
    if family != "scenes":
        lens, batch = wrapped(family)
    options = {"max_new_tokens": NEW, "num_beams": 3, "min_new_tokens": NEW}
    made = MADE[name](lens, batch)
    found = lens.generate(batch, logits_processor=[made], **options).tokens
    assert torch.equal(found, lens.generate(batch, logits_processor=[Slow(name, lens, batch)], **options).tokens)
    assert torch.equal(found, lens.generate(batch, logits_processor=[made], **options).tokens)


def test_several_sampled_texts_of_each_prompt(lens, batch):
    """Rows that transformers multiplies, sampled apart, each with its own text in the other branch."""
    made, ids = steering.VisualContrast(lens, batch, strength=0.5, cutoff=0.0), []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            ids.append((input_ids.clone(), scores.clone()))
            return scores

    torch.manual_seed(0)
    lens.model.generate(
        **batch.inputs, do_sample=True, temperature=3.0, num_return_sequences=2, max_new_tokens=NEW, top_k=0,
        logits_processor=LogitsProcessorList([made, Look()]),
    )  # fmt: skip
    # What came out at the last step is what a fresh processor would give for the same texts one by one.
    last, scores = ids[-1]
    width = batch.mask.shape[1]
    assert len(last) == 6
    assert any(not torch.equal(last[i], last[i + 1]) for i in (0, 2, 4))
    for row in (1, 4):
        one = prompts(lens, (row // 2,))
        tokens = last[row : row + 1, width:]
        plain = lens.run(longer(lens, one, tokens), ["logits@last"]).logits[:, -1]  # the temperature comes behind
        other, _ = other_prompt("vcd", lens, one)
        there = lens.run(longer(lens, other, tokens), ["logits@last"]).logits[:, -1]
        wanted = (1.5 * plain - 0.5 * there).log_softmax(-1)
        assert torch.allclose(scores[row], wanted[0], atol=1e-3)


def test_with_edits_only_the_plain_branch_is_edited(lens, batch):
    """Edits stay with the text that is generated: the other branch is that of the model as it is."""
    change, before = steering.edit_heads([(3, 1), (4, 2)], 2.5), hooks(lens)
    made = MADE["vcd"](lens, batch)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    found = lens.generate(batch, change, reads=["resid_post.-1@last"], logits_processor=[made], **options)
    other, _ = other_prompt("vcd", lens, batch)
    tokens = batch.inputs["input_ids"][:, :0]
    for step in range(NEW):
        plain = lens.run(longer(lens, batch, tokens), ["logits@last"], change).logits[:, -1]
        plain[:, ends(lens)] = -torch.inf
        there = lens.run(longer(lens, other, tokens), ["logits@last"]).logits[:, -1]
        tokens = torch.cat([tokens, formula("vcd", plain, there, step).argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.tokens, tokens)
    assert found.trace["resid_post.-1@last", 5].shape[1] == NEW  # nothing of the other branch was read
    assert hooks(lens) == before


def test_other_ways_to_distort(lens, batch):
    scores = lens.run(batch, ["logits@last"]).logits[:, -1]
    ids = batch.inputs["input_ids"]
    named = ("diffused", "noise", "mean", "drop")
    ways = [steering.VisualContrast(lens, batch, distort=d).uncut(ids, scores) for d in named]
    assert all(not torch.equal(ways[0], one) for one in ways[1:])
    far, near = (steering.VisualContrast(lens, batch, steps=n).uncut(ids, scores) for n in (500, 0))
    plain = scores.log_softmax(-1)
    # A picture with hardly any noise says what the picture says.
    assert float((near - plain).abs().max()) < 0.1 < float((far - plain).abs().max())


def test_bad_input(lens, batch):
    ids = batch.inputs["input_ids"]
    blind = interp.wrap(build("llama"), processor("llama"), name="llama")
    text = blind.prepare(["ab", "cd"])
    for make in (steering.VisualContrast, steering.M3ID):
        with pytest.raises(UnsupportedError, match="takes no images"):
            make(blind, text)
    with pytest.raises(InputError, match="image tokens in every prompt"):
        steering.BlindTokenContrast(blind, text)
    right = lens.prepare(
        [evaluation.image_prompt(lens, t) for t in ("a", "what color is the background ?")],
        [scenes.scene("test", i).image for i in range(2)],
        padding_side="right",
    )
    for make in (steering.VisualContrast, steering.M3ID, steering.BlindTokenContrast):
        with pytest.raises(InputError, match="padding_side='left'"):
            make(lens, right)
    for options in ({"strength": math.inf}, {"cutoff": 1.5}, {"steps": 1000}, {"steps": 1.0}):
        with pytest.raises(SettingsError):
            steering.VisualContrast(lens, batch, **options)
    for options in ({"rate": -1.0}, {"confidence": 0.0}, {"start": -1}, {"ceiling": -1.0}, {"rate": math.nan}):
        with pytest.raises(SettingsError):
            steering.M3ID(lens, batch, **options)
    for options in ({"share": 0.0}, {"deviations": math.nan}, {"strength": math.nan}):
        with pytest.raises(SettingsError):
            steering.BlindTokenContrast(lens, batch, **options)
    with pytest.raises(InputError, match="blind marks image tokens"):
        steering.BlindTokenContrast(lens, batch, blind=torch.ones_like(batch.mask))
    with pytest.raises(UnknownNameError, match="blur"):
        steering.VisualContrast(lens, batch, distort="blur")
    with pytest.raises(UnsupportedError, match="drop_keep_positions"):
        steering.M3ID(lens, batch, without="mask")
    made = steering.VisualContrast(lens, batch)
    with pytest.raises(InputError, match="not those of the batch"):
        made(ids[[1, 0, 2]], torch.zeros(3, lens.vocabulary))
    with pytest.raises(InputError, match="token by token"):
        made(torch.cat([ids, ids[:, :2]], 1), torch.zeros(3, lens.vocabulary))
    made(ids, torch.zeros(3, lens.vocabulary))
    changed = torch.cat([ids, ids[:, :1]], 1)
    changed[0, 5] = (changed[0, 5] + 1) % 50
    with pytest.raises(InputError, match="changed between"):
        made(changed, torch.zeros(3, lens.vocabulary))
    with pytest.raises(InputError, match="not those of the batch"):
        lens.generate(prompts(lens, (0,)), logits_processor=[made], max_new_tokens=2)


def test_models_with_another_state_are_refused():
    lens, batch = wrapped("mllama")
    with pytest.raises(UnsupportedError, match="no second prompt can be carried on"):
        steering.M3ID(lens, batch)
