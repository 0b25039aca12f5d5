"""Attention rollout.

Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3, and the
authors' code (samiraabnar/attention_flow). With W_l the attention of layer l averaged over heads, a the weight of the
identity and rownorm the division of every row by its sum,

    A_l = rownorm((1 - a) W_l + a I)        rollout = A_L A_(L-1) ... A_1

The paper has a = 1/2 (`residual=0.5`); its "joint attention" is a = 0 (`residual=None`). As in the code, and unlike the
paper's formula, rows are divided by the sum that they have: it is not one in families with an attention sink of their
own, nor after `fusion="max"`.

Departures. Only the rows of the targets are computed, from the top layer down: with r a row and n the row sums,
r <- (1 - a)(r / n) W_l + a (r / n), which is O(layers x T^2) for each row instead of O(layers x T^3). Matrices are read
from the model a few at a time (`memory`), so that no more than two T x T matrices of a sample exist at once, whatever
the number of layers; beside them one residual stream [T, d_model] is kept for each group of layers. Padding is left
out. Every tower of self-attention can be rolled out. For cross-attention the paper defines nothing, and nothing is
offered here (`raw_attention(tower="cross")` gives single layers): the rollout of an encoder-decoder's decoder, or of a
text tower that sees images through cross-attention, stays among its own tokens.

What it does not see: values, output projections, MLPs and signs. With depth it tends to the same row for every target;
`settings["entropy"]` holds the mean entropy of the rows as a share of the largest possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.common import (
    Fusion,
    check_fusion,
    chosen_layers,
    chosen_targets,
    fused_patterns,
    residual_weight,
    settings_of,
    stream_of,
    token_scores,
)
from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.lens import Lens
from interp.reads import Positions
from interp.tokens import TokenScores


def rollout(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions = "last",
    layers: int | Sequence[int] | None = None,
    residual: float | None = 0.5,
    fusion: Fusion = "mean",
    tower: str | None = None,
    memory: int = 2**22,
) -> TokenScores:
    """How much of each target position comes from each source token, if attention and residual were all there is.

    Args:
        lens: a model whose patterns can be read.
        batch: prompts.
        target: positions as in a read, in the same tower (for a vision tower 0 is the class token).
        layers: None for all; an int for all up to that one (the paper's rollout at a layer); or a list of layers.
        residual: weight of the identity, from 0 to below 1; None is 0.
        fusion: `mean`, `max` or `min` over heads.
        tower: which tower of self-attention; None for the main one.
        memory: bytes of matrices held at a time for each sample; at least one matrix is.

    Returns:
        Scores [batch, target, source]; every row sums to one, and a decoder's future tokens have exactly zero.

    Raises:
        UnknownNameError: a layer, tower, position or fusion does not exist.
        SettingsError: `residual` is out of range.
        InputError: a position outside a sample.
        UnsupportedError: a layer moves information between positions without an attention pattern, or the tower is
            `cross`.
    """
    check_fusion(fusion)
    weight = residual_weight(residual)
    if lens.anatomy.tower(tower)[1] == "cross":
        raise UnsupportedError("rollout is not defined for cross-attention; use raw_attention(tower='cross').")
    wanted = chosen_layers(lens, layers, tower)
    stream = stream_of(lens, batch, tower)
    chosen = chosen_targets(lens, batch, stream, target)
    rows = start_rows(chosen.index, stream.mask)
    options = {"fusion": fusion, "tower": tower, "memory": memory, "width": stream.mask.shape[1]}
    for _, pattern in fused_patterns(lens, batch, wanted, **options):
        rows = rolled(rows.to(pattern.device), pattern, weight)
        del pattern  # before the next one is made
    settings = settings_of(lens, batch, "rollout", layers=wanted, residual=weight, fusion=fusion, tower=tower)
    settings["entropy"] = entropy(rows.cpu()[chosen.valid], stream.mask[chosen.valid.nonzero()[:, 0]])
    return token_scores("rollout", rows, chosen, stream, settings, unit="share")


def start_rows(columns: Tensor, mask: Tensor) -> Float[Tensor, "batch target pos"]:
    """A row for each target, with one at its own column."""
    return torch.nn.functional.one_hot(columns, mask.shape[1]).float()


def rolled(
    rows: Float[Tensor, "batch target pos"], pattern: Float[Tensor, "batch pos pos"], weight: float
) -> Float[Tensor, "batch target pos"]:
    """Rows carried through one layer downwards: rows @ rownorm((1 - weight) pattern + weight I), never made whole."""
    total = (1 - weight) * pattern.sum(-1) + weight
    # Rows of padding sum to zero; nothing that is real leads there.
    share = rows / total.masked_fill(total == 0, 1)[:, None]
    return (1 - weight) * (share @ pattern) + weight * share


def entropy(rows: Float[Tensor, "n pos"], mask: Tensor) -> float:
    """Mean entropy of rows as a share of the largest that their number of sources allows; 1 for equal shares."""
    found = -(rows * rows.clamp_min(1e-30).log()).sum(-1)
    return float((found / mask.sum(-1).clamp_min(2).log()).mean())
