"""Deletion and insertion curves: does the answer fall when what scores call relevant is taken away?

Source: Samek et al. 2017, "Evaluating the Visualization of What a Deep Neural Network Has Learned" (arXiv 1509.06321);
Petsiuk, Das, Saenko 2018, "RISE" (arXiv 1806.07421), for the two curves and their areas; Chefer, Gur, Wolf 2021,
"Generic Attention-model Explainability" (arXiv 2103.15679), for the perturbation test on text and pictures,
most relevant first (positive) and least relevant first (negative). With s_1 >= s_2 >= ... the scores of a sample's n
sources and y(S) the answer's number when those of S are gone,

    deletion(f)  = y({s_1 .. s_k}),        insertion(f) = y({s_k+1 .. s_n}),      k = f n, rounded, halves up
    area         = the integral over f (trapezoids), divided by the range of f
    gain         = area in random orders - area, for a deletion of the most relevant first; see `Curve`

What "gone" means is chosen as in [`blank_out`][interp.attribution.blank_out.blank_out]. Equal scores stand in a random
order; `least` is exactly the reverse of `most`, so that an insertion of the most relevant first is a deletion of the
least relevant first read from the right.

What to know. A curve alone says nothing: an answer falls in any order. The gain over random orders is the result, with
its interval over samples. Where the answer's own sources are few, the curve is a step and the fractions matter.
Taking things away makes inputs that the model did not see in training: a large gain may come from what breaks the model
as well as from what it used, so compare two ways of taking away. A method that blanks out is judged here by its own
means.

Departures. Removal by dropping tokens (Chefer's) can be had, the default replaces them. Random orders are added. The
measure is the answer's probability by default (RISE's), for logits of different inputs differ by what all classes
share; Chefer's is `accuracy`, at the fractions 0, .25, .5, .75, .8, .85, .9, .95, 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.blanks import Blanks, ImageMode, Mode, causal, check_modes, source_tower, waves
from interp.attribution.common import settings_of, stream_of
from interp.attribution.targets import MEASURES, Answers, Question, question
from interp.batch import Batch
from interp.errors import InputError, SettingsError, UnknownNameError, unknown
from interp.evaluation.compared import Sources, by_name, chosen_sources, same_tokens
from interp.evaluation.curve import Curve
from interp.evaluation.intervals import check_options
from interp.evaluation.orders import Order, fingerprints, places_in_order
from interp.lens import Lens
from interp.reads import Read
from interp.tokens import TokenScores

CurveMeasure = Literal["probability", "logit", "logprob", "accuracy"]
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_UNITS = {**MEASURES, "accuracy": "accuracy"}


@dataclass(frozen=True, slots=True)
class _Options:
    """What was asked for, but the data; checked."""

    kind: Literal["deletion", "insertion"]
    answers: Answers | None
    wrong: Answers | None
    target: int
    order: Order
    fractions: Sequence[float]
    sources: Sources
    keep_special: bool
    mode: Mode
    image: ImageMode
    token: str | int | None
    sigma: float | None
    measure: CurveMeasure
    baseline: int
    seed: int
    resamples: int
    batch_size: int

    def __post_init__(self) -> None:
        check_modes(self.mode, self.image, self.token, self.sigma, self.batch_size)
        check_options(0.95, self.resamples, self.seed)
        if self.order not in ("most", "least"):
            raise unknown("order", self.order, ("most", "least"))
        if self.measure not in _UNITS:
            raise unknown("measure", self.measure, _UNITS)
        if isinstance(self.baseline, bool) or not isinstance(self.baseline, int) or self.baseline < 0:
            raise SettingsError(f"baseline is a number of random orders from 0, found {self.baseline!r}.")
        steps = list(self.fractions)
        if len(steps) < 2 or not all(0 <= f <= 1 for f in steps) or any(b <= a for a, b in pairwise(steps)):
            raise SettingsError(f"fractions ascend within 0 and 1, two at least: found {steps}.")


def deletion_curve(
    lens: Lens,
    batch: Batch,
    scores: TokenScores | Mapping[str, TokenScores],
    *,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    target: int = -1,
    order: Order = "most",
    fractions: Sequence[float] = FRACTIONS,
    sources: Sources = "all",
    keep_special: bool = True,
    mode: Mode = "replace",
    image: ImageMode = "mask",
    token: str | int | None = None,
    sigma: float | None = None,
    measure: CurveMeasure = "probability",
    baseline: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    batch_size: int = 32,
) -> Curve:
    """The answer's number as more and more sources are taken away, in the order of some scores and in random orders.

    Several scores at once share the random orders, and every set of sources is run once, whichever orders meet it.
    A decoder's tokens behind the target, which it cannot see, are no sources; nor is the target itself under `drop`.
    A sample's random orders depend on the seed and its own content only.

    Args:
        lens: a model with logits.
        batch: the batch that the scores were made from.
        scores: the scores, or several by name.
        answers: as for [`blank_out`][interp.attribution.blank_out.blank_out]; None for the largest logit of the whole
            input. The answer is read at the scores' target; where that stands in another tower than the logits, at the
            last position.
        wrong: the same; their number is subtracted. With `accuracy`, whether the answer has the larger logit.
        target: which of a sample's targets gives the order, along the target axis; negative ones count from the last.
        order: `most` or `least` relevant first.
        fractions: shares of a sample's sources, ascending within 0 and 1.
        sources: `all`, `text` or `image` tokens, or the columns [batch, source] marked True; others are never touched.
        keep_special: whether special tokens (and a picture's class token) are never touched.
        mode: what is done to text tokens: `replace`, `mask` or `drop`.
        image: what is done to patches and image tokens: `mask`, `mean` or `blur`.
        token: for `replace`, which token; None takes the tokenizer's mask, unknown or padding token.
        sigma: for `blur`, in pixels of the picture that the model gets.
        measure: `probability`, `logit`, `logprob`, or `accuracy`: whether the answer is the largest logit.
        baseline: how many random orders.
        seed: seed of the random orders, of equal scores' order, and of the bootstrap.
        resamples: how often the samples are drawn anew for an interval.
        batch_size: how many rows a run may have; at least one for each sample.

    Returns:
        The curves, with areas, gains and their intervals over samples.

    Raises:
        UnknownNameError: a mode, measure, order, kind of sources, target, tower or class does not exist.
        SettingsError: options that contradict each other or lie outside their range.
        InputError: scores of another batch, or of different targets; answers that do not fit; a sample without such
            sources, or with nothing left when they are gone.
        UnsupportedError: no logits; sources in a tower that nothing can be taken away from; a mode it cannot do.
    """
    how = (order, fractions, sources, keep_special, mode, image, token, sigma, measure, baseline, seed, resamples)
    return _curve(lens, batch, scores, _Options("deletion", answers, wrong, target, *how, batch_size))


def insertion_curve(
    lens: Lens,
    batch: Batch,
    scores: TokenScores | Mapping[str, TokenScores],
    *,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    target: int = -1,
    order: Order = "most",
    fractions: Sequence[float] = FRACTIONS,
    sources: Sources = "all",
    keep_special: bool = True,
    mode: Mode = "replace",
    image: ImageMode = "mask",
    token: str | int | None = None,
    sigma: float | None = None,
    measure: CurveMeasure = "probability",
    baseline: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    batch_size: int = 32,
) -> Curve:
    """The answer's number as sources are put back into an input from which all were taken away.

    Arguments, result and errors are those of [`deletion_curve`][interp.evaluation.curves.deletion_curve]; a fraction
    is the share that was put back. Without `answers` the answer is that of the whole input.
    """
    how = (order, fractions, sources, keep_special, mode, image, token, sigma, measure, baseline, seed, resamples)
    return _curve(lens, batch, scores, _Options("insertion", answers, wrong, target, *how, batch_size))


def _curve(lens: Lens, batch: Batch, scores: TokenScores | Mapping[str, TokenScores], o: _Options) -> Curve:
    named = by_name(scores)
    first = next(iter(named.values()))
    name = source_tower(lens, first.tower, f"{o.kind}_curve")
    stream = stream_of(lens, batch, name)
    same_tokens(first.source_mask, first.tokens, stream.mask, stream.tokens, "the scores", "what they are tested on")
    places = {key: _target_places(one, o.target) for key, one in named.items()}
    positions = _positions(lens, named, places)
    counted = "logit" if o.measure == "accuracy" else o.measure
    asked = question(lens, batch, next(iter(positions.values()), None), o.answers, o.wrong, measure=counted)
    if not asked.pooled:
        _check_positions(positions)
    removable = chosen_sources(first, o.sources, special=not o.keep_special)
    if name == lens.anatomy.main and not asked.pooled:
        at, column = asked.chosen.index, torch.arange(removable.shape[1])
        removable = removable & ~((column == at) & (o.mode == "drop"))
        if bool(((column > at) & removable).any()) and causal(lens, batch):
            removable = removable & (column <= at)
    sizes = removable.sum(1)
    if not bool(sizes.all()):
        raise InputError(f"sample {int((sizes == 0).nonzero()[0])} has no source that can be taken away.")
    pixels = stream.spans.get("image", torch.zeros_like(removable))
    kinds = {"text": removable & ~pixels, "image": removable & pixels}
    blanks = Blanks(lens, batch, asked, stream, o.mode, o.image, o.token, o.sigma, kinds)
    rows = torch.stack([_chosen(one.scores, places[key]) for key, one in named.items()])
    seeds = [(o.seed, number) for number in fingerprints(batch, stream)]
    ranks, tied = places_in_order(rows, removable, order=o.order, random=o.baseline, seeds=seeds)
    steps = torch.tensor(list(o.fractions), dtype=torch.float64)
    counts = (steps * sizes[:, None] + 0.5).floor().long()
    before = (ranks[:, :, None] < counts[:, :, None]) & removable[:, None]  # [order, batch, step, source]
    gone = before if o.kind == "deletion" else removable[:, None] & ~before
    _check_left(blanks, gone)
    values = _values(lens, batch, asked, blanks, gone, o)
    own = {"tower": first.tower, "order": o.order, "fractions": steps.tolist(), "keep_special": o.keep_special}
    own |= {"sources": "marked" if isinstance(o.sources, Tensor) else o.sources, "target": o.target, "tied": tied}
    own |= {"baseline": o.baseline, "seed": o.seed, "resamples": o.resamples}
    settings = settings_of(lens, batch, f"{o.kind}_curve", **own, **blanks.settings) | asked.settings(lens)
    settings |= {"measure": o.measure, "scores": {key: one.settings for key, one in named.items()}}
    del settings["value"]
    return Curve(
        kind=o.kind,
        order=o.order,
        names=tuple(named),
        fractions=steps,
        values=values[: len(named)],
        random=values[len(named) :],
        counts=counts,
        sizes=sizes,
        unit=_UNITS[o.measure],
        settings=settings,
        caveat=_caveat(named, places, settings["answers"]),
    )


def _target_places(scores: TokenScores, target: int) -> Int[Tensor, " batch"]:
    """Where each sample's target stands along the target axis."""
    real = scores.targets >= 0
    counts = real.sum(1)
    place = target + counts if target < 0 else torch.full_like(counts, target)
    wrong = (place < 0) | (place >= counts)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise UnknownNameError(
            f"target {target} of the {scores.name} scores does not exist: sample {row} has {int(counts[row])}."
        )
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    return order.gather(1, place[:, None])[:, 0]


def _chosen(values: Tensor, places: Tensor) -> Tensor:
    """The row of each sample's target."""
    return values[torch.arange(len(values)), places]


def _positions(
    lens: Lens, named: Mapping[str, TokenScores], places: Mapping[str, Tensor]
) -> dict[str, Int[Tensor, "batch 1"]]:
    """The targets among their samples' own tokens, of the scores whose targets stand in the tower of the logits."""
    found = {}
    for key, one in named.items():
        if (one.target_tower or one.tower) == lens.anatomy.main:
            mask = one.source_mask if one.target_mask is None else one.target_mask
            found[key] = (mask.long().cumsum(1) - 1).gather(1, _chosen(one.targets, places[key])[:, None])
    return found


def _check_positions(positions: Mapping[str, Int[Tensor, "batch 1"]]) -> None:
    """Whether all scores explain the same position."""
    for (first, one), (key, other) in pairwise(positions.items()):
        if not torch.equal(one, other):
            row = int((one != other).nonzero()[0, 0])
            raise InputError(
                f"the {first} scores explain position {int(one[row])} of sample {row}, the {key} scores "
                f"{int(other[row])}: the answer is read at one position."
            )


def _check_left(blanks: Blanks, gone: Bool[Tensor, "order batch step source"]) -> None:
    """Whether something is left of every sample."""
    mask = blanks.sources.mask[:, None]
    for kind, how in blanks.how.items():
        if how != "drop" and (how != "mask" or blanks.sources.tower != "encoder"):
            continue
        empty = ~(mask & ~(gone & blanks.kinds[kind][:, None])).any(-1)
        if bool(empty.any()):
            raise InputError(
                f"nothing is left of sample {int(empty.nonzero()[0, 1])} when {how!r} has taken all away: stop at a "
                "smaller fraction, keep special tokens, or use mode='replace'."
            )


def _values(
    lens: Lens,
    batch: Batch,
    asked: Question,
    blanks: Blanks,
    gone: Bool[Tensor, "order batch step source"],
    o: _Options,
) -> Float[Tensor, "order batch step"]:
    """The answer's number for each set of columns; equal sets of a sample are run once."""
    orders, size, steps, width = gone.shape
    sets, index = [], torch.zeros(orders, size, steps, dtype=torch.long)
    for i in range(size):
        packed = np.packbits(gone[:, i].reshape(-1, width).numpy(), axis=1)
        _, where, back = np.unique(packed, axis=0, return_index=True, return_inverse=True)
        mine = gone[:, i].reshape(-1, width)[where]
        # Sets of about one size share a run: what is dropped makes it shorter.
        by_size = torch.argsort(mine.sum(1), stable=True)
        sets.append(mine[by_size])
        index[:, i] = torch.argsort(by_size)[torch.from_numpy(back.reshape(orders, steps))]
    most = max(map(len, sets))
    # Fillers repeat the last set; nobody looks at them.
    sets = torch.stack([torch.cat([s, s[-1:].expand(most - len(s), -1)]) for s in sets])
    found = torch.zeros(size, most)
    read = Read("logits")
    if not asked.pooled:
        last = (asked.stream.mask * torch.arange(asked.stream.mask.shape[1])).argmax(1)
        if torch.equal(last, asked.chosen.index[:, 0]):
            read = Read("logits", positions="last")
    for rows, some in waves(batch, most, o.batch_size):
        copies = some.stop - some.start
        blanked = blanks.of(rows, sets[:, some].transpose(0, 1).reshape(-1, width))
        logits = lens.run(blanked.batch, read, blanked.edits).logits
        options: dict[str, Any] = {"copies": copies, "columns": blanked.columns}
        if o.measure != "accuracy" or asked.wrong is not None:
            values = asked.values(logits, **options)
            values = (values > 0).float() if o.measure == "accuracy" else values
        else:
            values = (asked.at_targets(logits, **options).argmax(-1) == asked.answers.repeat(copies, 1)).float()
        found[:, some] = values.cpu().view(copies, size).T
    return found[torch.arange(size)[:, None], index]


def _caveat(named: Mapping[str, TokenScores], places: Mapping[str, Tensor], answers: list[list[str]]) -> str:
    """What is wrong when scores explain another answer than the one that is measured."""
    for key, one in named.items():
        rows = one.settings.get("answers") or ()
        if len(rows) != len(answers):  # unknown, or of the batch from which this sample was selected
            continue
        explained = [row[place] for row, place in zip(rows, places[key].tolist(), strict=True)]
        for i, (said, measured) in enumerate(zip(explained, answers, strict=True)):
            if said != measured[0]:
                return f"The {key} scores explain {said!r} in sample {i}, the curve measures {measured[0]!r}."
    return ""
