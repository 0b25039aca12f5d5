"""Edits, each against the plain formula."""

import inspect

import pytest
import torch

import interp
from interp import edits
from interp.errors import EditError, SettingsError, UnknownNameError, UnsupportedError
from tests.zoo import build, inputs, processor


@pytest.fixture(scope="module")
def lens():
    return interp.wrap(build("llama"), processor("llama"))


@pytest.fixture(scope="module")
def batch(lens):
    return lens.prepare(input_ids=[[70, 80, 90, 100, 110], [71, 81, 91, 101]])


def test_scale_heads_scales_z(lens, batch):
    plain = lens.run(batch, ["z.1"])["z", 1]
    found = lens.run(batch, ["z.1"], edits.scale_heads(3.0, layers=1, heads=[0, 2]))["z", 1]
    wanted = plain.clone()
    wanted[:, :, [0, 2]] *= 3.0
    assert torch.equal(found, wanted)


def test_scale_heads_per_sample_sets(lens, batch):
    factor = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    plain = lens.run(batch, ["z.1"])["z", 1]
    found = lens.run(batch, ["z.1"], edits.scale_heads(factor, layers=1, heads=[0, 3]))["z", 1]
    assert found[0, :, 0].abs().sum() == 0
    assert found[1, :, 3].abs().sum() == 0
    assert torch.equal(found[1, :, 0], plain[1, :, 0])
    assert torch.equal(found[0, :, 3], plain[0, :, 3])
    with pytest.raises(EditError, match="does not fit"):
        lens.run(batch, ["z.1"], edits.scale_heads(torch.ones(2, 3), layers=1, heads=[0, 3]))


def test_ablate_mean_and_resample(lens, batch):
    reference = lens.run(batch, ["z"])
    mean = lens.run(batch, ["z.2"], edits.ablate(mode="mean", reference=reference, layers=2, heads=1))["z", 2]
    real = reference["z", 2][batch.mask]
    torch.testing.assert_close(mean[:, :, 1], real[:, 1].mean(0).expand_as(mean[:, :, 1]))
    assert torch.equal(mean[:, :, 0], reference["z", 2][:, :, 0])
    swapped = lens.run(batch, ["z.0"], edits.ablate(mode="resample", reference=reference, layers=0, heads=1))["z", 0]
    assert torch.equal(swapped[:, :, 1], reference["z", 0].flip(0)[:, :, 1])
    with pytest.raises(SettingsError, match="needs a reference"):
        edits.ablate(mode="mean")
    with pytest.raises(UnknownNameError, match="mean"):
        inspect.unwrap(edits.ablate)(mode="average")  # past the run-time type check of the tests


def test_patch_from_another_run(lens, batch):
    other = lens.prepare(input_ids=[[75, 85, 95, 105, 115], [76, 86, 96, 106]])
    source = lens.run(other, ["resid_post.1@last", "logits@last"])
    found = lens.run(
        batch, ["resid_post.1@last"], edits.patch("resid_post", source["resid_post", 1], layer=1, positions="last")
    )
    assert torch.equal(found["resid_post", 1], source["resid_post", 1])
    everywhere = lens.run(other, ["resid_pre.0"])["resid_pre", 0]
    patched = lens.run(batch, ["logits@last"], edits.patch("resid_pre", everywhere, layer=0))
    torch.testing.assert_close(patched.logits, source.logits)


@pytest.mark.parametrize(
    "site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act", "q", "k", "v", "z"]
)
def test_steer_adds_a_vector_and_reads_see_it(lens, batch, site):
    plain = lens.run(batch, [f"{site}.1"])[site, 1]
    vector = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(1))
    found = lens.run(batch, [f"{site}.1"], edits.steer(vector, site=site, layers=1, scale=2.0))[site, 1]
    torch.testing.assert_close(found, plain + 2.0 * vector, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "granite", "bert", "dinov2", "mllama", "falcon", "falcon_h1", "opt", "gpt_neox"]
)
@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_mid"])
def test_branch_edits_move_the_stream_by_as_much(name, site):
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given)
    batch = lens.prepare(**given)
    try:
        plain = lens.run(batch, [f"{site}.0", "resid_pre.0", "resid_post.0"])
    except UnsupportedError:
        pytest.skip("refused by the family")
    shift = torch.randn(plain["resid_post", 0].shape, generator=torch.Generator().manual_seed(2)) * 0.1
    change = edits.splice(lambda x: x + shift, site=site, layers=0)
    found = lens.run(batch, [f"{site}.0", "resid_post.0"], change)
    torch.testing.assert_close(found[site, 0], plain[site, 0] + shift, atol=2e-5, rtol=1e-4)
    moved = found["resid_post", 0] - plain["resid_post", 0]
    post_norm = lens.anatomy.towers[lens.anatomy.main].layers[0].post_norm
    parallel = lens.anatomy.towers[lens.anatomy.main].layers[0].parallel
    if not post_norm and (site == "mlp_out" or parallel):
        torch.testing.assert_close(moved, shift, atol=5e-5, rtol=1e-3)
    else:
        assert moved.abs().max() > 1e-3


