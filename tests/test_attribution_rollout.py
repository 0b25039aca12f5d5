"""Raw attention and rollout: by hand, against transformers, invariants, memory, every kind of model."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from experiments.benchmarks.rounds import peak_bytes
from interp.attribution import common as shared
from interp.attribution import raw_attention, rollout
from interp.attribution.rollout import rolled, start_rows
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.inputs import placeholder
from tests.conftest import packaged
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
LOW = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]])
HIGH = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.4, 0.6, 0.0]]])


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


def own_rows(scores, sample, target=-1):
    """A target's scores over a sample's own tokens."""
    return scores._one(sample, target).scores[0, 0]


def full_rollout(lens, batch, tower=None, weight=0.5, fuse="mean"):
    """The published product of whole matrices."""
    trace = lens.run(batch, interp.Read("pattern", tower=tower))
    product = None
    for pattern in trace.values.values():
        fused = {"mean": pattern.mean(1), "max": pattern.amax(1), "min": pattern.amin(1)}[fuse].double()
        mixed = (1 - weight) * fused + weight * torch.eye(fused.shape[-1])
        mixed = mixed / mixed.sum(-1, keepdim=True)
        product = mixed if product is None else mixed @ product
    return product


def test_rollout_by_hand(monkeypatch, llama):
    """Two layers, three tokens: the last row of ((HIGH + I) / 2) ((LOW + I) / 2)."""

    def patterns(*_, **__):
        yield from [(1, HIGH), (0, LOW)]

    monkeypatch.setattr(sys.modules["interp.attribution.rollout"], "fused_patterns", patterns)
    batch = llama.prepare(input_ids=[[70, 71, 72]])
    # Top row [.2, .3, .5]; lower rows [1, 0, 0], [.25, .75, 0], [.1, .15, .75].
    wanted = [0.2 + 0.3 * 0.25 + 0.5 * 0.1, 0.3 * 0.75 + 0.5 * 0.15, 0.5 * 0.75]
    assert rollout(llama, batch).scores[0, 0].tolist() == pytest.approx(wanted)
    # Joint attention: [.4, .6, 0] LOW.
    for nothing in (None, 0, 0.0):
        assert rollout(llama, batch, residual=nothing).scores[0, 0].tolist() == pytest.approx([0.7, 0.3, 0.0])
    everyone = rollout(llama, batch, target="all").scores[0]
    assert everyone[1].tolist() == pytest.approx([0.45 + 0.55 * 0.25, 0.55 * 0.75, 0])
    assert everyone[0].tolist() == [1, 0, 0]


def test_rows_are_divided_by_the_sum_that_they_have():
    """Rows that do not sum to one: (W + I) / (s + 1), not W / 2s + I / 2."""
    rows = start_rows(torch.tensor([[1]]), torch.ones(1, 2))
    pattern = torch.tensor([[[0.5, 0.0], [1.0, 2.0]]])
    assert rolled(rows, pattern, 0.5)[0, 0].tolist() == pytest.approx([1 / 4, 3 / 4])
    assert rolled(rows, pattern, 0.0)[0, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert rolled(rows, torch.zeros(1, 2, 2), 0.0)[0, 0].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "modernbert"])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_is_the_product_of_matrices(name, fusion):
    """The rows from the top equal the whole product, with all layers in one run and with one layer in each."""
    lens = interp.wrap(build(name), processor(name), name=name)
    batch = lens.prepare(input_ids=[IDS[0], IDS[0][::-1]])
    for weight in (0.5, 0.2, None):
        wanted = full_rollout(lens, batch, weight=weight or 0.0, fuse=fusion)
        for memory in (2**22, 1):
            found = rollout(lens, batch, target="all", residual=weight, fusion=fusion, memory=memory)
            torch.testing.assert_close(found.scores.double(), wanted, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(found.scores.sum(-1), torch.ones(2, 6))


def test_the_future_has_exactly_zero(llama):
    batch = llama.prepare(input_ids=[IDS[0]])
    for method in (rollout, raw_attention):
        scores = method(llama, batch, target="all").scores[0]
        assert (scores.triu(1) == 0).all()
        assert (scores.tril().diagonal() > 0).all()


def test_layers_up_to_one_and_lists(llama):
    batch = llama.prepare(input_ids=[IDS[0]])
    some = rollout(llama, batch, layers=1)
    assert some.settings["layers"] == [0, 1]
    assert rollout(llama, batch, layers=[1, 0]).scores.equal(some.scores)
    assert rollout(llama, batch, layers=-2).scores.equal(some.scores)
    single = rollout(llama, batch, layers=[2], residual=None)
    torch.testing.assert_close(single.scores, raw_attention(llama, batch, layer=2).scores)
    for layers, error in (([], SettingsError), ([1, -2], SettingsError), (7, UnknownNameError)):
        with pytest.raises(error):
            rollout(llama, batch, layers=layers)


@pytest.mark.parametrize("method", [rollout, raw_attention])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single_and_padding_changes_nothing(llama, method, side):
    together = method(llama, llama.prepare(input_ids=IDS, padding_side=side), target=[-1, 0, 2])
    for i, row in enumerate(IDS):
        alone = method(llama, llama.prepare(input_ids=[row]), target=[-1, 0, 2])
        torch.testing.assert_close(together.select(i).scores, alone.scores, atol=1e-6, rtol=1e-5)
        mine, theirs = together.select(i).frame(), alone.frame()
        assert mine.drop(columns="score").equals(theirs.drop(columns="score"))


def test_targets_are_positions_as_in_reads(llama):
    batch = llama.prepare(["one two three", "a b"], padding_side="right")
    everyone = rollout(llama, batch, target="all")
    assert everyone.targets[1].tolist() == [0, 1, 2, *[-1] * 10]
    assert everyone.scores[1, 3:].isnan().all()
    last = rollout(llama, batch, target="last")
    assert last.targets.tolist() == [[12], [2]]
    torch.testing.assert_close(own_rows(last, 1), everyone.scores[1, 2, :3])
    at = rollout(llama, batch, target=slice(1, 3))
    assert at.targets.tolist() == [[1, 2], [1, 2]]
    alone = llama.prepare(["one two three"])
    word = rollout(llama, alone, target=alone.find("two"))
    assert word.target_tokens == [["t", "w", "o"]]
    uneven = torch.tensor([[True] * 3 + [False] * 10, [True] + [False] * 12])
    some = raw_attention(llama, batch, target=uneven)
    assert some.targets.tolist() == [[0, 1, 2], [0, -1, -1]]
    assert some.target_tokens[1] == ["a", "", ""]
    torch.testing.assert_close(rollout(llama, batch, target=uneven).scores[0, 2], everyone.scores[0, 2])


def test_raw_attention_is_transformers_eager_attention(llama):
    ids = torch.tensor([IDS[0]])
    eager = build("llama", attn_implementation="eager")(ids, output_attentions=True).attentions
    for layer in (0, -1):
        for fusion in ("mean", "max", "min"):
            found = raw_attention(llama, llama.prepare(input_ids=ids), layer=layer, target="all", fusion=fusion)
            wanted = {"mean": eager[layer].mean(1), "max": eager[layer].amax(1), "min": eager[layer].amin(1)}[fusion]
            torch.testing.assert_close(found.scores, wanted.detach(), atol=1e-6, rtol=1e-5)
    some = raw_attention(llama, llama.prepare(input_ids=ids), layer=1, heads=[0, 3])
    torch.testing.assert_close(some.scores[0, 0], eager[1][0, [0, 3], -1].mean(0).detach(), atol=1e-6, rtol=1e-5)
    one = raw_attention(llama, llama.prepare(input_ids=ids), layer=1, heads=2)
    torch.testing.assert_close(one.scores[0, 0], eager[1][0, 2, -1].detach(), atol=1e-6, rtol=1e-5)
    assert one.settings["heads"] == [2]


def test_fused_reads_equal_plain_ones(llama):
    """A read that is reduced over heads a few rows at a time, in every way to choose positions and heads."""
    batch = llama.prepare(input_ids=IDS)
    plain = llama.run(batch, ["pattern"])
    for heads in (None, (1, 2)):
        chosen = slice(None) if heads is None else list(heads)
        for reduce, take in (("head_mean", torch.mean), ("head_max", torch.amax), ("head_min", torch.amin)):
            wanted = take(plain["pattern", 1][:, chosen], 1)
            read = interp.Read("pattern", layers=1, heads=heads, reduce=reduce)
            torch.testing.assert_close(llama.run(batch, read).values[read, 1], wanted)
            read = read.but(positions="last")
            columns = batch.select("last").index[:, 0]
            rows = llama.run(batch, read).values[read, 1][:, 0]
            torch.testing.assert_close(rows, wanted[torch.arange(3), columns])
    uneven = interp.Read("pattern", layers=1, positions=slice(3, None), reduce="head_mean")
    trace = llama.run(batch, uneven)
    assert trace.valid[uneven].sum(1).tolist() == [3, 1, 2]
    assert (trace.values[uneven, 1][1, 1:] == 0).all()
    streams = interp.Read("z", layers=0, reduce="head_max")
    assert llama.run(batch, streams).values[streams, 0].equal(llama.run(batch, ["z.0"])["z", 0].amax(2))
    assert interp.Read.of("pattern.1@last|head_mean").over_heads
    with pytest.raises(SettingsError, match="no head axis"):
        interp.Read("resid_post", reduce="head_mean")


def test_memory_stays_below_two_matrices():
    """A thousand tokens and thirty layers: beside kept streams and a plain run, no two matrices of T x T at once."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**small, num_hidden_layers=30, vocab_size=100, max_position_embeddings=1024)
    lens = interp.wrap(LlamaForCausalLM(config).eval(), name="deep")
    batch = lens.prepare(input_ids=torch.randint(5, 100, (1, 1000)))
    matrix, streams = 4 * 1000**2, 30 * 4 * 1000 * 32
    plain = peak_bytes(lambda: lens.run(batch, "resid_post.29"))
    peak = peak_bytes(lambda: rollout(lens, batch))
    assert peak - streams - plain < 2 * matrix
    assert peak - streams - plain > 0.9 * matrix  # the measure sees the one matrix that there is
    whole = peak_bytes(lambda: rollout(lens, batch, memory=2**40))
    assert whole > 30 * matrix


