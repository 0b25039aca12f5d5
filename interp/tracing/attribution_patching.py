"""Activation patching to first order: every cell of a grid from one gradient.

Sources: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale" (the gradient at the base run);
Hanna, Pezzelle, Belinkov 2024, "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model
Mechanisms", arXiv 2403.17806 (the gradient averaged on the way from the base input to the source input, five steps);
Kramár, Lieberum, Shah, Nanda 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to
components", arXiv 2403.00745 (queries and keys behind an exact softmax).

    value(cell) = metric(base) + sum over the cell of (a_source - a_base) * d metric / d a
    gradient:  at the base run, or the mean over inputs  base + k/m (source - base),  k = 1 ... m
    q, k:      metric(base) + sum of (pattern with the cell's query or keys - pattern of the base run)
               * d metric / d pattern

The inputs that are interpolated are the streams that enter the first layer, which for images hold their embeddings.
With steps, what lies behind an exact softmax is the mean gradient; the softmax itself is that of the base run. The
other correction of AtP*, gradients with one layer left out at a time, is not there: it takes a gradient for each layer.

What it does not see: the effect is linear in the patch. It is poor where a patch saturates (the stream and the MLP of
the first layers, attention that is almost sure). Compare the cells that matter with `patch_sweep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import splice
from interp.errors import SettingsError, UnsupportedError, unknown
from interp.heads.common import Answers
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tracing.causal_map import CausalMap
from interp.tracing.exact_softmax import key_shares, needed, query_shares
from interp.tracing.grid import EVERY, Groups, Heads, Place
from interp.tracing.grid_run import Direction, GridRun
from interp.tracing.metrics import Measure, Metric, against, columns_of
from interp.tracing.pair import Found, Pair

Softmax = Literal["exact", "linear"]


def attribution_patching(
    lens: Lens,
    clean: Batch | Sequence[Batch],
    corrupt: Batch | Sequence[Batch],
    *,
    sites: str | Sequence[str] = ("z",),
    layers: int | Sequence[int] | None = None,
    positions: Groups = "each",
    heads: Heads = "each",
    steps: int = 0,
    softmax: Softmax = "exact",
    metric: Metric | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    at: Positions = "last",
    direction: Direction = "denoise",
    min_gap: float = 0.1,
) -> CausalMap:
    """Estimate what `patch_sweep` measures, for all cells at once.

    Args:
        lens: a language model, with or without images.
        clean: as in `patch_sweep`.
        corrupt: as in `patch_sweep`.
        sites: as in `patch_sweep`.
        layers: as in `patch_sweep`.
        positions: as in `patch_sweep`.
        heads: as in `patch_sweep`.
        steps: 0 takes the gradient at the base run; m from 1 the mean over m inputs on the way to the source (m = 5 is
            usual), which costs a gradient for each.
        softmax: for `q` and `k`, `exact` computes the attention of the patched query or key and is linear behind it,
            which costs one run more for `q` and two for `k`; `linear` takes the gradient there as at other sites.
        metric: as in `patch_sweep`; a function has to be differentiable.
        answers: as in `patch_sweep`.
        wrong: as in `patch_sweep`.
        at: as in `patch_sweep`.
        direction: as in `patch_sweep`.
        min_gap: see `CausalMap`.

    Returns:
        The estimated metric of every cell and prompt, with those of both runs, which are exact.

    Raises:
        as `patch_sweep`, and
        SettingsError: `steps` is negative.
        UnknownNameError: another `softmax`.
        UnsupportedError: `steps` for an encoder-decoder, whose encoder's output is no input of the first layer; an
            exact softmax for keys where something lies between attention and `z`, such as a gate.
    """
    if type(steps) is not int or steps < 0:
        raise SettingsError(f"steps is a whole number from 0, got {steps!r}.")
    if steps and "encoder" in lens.anatomy.towers and lens.anatomy.main == "decoder":
        raise UnsupportedError("inputs of an encoder-decoder are not interpolated here: steps must be 0.")
    if softmax not in get_args(Softmax):
        raise unknown("softmax", softmax, get_args(Softmax))
    run = GridRun.of(
        lens,
        clean,
        corrupt,
        sites=sites,
        layers=layers,
        positions=positions,
        heads=heads,
        window=1,
        metric=metric,
        answers=answers,
        wrong=wrong,
        at=at,
        direction=direction,
    )
    found = [_estimated(pair, steps, softmax == "exact") for pair in run.pairs()]
    settings = run.settings(method="attribution_patching", steps=steps)
    if any(place.site in ("q", "k") for place in run.places):
        settings["softmax"] = softmax
    return run.result(found, min_gap, settings)


def _estimated(pair: Pair, steps: int, exact: bool) -> Found:
    lens, first = pair.lens, Read("resid_pre", layers=(0,))
    output, every = Read("logits", positions=pair.measure.positions), torch.arange(len(pair.base))
    every = every.to(pair.base.mask.device)
    wanted: dict[int, set[int]] = {}
    for cell in pair.cells:
        wanted.setdefault(cell.place, set()).update(cell.layers)
    reads = {number: pair.places[number].read(sorted(layers)) for number, layers in wanted.items()}
    more = needed(pair.places, wanted) if exact else {}
    behind = {place: place.read(sorted(layers)) for place, layers in more.items()}
    # Behind an exact softmax the gradient is wanted at the heads' outputs instead.
    slopes = [read for read in reads.values() if not (exact and read.site in ("q", "k"))]
    slopes = list(dict.fromkeys([*slopes, *(read for read in behind.values() if read.site == "z")]))
    source = lens.run(pair.source, [*reads.values(), first, output])
    measure = against(pair.measure, source.logits) if pair.measure.relative else pair.measure
    metric = metric_of(pair.base, measure)
    base = lens.run(pair.base, [*reads.values(), *behind.values(), first], gradients=slopes, metric=metric)
    gradients = dict(base.gradients)
    start, way = base.values[first, 0], source.values[first, 0] - base.values[first, 0]
    for step in range(1, steps + 1):
        there = splice(lambda _, a=step / steps: start + a * way, site="resid_pre", layers=0)
        some = lens.run(pair.base, (), [there], gradients=slopes, metric=metric).gradients
        for key in gradients:
            new = some[key] / steps
            gradients[key] = new if step == 1 else gradients[key] + new
    shares: dict[tuple[int, int], Tensor] = {}
    for number, layers in wanted.items():
        place, read = pair.places[number], reads[number]
        if exact and place.site in ("q", "k"):
            outputs, taken = behind[Place("z", place.tower)], {i: source.values[read, i] for i in layers}
            slope, z = {i: gradients[outputs, i] for i in layers}, {i: base.values[outputs, i] for i in layers}
            if place.site == "q":
                found = query_shares(pair, place, taken, z, slope)
            else:
                values = {i: base.values[behind[Place("v", place.tower)], i] for i in layers}
                width = next(iter(taken.values())).shape[1]
                masks = pair.source_masks(width) if place.of_source else pair.masks
                found = key_shares(pair, place, taken, values, z, slope, masks)
            shares |= {(number, i): share for i, share in found.items()}
            continue
        for layer in layers:
            moved = source.values[read, layer].float() - base.values[read, layer].float()
            # Scores behind the mask are minus infinity in both runs.
            product = (moved * gradients[read, layer].float()).nan_to_num(0.0).sum(-1)
            shares[number, layer] = product.transpose(1, 2) if place.site in ("pattern", "scores") else product
    assert base.metric is not None
    value = base.metric.float()
    values = torch.stack([value + _of_cell(pair, shares, i, exact) for i in range(len(pair.cells))]).cpu()
    for i, cell in enumerate(pair.cells):
        values[i, ~pair.exists[cell.group]] = torch.nan
    logits = source.logits if measure.ids is None else source.logits[..., measure.ids]
    return Found(values, pair.exists, measure(logits, every).cpu(), value.cpu(), 0, "first order")


def _of_cell(pair: Pair, shares: dict[tuple[int, int], Tensor], number: int, exact: bool) -> Float[Tensor, " batch"]:
    """The share of one cell in each sample, from those of every column [batch, pos] (and head)."""
    cell = pair.cells[number]
    place, share = pair.places[cell.place], shares[cell.place, cell.layers[0]]
    if exact and place.site == "k":  # by group
        return share[cell.group].sum(1) if cell.head == EVERY else share[cell.group, :, cell.head]
    masks = pair.source_masks(share.shape[1]) if place.of_source else pair.masks
    if share.ndim == 3:
        share = share.sum(2) if cell.head == EVERY else share[:, :, cell.head]
    return (share * masks[cell.group]).sum(1)


def metric_of(batch: Batch, measure: Measure):
    """The metric as a function of a run's logits [batch, pos, d_vocab]."""
    columns = columns_of(measure, batch)
    rows = torch.arange(len(batch), device=columns.device)

    def metric(logits: Tensor) -> Tensor:
        some = logits[rows[:, None], columns].float()
        return measure.function(some if measure.ids is None else some[..., measure.ids], rows)

    return metric