def test_relative_steering(lens, batch):
    plain = lens.run(batch, ["resid_post.0@last"])["resid_post", 0]
    vector = torch.zeros(plain.shape[-1])
    vector[0] = 5.0
    found = lens.run(
        batch, ["resid_post.0@last"], edits.steer(vector, layers=0, scale=0.5, positions="last", relative=True)
    )
    torch.testing.assert_close(found["resid_post", 0][..., 0] - plain[..., 0], 0.5 * plain.norm(dim=-1))


def test_mask_attention_is_a_softmax_without_those_keys(lens, batch):
    scores = lens.run(batch, ["scores.1"])["scores", 1]
    found = lens.run(batch, ["pattern.1"], edits.mask_attention(layers=1, heads=2, queries="last", keys=[1, 2]))[
        "pattern", 1
    ]
    plain = lens.run(batch, ["pattern.1"])["pattern", 1]
    for b, (first, last) in enumerate([(0, 4), (1, 4)]):
        row = scores[b, 2, last].clone()
        row[[first + 1, first + 2]] = -torch.inf
        torch.testing.assert_close(found[b, 2, last], row.softmax(-1))
        assert torch.equal(found[b, 1], plain[b, 1])
        assert torch.equal(found[b, 2, :last], plain[b, 2, :last])


def test_masking_everything_is_refused(lens, batch):
    with pytest.raises(EditError, match="no key at all"):
        lens.run(batch, ["pattern.1"], edits.mask_attention(layers=1, queries="last", keys="all"))


@pytest.mark.parametrize("renormalize", [True, False])
def test_reweight_attention(lens, batch, renormalize):
    plain = lens.run(batch, ["pattern.1", "v.1", "z.1"])
    change = edits.reweight_attention(4.0, layers=1, heads=0, queries="last", keys=0, renormalize=renormalize)
    found = lens.run(batch, ["pattern.1", "z.1"], change)
    for b, first in enumerate([0, 1]):
        row = plain["pattern", 1][b, 0, -1].clone()
        row[first] *= 4.0
        row = row / row.sum() if renormalize else row
        torch.testing.assert_close(found["pattern", 1][b, 0, -1], row)
        torch.testing.assert_close(found["z", 1][b, -1, 0], row @ plain["v", 1][b, :, 0], atol=1e-5, rtol=1e-4)


def test_edits_apply_in_order(lens, batch):
    double = edits.splice(lambda x: 2 * x, site="resid_post", layers=0)
    add = edits.splice(lambda x: x + 1, site="resid_post", layers=0)
    plain = lens.run(batch, ["resid_post.0"])["resid_post", 0]
    assert torch.equal(lens.run(batch, ["resid_post.0"], [double, add])["resid_post", 0], 2 * plain + 1)
    assert torch.equal(lens.run(batch, ["resid_post.0"], [add, double])["resid_post", 0], 2 * (plain + 1))


def test_ragged_positions_change_only_their_columns(lens, batch):
    marked = torch.zeros_like(batch.mask)
    marked[0, [0, 2, 4]] = True
    marked[1, 3] = True
    plain = lens.run(batch, ["resid_post.0"])["resid_post", 0]
    found = lens.run(
        batch, ["resid_post.0"], edits.splice(torch.zeros_like, site="resid_post", layers=0, positions=marked)
    )
    assert torch.equal(found["resid_post", 0], plain.masked_fill(marked[..., None], 0.0))
    read = lens.run(batch, [interp.Read("resid_post", layers=0, positions=marked)])
    values = read.values[next(iter(read.values))]
    assert torch.equal(values[0], plain[0, [0, 2, 4]])
    assert torch.equal(values[1, 0], plain[1, 3])
    assert values[1, 1:].abs().sum() == 0
    assert next(iter(read.valid.values())).tolist() == [[True] * 3, [True, False, False]]


def test_reductions_leave_padding_out(lens, batch):
    trace = lens.run(batch, ["resid_post.0", "resid_post.0|mean", "resid_post.0|norm", "z.0|max", "z.0"])
    full = trace.values[interp.Read.of("resid_post.0"), 0]
    mean = trace.values[interp.Read.of("resid_post.0|mean"), 0]
    for b in range(2):
        torch.testing.assert_close(mean[b], full[b][batch.mask[b]].mean(0))
    torch.testing.assert_close(trace.values[interp.Read.of("resid_post.0|norm"), 0], full.norm(dim=-1))
    z = trace.values[interp.Read.of("z.0"), 0]
    biggest = trace.values[interp.Read.of("z.0|max"), 0]
    torch.testing.assert_close(biggest[1], z[1][batch.mask[1]].amax(0))


