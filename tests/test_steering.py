"""Interventions on generation: against slow references, strength zero, caches, mixed batches, bad input."""

import math

import pytest
import torch

import interp
from interp import edits, evaluation, heads, steering
from interp.data import scenes
from interp.errors import EditError, InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads.common import head_grid
from interp.heads.vision_divergence import ruled
from interp.reads import Read
from interp.steering.sinks import default_tau, relative_size, sink_size
from interp.steering.vision_reinforcement import reinforced_layers
from interp.without_image import without_image
from tests.test_heads_vision import wrapped
from tests.zoo import build, processor

FAMILIES = ["llava", "llava_onevision", "qwen2_vl", "smolvlm", "gemma3_vl", "aya_vision", "mistral3"]
NEW = 8


@pytest.fixture(scope="module")
def lens():
    return interp.load("scenes", device="cpu")


@pytest.fixture(scope="module")
def batch(lens):
    """Prompts of two lengths, so that one is padded."""
    drawn = list(scenes.scenes("test", 3))
    texts = [scenes.CAPTION_PROMPT, "what color is the background ?", scenes.CAPTION_PROMPT]
    asked = [evaluation.image_prompt(lens, text) for text in texts]
    return lens.prepare(asked, [s.image for s in drawn], padding_side="left")


# Vision-aware head reinforcement


def two_passes(lens, batch, layers, scale, without, outliers):
    """The published procedure, slowly: for each layer both branches anew, with what was chosen below."""
    blind = without_image(lens, batch, without)
    made, _, valid = [], *head_grid(lens)[1:]
    chosen = torch.zeros(len(batch), *valid.shape, dtype=torch.bool)
    for layer in layers:
        read = Read("z", layers=(layer,), positions="last")
        seen = lens.run(batch, read, made)[read, layer][:, 0]
        unseen = lens.run(blind.batch, read, [*blind.edits, *made])[read, layer][:, 0]
        found, _ = ruled(seen, unseen, "absolute", outliers)
        found[found < 1e-5] = 0  # a window that does not reach the image leaves rounding
        picked = found > found.quantile(0.5, dim=1, keepdim=True)
        chosen[:, layer, : picked.shape[1]] = picked
        made += edits.scale_heads(torch.where(picked, scale, 1.0), layers=layer, positions="last")
    return chosen


