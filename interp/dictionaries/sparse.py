"""Few active latents: their selection, and encoder and decoder that touch no others.

With the active latents S of n tokens (k of each, in all or on average), centred input x~, and the gradient g of the
reconstruction, a training step of a top-k dictionary needs

    pre = x~ W_enc + b_enc          dense, the one large product; made in parts of rows and never held whole
    y   = sum_S v W_dec[s]          rows gathered
    dv  = <g, W_dec[s]>             for S only (a sampled product)
    dW_dec[s] = sum v g             summed by latent, after sorting S by latent
    dW_enc[:, s] = sum dv x~        the same
    db_dec = -W_enc db_enc          through the encoder: a product with a vector, for all tokens subtract the same bias

so that 5 of the 6 products of size n x d x F of the dense form fall away. Gathers and sums by latent are
`embedding_bag`s (deterministic, vectorised on the CPU), the sampled product is torch's for CSR.

The k n largest of a whole batch are found exactly: a bound from a sample leaves few candidates, a radix search over
their bits finds the threshold, on several processes too (`reduce`), and a part that was cut above it is done again.
Values equal to the threshold are all kept.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

Reduce = Callable[[Tensor, Literal["sum", "min", "max"]], Tensor]
"""Brings a tensor of every process together (an all-reduce) and returns the outcome."""

# Elements of pre-activations that are held at a time. On the CPU below 32 MiB, from where on malloc maps memory afresh
# every time, which costs as much as the product that fills it.
_HELD = {"cpu": 6 * 2**20}
_HELD_ELSEWHERE = 2**28


class Pattern:
    """Which latents are active in which token, rows after rows (CSR).

    Attributes:
        latents: indices [active].
        offsets: where each token's part begins, and the end [tokens + 1].
        d_sae: number of latents.
    """

    def __init__(self, latents: Int[Tensor, " active"], offsets: Int[Tensor, " tokens1"], d_sae: int):
        self.latents, self.offsets, self.d_sae = latents, offsets, d_sae

    @cached_property
    def tokens(self) -> Int[Tensor, " active"]:
        """The token of each active latent."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order that sorts by latent, the tokens in that order, and where each latent's part begins, with the end."""
        order = torch.argsort(self.latents, stable=True)
        return order, self.tokens[order], _offsets(torch.bincount(self.latents, minlength=self.d_sae))

    def part(self, first: int, end: int) -> tuple[Bool[Tensor, " active"], Pattern]:
        """The latents from `first` to below `end`, numbered from 0: which of the active they are, and their pattern."""
        inside = (self.latents >= first) & (self.latents < end)
        counts = torch.bincount(self.tokens[inside], minlength=len(self.offsets) - 1)
        return inside, Pattern(self.latents[inside] - first, _offsets(counts), end - first)

    def gather(self, weight: Float[Tensor, "d_sae d"], values: Float[Tensor, " active"]) -> Float[Tensor, "tokens d"]:
        """Sum over each token's latents of value times row."""
        return embedding_bag(
            self.latents, weight, self.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    def scatter(self, x: Float[Tensor, "tokens d"], values: Float[Tensor, " active"]) -> Float[Tensor, "d_sae d"]:
        """Sum over each latent's tokens of value times the token's row."""
        order, tokens, offsets = self.by_latent
        return embedding_bag(tokens, x, offsets, mode="sum", per_sample_weights=values[order], include_last_offset=True)

    def sampled(self, x: Float[Tensor, "tokens d"], weight: Float[Tensor, "d_sae d"]) -> Float[Tensor, " active"]:
        """Products of each active latent's row with its token's row."""
        if x.dtype in (torch.float32, torch.float64) and x.device.type in ("cpu", "cuda"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support")
                shape = (len(x), self.d_sae)
                zero = torch.sparse_csr_tensor(
                    self.offsets, self.latents, x.new_zeros(len(self.latents)), shape, check_invariants=False
                )
                return torch.sparse.sampled_addmm(zero, x, weight.t(), beta=0.0).values()
        step = max(1, held(x.device) // x.shape[1])
        parts = zip(self.tokens.split(step), self.latents.split(step), strict=True)
        return torch.cat([(x[t].float() * weight[s].float()).sum(1) for t, s in parts] or [x.new_zeros(0)]).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Latents of tokens where few are active.

    Attributes:
        values: of the active latents [active]; some may be zero.
        pattern: which they are.
    """

    values: Float[Tensor, " active"]
    pattern: Pattern

    @property
    def shape(self) -> torch.Size:
        """Tokens and latents."""
        return torch.Size((len(self.pattern.offsets) - 1, self.pattern.d_sae))

    def dense(self) -> Float[Tensor, "tokens d_sae"]:
        """All latents, zeros too."""
        rows, latents = self.pattern.tokens, self.pattern.latents
        return self.values.new_zeros(self.shape).index_put((rows, latents), self.values)

    def counts(self) -> Int[Tensor, " d_sae"]:
        """In how many tokens each latent is active."""
        return torch.bincount(self.pattern.latents[self.values.detach() != 0], minlength=self.pattern.d_sae)


def held(device: torch.device) -> int:
    """How many pre-activations are held at a time."""
    return _HELD.get(device.type, _HELD_ELSEWHERE)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def low_precision(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for here, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    """a @ b, multiplied in the precision `low` where one is given, and returned in a's own."""
    return a @ b if low is None else (a.to(low) @ b.to(low)).to(a.dtype)


class _Affine(torch.autograd.Function):
    """(x - shift) W + b with the cheap gradient for shift, and none for x where none is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, low: torch.dtype | None):
        centred = x if shift is None else x - shift
        ctx.save_for_backward(centred, weight)
        ctx.low, ctx.shifted = low, shift is not None
        if low is None:
            return torch.addmm(bias, centred, weight)
        return product(centred, weight, low).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        (grad,) = grads
        centred, weight = ctx.saved_tensors
        bias = grad.sum(0)
        return (
            product(grad, weight.t(), ctx.low) if ctx.needs_input_grad[0] else None,
            -(weight @ bias) if ctx.shifted and ctx.needs_input_grad[1] else None,
            product(centred.t(), grad, ctx.low) if ctx.needs_input_grad[2] else None,
            bias if ctx.needs_input_grad[3] else None,
            None,
        )


class _Selected(torch.autograd.Function):
    """Pre-activations that were computed already, with the encoder's gradient of these only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, pattern: Any):
        ctx.save_for_backward(x, shift, weight)
        ctx.pattern = pattern
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        (grad,) = grads
        x, shift, weight = ctx.saved_tensors
        pattern, grad = ctx.pattern, grad.contiguous()
        bias = pattern.scatter(x.new_ones(len(x), 1), grad)[:, 0]
        centred = x if shift is None else x - shift
        return (
            None,
            pattern.gather(weight.t().contiguous(), grad) if ctx.needs_input_grad[1] else None,
            -(weight @ bias) if shift is not None and ctx.needs_input_grad[2] else None,
            pattern.scatter(centred, grad).t() if ctx.needs_input_grad[3] else None,
            bias if ctx.needs_input_grad[4] else None,
            None,
        )


class _Decode(torch.autograd.Function):
    """Sum of the active latents' rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: Any):
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return pattern.gather(weight, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any):
        values, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        return (
            ctx.pattern.sampled(grad, weight) if ctx.needs_input_grad[0] else None,
            ctx.pattern.scatter(grad, values) if ctx.needs_input_grad[1] else None,
            None,
        )


def affine(
    x: Float[Tensor, "tokens d_in"],
    shift: Float[Tensor, " d_in"] | None,
    weight: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
    low: torch.dtype | None = None,
) -> Float[Tensor, "tokens d_sae"]:
    """All pre-activations, (x - shift) weight + bias; the product in the precision `low` where one is given."""
    return _Affine.apply(x, shift, weight, bias, low)  # type: ignore[return-value]


def selected(
    values: Float[Tensor, " active"],
    pattern: Pattern,
    x: Float[Tensor, "tokens d_in"],
    shift: Float[Tensor, " d_in"] | None,
    weight: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
) -> Float[Tensor, " active"]:
    """Pre-activations at a pattern, found without gradient, joined to the graph of the encoder."""
    return _Selected.apply(values, x, shift, weight, bias, pattern)  # type: ignore[return-value]


def decode(
    values: Float[Tensor, " active"], weight: Float[Tensor, "d_sae d"], pattern: Pattern
) -> Float[Tensor, "tokens d"]:
    """The decoder without its bias; gradients reach the values and the rows of active latents."""
    return _Decode.apply(values, weight, pattern)  # type: ignore[return-value]


def _parts(x: Tensor, d_sae: int) -> tuple[Tensor, ...]:
    return x.split(max(1, held(x.device) // d_sae))


def _pre_activations(
    parts: Sequence[Tensor], weight: Tensor, bias: Tensor, low: torch.dtype | None
) -> Iterator[Float[Tensor, "part d_sae"]]:
    """Of each part, in memory that the next part takes over."""
    place = parts[0].new_empty(len(parts[0]) if low is None else 0, len(bias))
    for part in parts:
        if low is None:
            yield torch.addmm(bias, part, weight, out=place[: len(part)])
        else:
            yield affine(part, None, weight, bias, low)


@torch.no_grad()
def topk_rows(
    centred: Float[Tensor, "tokens d_in"],
    weight: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    *,
    scale: Float[Tensor, " d_sae"] | None = None,
    absolute: bool = False,
    low: torch.dtype | None = None,
) -> tuple[Float[Tensor, " active"], Pattern]:
    """The k largest pre-activations of every token, ranked times `scale`, or by size whatever their sign.

    Returns:
        The pre-activations, without the scale, and the pattern.
    """
    if scale is not None:
        weight, bias = weight * scale, bias * scale
    found, latents = [], []
    for pre in _pre_activations(_parts(centred, weight.shape[1]), weight, bias, low):
        index = (pre.abs() if absolute else pre).topk(k, dim=-1, sorted=False).indices
        found.append(pre.gather(1, index))
        latents.append(index)
    index = torch.cat(latents).flatten()
    values = torch.cat(found).flatten()
    offsets = torch.arange(0, len(index) + 1, k, device=index.device)
    return values if scale is None else values / scale[index], Pattern(index, offsets, weight.shape[1])


@torch.no_grad()
def topk_batch(
    centred: Float[Tensor, "tokens d_in"],
    weight: Float[Tensor, "d_in d_sae"],
    bias: Float[Tensor, " d_sae"],
    count: int,
    *,
    scale: Float[Tensor, " d_sae"] | None = None,
    low: torch.dtype | None = None,
    reduce: Reduce | None = None,
) -> tuple[Float[Tensor, " active"], Pattern]:
    """The positive ones of the `count` largest pre-activations of a batch, ranked times `scale`.

    With `reduce`, of the batches of all processes together; `count` is then this process's share.

    Returns:
        The pre-activations, without the scale, and the pattern.
    """
    if scale is not None:
        weight, bias = weight * scale, bias * scale
    parts = _parts(centred, weight.shape[1])
    smallest = torch.finfo(centred.dtype).smallest_normal
    found, bounds = [], []
    for pre in _pre_activations(parts, weight, bias, low):
        # More than a part's fair share, for parts differ in how much they hold.
        bounds.append(max(_guess(pre, 1.5 * count / max(len(centred), 1) * len(pre)), smallest))
        found.append(_above(pre, bounds[-1]))
    total = torch.tensor(count, device=centred.device)
    whole = int(total if reduce is None else reduce(total, "sum"))
    while True:
        values = torch.cat([v for _, _, v in found])
        threshold = max(kth_largest(values, whole, reduce), smallest)
        # A part that was cut above the threshold may hold more; the threshold cannot lie below what was found now.
        short = [i for i, bound in enumerate(bounds) if bound > threshold]
        missed = torch.tensor(len(short), device=centred.device)
        if not int(missed if reduce is None else reduce(missed, "max")):
            break
        for i in short:
            bounds[i] = threshold
            found[i] = _above(affine(parts[i], None, weight, bias, low), threshold)
    starts = list(itertools.accumulate((len(part) for part in parts), initial=0))
    kept = values >= threshold
    tokens = torch.cat([t + s for (t, _, _), s in zip(found, starts, strict=False)])[kept]
    latents = torch.cat([index for _, index, _ in found])[kept]
    values = values[kept]
    pattern = Pattern(latents, _offsets(torch.bincount(tokens, minlength=len(centred))), weight.shape[1])
    return values if scale is None else values / scale[latents], pattern


def _guess(pre: Tensor, wanted: float) -> float:
    """A value that about `wanted` elements reach, from a sample of them."""
    flat = pre.flatten()
    step = 1 if len(flat) < 2**16 else next(s for s in (17, 19, 23, 29, 31, 37, 1) if pre.shape[1] % s)
    sample = flat[::step]
    return kth_largest(sample[sample > 0], max(round(wanted / step), 1))


def _above(pre: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Token, latent and value of all elements that reach a bound."""
    place = (pre >= bound).flatten().nonzero()[:, 0]
    tokens = torch.div(place, pre.shape[1], rounding_mode="floor")
    return tokens, place - tokens * pre.shape[1], pre.flatten()[place]


def kth_largest(values: Float[Tensor, " n"], k: int, reduce: Reduce | None = None) -> float:
    """The k-th largest of numbers that are not negative, on all processes together.

    0 where there are fewer than k, infinity where k is below 1.
    """
    if k < 1:
        return math.inf
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    # The bits of such numbers, read as integers, are in the same order.
    bits, high = (values.view(torch.int32), 31) if values.dtype == torch.float32 else (values.view(torch.int64), 63)
    prefix, wanted, dtype = 0, k, values.dtype
    while high > 0:
        low = max(high - 11, 0)
        digits = (bits >> low) - (prefix << (high - low))
        counts = torch.bincount(digits, minlength=1 << (high - low))
        if reduce is not None:
            counts = reduce(counts, "sum")
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, wanted))
        if place == len(from_top):
            return 0.0
        wanted -= int(from_top[place] - counts.flip(0)[place])
        digit = len(counts) - 1 - place
        bits = bits[digits == digit]
        prefix, high = (prefix << (high - low)) + digit, low
    kind = torch.int32 if dtype == torch.float32 else torch.int64
    return torch.tensor(prefix, dtype=kind).view(dtype).item()
