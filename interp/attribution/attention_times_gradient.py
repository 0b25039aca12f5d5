"""Attention times gradient: the attention of one layer, weighted by how much the answer depends on it.

The Grad-CAM baseline of Chefer, Gur, Wolf 2021 (arXiv 2103.15679), section 4, on the attention of layer l. With A_h
its probabilities and G_h = dy / dA_h the gradient of the answer's logit y,

    score(i, j) = mean over heads h of max(A_h[i, j] G_h[i, j], 0)

Departures. Their code averages the gradient over a head's positions first, as Grad-CAM does with channels, and takes
the positive part last; here both are taken for each element, as in the matrix that `relevance` multiplies over layers,
of which this is one factor. What speaks against the answer is invisible.
"""

from __future__ import annotations

import torch

from interp.attribution.common import settings_of, stream_of, token_scores
from interp.attribution.targets import Answers, question, weighted_patterns
from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.lens import Lens
from interp.reads import Positions
from interp.tokens import TokenScores


def attention_times_gradient(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    layer: int = -1,
    tower: str | None = None,
) -> TokenScores:
    """The gradient-weighted attention of the target positions in one layer. One forward and backward pass per target.

    Args:
        lens: a model with logits whose patterns can be read.
        batch: prompts.
        target: positions as in a read, whose logits are explained and whose attention is shown; None for the last one,
            or for the position that a classifier reads.
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their logits are subtracted.
        layer: which layer; negative ones count from the end.
        tower: None for the main one; `cross` for the cross-attention of a decoder.

    Returns:
        Scores [batch, target, source], not negative, in logits; a decoder's future tokens have exactly zero.

    Raises:
        UnknownNameError: a layer, tower, position or class does not exist.
        SettingsError: a wrong answer without an answer.
        InputError: a position outside a sample, or answers that do not fit.
        UnsupportedError: no logits, no pattern, or a tower that the targets do not stand in.
    """
    asked = question(lens, batch, target, answers, wrong, rows=True)
    found, kind = lens.anatomy.tower(tower)
    if found.name != asked.stream.tower:
        raise UnsupportedError(
            f"the targets stand in tower {asked.stream.tower!r} of {lens.name}, not in {found.name!r}: their attention "
            "is in that one or in 'cross'."
        )
    index = found.layer(layer).index
    lens.anatomy.attention(tower, index, "pattern")
    sources = asked.stream
    if kind == "cross":
        sources = stream_of(lens, batch, "encoder" if "encoder" in lens.anatomy.towers else "vision")
    rows = []
    for some in asked.passes():
        ((_, matrix),) = weighted_patterns(lens, batch, asked, some.start, [(tower, index)], memory=0)
        at = asked.chosen.index[:, some, None].to(matrix.device)
        rows.append(matrix.gather(1, at.expand(-1, -1, matrix.shape[2])))
    settings = settings_of(lens, batch, "attention_times_gradient", layer=index, tower=tower) | asked.settings(lens)
    of = None if sources is asked.stream else asked.stream
    name = "attention_times_gradient"
    return token_scores(name, torch.cat(rows, 1), asked.chosen, sources, settings, of=of, unit="logits")