@pytest.mark.parametrize("without", ["drop", "mask", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_are_those_of_the_slow_two_passes(name, without):
    lens, batch = wrapped(name)
    depth = len(lens.anatomy.towers["text"].layers)
    layers = tuple(range(depth))
    found = steering.vision_heads(lens, batch, layers=layers, scale=3.0, without=without)
    assert torch.equal(found.chosen, two_passes(lens, batch, layers, 3.0, without, "biased"))
    assert bool(found.chosen.any())


def test_heads_of_scenes(lens, batch):
    for outliers in ("keep", "biased", "unbiased"):
        found = steering.vision_heads(lens, batch, outliers=outliers)
        assert found.layers == (1, 3, 4, 5)
        assert torch.equal(found.chosen, two_passes(lens, batch, found.layers, 2.0, "drop", outliers))
    # With nothing left out, and distinct divergences, half of eight heads lie above the median.
    counts = steering.vision_heads(lens, batch, outliers="keep").chosen.sum(2)
    assert counts[:, list(found.layers)].unique().tolist() == [4]
    first = heads.vision_divergence(lens, batch).per_prompt[:, 1]
    divergence = steering.vision_heads(lens, batch, outliers="keep").divergence[:, 1]
    assert torch.allclose(divergence, first, atol=1e-4)  # nothing is reinforced below the first layer


def test_the_paper_s_layers_and_their_share():
    assert reinforced_layers(32) == (1, *range(18, 32))
    assert reinforced_layers(1) == (0,)
    assert reinforced_layers(2) == (1,)


@pytest.mark.parametrize("name", ["scenes", "llava", "llava_onevision", "smolvlm", "mistral3"])
def test_generation_behind_a_prefix_is_generation(lens, batch, name):
    if name != "scenes":
        lens, batch = wrapped(name)
    found = steering.vision_heads(lens, batch)
    assert found.prefix is not None
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    for made in ((), found.edits(3.0)):
        whole = lens.generate(batch, made, reads=["resid_post.-1@last"], **options)
        behind = lens.generate(batch, made, prefix=found.prefix, reads=["resid_post.-1@last"], **options)
        assert torch.equal(whole.tokens, behind.tokens)
        depth = len(lens.anatomy.towers["text"].layers) - 1
        streams = [x.trace["resid_post.-1@last", depth] for x in (whole, behind)]
        assert torch.allclose(*streams, atol=1e-4)
    assert torch.equal(
        lens.generate(batch, prefix=found.prefix, **options).tokens, lens.generate(batch, **options).tokens
    )


def test_models_that_cannot_go_on_behind_a_prefix_say_so():
    lens, batch = wrapped("qwen2_vl")
    assert steering.vision_heads(lens, batch).prefix is None
    prefix = lens.run(batch, ["resid_post.0"], cache=True).cache
    with pytest.raises(UnsupportedError, match="generate without a prefix"):
        lens.generate(batch, prefix=prefix)


def test_shuffled_heads_keep_the_number_in_every_layer(lens, batch):
    found = steering.vision_heads(lens, batch)
    one, two = found.shuffled(lens, seed=0), found.shuffled(lens, seed=1)
    for other in (one, two):
        assert torch.equal(other.chosen.sum(2), found.chosen.sum(2))
    assert not torch.equal(one.chosen, two.chosen)
    assert torch.equal(one.chosen, found.shuffled(lens, seed=0).chosen)
    with pytest.raises(EditError, match="are of scenes"):
        found.shuffled(wrapped("llava")[0])


# All interventions


def intervention(name, lens, batch, strength=None):
    """Each one's edits, at a strength or its own."""
    rates = [0.1, 0.3, 0.2, 0.4, 0.2, 0.1]
    if name == "vhr":
        return steering.vision_reinforcement(lens, batch, scale=2.0 if strength is None else strength)
    if name == "iri":
        size = 0.26 if strength is None else strength
        return steering.representation_injection(lens, attn=rates, mlp=rates, attn_strength=size, mlp_strength=size)
    if name.startswith("var"):
        # This model has no sinks of its own: the threshold is lowered until some tokens are taken for them.
        form = name.partition("-")[2]
        options = {"dimensions": (76, 1), "tau": 2.2, "rho": 0.2, "form": form}
        return steering.attention_redistribution(lens, batch, p=0.3 if strength is None else strength, **options)
    ranking = heads.vision_divergence(lens, batch)
    return steering.edit_heads(ranking, -1.0 if strength is None else strength, k=4)


NOTHING = {"vhr": 1.0, "iri": 0.0, "var-pattern": 1.0, "var-bias": 1.0, "edit": 1.0}


@pytest.mark.parametrize("name", NOTHING)
def test_strength_zero_is_bit_identical_and_the_usual_one_is_not(lens, batch, name):
    plain = lens.run(batch, ["logits"]).logits
    assert torch.equal(lens.run(batch, ["logits"], intervention(name, lens, batch, NOTHING[name])).logits, plain)
    changed = lens.run(batch, ["logits"], intervention(name, lens, batch)).logits
    assert float((changed[:, -1] - plain[:, -1]).abs().max()) > 1e-2
    assert torch.equal(lens.run(batch, ["logits"]).logits, plain)  # and nothing is left behind


@pytest.mark.parametrize("name", ["vhr", "iri", "edit"])
def test_the_cache_gives_what_recomputing_gives(lens, batch, name):
    made = intervention(name, lens, batch)
    cached = lens.generate(batch, made, max_new_tokens=NEW, min_new_tokens=NEW)
    if name == "vhr":  # recomputed, the last position is another one each time
        made = [
            edits.Edit(Read("z", layers=edit.read.layers, positions="all"), _from(edit.change, batch), edit.name)
            for edit in edits.flatten([made])
        ]
    if name == "iri":
        made = [edits.Edit(Read(e.read.site, layers=e.read.layers), _injected(e.change, batch), e.name) for e in made]
    whole = lens.prepare(**_longer(batch, cached.tokens))
    logits = lens.run(whole, ["logits"], made).logits
    width = batch.mask.shape[1]
    forbidden = {lens.model.generation_config.eos_token_id, lens.processor.tokenizer.eos_token_id}
    logits[..., [i for i in forbidden if i is not None]] = -math.inf
    assert torch.equal(logits[:, width - 1 : width - 1 + NEW].argmax(-1), cached.tokens)


def _longer(batch, tokens):
    inputs = dict(batch.inputs)
    tokens = tokens[:, :-1]
    return inputs | {
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
    }


def _from(change, batch):
    """A change at the last position of the prompt and every later one."""

    def at(value, where):
        later = where.columns >= batch.mask.shape[1] - 1
        return torch.where(later[:, :, None, None], change(value, where), value)

    return at


def _injected(change, batch):
    def at(value, where):
        later = where.columns >= batch.mask.shape[1] - 1
        return torch.where(later[:, :, None], change(value, where), value)

    return at


@pytest.mark.parametrize("form", ["pattern", "bias"])
def test_redistribution_with_and_without_a_cache(lens, batch, form):
    """Sinks are those of the prompt; each new position redistributes as if it had been in the run from the start."""
    made = intervention(f"var-{form}", lens, batch)
    cached = lens.generate(batch, made, max_new_tokens=NEW, min_new_tokens=NEW)
    whole = lens.prepare(**_longer(batch, cached.tokens))
    width = batch.mask.shape[1]
    longer = intervention(f"var-{form}", lens, whole)
    state = {}
    # The sinks of the generated part are none: forget what the longer run takes for some.
    for edit in longer:
        if edit.read.site == "resid_pre":
            notice = edit.change.__self__
            state[id(notice)] = notice
    for notice in state.values():
        notice.mask = whole.mask & (torch.arange(whole.mask.shape[1]) < width)
    logits = lens.run(whole, ["logits"], longer).logits
    logits[..., lens.processor.tokenizer.eos_token_id] = -math.inf
    assert torch.equal(logits[:, width - 1 : width - 1 + NEW].argmax(-1), cached.tokens)


@pytest.mark.parametrize("name", NOTHING)
def test_batched_is_single(lens, batch, name):
    together = lens.run(batch, ["logits@last"], intervention(name, lens, batch)).logits
    for i in range(len(batch)):
        one = batch[i]
        made = intervention(name, lens, one)
        if name == "edit":  # a ranking is of a batch: the same heads for each
            made = intervention(name, lens, batch)
        assert torch.allclose(lens.run(one, ["logits@last"], made).logits, together[i : i + 1], atol=2e-4), i


@pytest.mark.parametrize("name", NOTHING)
def test_sampling_works(lens, batch, name):
    made = intervention(name, lens, batch)
    one, two = (lens.generate(batch, made, max_new_tokens=4, do_sample=True, seed=7).texts for _ in range(2))
    assert one == two


def test_a_sample_without_chosen_heads_is_untouched(lens, batch):
    found = steering.vision_heads(lens, batch)
    found.chosen[1] = False
    plain, mixed = lens.run(batch, ["logits"]).logits, lens.run(batch, ["logits"], found.edits(3.0)).logits
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])


