"""Layers called one at a time give what a whole run gives: any rows, any start, edits inside, shared prefixes."""

import pytest
import torch

import interp
from interp import edits
from interp.engine import shared
from interp.engine.stepper import Rows
from interp.errors import InputError, UnsupportedError
from interp.tracing import patch_sweep
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75, 64, 33], [71, 81, 91, 101, 17], [72, 82, 92, 102, 112, 20]]
FAMILIES = ["llama", "gpt2", "mistral", "gemma2", "gemma3", "gpt_oss", "cohere2", "qwen3_moe", "falcon", "bart"]


def kept(lens, batch):
    last = lens.anatomy.depth[lens.anatomy.main] - 1
    run = lens.run(batch, ["resid_pre", f"resid_post.{last}"], cache=True)
    return [*(run["resid_pre", i] for i in range(last + 1)), run["resid_post", last]], run.cache


def prepared(name):
    if name == "bart":
        given = inputs(name)
        lens = interp.wrap(build(name), sample=given)
        return lens, lens.prepare(**given)
    lens = interp.wrap(build(name), processor(name), name=name)
    return lens, lens.prepare(input_ids=IDS, padding_side="left")


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_alone_give_what_the_run_gave(name, share, monkeypatch):
    """Rows in any order and number, padded samples among them; with keys copied to each row, and shared."""
    lens, batch = prepared(name)
    streams, prefix = kept(lens, batch)
    stepper, calls = lens.stepper(batch, prefix), []
    attend = shared.SharedPrefix.attend
    monkeypatch.setattr(shared.SharedPrefix, "pays", lambda self, heads, columns: share)
    monkeypatch.setattr(shared.SharedPrefix, "attend", lambda s, *a: (calls.append(1), attend(s, *a))[1])
    size, width = batch.mask.shape
    samples = torch.tensor([size - 1, 0, 1, 0, size - 1, 1, 1])
    for start in (0, 3, width - 1):
        rows = stepper.rows(samples, start)
        for layer, stream in enumerate(streams[:-1]):
            for count in (7, 4, 1):
                some = samples[:count]
                found = rows.step(layer, stream[some, start:])
                real = batch.mask[some][:, start:]
                torch.testing.assert_close(found[real], streams[layer + 1][some, start:][real], atol=3e-5, rtol=1e-3)
    assert bool(calls) == (share and name != "falcon")
    assert not stepper.joins