def test_towers_that_cannot_be_entered_are_run_from_the_input():
    lens = interp.wrap(build("t5"), processor("t5"), sample=inputs("t5"), name="t5")
    batch = lens.prepare(**inputs("t5"))
    assert not shared.entries_of(lens, batch, [0, 1], "encoder")
    for tower in ("encoder", "decoder"):
        torch.testing.assert_close(
            rollout(lens, batch, target="all", tower=tower, memory=1).scores.double(), full_rollout(lens, batch, tower)
        )


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoders_have_three_kinds_of_attention(name):
    given = inputs(name)
    lens = interp.wrap(build(name), processor(name), sample=given, name=name)
    batch = lens.prepare(**given)
    encoder, decoder = rollout(lens, batch, tower="encoder"), rollout(lens, batch, tower="decoder", target="all")
    assert encoder.scores.shape[-1] == given["input_ids"].shape[1]
    assert (decoder.scores.triu(1) == 0).all()
    cross = raw_attention(lens, batch, tower="cross", target="all")
    assert (cross.target_tower, cross.tower) == ("decoder", "encoder")
    assert cross.scores.shape[1:] == (decoder.scores.shape[1], encoder.scores.shape[2])
    layer = len(lens.anatomy.towers["decoder"].layers) - 1
    trace = lens.run(batch, ["cross:pattern"])
    torch.testing.assert_close(cross.scores, trace["cross:pattern", layer].mean(1))
    with pytest.raises(UnsupportedError, match="not defined for cross-attention"):
        rollout(lens, batch, tower="cross")


