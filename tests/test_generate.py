"""Generation with edits and reads: against a naive loop of full runs without a cache."""

import pytest
import torch

import interp
from interp import edits
from interp.testing import hooks_of
from tests.zoo import build, inputs, processor

NAMES = ["llama", "gpt2", "gemma2", "gpt_oss", "qwen3_next", "falcon_h1", "mistral"]


def grown(lens, batch, new):
    ids = torch.cat([batch.inputs["input_ids"], new], 1)
    mask = torch.cat([batch.mask, torch.ones_like(new, dtype=torch.bool)], 1)
    return lens.prepare(input_ids=ids, attention_mask=mask.long())


def naive(lens, batch, change, steps):
    """Greedy decoding by a full run for every token."""
    new = torch.zeros(len(batch), 0, dtype=torch.long)
    for _ in range(steps):
        logits = lens.run(grown(lens, batch, new), ["logits@last"], change).logits[:, -1]
        new = torch.cat([new, logits.argmax(-1, keepdim=True)], 1)
    return new


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    lens = interp.wrap(build(request.param), processor(request.param))
    for name in ("eos_token_id", "pad_token_id"):
        setattr(lens.model.generation_config, name, None if name == "eos_token_id" else 0)
    return lens, lens.prepare(["The cat sat on", "A dog"], padding_side="left")


def test_plain_generation_is_the_models_own(case):
    lens, batch = case
    wanted = lens.model.generate(**batch.inputs, max_new_tokens=6, do_sample=False)
    found = lens.generate(batch, max_new_tokens=6)
    assert torch.equal(found.sequences, wanted)
    assert found.tokens.shape == (2, 6)
    assert found.texts is not None


@pytest.mark.parametrize("change", ["none", "ablate", "steer"])
def test_edits_hold_in_every_step(case, change):
    lens, batch = case
    width = lens.anatomy.towers["text"].d_model
    able = [x.index for x in lens.anatomy.towers["text"].layers if "attn" in x.attention]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    made = {
        "none": [],
        "ablate": edits.ablate(layers=able[-1], heads=[0, 1]),
        "steer": edits.steer(vector, layers=1, scale=3.0),
    }[change]
    plain = lens.generate(batch, max_new_tokens=5).tokens
    found = lens.generate(batch, made, max_new_tokens=5).tokens
    assert torch.equal(found, naive(lens, batch, made, 5))
    assert change != "steer" or not torch.equal(found, plain)
    assert hooks_of(lens.model) == 0


def test_reads_of_all_steps_are_those_of_the_finished_sequence(case):
    lens, batch = case
    able = [x.index for x in lens.anatomy.towers["text"].layers if "attn" in x.attention][-1]
    found = lens.generate(
        batch,
        reads=["resid_post.1", f"pattern.{able}", "resid_post.1@generated", "resid_post.1@last"],
        max_new_tokens=5,
    )
    whole = lens.run(grown(lens, batch, found.tokens[:, :-1]), ["resid_post.1", f"pattern.{able}"])
    real = grown(lens, batch, found.tokens[:, :-1]).mask
    stream = found.trace.values[interp.Read.of("resid_post.1"), 1]
    torch.testing.assert_close(stream[real], whole["resid_post", 1][real], atol=2e-4, rtol=1e-3)
    pattern = found.trace["pattern", able]
    assert pattern.shape == whole["pattern", able].shape
    keep = real[:, None, :, None] & real[:, None, None, :]
    torch.testing.assert_close(pattern * keep, whole["pattern", able] * keep, atol=1e-4, rtol=1e-3)
    made = found.trace.values[interp.Read.of("resid_post.1@generated"), 1]
    assert made.shape[1] == 4
    torch.testing.assert_close(made, whole["resid_post", 1][:, -4:], atol=2e-4, rtol=1e-3)
    assert found.trace.values[interp.Read.of("resid_post.1@last"), 1].shape[1] == 5


def test_knockout_of_prompt_keys_in_generated_steps():
    lens = interp.wrap(build("llama"), processor("llama"))
    lens.model.generation_config.eos_token_id = None
    batch = lens.prepare(["The cat sat on", "A dog"], padding_side="left")
    change = edits.mask_attention(layers=1, keys=0, queries="generated")
    trace = lens.generate(batch, change, reads=["pattern.1"], max_new_tokens=4).trace
    pattern, prompt = trace["pattern", 1], batch.mask.shape[1]
    first = batch.mask.int().argmax(1)
    for b in range(2):
        assert pattern[b, :, prompt:, first[b]].abs().sum() == 0
        assert (pattern[b, :, prompt - 1, first[b]] > 0).all()
    torch.testing.assert_close(pattern[:, :, prompt:].sum(-1), torch.ones(2, 4, 3))


def test_prompt_positions_are_edited_once():
    lens = interp.wrap(build("llama"), processor("llama"))
    lens.model.generation_config.eos_token_id = None
    batch = lens.prepare(["The cat sat on", "A dog"], padding_side="left")
    calls = []

    def count(x):
        calls.append(tuple(x.shape))
        return x

    lens.generate(batch, edits.splice(count, site="resid_post", layers=0, positions=0), max_new_tokens=4)
    assert calls == [(2, 1, 32)] or len(calls) == 1
    calls.clear()
    lens.generate(batch, edits.splice(count, site="resid_post", layers=0, positions="last"), max_new_tokens=4)
    assert len(calls) == 4


def test_sampling_is_repeatable_and_leaves_the_global_state():
    lens = interp.wrap(build("llama"), processor("llama"))
    batch = lens.prepare(["The cat"])
    before = torch.get_rng_state()
    one = lens.generate(batch, do_sample=True, seed=3, max_new_tokens=8).tokens
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(lens.generate(batch, do_sample=True, seed=3, max_new_tokens=8).tokens, one)
    assert any(
        not torch.equal(lens.generate(batch, do_sample=True, seed=s, max_new_tokens=8).tokens, one) for s in (4, 5, 6)
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "mllama", "gemma3_vl"])
def test_image_models_generate_with_edits(name):
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    lens.model.generation_config.eos_token_id = None
    batch = lens.prepare(**given)
    plain = lens.generate(batch, max_new_tokens=3, reads=["vision:resid_post.0"])
    assert plain.trace["vision:resid_post", 0].abs().sum() > 0
    edited = lens.generate(batch, edits.ablate(site="attn_out", tower="vision"), max_new_tokens=3)
    assert edited.tokens.shape == plain.tokens.shape
    assert torch.equal(lens.generate(batch, max_new_tokens=3).sequences, plain.sequences)


@pytest.mark.parametrize("name", ["bart", "whisper", "t5"])
def test_encoder_decoders_generate(name):
    lens = interp.wrap(build(name))
    batch = lens.prepare(**inputs(name))
    change = edits.ablate(tower="cross", layers=0)
    found = lens.generate(batch, change, max_new_tokens=3, reads=["encoder:resid_post.0", "cross:z.0"])
    assert found.trace["encoder:resid_post", 0].shape[0] == 2
    assert found.trace["cross:z", 0].abs().sum() == 0
