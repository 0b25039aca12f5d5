"""Activation patching to first order: every cell of a grid from one gradient.

Sources: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale" (the gradient at the base run);
Hanna, Pezzelle, Belinkov 2024, "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model
Mechanisms", arXiv 2403.17806 (the gradient averaged on the way from the base input to the source input, five steps).

    value(cell) = metric(base) + sum over the cell of (a_source - a_base) * d metric / d a
    gradient:  at the base run, or the mean over inputs  base + k/m (source - base),  k = 1 ... m

The inputs that are interpolated are the streams that enter the first layer, which for images hold their embeddings.

What it does not see: the effect is linear in the patch. It is poor where a patch saturates (the stream and the MLP of
the first layers, attention that is almost sure), and for queries and keys, which act through a softmax. Compare the
cells that matter with `patch_sweep`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import splice
from interp.errors import SettingsError, UnsupportedError
from interp.heads.common import Answers
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tracing.causal_map import CausalMap
from interp.tracing.grid import EVERY, Groups, Heads
from interp.tracing.grid_run import Direction, GridRun
from interp.tracing.metrics import Measure, Metric, against, columns_of
from interp.tracing.pair import Found, Pair


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
        UnsupportedError: `steps` for an encoder-decoder, whose encoder's output is no input of the first layer.
    """
    if type(steps) is not int or steps < 0:
        raise SettingsError(f"steps is a whole number from 0, got {steps!r}.")
    if steps and "encoder" in lens.anatomy.towers and lens.anatomy.main == "decoder":
        raise UnsupportedError("inputs of an encoder-decoder are not interpolated here: steps must be 0.")
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
    found = [_estimated(pair, steps) for pair in run.pairs()]
    return run.result(found, min_gap, run.settings(method="attribution_patching", steps=steps))


def _estimated(pair: Pair, steps: int) -> Found:
    lens, first = pair.lens, Read("resid_pre", layers=(0,))
    output, every = Read("logits", positions=pair.measure.positions), torch.arange(len(pair.base))
    every = every.to(pair.base.mask.device)
    wanted: dict[int, set[int]] = {}
    for cell in pair.cells:
        wanted.setdefault(cell.place, set()).update(cell.layers)
    reads = {number: pair.places[number].read(sorted(layers)) for number, layers in wanted.items()}
    source = lens.run(pair.source, [*reads.values(), first, output])
    measure = against(pair.measure, source.logits) if pair.measure.relative else pair.measure
    metric = _metric(pair.base, measure)
    base = lens.run(pair.base, [*reads.values(), first], gradients=reads.values(), metric=metric)
    keys = [(number, layer) for number, layers in wanted.items() for layer in sorted(layers)]
    gradients = {k: base.gradients[reads[k[0]], k[1]] for k in keys}
    start, way = base.values[first, 0], source.values[first, 0] - base.values[first, 0]
    for step in range(1, steps + 1):
        there = splice(lambda _, a=step / steps: start + a * way, site="resid_pre", layers=0)
        some = lens.run(pair.base, (), [there], gradients=reads.values(), metric=metric).gradients
        for number, layer in keys:
            new = some[reads[number], layer] / steps
            gradients[number, layer] = new if step == 1 else gradients[number, layer] + new
    shares = {}
    for number, layer in keys:
        moved = source.values[reads[number], layer].float() - base.values[reads[number], layer].float()
        # Scores behind the mask are minus infinity in both runs.
        product = (moved * gradients[number, layer].float()).nan_to_num(0.0).sum(-1)
        shares[number, layer] = (
            product.transpose(1, 2) if pair.places[number].site in ("pattern", "scores") else product
        )
    assert base.metric is not None
    value = base.metric.float()
    values = torch.stack([value + _of_cell(pair, shares, i) for i in range(len(pair.cells))]).cpu()
    for i, cell in enumerate(pair.cells):
        values[i, ~pair.exists[cell.group]] = torch.nan
    logits = source.logits if measure.ids is None else source.logits[..., measure.ids]
    return Found(values, pair.exists, measure(logits, every).cpu(), value.cpu(), 0, "first order")


def _of_cell(pair: Pair, shares: dict[tuple[int, int], Tensor], number: int) -> Float[Tensor, " batch"]:
    """The share of one cell in each sample, from those of every column [batch, pos] (and head)."""
    cell = pair.cells[number]
    place, share = pair.places[cell.place], shares[cell.place, cell.layers[0]]
    masks = pair.source_masks(share.shape[1]) if place.of_source else pair.masks
    if share.ndim == 3:
        share = share.sum(2) if cell.head == EVERY else share[:, :, cell.head]
    return (share * masks[cell.group]).sum(1)


def _metric(batch: Batch, measure: Measure):
    """The metric as a function of a run's logits [batch, pos, d_vocab]."""
    columns = columns_of(measure, batch)
    rows = torch.arange(len(batch), device=columns.device)

    def metric(logits: Tensor) -> Tensor:
        some = logits[rows[:, None], columns].float()
        return measure.function(some if measure.ids is None else some[..., measure.ids], rows)

    return metric