# Beams and sampling


def anew(name, lens, batch, made):
    """Edits that do in a run over prompt and new tokens what `made` did on the way."""
    start = batch.mask.shape[1] - 1
    if name == "edit":
        return made
    if name == "iri":
        return [edits.Edit(Read(e.read.site, layers=e.read.layers), _injected(e.change, batch), e.name) for e in made]
    out = []
    for edit in made:
        if name == "norm" and edit.read.site == "attn_out":
            change = _later(edit.change, start, 2)
        else:
            change = _later(edit.change, start, 3)
        out.append(edits.Edit(Read(edit.read.site, layers=edit.read.layers), change, edit.name))
    return out


def _later(change, start, axes):
    def at(value, where):
        later = (where.columns >= start).reshape(*where.columns.shape, *([1] * (axes - 1)))
        return torch.where(later, change(value, where), value)

    return at


def beam_search(lens, batch, made, beams, new):
    """Plain beam search of `new` tokens without a cache; texts do not end."""
    size = len(batch)
    eos = lens.processor.tokenizer.eos_token_id
    ids = batch.inputs["input_ids"][:, None, :0].expand(size, beams, 0)
    score = torch.full((size, beams), -math.inf)
    score[:, 0] = 0.0
    for _ in range(new):
        rows = []
        for j in range(beams):
            tokens = torch.cat([ids[:, j], torch.zeros(size, 1, dtype=torch.long)], 1)
            logits = lens.run(lens.prepare(**_longer(batch, tokens)), ["logits@last"], made).logits[:, -1]
            rows.append(logits.log_softmax(-1))
        chance = torch.stack(rows, 1)
        chance[..., eos] = -math.inf
        score, best = (score[:, :, None] + chance).flatten(1).topk(beams, dim=1)
        origin, token = best // chance.shape[-1], best % chance.shape[-1]
        ids = torch.cat([ids.gather(1, origin[..., None].expand(-1, -1, ids.shape[-1])), token[..., None]], 2)
    return ids[:, 0]


