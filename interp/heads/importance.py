"""Head importance by the gradient of a head mask.

Source: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", arXiv 1905.10650, equation 2:

    I(h) = E_x | dL(x) / d xi_h | = E_x | Att_h(x)^T dL(x) / dAtt_h(x) |,   xi_h multiplying the head's output

All heads cost one backward pass: the derivative with respect to the mask is the sum of z * dL/dz. The absolute value is
taken per example, as the paper writes; its code takes it per token (`absolute="token"`). The code normalises within
each layer by the L2 norm (`normalize="layer"`), which forces equal mass on all layers, so here the default is none.
The signed derivative is kept beside it: where it is positive, the loss falls when the head is weakened.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from interp.batch import Batch
from interp.edits import Edit
from interp.errors import unknown
from interp.heads.common import Answers, chosen_metric, head_grid, head_scores, settings_of
from interp.lens import Lens
from interp.scores import HeadScores


def importance(
    lens: Lens,
    batch: Batch,
    *,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    absolute: Literal["example", "token"] = "example",
    normalize: Literal["none", "layer", "global"] = "none",
    edits: Iterable[Edit | Iterable[Edit]] = (),
) -> HeadScores:
    """Sensitivity of the loss (or of a logit difference) to each head.

    Args:
        lens: a model with logits.
        batch: prompts.
        answers: right next tokens; with them the metric is the logit (difference) at the last position, without
            them the mean next-token loss.
        wrong: wrong next tokens.
        absolute: take the absolute value per example (paper) or per token (reference code).
        normalize: divide by the L2 norm of each layer, of all heads, or not at all.
        edits: what is changed in the model meanwhile; a head whose output is zero has importance zero.

    Returns:
        Scores [layer, head] with `per_prompt`, and the mean signed derivative as the extra column `signed`.

    Raises:
        UnknownNameError: an unknown option value.
        UnsupportedError: the model has no logits or no readable heads.
    """
    if absolute not in ("example", "token"):
        raise unknown("absolute", absolute, ("example", "token"))
    if normalize not in ("none", "layer", "global"):
        raise unknown("normalize", normalize, ("none", "layer", "global"))
    metric, unit = chosen_metric(lens, batch, answers, wrong)
    layers, counts, valid = head_grid(lens)
    site = f"z.{','.join(map(str, layers))}"
    trace = lens.run(batch, [site], edits, gradients=[site], metric=metric)
    per_prompt = torch.zeros(len(batch), *valid.shape)
    signed = torch.zeros(valid.shape)
    for layer in layers:
        z, gradient = trace["z", layer].float(), trace.gradient("z", layer).float()
        by_token = (z * gradient).sum(-1)
        if by_token.shape[:2] == batch.mask.shape:
            by_token = by_token.masked_fill(~batch.mask[..., None], 0.0)
        derivative = by_token.sum(1)
        value = derivative.abs() if absolute == "example" else by_token.abs().sum(1)
        per_prompt[:, layer, : counts[layer]] = value.cpu()
        signed[layer, : counts[layer]] = derivative.mean(0).cpu()
    scores = per_prompt.mean(0)
    if normalize == "layer":
        size = scores.norm(dim=1, keepdim=True).clamp_min(1e-20)
        scores, per_prompt = scores / size, per_prompt / size
    elif normalize == "global":
        size = scores.norm().clamp_min(1e-20)
        scores, per_prompt = scores / size, per_prompt / size
    settings = settings_of(lens, batch, method="importance", metric=unit, absolute=absolute, normalize=normalize)
    unit = f"|d {unit} / d mask|" if normalize == "none" else "normalised"
    return head_scores("importance", unit, per_prompt, valid, settings, lens.anatomy.main, extra={"signed": signed})
