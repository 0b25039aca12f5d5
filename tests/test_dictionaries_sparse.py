"""Sparse kernels: selection is exact, gradients are those of dense autograd, several processes choose as one."""

import threading

import pytest
import torch

from interp.dictionaries import SAE, sparse
from interp.dictionaries.sparse import (
    Pattern,
    Sparse,
    affine,
    decode,
    kth_largest,
    selected,
    topk_batch,
    topk_rows,
)

N, D, F = 37, 10, 51


def tensors(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def pattern(seed=3, share=0.15):
    """A random pattern with empty tokens and latents that are never active."""
    mask = torch.rand(N, F, generator=torch.Generator().manual_seed(seed)) < share
    mask[4], mask[:, 7] = False, False
    return Pattern(mask.nonzero()[:, 1], torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)]), F), mask


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of a few rows, so that every selection crosses their borders."""
    monkeypatch.setattr(sparse, "held", lambda device: 5 * F)


def test_gather_scatter_and_sampled_are_the_dense_products():
    p, mask = pattern()
    x, w, v = tensors((N, D), (F, D), int(mask.sum()))
    dense = torch.zeros(N, F, dtype=torch.float64)
    dense[mask] = v
    assert torch.equal(Sparse(v, p).dense(), dense)
    torch.testing.assert_close(p.gather(w, v), dense @ w)
    torch.testing.assert_close(p.scatter(x, v), dense.T @ x)
    torch.testing.assert_close(p.sampled(x, w), (x @ w.T)[mask])
    half = p.sampled(x.bfloat16(), w.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.double(), (x.bfloat16().double() @ w.bfloat16().double().T)[mask], rtol=0.01, atol=1e-3
    )
    inside, part = p.part(10, 30)
    torch.testing.assert_close(Sparse(v[inside], part).dense(), dense[:, 10:30])
    v[::3] = 0
    dense[mask] = v
    assert torch.equal(Sparse(v, p).counts(), (dense != 0).sum(0))


def test_gradients_are_those_of_dense_autograd():
    p, mask = pattern()
    x, b_dec, w_enc, b_enc, w_dec = (t.requires_grad_() for t in tensors((N, D), D, (D, F), F, (F, D)))
    leaves = (x, b_dec, w_enc, b_enc, w_dec)
    with torch.no_grad():
        found = ((x - b_dec) @ w_enc + b_enc)[mask]
    values = selected(found, p, x, b_dec, w_enc, b_enc)
    ours = torch.autograd.grad(decode(values.square(), w_dec, p).pow(3).sum(), leaves)
    pre = (x - b_dec) @ w_enc + b_enc
    theirs = torch.autograd.grad(((pre.square() * mask) @ w_dec).pow(3).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(ours[2][:, 7], torch.zeros(D, dtype=torch.float64))


def test_affine_is_the_dense_form():
    x, b_dec, w, b = (t.requires_grad_() for t in tensors((N, D), D, (D, F), F))
    for shift in (b_dec, None):
        leaves = [t for t in (x, shift, w, b) if t is not None]
        ours = affine(x, shift, w, b)
        theirs = (x - shift if shift is not None else x) @ w + b
        torch.testing.assert_close(ours, theirs)
        for a, c in zip(
            torch.autograd.grad(ours.pow(3).sum(), leaves),
            torch.autograd.grad(theirs.pow(3).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, c)
    assert torch.autograd.gradcheck(lambda *a: affine(*a), (x[:4], b_dec, w[:, :6], b[:6]))


@pytest.mark.parametrize("k", [1, 6, F])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_rows_keep_their_k_largest(k, absolute):
    x, w, b, scale = tensors((N, D), (D, F), F, F)
    for s in (None, scale.abs() + 0.1):
        values, p = topk_rows(x, w, b, k, scale=s, absolute=absolute)
        pre = x @ w + b
        ranks = pre if s is None else pre * s
        best = (ranks.abs() if absolute else ranks).topk(k, dim=1).indices
        expected = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best))
        torch.testing.assert_close(Sparse(values, p).dense(), expected)
        assert torch.equal(p.offsets, torch.arange(0, N * k + 1, k))


def batch_topk(pre, count, scale=None):
    ranks = (pre if scale is None else pre * scale).flatten()
    kept = torch.zeros_like(ranks).index_fill(0, ranks.relu().topk(min(count, ranks.numel())).indices, 1)
    return pre * (kept * (ranks > 0)).view_as(pre)


@pytest.mark.parametrize("count", [0, 1, 40, 333, 900, N * F])
@pytest.mark.parametrize("hot", [None, slice(0, 3), slice(20, 24)])
@pytest.mark.usefixtures("small_parts")
def test_batches_keep_their_largest_wherever_they_stand(count, hot):
    """Parts that hold far more or far fewer than their share are cut right, too."""
    x, w, b, scale = tensors((N, D), (D, F), F, F)
    if hot is not None:
        x[hot] *= 50
    for s in (None, scale.abs() + 0.1):
        values, p = topk_batch(x, w, b, count, scale=s)
        expected = batch_topk(x @ w + b, count, s)
        torch.testing.assert_close(Sparse(values, p).dense(), expected)
        assert (values > 0).all()
        assert torch.equal(p.offsets.diff(), (expected != 0).sum(1))


def test_a_large_batch_is_sampled_and_still_exact():
    x, w, b = tensors((700, 64), (64, 1024), 1024, dtype=torch.float32)
    x[:40] *= 20
    for low in (None, torch.bfloat16):
        values, p = topk_batch(x, w, b, 700 * 9, low=low)
        pre = affine(x, None, w, b, low)
        least = pre.flatten().topk(700 * 9).values.min()
        torch.testing.assert_close(Sparse(values, p).dense(), pre * (pre >= least))
        # In bfloat16 many are equal to the smallest; all of them are kept.
        assert len(values) == 700 * 9 if low is None else len(values) >= 700 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kth_largest_is_exact(dtype):
    (x,) = tensors(5000)
    x = x.abs().pow(8).to(dtype)  # many orders of size
    x[:3] = 0
    for k in (1, 2, 77, 4000, 4997, 5000):
        assert kth_largest(x, k) == x.sort(descending=True).values[k - 1]
    assert kth_largest(x, 5001) == 0
    assert kth_largest(x[:0], 1) == 0
    assert kth_largest(x, 0) == torch.inf
    assert kth_largest(torch.full((9,), 2.5, dtype=dtype), 4) == 2.5


class Processes:
    """Two threads that reduce together, as processes would."""

    def __init__(self, count=2):
        self.barrier, self.slots, self.count = threading.Barrier(count), [None] * count, count

    def reduce(self, rank):
        def run(tensor, op):
            self.slots[rank] = tensor.clone()
            self.barrier.wait(30)
            stack = torch.stack(self.slots)
            self.barrier.wait(30)
            return {"sum": stack.sum, "min": stack.amin, "max": stack.amax}[op](0)

        return run

    def run(self, work):
        found, threads = [None] * self.count, []
        for rank in range(self.count):

            def go(rank=rank):
                try:
                    found[rank] = work(rank, self.reduce(rank))
                except BaseException:
                    self.barrier.abort()
                    raise

            threads.append(threading.Thread(target=go))
        [t.start() for t in threads]
        [t.join() for t in threads]
        return found


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_several_processes_choose_as_one(hot):
    x, w, b = tensors((2 * N, D), (D, F), F)
    if hot:
        x[:4] *= 50  # the first process has far more than its share
    whole = Sparse(*topk_batch(x, w, b, 400)).dense()
    parts = Processes().run(lambda rank, reduce: topk_batch(x.split(N)[rank], w, b, 200, reduce=reduce))
    torch.testing.assert_close(torch.cat([Sparse(*part).dense() for part in parts]), whole)


def test_the_threshold_of_several_processes_is_that_of_one():
    (x,) = tensors((2 * N, D))
    saes = [SAE(d_in=D, d_sae=F, architecture="batchtopk", k=3, dtype="float64") for _ in range(3)]
    dead = torch.arange(F) < 9
    whole = saes[0].loss(x, dead=dead)
    whole.total.backward()

    def work(rank, reduce):
        loss = saes[1 + rank].loss(x.split(N)[rank], dead=dead, reduce=reduce)
        loss.total.backward()
        return loss

    parts = Processes().run(work)
    torch.testing.assert_close(sum(part.total for part in parts) / 2, whole.total)
    assert saes[0].topk_threshold == saes[1].topk_threshold == saes[2].topk_threshold > 0
    for name, p in saes[0].named_parameters():
        mean = sum(dict(s.named_parameters())[name].grad for s in saes[1:]) / 2
        torch.testing.assert_close(mean, p.grad)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_step_at_size_equals_the_dense_step(kind):
    """Float32 at a size where parts, sampling and the fast kernels are all in use."""
    n, d, f, k = 1024, 64, 8192, 16
    x = tensors((n, d), dtype=torch.float32)[0]
    sae = SAE(d_in=d, d_sae=f, architecture=kind, k=k)
    assert n * f > sparse.held(x.device)
    sae.loss(x).total.backward()
    w_enc, w_dec, b_enc, b_dec = (
        p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    pre = (x - b_dec) @ w_enc + b_enc
    ranks = pre * w_dec.norm(dim=1)
    if kind == "topk":
        keep = torch.zeros_like(pre).scatter(1, ranks.topk(k).indices, 1)
    else:
        keep = torch.zeros_like(pre).flatten().index_fill(0, ranks.relu().flatten().topk(n * k).indices, 1).view_as(pre)
    ((pre.relu() * keep) @ w_dec + b_dec - x).square().sum(1).mean().backward()
    for own, dense in ((sae.W_enc, w_enc), (sae.W_dec, w_dec), (sae.b_enc, b_enc), (sae.b_dec, b_dec)):
        assert (own.grad - dense.grad).norm() < 1e-4 * dense.grad.norm()


def test_steps_are_the_same_bit_for_bit():
    x = tensors((600, 64), dtype=torch.float32)[0]
    found = []
    for _ in range(2):
        sae = SAE(d_in=64, d_sae=1024, architecture="batchtopk", k=8)
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for _ in range(4):
            sae.loss(x).total.backward()
            optimiser.step()
            optimiser.zero_grad()
        found.append(sae.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
