"""What can be told of an attention layer from what went in and what it was seen to use; see `rule`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.dictionaries.lorsa.attend import rotate
from interp.errors import UnsupportedError

CLOSE = 1e-4  # relative to the largest value: what is another tensor is further away by far


def input_of(
    layer: nn.Module, attention: nn.Module, resid: Tensor, v: Tensor, where: str
) -> tuple[nn.Module | None, Any]:
    """The module before the projections, and what gives their outputs, weights and biases for an input."""
    inside = set(attention.modules())
    others = [m for m in layer.modules() if m not in inside and not any(True for _ in m.children())]
    norms: list[nn.Module | None] = [None, *(m for m in others if all(p.ndim < 2 for p in m.parameters()))]
    best: tuple[float, nn.Module | None] = (float("inf"), None)

    def columns(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [*_projections(attention, x)]
        if not parts:
            raise UnsupportedError(f"{where} has no plain linear projections (quantised?).")
        return tuple(torch.cat(t, -1) for t in zip(*parts, strict=True))  # type: ignore[return-value]

    for norm in norms:
        try:
            x = resid if norm is None else norm(resid)
        except (TypeError, RuntimeError, ValueError):
            continue
        if not isinstance(x, Tensor) or x.shape != resid.shape:
            continue
        error = _matched(v.flatten(1), columns(x)[0])[2]
        if error < best[0]:
            best = error, norm
    if best[0] > CLOSE:
        raise UnsupportedError(
            f"{where}: its values are no linear map of its normed stream ({best[0]:.1e} away), so a Lorsa "
            "cannot have its heads."
        )
    return best[1], columns


def _projections(attention: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Output [token, n], weight [d_in, n] and bias [n] of each linear map of the stream in a module."""
    width = x.shape[-1]
    for module in attention.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or width not in weight.shape:
            continue
        bias = getattr(module, "bias", None)
        for matrix in (weight.T, weight):
            if matrix.shape[0] != width:
                continue
            b = matrix.new_zeros(matrix.shape[1]) if bias is None else bias
            if b.shape != matrix.shape[1:]:
                continue
            try:
                y = module(x)
            except RuntimeError:  # it reads something else of the same width
                continue
            if y.shape == (len(x), matrix.shape[1]) and torch.allclose(y, x @ matrix + b, rtol=1e-3, atol=1e-4):
                yield y, matrix.detach(), b.detach()
                break


