"""Integrated gradients.

Source: Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks" (arXiv 1703.01365), equation 1. With x
the input vectors, b the baseline and y the answer's number,

    score(j) = sum over d of (x_j[d] - b_j[d]) * integral from 0 to 1 of dy/dx_j[d] at b + a (x - b) da

By the theorem of that paper the scores of a row sum to y(x) - y(b).

Departures. The integral is taken with Gauss-Legendre points, which for smooth functions need far fewer steps than the
paper's sum of equal ones. What is missing from the theorem's sum is measured: `settings["gap"]` holds y(x) - y(b) less
the sum of scores, for each sample and target, and `settings["difference"]` y(x) - y(b) itself; a large gap asks for
more steps. Only the vectors move along the path: what the model adds to them later (places at `site="embed"`) stays.
The vectors are those of `input_gradient`.

The baseline that the paper takes for text is zero. In models that begin with an RMSNorm (Llama, Qwen, Gemma) that is a
singular point: the norm undoes any shrinking until almost nothing is left, all change happens in a tiny part of the
path, and the gap stays as large as the scores whatever the steps. So the default here is `mean`. A gap above 5% of the
difference is told in the result's caveat.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.common import Stream
from interp.attribution.embedded import Where, embedded
from interp.attribution.input_gradient import input_scores, value_and_gradient
from interp.attribution.targets import Answers, Measure, question
from interp.batch import Batch
from interp.edits import Edit, patch
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.inputs import pad_id, tokenizer_of
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores

BASELINES = ("mean", "zero", "pad")


def integrated_gradients(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    steps: int = 32,
    baseline: Literal["mean", "zero", "pad"] | Float[Tensor, " d"] | Float[Tensor, "batch pos d"] = "mean",
    measure: Measure = "logit",
    site: Where | None = None,
    tower: str | None = None,
) -> TokenScores:
    """Integrated gradients of each source token. `steps` forward and backward passes for each target.

    Args:
        lens: a model with logits.
        batch: prompts.
        target: positions as in a read, whose logits are explained; None for the last one (a classifier's logits belong
            to the whole input).
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their number is subtracted.
        steps: points on the path, at least 1.
        baseline: `mean`, of the sample's own vectors; `zero`; `pad`, the vectors of the same prompts with every
            token replaced by the padding token (special tokens too); or a tensor, one vector or all of them.
        measure: what is differentiated: `logit`, `probability` or `logprob`.
        site: `embed` or `resid_pre` of the first layer; None chooses, see `input_gradient`.
        tower: where the sources stand: None for the main tower, or the encoder of an encoder-decoder.

    Returns:
        Scores [batch, target, source] with their sign, in units of the measure; a decoder's future tokens have exactly
        zero. `settings` holds `gap` and `difference`, each [batch][target].

    Raises:
        UnknownNameError: a baseline, measure, site, tower, position or class does not exist.
        SettingsError: `steps` is no whole number of at least 1; a wrong answer without an answer; `embed` where it is
            not all of the input.
        InputError: a position outside a sample, answers that do not fit, a baseline of another shape or not finite.
        UnsupportedError: no logits, a tower whose rows are not the samples, `pad` where the tower reads no tokens.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SettingsError(f"steps is a whole number of at least 1, found {steps!r}.")
    asked = question(lens, batch, target, answers, wrong, measure=measure)
    read, layer, sources = embedded(lens, batch, asked, site, tower)
    value = lens.run(batch, [read]).values[read, layer]
    start = _baseline(lens, batch, read, layer, sources, baseline, value)
    start = torch.where(sources.mask.to(value.device)[:, :, None], start.to(value), value)
    points, weights = np.polynomial.legendre.leggauss(steps)
    points, weights = (points + 1) / 2, weights / 2
    rows: list[Tensor] = []
    wide = torch.promote_types(value.dtype, torch.float32)
    for t in range(len(asked)):
        total = torch.zeros_like(value, dtype=wide)
        for point, weight in zip(points.tolist(), weights.tolist(), strict=True):
            there = _put(read, layer, torch.lerp(start.to(wide), value.to(wide), point).to(value))
            total += weight * value_and_gradient(lens, batch, asked, t, read, tuple(there))[1]
        rows.append(((value - start).to(wide) * total).sum(-1))
    low = asked.values(lens.run(batch, Read("logits"), _put(read, layer, start)).logits).cpu()
    difference = asked.value - low
    scores = torch.stack(rows, 1).cpu().masked_fill(~sources.mask[:, None], 0)
    gap = difference - scores.sum(-1)
    room = torch.maximum(difference.abs(), scores.abs().sum(-1) / 100).clamp_min(1e-4)
    share = float((gap.abs() / room)[asked.chosen.valid].max())
    caveat = ""
    if share > 0.05:
        caveat = (
            f"the scores miss y(x) - y(baseline) by up to {share:.0%} of it: take more steps than {steps}, or another "
            "baseline."
        )
    named = baseline if isinstance(baseline, str) else f"tensor {tuple(baseline.shape)}"
    more = {"steps": steps, "baseline": named, "difference": difference.tolist(), "gap": gap.tolist()}
    return input_scores(lens, batch, "integrated_gradients", rows, asked, sources, read, caveat, **more)


def _put(read: Read, layer: int, value: Tensor) -> list[Edit]:
    return patch(read.site, value, layer=None if layer < 0 else layer, tower=read.tower)


def _baseline(
    lens: Lens, batch: Batch, read: Read, layer: int, sources: Stream, baseline: str | Tensor, value: Tensor
) -> Tensor:
    """The baseline's vectors [batch, pos, d]."""
    if isinstance(baseline, Tensor):
        fits = tuple(baseline.shape) in (tuple(value.shape), (value.shape[-1],))
        if not fits or not bool(baseline.isfinite().all()):
            raise InputError(
                f"the baseline {tuple(baseline.shape)} must be finite, of shape {tuple(value.shape)} or "
                f"{(value.shape[-1],)}."
            )
        return baseline.to(value).expand_as(value)
    if baseline not in BASELINES:
        raise unknown("baseline", baseline, (*BASELINES, "a tensor"))
    if baseline == "zero":
        return torch.zeros_like(value)
    if baseline == "mean":
        real = sources.mask.to(value)[:, :, None]
        return ((value * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)).expand_as(value)
    key = "decoder_input_ids" if sources.tower == "decoder" else "input_ids"
    ids = batch.inputs.get(key)
    if not isinstance(ids, Tensor) or ids.shape != value.shape[:2] or "image" in sources.spans:
        raise UnsupportedError(f"baseline='pad': tower {sources.tower!r} of {lens.name} reads more than tokens here.")
    tokenizer = tokenizer_of(lens.processor)
    fill = getattr(tokenizer, "pad_token_id", None)
    fill = pad_id(lens.model.config) if fill is None else fill
    padded = replace(batch, inputs={**batch.inputs, key: torch.full_like(ids, fill)})
    return lens.run(padded, [read]).values[read, layer]