def test_edits_find_their_rows():
    lens, batch = prepared("llama")
    streams, prefix = kept(lens, batch)
    samples, start = torch.tensor([2, 0, 2]), 2
    rows = lens.stepper(batch, prefix).rows(samples, start)

    def halve(z):
        z = z.clone()
        z[1, :, 3] *= 0.5
        return z

    found = rows.step(1, streams[1][samples, start:], edits.splice(halve, site="z", layers=1))
    scaled = edits.scale_heads(0.5, layers=1, heads=3)
    wanted = lens.run(batch, "resid_post.1", scaled)["resid_post", 1]
    torch.testing.assert_close(found[1], wanted[0, start:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=1e-5)
    real = batch.mask[2, start:]
    torch.testing.assert_close(found[0][real], streams[2][2, start:][real], atol=1e-5, rtol=1e-4)


def test_a_call_of_another_form_is_joined(monkeypatch):
    """Where attention does not get a mask over the prefix, the keys are copied after all."""
    lens, batch = prepared("llama")
    streams, prefix = kept(lens, batch)
    stepper = lens.stepper(batch, prefix)
    monkeypatch.setattr(shared.SharedPrefix, "pays", lambda *a: True)
    monkeypatch.setattr(shared.SharedPrefix, "attend", lambda *a: (_ for _ in ()).throw(shared.Unfit))
    found = stepper.rows(torch.tensor([0]), 4).step(1, streams[1][:1, 4:])
    assert stepper.joins
    torch.testing.assert_close(found, streams[2][:1, 4:], atol=1e-5, rtol=1e-4)


def test_a_long_prefix_is_shared_and_exact(monkeypatch):
    """A sweep of the last token behind 90 others, with padding: equal to keys copied to each row."""
    lens = interp.wrap(build("llama"), processor("llama"), name="llama")
    torch.manual_seed(0)
    ids = [torch.randint(5, 60, (n,)).tolist() for n in (96, 90)]
    other = [[*x[:40], x[40] + 1, *x[41:]] for x in ids]
    pair = [lens.prepare(input_ids=x, padding_side="left") for x in (ids, other)]
    options = {"sites": ["resid_pre", "attn_out"], "positions": "last", "answers": [7, 8], "wrong": [9, 10]}
    calls, attend = [], shared.SharedPrefix.attend
    monkeypatch.setattr(shared.SharedPrefix, "attend", lambda s, *a: (calls.append(1), attend(s, *a))[1])
    found = patch_sweep(lens, *pair, **options)
    assert calls
    monkeypatch.setattr(shared.SharedPrefix, "pays", lambda *a: False)
    wanted = patch_sweep(lens, *pair, **options)
    torch.testing.assert_close(found.values, wanted.values, atol=1e-5, rtol=1e-4)
    end, rows = pair[0].mask.shape[1] - 1, torch.arange(2)
    source = lens.run(pair[0], ["resid_pre@last", "attn_out@last"])
    for i, (number, layer, _, _) in enumerate(found.cells.tolist()):
        site = found.sites[number]
        value = source[f"{site}@last", layer]
        last = lens.run(pair[1], "logits", edits.patch(site, value, layer=layer, positions="last")).logits[:, end]
        torch.testing.assert_close(found.values[i], last[rows, [7, 8]] - last[rows, [9, 10]], atol=2e-5, rtol=1e-4)
    assert float((found.values - found.corrupt).abs().max()) > 1e-3


def test_what_cannot_be_called_alone_is_refused():
    lens = interp.wrap(build("gptj"), processor("gptj"), name="gptj")
    with pytest.raises(UnsupportedError, match="cannot be called alone"):
        lens.stepper(lens.prepare(input_ids=IDS[:1]))
    lens, batch = prepared("llama")
    stepper = lens.stepper(batch)
    assert isinstance(stepper.rows(torch.tensor([0])), Rows)
    with pytest.raises(InputError, match="prefix"):
        stepper.rows(torch.tensor([0]), 2)
    with pytest.raises(InputError, match="no column"):
        stepper.rows(torch.tensor([0]), 8)


def test_forward_calls_are_the_models_own_again():
    lens, batch = prepared("llama")
    before = [set(vars(m)) for m in lens.model.modules()]
    _, prefix = kept(lens, batch)
    keys = [x.keys.clone() for x in prefix.key_values.layers]
    lens.stepper(batch, prefix).rows(torch.tensor([0, 1]), 3)
    assert before == [set(vars(m)) for m in lens.model.modules()]
    assert all(torch.equal(a, x.keys) for a, x in zip(keys, prefix.key_values.layers, strict=True))


@pytest.mark.parametrize("padded", [1, 3])
def test_some_rows_of_a_batch_whose_padded_prompts_come_last(padded):
    """Rows of unpadded prompts need no mask, those of the padded ones do: what a layer is given depends on the rows."""
    lens = interp.wrap(build("llama"), name="llama")
    ids = torch.randint(70, 120, (9, 6), generator=torch.Generator().manual_seed(0))
    ids[9 - padded :, 0] = 0
    batch = lens.prepare(input_ids=ids, attention_mask=(ids > 0).long())
    trace = lens.run(batch, ["resid_pre.1", "resid_post.1"], cache=True)
    for start in (3, 5):
        rows = lens.stepper(batch, trace.cache).rows(torch.arange(9), start=start)
        stream, wanted = (trace[site, 1][:, start:] for site in ("resid_pre", "resid_post"))
        for count in (1, 4, 9):
            assert torch.allclose(rows.step(1, stream[:count]), wanted[:count], atol=1e-5)