def _matched(wanted: Float[Tensor, "token m"], y: Float[Tensor, "token n"]) -> tuple[Tensor, Tensor, float]:
    """For each column the one of y that is most nearly a multiple of it, the factor, and the largest relative error."""
    a, b = (nn.functional.normalize(t.double(), dim=0) for t in (wanted, y))
    index = torch.cdist(a.T, b.T).argmin(1)
    near = y.double()[:, index]
    factor = (near * wanted).sum(0) / near.square().sum(0).clamp_min(1e-30)
    error = (near * factor - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return index, torch.where((factor - 1).abs() < 1e-5, 1.0, factor).to(y.dtype), float(error)


def linear(wanted: Tensor, y: Tensor, weight: Tensor, bias: Tensor, what: str, where: str) -> tuple[Tensor, Tensor]:
    """Weights [head, d_in, d] and biases [head, d] of what equals columns of the projections."""
    index, factor, error = _matched(wanted.flatten(1), y)
    if error > CLOSE:
        raise UnsupportedError(f"{where}: its {what} are no plain linear map of its input ({error:.1e} away).")
    heads, d = wanted.shape[1:]
    w = (weight[:, index] * factor).view(-1, heads, d).transpose(0, 1).contiguous()
    return w, (bias[index] * factor).view(heads, d).clone()


def projected(
    wanted: Tensor, y: Tensor, weight: Tensor, bias: Tensor, module: nn.Module, what: str, where: str
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Weights, biases, gains and eps of queries or keys at the first position."""
    error = _matched(wanted.flatten(1), y)[2]
    if error <= CLOSE:
        return *linear(wanted, y, weight, bias, what, where), None, 1e-6
    heads, d = wanted.shape[1:]
    sizes = {float(getattr(m, n)) for m in module.modules() for n in ("eps", "variance_epsilon") if hasattr(m, n)}
    weights, biases, gains, worst, used = [], [], [], error, 1e-6
    for eps in sorted(sizes | {1e-6}):
        w, b, g, errors = [], [], [], []
        for head in range(heads):
            best = (float("inf"), 0, wanted.new_zeros(d))
            for start in range(0, y.shape[1] - d + 1, d):
                block = y[:, start : start + d].double()
                u = block * torch.rsqrt(block.square().mean(-1, keepdim=True) + eps)
                gain = (u * wanted[:, head]).sum(0) / u.square().sum(0).clamp_min(1e-30)
                gap = float((u * gain - wanted[:, head]).abs().max() / wanted.abs().max())
                if gap < best[0]:
                    best = gap, start, gain.to(y.dtype)
            errors.append(best[0])
            cut = slice(best[1], best[1] + d)
            w.append(weight[:, cut])
            b.append(bias[cut])
            g.append(best[2])
        if max(errors) < worst:
            weights, biases, gains, worst, used = w, b, g, max(errors), eps
    if worst > CLOSE:
        raise UnsupportedError(
            f"{where}: its {what} are neither a plain linear map of its input, nor one with a norm of each head "
            f"({worst:.1e} away)."
        )
    return torch.stack(weights), torch.stack(biases).clone(), torch.stack(gains), used


def rotation(
    raw: Float[Tensor, "token head d"],
    turned: Float[Tensor, "token head d"],
    positions: Tensor,
    length: int,
    where: str,
) -> tuple[Tensor, Tensor, str]:
    """Cosine and sine of each pair at each position, and how coordinates are paired."""
    size = turned.abs().max()
    moved = ((turned - raw).abs().amax((0, 1)) > 1e-5 * size).nonzero()[:, 0]
    if not len(moved):
        return raw.new_zeros(length, 0), raw.new_zeros(length, 0), "half"
    best: tuple[float, Any] = (float("inf"), None)
    least = int(moved.max()) + 1
    for dim in range(least + least % 2, raw.shape[-1] + 1, 2):
        for pairing in ("half", "interleaved"):
            a, b = _pairs(raw[..., :dim].double(), pairing)
            c, d = _pairs(turned[..., :dim].double(), pairing)
            sums = torch.zeros(2, length, dim // 2, dtype=torch.float64, device=raw.device)
            sums[0].index_add_(0, positions, (a * c + b * d).sum(1))
            sums[1].index_add_(0, positions, (a * d - b * c).sum(1))
            cos, sin = sums / sums.norm(dim=0).clamp_min(1e-30)
            found = rotate(raw[None], cos[positions][None], sin[positions][None], pairing)[0]
            error = float((found - turned).abs().max() / size)
            if error < best[0]:
                best = error, (cos.to(raw.dtype), sin.to(raw.dtype), pairing)
    if best[0] > CLOSE:
        raise UnsupportedError(f"{where}: its positions are no rotation of pairs of coordinates ({best[0]:.1e} away).")
    return best[1]


def _pairs(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]) if pairing == "half" else (x[..., 0::2], x[..., 1::2])


def capped(r: Tensor, s: Tensor) -> tuple[float, float]:
    """Scale and cap of cap tanh(scale r / cap), by Gauss-Newton steps in their logarithms."""
    near = r.abs() <= r.abs().quantile(0.1)
    scale = (r[near] * s[near]).sum() / r[near].square().sum().clamp_min(1e-30)
    place = torch.stack([scale.clamp_min(1e-6), s.abs().max() * 1.01]).log()
    for _ in range(60):
        scale, cap = place.exp()
        t = torch.tanh(r * scale / cap)
        slope = (1 - t.square()) * r * scale
        jacobian = torch.stack([slope, cap * t - slope], 1)
        gram = jacobian.T @ jacobian
        gram = gram + 1e-9 * gram.diagonal().mean() * torch.eye(2).to(gram)
        place = place + torch.linalg.solve(gram, jacobian.T @ (s - cap * t)).clamp(-0.5, 0.5)
    return float(place[0].exp()), float(place[1].exp())


def mask(
    finite: Bool[Tensor, "batch head query key"], inner: Bool[Tensor, "batch head query key"], where: str
) -> tuple[bool, int | None]:
    """Whether it is causal, and its window."""
    n = finite.shape[-1]
    column = torch.arange(n, device=finite.device)
    away = column[:, None] - column
    seen = finite & inner
    causal = not bool((seen & (away < 0)).any())
    window = int(away.abs().expand_as(seen)[seen].max()) + 1
    expected = inner & (away.abs() < window) & ((away >= 0) if causal else (away == away))
    if not torch.equal(seen, expected):
        raise UnsupportedError(f"{where}: what a position sees is neither all, nor all earlier, nor a window.")
    return causal, window if bool((inner & (away.abs() >= window)).any()) else None
