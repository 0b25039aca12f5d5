"""The packaged pretrained models: they load, prove their anatomy, and show what is known of them."""

import importlib.util

import numpy as np
import pytest
import torch

import interp
from interp import edits, heads, testing
from interp.data.prompts import repeated_tokens
from tests.conftest import packaged
from tests.models_tracr_truth import TRUTH
from tests.test_models import residuals

pytestmark = pytest.mark.slow


def proven(lens, *names):
    for name in names:
        proof = lens.anatomy.towers[name].proof
        assert {"residual", "heads", "pattern", "middle"} <= set(proof)
        assert max(proof.values()) < 1e-4, proof


def test_smollm2_answers_the_ioi_prompt(smollm):
    proven(smollm, "text")
    batch = smollm.prepare(["When Mary and John went to the store, John gave a drink to", "The capital of France is"])
    probability = smollm.run(batch, ["logits@last"]).logits[:, -1].softmax(-1)
    tokens = [smollm.processor.decode([i]) for i in probability.argmax(-1).tolist()]
    assert tokens == [" Mary", " Paris"]
    assert probability.max(-1).values[0] > 0.85


def test_smollm2_has_induction_heads(smollm):
    ids = repeated_tokens(4, 32, vocab_size=40000, seed=0)
    batch = smollm.prepare(input_ids=ids)
    scores = heads.patterns(smollm, batch)
    assert float(scores.scores.max()) > 0.5
    layer, head = divmod(int(scores.scores.argmax()), scores.scores.shape[1])
    # The published formula on the same run: attention to the token after the earlier copy.
    pattern = smollm.run(batch, [f"pattern.{layer}/{head}"])["pattern", layer][:, 0]
    published = pattern.diagonal(1 - 32, dim1=-2, dim2=-1)[:, 1:].mean()
    assert abs(float(published) - float(scores.scores.max())) < 0.02
    loss = heads.common.next_token_loss(batch)(smollm.run(batch, ["logits"]).logits)
    without = smollm.run(batch, ["logits"], edits.ablate(pairs=[(layer, head)])).logits
    assert heads.common.next_token_loss(batch)(without).mean() > loss.mean()


def test_smollm2_keeps_the_contract(smollm):
    batch = smollm.prepare(["The quick brown fox jumps over the lazy dog.", "Paris is the capital of France, and"])
    unpadded = smollm.prepare(input_ids=batch.inputs["input_ids"][:, -6:])
    only = ("unchanged", "proof", "rows", "no_op", "stop", "entry", "removed")
    assert all(not isinstance(v, str) for v in testing.contract(smollm, unpadded, only=only).values())
    testing.check_batched(smollm, batch)


def test_minilm(tmp_path):
    lens = packaged("minilm-l6")
    proven(lens, "text")
    batch = lens.prepare(["A cat sits on the mat.", "A kitten is sitting on a rug.", "Wall Street fell sharply today."])
    pooled = lens.run(batch, ["resid_post.5|mean"])["resid_post|mean", 5]
    similar = torch.nn.functional.cosine_similarity(pooled[0], pooled[1:])
    assert similar[0] > 0.5 > 0.25 > similar[1]
    testing.check_batched(lens, batch)


def test_dino(tmp_path):
    from PIL import Image

    lens = packaged("dinov2-s")
    proven(lens, "vision")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8))
    batch = lens.prepare(images=[picture])
    trace = lens.run(batch, ["resid_post.11", "pattern.11@0"])
    assert trace["resid_post", 11].shape == (1, 1 + 16 * 16, 384)
    assert trace["pattern", 11].shape == (1, 6, 1, 257)
    with torch.no_grad():
        wanted = lens.model(**batch.inputs).last_hidden_state
    found = lens.model.layernorm(trace["resid_post", 11])
    assert torch.equal(found, wanted)


def test_whisper():
    lens = packaged("whisper-tiny-en")
    proven(lens, "encoder", "decoder")
    sound = torch.zeros(1, 80, 3000)
    batch = lens.prepare(input_features=sound, decoder_input_ids=torch.tensor([[50257, 50362, 314]]))
    trace = lens.run(batch, ["encoder:resid_post.3", "cross:pattern.3@last", "logits@last"])
    assert trace["encoder:resid_post", 3].shape == (1, 1500, 384)
    assert trace["cross:pattern", 3].shape == (1, 6, 1, 1500)
    torch.testing.assert_close(trace["cross:pattern", 3].sum(-1), torch.ones(1, 6, 1))
    assert trace.logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_tracr_streams_are_the_compiled_truth(name):
    """The residual stream after every sublayer, read with interp, against what the compiler itself gave."""
    lens = interp.load(name)
    proven(lens, "text")
    batch = lens.prepare(TRUTH[name]["text"])
    trace = lens.run(batch, ["resid_pre", "resid_mid", "resid_post", "logits"])
    layers = range(len(lens.anatomy.towers["text"].layers))
    found = [trace["resid_pre", 0], *(trace[site, i] for i in layers for site in ("resid_mid", "resid_post"))]
    expected = list(residuals(TRUTH[name], lens.model.config.residual_labels))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[0].numpy(), theirs, atol=1e-5, rtol=0)
    answer = lens.processor.decode(trace.logits[0].argmax(-1)[1:])
    assert answer.split() == TRUTH[name]["answer"].split()


def test_tracr_reverse_needs_its_last_head():
    """A known circuit: without the head that moves tokens, the program's answer is lost."""
    lens = interp.load("tracr-reverse")
    batch = lens.prepare(TRUTH["tracr-reverse"]["text"])
    plain = lens.run(batch, ["logits"]).logits[0].argmax(-1)[1:]
    last = len(lens.anatomy.towers["text"].layers) - 1
    broken = lens.run(batch, ["logits"], edits.ablate(pairs=[(last, 0)])).logits[0].argmax(-1)[1:]
    assert not torch.equal(plain, broken)


def test_optional_packages_are_installed_for_the_tests():
    assert importlib.util.find_spec("transformer_lens")
    assert importlib.util.find_spec("nnsight")
    assert importlib.util.find_spec("sae_lens")
