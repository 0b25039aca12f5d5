"""Relative attention: where one layer looks for this question, and not for any (the maps behind ViCrop).

Source: Zhang, Khayatkhoei, Chhikara, Ilievski 2025, "MLLMs Know Where to Look: Training-free Perception of Small Visual
Details with Multimodal LLMs" (arXiv 2502.17422), section 4, and the authors' code (saccharomycetes/mllms_know). With A
the attention of the prompt's last token to the image tokens in one layer, q the question, g a general instruction over
the same images ("describe the image"), and y the log-probability of the answer's first token,

    relative         mean over heads of A(q) / mean over heads of A(g)                                (rel-att)
    gradient         mean over heads of A(q) max(0, dy / dA(q))                                      (grad-att)
    pixel_gradient   the pixels' ||dy / dx||_2 over channels under q, divided by that under g, times a mask of
                     fine detail, averaged over the pixels of each token                             (pure-grad)

Departures
- Nothing keeps a divisor from zero in the code. Here a share of its own mean over the sample's image is added to it:
  A(q) / (A(g) + epsilon mean A(g)).
- The mask of fine detail is made of the pixels as the model gets them; the code blurs the resized picture before it is
  normalised, which weights the colours differently.
- The layer: the paper chose one for each model by its results (14 of 32 in LLaVA-1.5-7B, 22 of 28 in Qwen2.5-VL-7B).
  None takes the one at half depth, near the first; sweep it on data that is not reported.
- For BLIP's kind of model the paper also multiplies by the attention of the connector; here images have to stand in
  the text.

Text tokens have zero. `relative` stops at its layer, and reads one row; the others need a forward and a backward pass,
`pixel_gradient` twice.

What it does not see: attention is not influence. The quotient cancels what draws attention under every prompt (sinks,
borders), and with it an object that the general instruction is about as much as the question. The packaged `scenes`
answers "describe the image ." by a list of objects, so dividing by it takes them away: asked after an object, the best
patch at half depth has 1 % of its pixels in the mask (chance 2 %, plain attention 18 %); with the question after the
background's colour in its place it is 19 %. The gradient form at the word in a caption, in layer 4: 53 %.
`crop_box` finds the window to look at again.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.common import chosen_targets, settings_of, stream_of, token_scores
from interp.attribution.pixel_gradient import pixel_gradient, pixel_grid
from interp.attribution.targets import Answers, Question, question, weighted
from interp.batch import Batch
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores

Form = Literal["relative", "gradient", "pixel_gradient"]
UNITS = {"relative": "ratio", "gradient": "nats", "pixel_gradient": "ratio"}


def relative_attention(
    lens: Lens,
    batch: Batch,
    *,
    general: Batch | None = None,
    form: Form = "relative",
    layer: int | None = None,
    target: Positions = "last",
    answers: Answers | None = None,
    epsilon: float = 1e-3,
) -> TokenScores:
    """Where the model looks in its images for this question.

    Args:
        lens: an LVLM whose image tokens stand in its text.
        batch: questions with images.
        general: the same images in the same order with a general instruction instead of the question, prepared alike;
            read at its last token. For every form but `gradient`.
        form: `relative`, `gradient` or `pixel_gradient`, see above.
        layer: the layer whose attention is read, negative from the end; None for the one at half depth. Not for
            `pixel_gradient`.
        target: positions of the questions as in a read.
        answers: for the gradients: for each sample a text of one token or an id, or one for each target; None for the
            most likely token. That of the general instruction is always its most likely token.
        epsilon: what is added to a divisor, as a share of its mean over the sample's image tokens, or pixels.

    Returns:
        Scores [batch, target, source], not negative: quotients, or nats for `gradient`; zero for text tokens, and for
        image tokens without a place of their own under `pixel_gradient`.

    Raises:
        UnknownNameError: a form, layer or position does not exist.
        SettingsError: options that do not belong to the form, or `epsilon` is not above zero.
        InputError: no image tokens, other images under the general instruction, or answers that do not fit.
        UnsupportedError: no pattern in this layer, no attention to the images there, or pixels that cannot be mapped to
            the tokens.
    """
    _check_options(form, general, layer, answers, epsilon)
    image = batch.span("image")
    if general is not None:
        check_same_images(batch, general)
    tower = lens.anatomy.towers[lens.anatomy.main]
    index = len(tower.layers) // 2 if layer is None else tower.layer(layer).index
    more: dict[str, Any] = {"form": form, "layer": None if form == "pixel_gradient" else index}
    stream = stream_of(lens, batch)
    chosen = chosen_targets(lens, batch, stream, target)
    if general is not None:
        more |= {"epsilon": float(epsilon), "general": None if general.texts is None else list(general.texts)}
    asked = None if form == "relative" else question(lens, batch, target, answers, None, measure="logprob")
    if asked is None:
        assert general is not None
        maps = _relative(lens, batch, general, index, target, epsilon)
    else:
        more |= asked.settings(lens)
        if general is None:
            maps = _gradient(lens, batch, asked, index)
        else:
            maps = _pixels(lens, batch, general, asked, epsilon)
    scores = maps.cpu() * image.cpu()[:, None]
    settings = settings_of(lens, batch, "relative_attention", **more)
    return token_scores("relative_attention", scores, chosen, stream, settings, unit=UNITS[form])


def _check_options(form: str, general: Batch | None, layer: int | None, answers: Any, epsilon: float) -> None:
    if form not in UNITS:
        raise unknown("form", form, UNITS)
    if (general is None) != (form == "gradient"):
        need = "needs a general instruction: general=lens.prepare(...)" if general is None else "takes no general"
        raise SettingsError(f"form={form!r} {need}.")
    if layer is not None and form == "pixel_gradient":
        raise SettingsError("form='pixel_gradient' goes through all layers: leave layer out.")
    if answers is not None and form == "relative":
        raise SettingsError("form='relative' knows nothing of answers: leave them out, or choose a gradient form.")
    if not (isinstance(epsilon, (int, float)) and 0 < epsilon < float("inf")):
        raise SettingsError(f"epsilon is a number above zero, found {epsilon!r}.")


def check_same_images(batch: Batch, general: Batch) -> None:
    """Refuse a general instruction over other images.

    Raises:
        InputError: another number of samples, of image tokens, or other pixels.
    """
    if len(general) != len(batch):
        raise InputError(f"general holds {len(general)} samples for {len(batch)} questions.")
    counts, others = batch.span("image").sum(1).tolist(), general.span("image").sum(1).tolist()
    if 0 in counts:
        raise InputError(f"sample {counts.index(0)} has no image tokens.")
    if counts != others:
        raise InputError(f"general has {others} image tokens in its samples, the questions have {counts}.")
    names = {n for b in (batch, general) for n in b.inputs if n.startswith(("pixel", "image"))}
    for name in sorted(names):
        mine, theirs = batch.inputs.get(name), general.inputs.get(name)
        if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)):
            raise InputError(f"general must show the same images in the same order: its {name} differs.")


def _attention(lens: Lens, batch: Batch, layer: int, target: Positions) -> Float[Tensor, "batch target key"]:
    """Attention of the targets in one layer, heads averaged; the run stops there."""
    read = Read("pattern", layers=(layer,), positions=target, reduce="head_mean")
    rows = lens.run(batch, read).values[read, layer]
    if rows.shape[0] != len(batch) or rows.shape[-1] != batch.mask.shape[1]:
        raise UnsupportedError(f"the pattern {tuple(rows.shape)} of layer {layer} is not over the batch's tokens.")
    return rows.float()


def _relative(
    lens: Lens, batch: Batch, general: Batch, layer: int, target: Positions, epsilon: float
) -> Float[Tensor, "batch target key"]:
    """The quotient over each sample's image tokens, taken in order; zero elsewhere."""
    values, divisor = _attention(lens, batch, layer, target), _attention(lens, general, layer, "last")[:, 0]
    image, other = batch.span("image").to(values.device), general.span("image").to(values.device)
    out = torch.zeros_like(values)
    for i in range(len(values)):
        below = divisor[i, other[i]]
        if not bool(below.sum() > 0):
            raise UnsupportedError(
                f"the general instruction of sample {i} gives its images no attention in layer {layer} (a sliding "
                "window?): choose another layer."
            )
        out[i][:, image[i]] = values[i][:, image[i]] / (below + epsilon * below.mean())
    return out


def _gradient(lens: Lens, batch: Batch, asked: Question, layer: int) -> Float[Tensor, "batch target key"]:
    rows = []
    for t in range(len(asked)):
        index, valid = (x[:, t : t + 1].to(batch.mask.device) for x in (asked.chosen.index, asked.chosen.valid))
        # The target's own row alone is read.
        read = Read("pattern", layers=(layer,), positions=torch.zeros_like(batch.mask).scatter(1, index, valid))
        trace = lens.run(batch, [read], gradients=[read], metric=asked.metric(t))
        rows.append(weighted(trace.values[read, layer], trace.gradients[read, layer]))
    return torch.cat(rows, 1)


def _pixels(
    lens: Lens, batch: Batch, general: Batch, asked: Question, epsilon: float
) -> Float[Tensor, "batch target key"]:
    grid = pixel_grid(lens, batch)
    below = pixel_gradient(lens, general, question(lens, general, "last", None, None, measure="logprob"), 0)
    rows = [grid.quotient(pixel_gradient(lens, batch, asked, t), below, epsilon) for t in range(len(asked))]
    return torch.stack(rows, 1)
