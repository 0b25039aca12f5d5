"""Fidelity: numbers by hand, one pass equal to all at once, and the right variance beside the legacy one."""

import math

import pytest
import torch

from interp.dictionaries import SAE, Fidelity, Sparse
from interp.dictionaries.sparse import Pattern
from interp.errors import InputError, NonFiniteError
from tests.test_dictionaries_sparse import Processes


def random(n=200, d=6, f=11, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + offset
    y = x + 0.3 * torch.randn(n, d, generator=g)
    latents = torch.randn(n, f, generator=g).relu() * (torch.arange(f) != 4)
    return x, y, latents


def collected(x, y, latents, sizes, d=6, f=11):
    scores = Fidelity(d, f)
    for parts in zip(x.split(sizes), y.split(sizes), latents.split(sizes), strict=True):
        scores.update(*parts)
    return scores


def test_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [4.0, 0.0]])
    latents = torch.tensor([[1.0, 0.0, 0.0], [2.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    scores = Fidelity(2, 3)
    scores.update(x, y, latents)
    found = scores.result()
    assert found.tokens == 3
    assert found.mse == pytest.approx(2 / 3)
    assert found.fvu == pytest.approx(2 / 8)  # errors 1 + 1 + 0; the mean is (2, 0), so 4 + 0 + 4
    assert found.explained_variance == pytest.approx(0.75)
    # By token: 1 - 1/4; no variance and an error, so 0; 1 - 0/4.
    assert found.explained_variance_legacy == pytest.approx((0.75 + 0 + 1) / 3)
    assert found.l0 == pytest.approx(1.0)
    assert found.l1 == pytest.approx(4 / 3)
    assert found.dead == 1
    assert torch.allclose(found.density, torch.tensor([2 / 3, 1 / 3, 0]))
    assert found.cosine == pytest.approx((0 + 1 + 1) / 3)
    assert found.relative_reconstruction_bias == pytest.approx((1 + 1 + 16) / (0 + 2 + 16))
    assert set(found.numbers()) == {*found.__slots__} - {"density"}


@pytest.mark.parametrize("sizes", [[200], [1, 9, 150, 40], [50] * 4])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batches_are_as_all_at_once(sizes, offset):
    x, y, latents = random(offset=offset)
    found = collected(x, y, latents, sizes).result()
    a, b = x.double(), y.double()
    error = (a - b).square().sum(1)
    assert found.fvu == pytest.approx((error.sum() / (a - a.mean(0)).square().sum()).item(), rel=1e-12)
    assert found.mse == pytest.approx(error.mean().item(), rel=1e-12)
    assert found.l2_ratio == pytest.approx((b.norm(dim=1) / a.norm(dim=1)).mean().item(), rel=1e-12)
    assert found.cosine == pytest.approx(torch.cosine_similarity(a, b).mean().item(), rel=1e-12)
    bias = b.square().sum(1).mean() / (a * b).sum(1).mean()
    assert found.relative_reconstruction_bias == pytest.approx(bias.item(), rel=1e-12)
    assert found.l0 == pytest.approx((latents > 0).sum(1).double().mean().item())
    assert found.l1 == pytest.approx(latents.sum(1).double().mean().item())
    assert torch.allclose(found.density, (latents > 0).float().mean(0))
    assert found.dead == 1
    legacy = torch.cat(
        [
            1 - e / (p - p.mean(0)).square().sum(1).clamp_min(1e-300)
            for p, e in zip(a.split(sizes), error.split(sizes), strict=True)
        ]
    )
    expected = torch.where(legacy < -1e200, 0, legacy).mean().item()  # a batch of one token has no variance
    assert found.explained_variance_legacy == pytest.approx(expected, rel=1e-9)


def test_an_offset_does_not_flatter():
    """The mistake of total variance about zero: with an offset it would say that all is explained."""
    near, far = (collected(*random(offset=offset), [100, 100]).result() for offset in (0.0, 30.0))
    assert near.fvu == pytest.approx(far.fvu, rel=1e-4)
    assert near.explained_variance_legacy == pytest.approx(far.explained_variance_legacy, rel=1e-3)
    x, y, _ = random(offset=30.0)
    wrong = 1 - ((x - y).square().sum() / x.square().sum()).item()
    assert wrong > 0.999
    assert 0.85 < far.explained_variance < 0.95


def test_the_mean_scores_zero_and_the_truth_one():
    x, _, latents = random()
    mean = collected(x, x.mean(0).expand_as(x), latents, [200]).result()
    assert mean.fvu == pytest.approx(1, rel=1e-6)
    assert mean.explained_variance_legacy == pytest.approx(0, abs=1e-6)
    best = collected(x, x, latents, [70, 130]).result()
    assert (best.fvu, best.explained_variance, best.explained_variance_legacy) == (0, 1, 1)
    assert best.relative_reconstruction_bias == pytest.approx(1)
    short = collected(x, x / 2, latents, [200]).result()
    assert short.relative_reconstruction_bias == pytest.approx(0.5)
    assert short.l2_ratio == pytest.approx(0.5)
    constant = torch.ones(3, 6)
    assert collected(constant, constant, latents[:3], [3]).result().fvu == 0
    assert math.isinf(collected(constant, constant + 1, latents[:3], [3]).result().fvu)


def test_sparse_latents_and_leading_axes():
    x, y, latents = random()
    mask = latents != 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    sparse = Fidelity(6, 11)
    sparse.update(x, y, Sparse(latents[mask], Pattern(mask.nonzero()[:, 1], offsets, 11)))
    folded = Fidelity(6, 11)
    folded.update(x.view(20, 10, 6), y.view(20, 10, 6), latents.view(20, 10, 11))
    folded.update(x[:0], y[:0], latents[:0])
    for name, value in collected(x, y, latents, [200]).result().numbers().items():
        assert sparse.result().numbers()[name] == pytest.approx(value, rel=1e-6)
        assert folded.result().numbers()[name] == value


def test_processes_together_are_as_one():
    x, y, latents = random(offset=3.0)
    cuts = (slice(0, 60), slice(60, 200))

    def work(rank, reduce):
        cut = cuts[rank]
        return collected(x[cut], y[cut], latents[cut], [len(x[cut])]).result(reduce)

    expected = collected(x, y, latents, [60, 140]).result().numbers()
    for found in Processes().run(work):
        for name, value in expected.items():
            assert found.numbers()[name] == pytest.approx(value, rel=1e-12), name


def test_with_a_dictionary():
    sae = SAE(d_in=6, d_sae=11, k=3)
    x, _, _ = random()
    with torch.no_grad():
        loss = sae.loss(x)
        scores = Fidelity(6, 11)
        scores.update(x, loss.reconstruction, loss.latents)
    found = scores.result()
    assert found.mse == pytest.approx(loss.parts["mse_loss"].item(), rel=1e-5)
    assert found.l0 <= 3


def test_bad_input():
    x, y, latents = random()
    with pytest.raises(InputError, match="no token"):
        Fidelity(6, 11).result()
    with pytest.raises(InputError, match=r"both \[\.\.\., 6\]"):
        Fidelity(6, 11).update(x, y[:, :5], latents)
    with pytest.raises(InputError, match=r"\[\.\.\., 11\] of 200 tokens"):
        Fidelity(6, 11).update(x, y, latents[:, :10])
    with pytest.raises(InputError, match="of 200 tokens"):
        Fidelity(6, 11).update(x, y, latents[:100])
    y[17, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="token 17"):
        Fidelity(6, 11).update(x, y, latents)