def test_encoder_padding_changes_nothing():
    lens = interp.wrap(build("bart"), processor("bart"), name="bart")
    texts = ["one two three four", "five six"]
    batch = lens.prepare(texts, targets=["a b", "a b"])
    together = rollout(lens, batch, tower="encoder")
    assert together.source_mask.sum(1).tolist() == batch.source_mask.sum(1).tolist()
    for i, text in enumerate(texts):
        alone = rollout(lens, lens.prepare([text], targets=["a b"]), tower="encoder")
        torch.testing.assert_close(together.select(i).scores, alone.scores, atol=1e-6, rtol=1e-5)
        assert together.select(i).tokens == alone.tokens


def test_image_tokens_are_sources_with_their_pixels():
    lens = interp.wrap(build("llava"), processor("llava"), name="llava")
    token = placeholder(lens.processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    batch = lens.prepare([f"{token} What is it?", f"Look closer: {token} a cat."], images=[[picture], [picture]])
    scores = rollout(lens, batch)
    torch.testing.assert_close(scores.scores.nansum(-1), torch.ones(2, 1))
    frame = scores.frame()
    counts = frame[frame["kind"] == "image"].groupby("prompt").size()
    assert counts.tolist() == batch.image_mask.sum(1).tolist()
    grid = scores.image_map(1)
    assert grid.shape == (40, 48)
    assert set(grid[grid.isfinite()].tolist()) <= set(scores.scores[1, 0, batch.image_mask[1]].tolist())
    assert len(scores.plot(1, picture=picture).layout.images) == 1
    slow = rollout(lens, batch, memory=1)
    torch.testing.assert_close(slow.scores, scores.scores, equal_nan=True)
    to_image = raw_attention(lens, batch, target="image")
    assert (to_image.targets >= 0).sum(1).tolist() == batch.image_mask.sum(1).tolist()
    tower = rollout(lens, batch, tower="vision", target=0)
    assert tower.scores.shape[0] == 2
    assert tower.image_map().shape == batch.inputs["pixel_values"].shape[-2:]
    assert len(tower.plot(picture=batch.inputs["pixel_values"][0]).layout.images) == 1
    torch.testing.assert_close(
        rollout(lens, batch, tower="vision", target="all").scores.double(), full_rollout(lens, batch, "vision")
    )


def test_clear_errors(llama):
    batch = llama.prepare(["one two"])
    with pytest.raises(UnknownNameError, match=r"position 'middle' does not exist.*last"):
        rollout(llama, batch, target="middle")
    with pytest.raises(InputError, match="'three' 0 times"):
        rollout(llama, batch, target=batch.find("three"))
    with pytest.raises(InputError, match="position 30 does not exist in sample 0, which has 7 tokens"):
        raw_attention(llama, batch, target=30)
    with pytest.raises(InputError, match=r"lens\.generate only"):
        rollout(llama, batch, target="generated")
    with pytest.raises(InputError, match="no image tokens"):
        rollout(llama, batch, target="image")
    with pytest.raises(UnknownNameError, match=r"'median' does not exist.*mean"):
        rollout(llama, batch, fusion="median")
    with pytest.raises(UnknownNameError, match="layer"):
        raw_attention(llama, batch, layer=99)
    with pytest.raises(UnknownNameError, match="head"):
        raw_attention(llama, batch, heads=99)
    with pytest.raises(UnknownNameError, match=r"tower 'visoin'.*text"):
        rollout(llama, batch, tower="visoin")
    for residual in (1.0, -0.1, float("nan")):
        with pytest.raises(SettingsError, match="weight from 0 to below 1"):
            rollout(llama, batch, residual=residual)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        rollout(llama, llama.prepare([""]))
    with pytest.raises(TypeError):
        rollout(llama, batch, layer=3)


def test_layers_that_mix_positions_otherwise_are_refused():
    for name, message in [("falcon_h1", "recurrent mixer"), ("jamba", "refused"), ("mamba", "refused")]:
        lens = interp.wrap(build(name), processor(name), name=name)
        with pytest.raises(UnsupportedError, match=message):
            rollout(lens, lens.prepare(input_ids=[IDS[0]]))
    swin = interp.wrap(build("swin"), sample=inputs("swin"), name="swin")
    with pytest.raises(UnsupportedError, match="windows"):
        rollout(swin, swin.prepare(**inputs("swin")), target=0)


def test_saved_rollouts_come_back(llama, tmp_path):
    scores = rollout(llama, llama.prepare(["one two", "three"]), target="all")
    scores.save(tmp_path / "r")
    assert interp.scores.load(tmp_path / "r").equals(scores)


@pytest.mark.slow
def test_smollm2(smollm):
    texts = ["The cat sat on the mat because it was", "Paris"]
    together = rollout(smollm, smollm.prepare(texts))
    for i, text in enumerate(texts):
        alone = rollout(smollm, smollm.prepare([text]))
        torch.testing.assert_close(together.select(i).scores, alone.scores, atol=1e-5, rtol=1e-3)
    assert together.tokens[0][1] == " cat"
    # The specification's warning: attention rests on the first token, and rollout ends there.
    assert together.scores[0, 0, 0] > 0.95
    assert together.settings["entropy"] < 0.2
    assert raw_attention(smollm, smollm.prepare(texts), layer=0).top(1)["token"].tolist() != ["The"]


@pytest.mark.slow
def test_minilm():
    lens = packaged("minilm-l6")
    scores = rollout(lens, lens.prepare(["A cat sits on the mat.", "Stocks fell."]), target=0)
    torch.testing.assert_close(scores.scores.nansum(-1), torch.ones(2, 1), atol=1e-5, rtol=0)
    assert scores.frame()["kind"].tolist().count("special") == 4
    assert scores.target_tokens == [["[CLS]"], ["[CLS]"]]


@pytest.mark.slow
def test_dino():
    lens = packaged("dinov2-s")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8))
    batch = lens.prepare(images=[picture])
    scores = rollout(lens, batch, target=0)
    assert scores.target_tokens == [["[class]"]]
    grid = scores.image_map()
    assert grid.shape == (224, 224)
    assert grid.isfinite().all()
    assert grid[0, 0] == scores.scores[0, 0, 1]
    assert grid[-1, -1] == scores.scores[0, 0, -1]
    assert len(scores.plot(picture=batch.inputs["pixel_values"][0]).layout.images) == 1


@pytest.mark.slow
def test_whisper():
    lens = packaged("whisper-tiny-en")
    sound = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    batch = lens.prepare(input_features=sound, decoder_input_ids=torch.tensor([[50257, 50362, 314]]))
    encoder = rollout(lens, batch, tower="encoder", target=[0, -1])
    assert encoder.scores.shape == (1, 2, 1500)
    torch.testing.assert_close(encoder.scores.sum(-1), torch.ones(1, 2), atol=1e-4, rtol=0)
    decoder = rollout(lens, batch)
    assert decoder.scores.shape == (1, 1, 3)
    cross = raw_attention(lens, batch, tower="cross", target="all")
    assert cross.scores.shape == (1, 3, 1500)
    assert cross.target_tokens[0][-1] == " I"
