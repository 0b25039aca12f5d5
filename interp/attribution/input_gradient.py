"""Input gradients: how strongly the answer's logit moves with each input vector.

Source: Simonyan, Vedaldi, Zisserman 2014, "Deep Inside Convolutional Networks" (arXiv 1312.6034), for `input_gradient`;
Denil, Demiraj, de Freitas 2014 (arXiv 1412.6815) and Shrikumar et al. 2016 (arXiv 1605.01713) for `gradient_x_input`.
With x_j the vector of token j, y the answer's logit and g_j = dy / dx_j,

    input_gradient(j) = ||g_j||_2   (or the L1 norm, or the plain sum over the vector)
    gradient_x_input(j) = sum over d of g_j[d] x_j[d]

The first has no sign and no direction, the second is the first-order effect of replacing x_j by zero.

Departures. x_j are token embeddings (`site="embed"`), as is usual for text, where the model reads tokens alone. With
images, in vision towers and in encoder-decoders they are the vectors that enter the first layer
(`site="resid_pre"`): an image token's embedding as the language tower gets it, or a patch's with its place. Pixels
themselves are no site of this package, so saliency is per patch or image token.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.common import Stream, settings_of, token_scores
from interp.attribution.embedded import Where, embedded
from interp.attribution.targets import MEASURES, Answers, Measure, Question, question
from interp.batch import Batch
from interp.errors import unknown
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores

NORMS = ("l2", "l1", "sum")


def input_gradient(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    norm: Literal["l2", "l1", "sum"] = "l2",
    measure: Measure = "logit",
    site: Where | None = None,
    tower: str | None = None,
) -> TokenScores:
    """The size of the gradient at each source token. One forward and backward pass for each target.

    Args:
        lens: a model with logits.
        batch: prompts.
        target: positions as in a read, whose logits are explained; None for the last one (a classifier's logits belong
            to the whole input).
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their number is subtracted.
        norm: `l2`, `l1`, or `sum` with its sign.
        measure: what is differentiated: `logit`, `probability` or `logprob`.
        site: `embed` or `resid_pre` of the first layer; None chooses, see above.
        tower: where the sources stand: None for the main tower, or the encoder of an encoder-decoder.

    Returns:
        Scores [batch, target, source], in units of the measure per unit of the vectors; a decoder's future tokens have
        exactly zero.

    Raises:
        UnknownNameError: a norm, measure, site, tower, position or class does not exist.
        SettingsError: a wrong answer without an answer, or `embed` where it is not all of the input.
        InputError: a position outside a sample, or answers that do not fit.
        UnsupportedError: no logits, or a tower whose rows are not the samples.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    asked = question(lens, batch, target, answers, wrong, measure=measure)
    read, _, sources = embedded(lens, batch, asked, site, tower)
    rows: list[Tensor] = []
    for t in range(len(asked)):
        _, gradient = value_and_gradient(lens, batch, asked, t, read)
        if norm == "sum":
            rows.append(gradient.sum(-1))
        else:
            rows.append(torch.linalg.vector_norm(gradient, 2 if norm == "l2" else 1, dim=-1))
    return input_scores(lens, batch, "input_gradient", rows, asked, sources, read, norm=norm)


def gradient_x_input(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    measure: Measure = "logit",
    site: Where | None = None,
    tower: str | None = None,
) -> TokenScores:
    """Gradient times input at each source token. One forward and backward pass for each target.

    Args:
        lens: a model with logits.
        batch: prompts.
        target: positions as in a read, whose logits are explained; None for the last one (a classifier's logits belong
            to the whole input).
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their number is subtracted.
        measure: what is differentiated: `logit`, `probability` or `logprob`.
        site: `embed` or `resid_pre` of the first layer; None chooses, see above.
        tower: where the sources stand: None for the main tower, or the encoder of an encoder-decoder.

    Returns:
        Scores [batch, target, source] with their sign, in units of the measure; a decoder's future tokens have exactly
        zero.

    Raises:
        UnknownNameError: a measure, site, tower, position or class does not exist.
        SettingsError: a wrong answer without an answer, or `embed` where it is not all of the input.
        InputError: a position outside a sample, or answers that do not fit.
        UnsupportedError: no logits, or a tower whose rows are not the samples.
    """
    asked = question(lens, batch, target, answers, wrong, measure=measure)
    read, _, sources = embedded(lens, batch, asked, site, tower)
    rows: list[Tensor] = []
    for t in range(len(asked)):
        value, gradient = value_and_gradient(lens, batch, asked, t, read)
        rows.append((value * gradient).sum(-1))
    return input_scores(lens, batch, "gradient_x_input", rows, asked, sources, read)


def value_and_gradient(
    lens: Lens, batch: Batch, asked: Question, t: int, read: Read, edits: tuple = ()
) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos d"]]:
    """The input vectors and the gradient of one target's number, in float32 or wider."""
    trace = lens.run(batch, [read], edits, gradients=[read], metric=asked.metric(t))
    ((key, value),) = trace.values.items()
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide), trace.gradients[key].to(wide)


def input_scores(
    lens: Lens,
    batch: Batch,
    name: str,
    rows: list[Tensor],
    asked: Question,
    sources: Stream,
    read: Read,
    caveat: str = "",
    **more: object,
) -> TokenScores:
    """A result from one row [batch, source] for each target."""
    settings = settings_of(lens, batch, name, site=str(read), **more) | asked.settings(lens)
    of = None if sources is asked.stream else asked.stream
    unit = MEASURES[asked.measure]
    unit = f"{unit} per unit" if name == "input_gradient" else unit
    return token_scores(name, torch.stack(rows, 1), asked.chosen, sources, settings, of=of, unit=unit, caveat=caveat)