def test_a_closed_gate_cannot_be_edited():
    given = inputs("mllama")
    model = build("mllama")
    lens = interp.wrap(model, sample=given)
    with torch.no_grad():
        model.model.language_model.layers[1].cross_attn_attn_gate.zero_()
    with pytest.raises(EditError, match="gate that is zero"):
        lens.run(
            lens.prepare(**given),
            ["resid_post.1"],
            edits.splice(lambda x: x + 1, site="attn_out", tower="cross", layers=1),
        )


def test_result_cannot_be_edited(lens, batch):
    with pytest.raises(UnsupportedError, match="not edited"):
        edits.splice(lambda x: x, site="result")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"])
@pytest.mark.parametrize("positions", ["last", (-3, -2), "tensor"])
def test_an_edit_of_a_few_query_rows_is_that_of_all_rows(name, positions):
    """Rows that no edit concerns keep the kernel's own result; the others are as if all had been computed anew."""
    lens = interp.wrap(build(name), name=name)
    ids = torch.tensor([[70, 71, 72, 73, 74, 75, 76, 77], [0, 0, 0, 81, 82, 83, 84, 85]])
    batch = lens.prepare(input_ids=ids, attention_mask=(ids > 0).long())
    if positions == "tensor":
        positions = torch.tensor([[4, 6], [2, 3]])
    chosen = batch.select(interp.Read("pattern", positions=positions).positions)
    marked = torch.zeros_like(batch.mask).scatter_(1, chosen.index, True)

    def half(pattern, where):
        new = pattern * torch.linspace(0.5, 1.5, pattern.shape[-1])
        return new / new.sum(-1, keepdim=True).clamp_min(1e-9)

    def everywhere(pattern, where):
        return torch.where(marked[:, None, :, None], half(pattern, where), pattern)

    few = edits.Edit(interp.Read("pattern", layers=(1,), positions=positions), half, "half")
    every = edits.Edit(interp.Read("pattern", layers=(1,)), everywhere, "half")
    read = ["attn_out.1", "logits"]
    plain, one, two = (lens.run(batch, read, made) for made in ((), [few], [every]))
    assert torch.allclose(one.logits[batch.mask], two.logits[batch.mask], atol=1e-5)
    kept = batch.mask & ~marked
    assert torch.equal(one["attn_out", 1][kept], plain["attn_out", 1][kept])
    assert not torch.allclose(one["attn_out", 1][marked], plain["attn_out", 1][marked], atol=1e-5)
    hidden = edits.mask_attention(queries=positions, keys=1, layers=2)
    before = lens.run(batch, ["pattern.2", "logits"], hidden)  # the read needs all rows
    assert torch.allclose(before.logits[batch.mask], lens.run(batch, ["logits"], hidden).logits[batch.mask], atol=1e-5)
    assert bool((before["pattern", 2].transpose(1, 2)[marked][..., 1 + 3 * 0] <= 1).all())


def test_edits_of_generated_rows_act_in_generation_alone():
    lens = interp.wrap(build("llama"), name="llama")
    ids = torch.tensor([[70, 71, 72, 73, 74, 75], [0, 0, 81, 82, 83, 84]])
    batch = lens.prepare(input_ids=ids, attention_mask=(ids > 0).long())
    seen = []

    def note(pattern, where):
        seen.append(where.columns.tolist())
        return pattern

    made = edits.Edit(interp.Read("pattern", layers=(1,), positions="generated"), note, "note")
    assert torch.equal(lens.run(batch, ["logits"], [made]).logits, lens.run(batch, ["logits"]).logits)
    assert seen == []
    lens.generate(batch, [made], max_new_tokens=3, min_new_tokens=3)
    assert seen == [[[6], [6]], [[7], [7]]]
    seen.clear()
    both = [made, edits.Edit(interp.Read("pattern", layers=(1,), positions=(-2,)), note, "note")]
    lens.generate(batch, both, max_new_tokens=2, min_new_tokens=2)
    assert seen == [[[4], [4]], [[6], [6]]]


@pytest.mark.parametrize("name", ["falcon", "llama"])
def test_values_of_the_caller_stay_as_they_are(name):
    """Falcon adds to what its MLP gives in place; the second run must get what the first one got."""
    lens = interp.wrap(build(name), name=name)
    batch = lens.prepare(input_ids=[[5, 6, 7, 8]])
    value = lens.run(batch, "mlp_out.0")["mlp_out", 0].clone()
    kept = value.clone()
    one = lens.run(batch, "logits", edits.patch("mlp_out", value, layer=0)).logits
    assert torch.equal(value, kept)
    two = lens.run(batch, "logits", edits.splice(lambda _: value, site="mlp_out", layers=0)).logits
    assert torch.equal(value, kept)
    assert torch.equal(one, two)
    assert torch.equal(one, lens.run(batch, "logits").logits)