@pytest.mark.parametrize("name", ["vhr", "iri", "edit", "norm"])
def test_beams_with_edits_are_a_plain_beam_search(lens, batch, name):
    """Each sample's heads go with its beams; what an edit keeps from site to site is kept for each beam."""
    if name == "norm":
        chosen = steering.vision_heads(lens, batch).chosen
        made = heads.norm_matched(lens, chosen, 6.0, positions="last")
    elif name == "vhr":
        made = intervention(name, lens, batch, 4.0)
    else:
        made = intervention(name, lens, batch, {"iri": 1.5}.get(name))
    options = {"num_beams": 3, "max_new_tokens": NEW, "min_new_tokens": NEW}
    found = lens.generate(batch, made, **options).tokens
    assert torch.equal(found, beam_search(lens, batch, anew(name, lens, batch, made), 3, NEW))
    assert not torch.equal(found, lens.generate(batch, **options).tokens)
    assert torch.equal(found, lens.generate(batch, made, **options).tokens)


@pytest.mark.parametrize("name", NOTHING)
def test_beams_batched_are_single(lens, batch, name):
    options = {"num_beams": 2, "max_new_tokens": NEW, "min_new_tokens": NEW}
    together = lens.generate(batch, intervention(name, lens, batch), **options).tokens
    for i in range(len(batch)):
        one = batch[i]
        made = intervention(name, lens, batch if name == "edit" else one)
        assert torch.equal(lens.generate(one, made, **options).tokens[0], together[i])
    nothing = intervention(name, lens, batch, NOTHING[name])
    assert torch.equal(lens.generate(batch, nothing, **options).tokens, lens.generate(batch, **options).tokens)


@pytest.mark.parametrize("name", ["vhr", "iri"])
def test_a_seed_s_sample_is_that_of_drawing_by_hand(lens, name):
    """One prompt, sampled with the cache and edits, and drawn token by token from whole runs with the same seed."""
    scene = scenes.scene("test", 1)
    batch = lens.prepare([evaluation.image_prompt(lens, scenes.CAPTION_PROMPT)], [scene.image])
    made = intervention(name, lens, batch, {"vhr": 3.0, "iri": 1.0}[name])
    options = {"do_sample": True, "temperature": 2.0, "top_k": lens.vocabulary, "max_new_tokens": NEW}
    found = lens.generate(batch, made, seed=5, **options).tokens
    whole, tokens = anew(name, lens, batch, made), batch.inputs["input_ids"][:, :0]
    torch.manual_seed(5)
    for _ in range(found.shape[1]):
        longer = lens.prepare(**_longer(batch, torch.cat([tokens, tokens.new_zeros(1, 1)], 1)))
        logits = lens.run(longer, ["logits@last"], whole).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial((logits / 2.0).softmax(-1), 1)], 1)
    assert torch.equal(found, tokens)
    assert not torch.equal(found, lens.generate(batch, made, seed=6, **options).tokens)


