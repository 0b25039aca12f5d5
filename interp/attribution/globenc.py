"""GlobEnc: rollout of the norms of what each position takes from each other one in a whole block.

Source: Modarressi, Fayyaz, Yaghoobzadeh and Pilehvar 2022, "GlobEnc: Quantifying Global Token Attribution by
Incorporating the Whole Encoder Layer in Transformers" (arXiv 2205.03286), and the authors' code
(mohsenfayyaz/GlobEnc). With x_j the stream that enters a layer, v_j^h the values, A^h the attention of head h and W_O^h
its part of the output projection; with s_i and s'_i the scales of the two norms at position i, taken from the true
vectors; and with L(f, s) = s (f - mean(f)) * gain,

    f_ij = sum over heads of A^h_ij v_j^h W_O^h          matrix "N":       |f_ij|
    r_ij = f_ij + [i = j] x_i                            matrix "N-Res":   |r_ij|
    g_ij = L_1(r_ij, s_i)                                matrix "N-ResLN": |g_ij|
    h_ij = L_2(g_ij, s'_i)                               matrix "N-Enc":   |h_ij|, which is GlobEnc
    scores = row of rownorm(M_L) ... rownorm(M_1)        with M_l the matrix of layer l

The MLP is skipped; the residual connection around it and its part in s'_i are kept. Biases of the projection and of
norms belong to no source: `settings["bias"]` has their norm as a share of the row's sum, as a mean for each layer.

Models with the norm before the block (decoders of today, vision transformers). With the patterns fixed, attention is
linear in the values, and each value has the norm of its own source in it, with that source's own statistics. So

    resid_mid_i = x_i + sum_j f_ij + bias = sum_j r_ij + bias

holds exactly, and the stream goes on without a norm: M_ij = |r_ij|, and "N-Res", "N-ResLN" and "N-Enc" are the same.
What lies between the projection and the stream is part of f_ij: LayerScale and other constant factors, and norms behind
the projection (Gemma 2, OLMo 2), frozen at the scale of the true vector. Where attention and MLP read the same stream,
the sum is x_i plus what attention adds. The equation is checked in every run (`settings["gap"]` is the largest relative
error); models that put a gate on the heads fail it and are refused.

The tensor [head, T, T, d_model] of the authors' code is never made. f_ij enters the matrices through norms alone, and
all that later norms and factors do alike at every position is one matrix K. With U_j^h = v_j^h W_O^h K and the Gram
matrix G_j[h, h'] = <U_j^h, U_j^h'> of each source, |sum_h A^h_ij U_j^h|^2 = A_ij^T G_j A_ij for i != j, which takes
T^2 H^2 steps. Only the vectors i = j are made, and only rows that the targets reach are computed.

Departures. As in the paper and not as in the code, rows are divided by their sums in each layer. `normalise=False` has
the code's product of bare norms; there only the row at the end is divided by its sum, since the size of such products
means nothing. The code multiplies padded columns by the exponential of the mask; here attention has exact zeros there.

What it does not see: MLPs, cross-attention (a decoder has only its own tokens as sources), the last norm, and how
queries and keys came about. A norm has no sign: contributions that cancel count twice. Where no norm follows the sum,
the stream grows with depth and a position seems to take mostly from itself: in SmolLM2 its own part is about 80 to 95%
of a row from the sixth layer on, and the first token still collects most of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.common import (
    chosen_layers,
    chosen_targets,
    entries_of,
    settings_of,
    stream_of,
    token_scores,
)
from interp.attribution.rollout import start_rows
from interp.batch import Batch, select
from interp.errors import UnsupportedError, unknown
from interp.lens import Entry, Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores

Matrix = Literal["N", "N-Res", "N-ResLN", "N-Enc"]
PLACES: dict[str, Literal["attn", "mid", "post"]] = {"N": "attn", "N-Res": "attn", "N-ResLN": "mid", "N-Enc": "post"}
BRANCHES = {"attn": "attn_out", "cross": "attn_out", "mlp": "mlp_out", "mixer": "mixer_out"}


def globenc(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions = "last",
    layers: int | Sequence[int] | None = None,
    matrix: Matrix = "N-Enc",
    normalise: bool = True,
    tower: str | None = None,
    memory: int = 2**26,
) -> TokenScores:
    """How much of each target position comes from each source token, by the norms of what whole blocks hand on.

    Args:
        lens: a model whose patterns and output projections can be read.
        batch: prompts.
        target: positions as in a read, in the same tower (for a vision tower 0 is the class token).
        layers: None for all; an int for all up to that one; or a list of layers.
        matrix: `N-Enc` for the whole block; `N-ResLN` without the norm behind the MLP, `N-Res` without both norms, `N`
            also without the residual connection.
        normalise: divide the rows of every layer's matrix by their sums, as the paper does and the code does not.
        tower: which tower of self-attention; None for the main one.
        memory: bytes of attention and of what is made from it held at a time, for the whole batch; at least one row of
            one layer with all heads is.

    Returns:
        Scores [batch, target, source]; every row sums to one, and a decoder's future tokens have exactly zero.

    Raises:
        UnknownNameError: a layer, tower, position or matrix does not exist.
        SettingsError: an empty list of layers, or one that names a layer twice.
        InputError: a position outside a sample.
        UnsupportedError: a layer moves information between positions without an attention pattern, its output
            projection was not found or is quantised, its attention is no plain sum over sources, or the tower is
            `cross`.
    """
    if matrix not in PLACES:
        raise unknown("matrix of GlobEnc", matrix, PLACES)
    found, kind = lens.anatomy.tower(tower)
    if kind == "cross":
        raise UnsupportedError("globenc is not defined for cross-attention; use raw_attention(tower='cross').")
    wanted = chosen_layers(lens, layers, tower)
    for i in wanted:
        lens.anatomy.attention(tower, i, "result").weight()  # says why there is none
    stream = stream_of(lens, batch, tower)
    chosen = chosen_targets(lens, batch, stream, target)
    rows = start_rows(chosen.index, stream.mask) * chosen.valid[..., None]
    entries = entries_of(lens, batch, wanted, found.name) if len(wanted) > 1 else {}
    bias: list[float] = []
    gap = 0.0
    for i in reversed(wanted):
        below, lost, count = torch.zeros_like(rows), 0.0, 0
        needed = (rows > 0).any(1)
        options = {"matrix": matrix, "tower": found.name, "entry": entries.pop(i, None), "memory": memory}
        for part in norm_rows(lens, batch, i, needed.cpu(), **options):
            rows, below = rows.to(part.norms.device), below.to(part.norms.device)
            total = part.norms.sum(-1)
            total = total.masked_fill(total == 0, 1)
            share = rows.gather(2, part.columns[:, None].expand(-1, rows.shape[1], -1))
            # Rows that are no more than fillers are zero in the norms.
            below += (share / total[:, None] if normalise else share) @ part.norms
            lost += float((part.bias / total)[part.valid].sum())
            count += int(part.valid.sum())
            gap = max(gap, part.gap)
        rows = below / below.sum(-1, keepdim=True).clamp_min(torch.finfo(below.dtype).tiny)
        bias.insert(0, lost / count)
    settings = settings_of(lens, batch, "globenc", layers=wanted, matrix=matrix, normalise=normalise, tower=tower)
    settings |= {"post_norm": any(found.layers[i].post_norm for i in wanted), "bias": bias, "gap": gap}
    caveat = ""
    if any("cross" in found.layers[i].branches for i in wanted):
        caveat = "what cross-attention brings into this stream is left out: only its own tokens are sources."
    return token_scores("globenc", rows, chosen, stream, settings, unit="share", caveat=caveat)


@dataclass(frozen=True, slots=True, eq=False)
class NormRows:
    """Some rows of the matrix of one layer.

    Attributes:
        columns: which rows, as columns of the stream [batch, n].
        valid: which entries are real.
        norms: the matrix's rows; zero where not valid.
        bias: the norm of what belongs to no source.
        gap: largest difference of the sum over all sources to what attention adds, relative to its largest number.
    """

    columns: Int[Tensor, "batch n"]
    valid: Bool[Tensor, "batch n"]
    norms: Float[Tensor, "batch n source"]
    bias: Float[Tensor, "batch n"]
    gap: float


def norm_rows(
    lens: Lens,
    batch: Batch,
    layer: int,
    needed: Bool[Tensor, "batch pos"],
    *,
    matrix: Matrix = "N-Enc",
    tower: str | None = None,
    entry: Entry | None = None,
    memory: int = 2**26,
) -> Iterator[NormRows]:
    """The rows of a layer's matrix that are needed, as many at a time as fit into `memory`.

    The layer is run once for its values, and once more for the patterns of each group of rows.

    Args:
        lens: the model.
        batch: the batch.
        layer: which layer.
        needed: which rows.
        matrix: which matrix.
        tower: the tower.
        entry: where the runs begin.
        memory: bytes held at a time.

    Raises:
        UnsupportedError: attention of windows, or attention that is no plain sum over sources.
    """
    found, _ = lens.anatomy.tower(tower)
    block, until = found.layers[layer], PLACES[matrix]
    n_heads = block.attention["attn"].n_heads
    size, width = needed.shape
    kinds = dict.fromkeys(["attn", *block.before_norms(until)])
    values = Read("v", layers=(layer,), tower=tower)
    whole = Read("resid_pre", layers=(layer,), tower=tower)
    branches = {k: Read(BRANCHES[k], layers=(layer,), tower="cross" if k == "cross" else tower) for k in kinds}
    trace = lens.run(batch, [values, whole, *branches.values()], entry=entry)
    v = trace.values[values, layer].float()
    if v.shape[:2] != (size, width):
        raise UnsupportedError(
            f"layer {layer} of tower {found.name!r} attends within windows: its values are {list(v.shape)}, not "
            f"[{size}, {width}, head, d_head]; globenc needs one pattern over the whole stream."
        )
    v = v.repeat_interleave(n_heads // v.shape[2], 2)
    stream = trace.values[whole, layer]
    added = {k: trace.values[read, layer] for k, read in branches.items()}
    del trace
    grams: Tensor | None = None
    rank = needed.cumsum(1) - 1
    # The pattern, its transpose, its product with the Gram matrices, and what the softmax needs.
    step = max(1, memory // (16 * size * n_heads * width))
    for first in range(0, int(needed.sum(1).max()), step):
        some = needed & (rank >= first) & (rank < first + step)
        read = Read("pattern", layers=(layer,), positions=some, tower=tower)
        pattern = lens.run(batch, read, entry=entry).values[read, layer].float()
        at = select(some.to(pattern.device), needed)
        mixed = (pattern @ v.transpose(1, 2)).transpose(1, 2)
        here = {k: _rows(x, at.index) for k, x in added.items()}
        linear = block.linear(mixed, _rows(stream, at.index), here, until=until)
        gap = _gap(linear.attention, here["attn"], at.valid)
        if not gap <= (1e-3 if lens.dtype in (torch.float32, torch.float64) else 5e-2):
            raise UnsupportedError(
                f"layer {layer} of tower {found.name!r}: attention probabilities times values through the output "
                f"projection miss what attention adds by {gap:.1e}. Its attention is no plain sum over sources (a gate "
                "or a norm between heads and projection?), so there is nothing to take apart."
            )
        if grams is None:
            grams = gram(v, linear.weight, max(1, memory // (4 * size * n_heads * linear.weight.shape[2])))
        norms = linear.scale * mixed_norms(pattern, grams)
        if matrix != "N":
            column = at.index[..., None]
            own = pattern.gather(3, column[:, None].expand(-1, n_heads, -1, -1))[..., 0].mT[..., None]
            vectors = torch.einsum("bnhv,hvd->bnd", own * _rows(v, at.index), linear.weight)
            vectors = linear.scale * vectors + linear.residual
            norms.scatter_(2, column, vectors.norm(dim=-1, keepdim=True))
        del pattern, mixed
        norms.masked_fill_(~at.valid[..., None], 0)
        yield NormRows(at.index, at.valid, norms, linear.bias.norm(dim=-1), gap)


def gram(
    values: Float[Tensor, "batch source head d_value"], weight: Float[Tensor, "head d_value d_model"], step: int
) -> Float[Tensor, "batch source head head"]:
    """The inner products of what the heads make of each source, `step` sources at a time."""
    out = []
    for some in values.split(step, 1):
        vectors = torch.einsum("bjhv,hvd->bjhd", some, weight)
        out.append(vectors @ vectors.mT)
    return torch.cat(out, 1)


def mixed_norms(
    pattern: Float[Tensor, "batch head n source"], grams: Float[Tensor, "batch source head head"]
) -> Float[Tensor, "batch n source"]:
    """The norm of the sum over heads of attention times vector, from the vectors' Gram matrices."""
    by_source = pattern.permute(0, 3, 2, 1).contiguous()
    square = (by_source @ grams).mul_(by_source).sum(-1)
    # Rounding may bring a square below zero where heads cancel.
    return square.clamp_min_(0).sqrt_().mT.contiguous()


def _rows(x: Tensor, columns: Int[Tensor, "batch n"]) -> Tensor:
    index = columns.reshape(*columns.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def _gap(found: Tensor, wanted: Tensor, valid: Tensor) -> float:
    """Largest absolute difference over the largest absolute number, at valid places."""
    found, wanted = found[valid], wanted[valid].float()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
