"""Padded equals unpadded, for random lengths, sides and amounts of padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.engine.anatomy import relative_error
from tests.zoo import build

NAMES = ["llama", "gpt2", "gemma2", "mistral", "bert", "roberta", "gpt_oss", "falcon_h1", "opt"]
SITES = ["resid_post", "attn_out", "mlp_out", "logits"]
LENSES = {}


def lens_of(name):
    if name not in LENSES:
        LENSES[name] = interp.wrap(build(name), name=name)
    return LENSES[name]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_site_of_every_sample(name, data):
    lens = lens_of(name)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    side = data.draw(st.sampled_from(["left", "right"]))
    seed = data.draw(st.integers(0, 99))
    pick = torch.Generator().manual_seed(seed)
    rows = [torch.randint(70, 300, (n,), generator=pick).tolist() for n in lengths]
    batch = lens.prepare(input_ids=rows, padding_side=side)
    assert batch.lengths.tolist() == lengths
    trace = lens.run(batch, SITES)
    for i, row in enumerate(rows):
        alone = lens.run(lens.prepare(input_ids=[row]), SITES)
        for key, value in trace.values.items():
            assert relative_error(value[i][batch.mask[i]], alone.values[key][0]) < 1e-5, key


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_selected_positions_are_the_same_tokens(name, data):
    """A position means the same token whatever the padding."""
    lens = lens_of(name)
    lengths = data.draw(st.lists(st.integers(3, 9), min_size=2, max_size=3))
    position = data.draw(st.sampled_from(["last", 0, 2, -1, -3]))
    pick = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = [torch.randint(70, 300, (n,), generator=pick).tolist() for n in lengths]
    read = interp.Read("resid_post", layers=1, positions=position)
    found = [
        lens.run(lens.prepare(input_ids=rows, padding_side=side), [read]).values[read, 1] for side in ("left", "right")
    ]
    assert relative_error(found[0], found[1]) < 1e-5
    for i, row in enumerate(rows):
        whole = lens.run(lens.prepare(input_ids=[row]), ["resid_post.1"])["resid_post", 1][0]
        assert relative_error(found[0][i, 0], whole[-1 if position == "last" else position]) < 1e-5


def test_a_padding_token_that_the_model_does_not_embed():
    """Some configurations name one behind the vocabulary: another id fills, and the mask hides it."""
    model = build("llama")
    model.config.pad_token_id = model.config.vocab_size
    lens = interp.wrap(model)
    batch = lens.prepare(input_ids=[[70, 71, 72], [80]])
    assert int(batch.inputs["input_ids"].max()) < model.config.vocab_size
    alone = lens.run(lens.prepare(input_ids=[[80]]), "logits").logits
    assert relative_error(lens.run(batch, "logits").logits[1][batch.mask[1]], alone[0]) < 1e-5