def test_what_beams_cannot_do_is_refused(lens, batch):
    with pytest.raises(SettingsError, match="reads follow one text"):
        lens.generate(batch, num_beams=2, reads=["resid_post.1"])
    prefix = lens.run(batch, ["resid_post.0"], cache=True).cache
    with pytest.raises(SettingsError, match="leave out prefix, or num_beams"):
        lens.generate(batch, num_beams=2, prefix=prefix)
    with pytest.raises(UnsupportedError, match="tower 'vision'"):
        lens.generate(batch, edits.scale_heads([(0, 0)], 0.0, tower="vision"), num_beams=2)
    for number in (0, 1.5, True):
        with pytest.raises(SettingsError, match="num_beams"):
            lens.generate(batch, num_beams=number)


# Size kept


def test_each_sample_s_own_heads_with_their_size_kept(lens, batch):
    """Against one sample at a time with its heads as pairs; a sample without heads is untouched."""
    chosen = steering.vision_heads(lens, batch).chosen.clone()
    chosen[1] = False
    made = heads.norm_matched(lens, chosen, 3.0)
    together = lens.run(batch, ["logits"], made).logits
    assert torch.equal(together[1], lens.run(batch, ["logits"]).logits[1])
    for i in (0, 2):
        pairs = [tuple(pair) for pair in chosen[i].nonzero().tolist()]
        alone = lens.run(batch, ["logits"], heads.norm_matched(lens, pairs, 3.0)).logits[i]
        assert torch.allclose(alone, together[i], atol=1e-5)
        assert not torch.allclose(alone, lens.run(batch, ["logits"]).logits[i], atol=1e-2)
    assert not torch.equal(chosen[0], chosen[2])
    assert heads.norm_matched(lens, chosen, 1.0) == []
    with pytest.raises(InputError, match=r"bools \[batch, 6, 8\]"):
        heads.norm_matched(lens, chosen[:, :3], 2.0)
    with pytest.raises(InputError, match="bools"):
        heads.norm_matched(lens, chosen.float(), 2.0)
    with pytest.raises(EditError, match="2 samples do not fit 3"):
        lens.run(batch, ["logits"], heads.norm_matched(lens, chosen[[0, 2]], 2.0))


# Injection


def test_injection_by_hand(lens, batch):
    rates = torch.tensor([0.5, 0.1, 0.4, 0.0, 0.3, 0.2])
    made = steering.representation_injection(lens, attn=rates, attn_strength=0.7, sources=2, targets=4)
    # The sources are layers 0 and 2, the targets 0, 2, 4 and 5; layer 0 has nothing below it.
    assert sorted(edit.read.layers[0] for edit in made) == [0, 2, 4, 5]
    before = {}
    for layer in (2, 4, 5):  # what each layer would have written, in the run that is injected below it
        below = [e for e in made if e.read.layers[0] < layer]
        before[layer] = lens.run(batch, [f"attn_out.{layer}@last"], below)[f"attn_out.{layer}@last", layer][:, 0]
    first = lens.run(batch, ["attn_out.0@last"])["attn_out.0@last", 0][:, 0]
    trace = lens.run(batch, ["attn_out.2,4,5@last"], made)
    for layer, sources in {2: {0: first}, 4: {0: first, 2: before[2]}, 5: {0: first, 2: before[2]}}.items():
        mixed = before[layer] + 0.7 * sum(rates[k] * source for k, source in sources.items())
        wanted = mixed * before[layer].norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
        found = trace["attn_out.2,4,5@last", layer][:, 0]
        assert torch.allclose(found, wanted, atol=1e-5), layer
        assert torch.allclose(found.norm(dim=-1), before[layer].norm(dim=-1), rtol=1e-6)


def test_only_the_last_position_is_injected(lens, batch):
    made = intervention("iri", lens, batch)
    plain, changed = (lens.run(batch, ["resid_post.5"], m)["resid_post", 5] for m in ((), made))
    assert torch.equal(plain[:, :-1][batch.mask[:, :-1]], changed[:, :-1][batch.mask[:, :-1]])
    assert not torch.equal(plain[:, -1], changed[:, -1])


# Redistribution


def test_planted_sinks_are_found(lens):
    stream = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    stream[:, 0, 17] = 60.0
    stream[1, 5, 17] = -80.0
    assert (sink_size(stream, [17]) > default_tau(64) * 2).nonzero().tolist() == [[0, 0], [1, 0], [1, 5]]
    by_hand = stream[1, 5].abs() / (stream[1, 5].square().mean() + 1e-6).sqrt()
    assert torch.allclose(relative_size(stream)[1, 5], by_hand, atol=1e-5)
    assert default_tau(4096) == 20


def test_dimensions_of_a_model_with_planted_first_tokens(lens, batch):
    """A token whose embedding has one huge number carries it up the stream."""
    model, first = build("llava"), 1
    embed = model.get_input_embeddings().weight
    with torch.no_grad():
        embed[first, 5] = 500.0
    planted = interp.wrap(model, processor("llava"), name="planted")
    ids = torch.tensor([[first, 70, 80, 90], [first, 75, 85, 95]])
    assert steering.sink_dimensions(planted, planted.prepare(input_ids=ids), tau=4.0) == (5,)
    assert steering.sink_dimensions(lens, batch) == ()  # and this model has none


def test_rows_sum_to_one_and_only_some_change(lens, batch):
    made = intervention("var-pattern", lens, batch)
    read = Read("pattern", layers=(2, 3, 4))
    plain, changed = lens.run(batch, read), lens.run(batch, read, made)
    image, width = batch.span("image"), batch.mask.shape[1]
    behind = torch.arange(width) > (image * torch.arange(width)).amax(1, keepdim=True)
    different = torch.zeros(len(batch), width, dtype=torch.bool)
    for layer in (2,):  # above it the stream differs as well
        old, new = plain[read, layer], changed[read, layer]
        assert torch.allclose(new.sum(-1), old.sum(-1), atol=1e-6)
        moved = (new != old).any(-1)
        assert bool(moved.any())
        assert not bool(moved.all(2).all())
        different |= moved.any(1)
    assert not bool((different & ~behind).any())


def test_redistribution_by_hand(lens, batch):
    """One head and query at a time, in plain loops."""
    dimensions, tau, rho, mass, p = (76, 1), 2.2, 0.2, 0.2, 0.3
    options = {"dimensions": dimensions, "tau": tau, "rho": rho, "mass": mass, "p": p}
    made = steering.attention_redistribution(lens, batch, layers=[2], **options)
    old, new = (lens.run(batch, ["pattern.2@last"], m)["pattern.2@last", 2][:, :, 0] for m in ((), made))
    stream = lens.run(batch, ["resid_pre.2"])["resid_pre", 2]
    image, count = batch.span("image"), 0
    for b in range(len(batch)):
        rms = (stream[b].square().mean(-1) + 1e-6).sqrt()
        sink = (stream[b][:, list(dimensions)].abs().amax(-1) / rms > tau) & batch.mask[b]
        for h in range(old.shape[1]):
            row = old[b, h].double()
            seen, free = float(row[image[b]].sum()), float(row[image[b] & ~sink].sum())
            wanted = row.clone()
            if bool((sink & image[b]).any()) and seen >= mass and free >= rho * seen:
                freed = (1 - p) * float(row[sink].sum())
                wanted[sink] = row[sink] * p
                wanted[image[b] & ~sink] = row[image[b] & ~sink] * (1 + freed / free)
                count += 1
            assert torch.allclose(new[b, h].double(), wanted, atol=1e-6)
    assert 0 < count < len(batch) * old.shape[1]


def test_bias_and_pattern_are_the_same(lens, batch):
    logits = [
        lens.run(batch, ["logits"], intervention(f"var-{form}", lens, batch)).logits[batch.mask]
        for form in ("pattern", "bias")
    ]
    assert torch.allclose(*logits, atol=1e-4)
    read = Read("pattern", layers=(2,))
    one, two = (
        lens.run(batch, read, intervention(f"var-{form}", lens, batch))[read, 2] for form in ("pattern", "bias")
    )
    assert torch.allclose(one, two, atol=1e-6)


# Head editing


def test_editing_heads_is_editing_the_weights(lens, batch):
    ranking = heads.vision_divergence(lens, batch)
    made = steering.edit_heads(ranking, 3.0, k=3)
    hooked = lens.run(batch, ["logits"], made).logits
    with heads.fold(lens, ranking.top(3), 3.0):
        folded = lens.run(batch, ["logits"]).logits
    assert torch.allclose(hooked, folded, atol=1e-4)
    by_pairs = steering.edit_heads([(3, 3)], 0.0)
    assert torch.equal(
        lens.run(batch, ["logits"], by_pairs).logits, lens.run(batch, ["logits"], edits.ablate(pairs=[(3, 3)])).logits
    )


def test_interventions_compose(lens, batch):
    """Each acts in the same run: together they differ from any of them."""
    made = [intervention(name, lens, batch) for name in ("vhr", "iri", "var-pattern")]
    alone = [lens.run(batch, ["logits@last"], m).logits for m in made]
    whole = lens.run(batch, ["logits@last"], made).logits
    assert all(float((whole - one).abs().max()) > 1e-3 for one in alone)
    assert len(lens.generate(batch, made, max_new_tokens=4).texts) == len(batch)


# Bad input


def test_bad_input(lens, batch):
    blind = interp.wrap(build("llama"), processor("llama"), name="llama")
    text = blind.prepare(["ab", "cd"])
    with pytest.raises(UnsupportedError, match="image"):
        steering.vision_reinforcement(blind, text)
    with pytest.raises(InputError, match="image"):
        steering.attention_redistribution(blind, text)
    with pytest.raises(UnknownNameError, match="layer 9"):
        steering.vision_reinforcement(lens, batch, layers=[9])
    with pytest.raises(SettingsError, match="no layer"):
        steering.vision_reinforcement(lens, batch, layers=[])
    with pytest.raises(EditError, match="finite"):
        steering.vision_reinforcement(lens, batch, scale=math.inf)
    with pytest.raises(SettingsError, match="form is absolute"):
        steering.vision_reinforcement(lens, batch, form="projected")
    with pytest.raises(UnknownNameError, match="form"):
        steering.vision_reinforcement(lens, batch, form="best")
    right = lens.prepare(
        [evaluation.image_prompt(lens, t) for t in ("a", "what color is the background ?")],
        [scenes.scene("test", i).image for i in range(2)],
        padding_side="right",
    )
    for function in (steering.vision_reinforcement, steering.attention_redistribution):
        with pytest.raises(InputError, match="padding_side='left'"):
            function(lens, right)
    with pytest.raises(InputError, match="rates of attention"):
        steering.representation_injection(lens)
    for rates in ([0.1] * 5, [0.1] * 5 + [math.nan]):
        with pytest.raises(InputError, match="one finite rate for each of the 6 layers"):
            steering.representation_injection(lens, attn=rates)
    with pytest.raises(EditError, match="strength of mlp must be finite"):
        steering.representation_injection(lens, mlp=[0.1] * 6, mlp_strength=math.nan)
    with pytest.raises(SettingsError, match="at least 1"):
        steering.representation_injection(lens, attn=[0.1] * 6, sources=0)
    for option in ({"rho": 1.5}, {"mass": -0.1}, {"p": 2.0}, {"p": 0.0, "form": "bias"}, {"tau": 0.0}):
        with pytest.raises(SettingsError):
            steering.attention_redistribution(lens, batch, **option)
    with pytest.raises(UnknownNameError, match="dimension"):
        steering.attention_redistribution(lens, batch, dimensions=(160,))
    with pytest.raises(UnknownNameError, match="form"):
        steering.attention_redistribution(lens, batch, form="mask")
    with pytest.raises(EditError, match="finite"):
        steering.edit_heads([(0, 0)], math.nan)
    with pytest.raises(EditError):
        steering.edit_heads([], -1.0)
    ranking = heads.vision_divergence(lens, batch)
    with pytest.raises(SettingsError, match="the ranking has 48 heads"):
        steering.edit_heads(ranking, k=49)


def test_an_injection_needs_the_whole_run(lens, batch):
    made = steering.representation_injection(lens, attn=[0.5, 0, 0, 0.2, 0, 0], sources=1, targets=2)
    stream = lens.run(batch, ["resid_pre.2"])["resid_pre", 2]
    trace = lens.run(batch, ["resid_pre.2"], cache=True)
    with pytest.raises(EditError, match="needs what the layers below it wrote"):
        lens.run(
            batch,
            ["logits@last"],
            [e for e in made if e.read.layers[0] > 0],
            entry=interp.Entry(2, stream, prefix=trace.cache),
        )
