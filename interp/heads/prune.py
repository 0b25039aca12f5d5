"""Removing heads step by step, the least important first.

Source: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", arXiv 1905.10650, section 4: all heads
are sorted by a ranking and removed from the lowest up, a share of them in each step; nothing is rescaled for the heads
that are left. Their importance is computed once (`one_shot`, the default of their code) or again after each step on
the model that is left (`greedy`, its `--exact_pruning`).

Departures. A curve alone shows nothing: any ranking of a redundant model looks good for its first steps. So random
orders are run beside it, by default with the same number of heads in each layer at each step, which leaves the choice
within layers as the only difference. Importance is measured on the prompts given here, not on a training set, and is
not normalised within layers unless asked for (`normalize="layer"`, the default of their code, forces equal mass on all
layers). A head can also be set to its mean output over the real tokens of the intact model (`mode="mean"`).

What it does not see: masked heads cost as much as before; no time is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, SettingsError, unknown
from interp.headlist import check_model
from interp.heads.common import Answers, head_grid, settings_of
from interp.heads.importance import importance
from interp.heads.measure import Task, mean_outputs, measure, scaling, tasks_of
from interp.heads.pruning_curve import PruningCurve
from interp.lens import Lens
from interp.scores import HeadScores

Grid = Bool[Tensor, "layer head"]


def prune(
    lens: Lens,
    data: Batch | Sequence[Batch],
    *,
    ranking: HeadScores | None = None,
    by: str = "score",
    strategy: Literal["one_shot", "greedy"] = "one_shot",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    mode: Literal["zero", "mean"] = "zero",
    step: float = 0.1,
    upto: float = 1.0,
    at_least: int = 0,
    normalize: Literal["none", "layer"] = "none",
    controls: int = 5,
    matched: Literal["layer", "none"] = "layer",
    seed: int = 0,
    max_tokens: int = 512,
) -> PruningCurve:
    """The loss and the accuracy as more and more heads are removed, beside random orders.

    Args:
        lens: a model with logits.
        data: prompts, in one batch or several.
        ranking: what says which heads go first (the lowest); None for their importance on these prompts.
        by: what of a given ranking: `score`, `abs` or an extra column.
        strategy: keep the ranking, or compute the importance anew after each step.
        answers: right next tokens of all prompts in order; without them the next-token loss is measured.
        wrong: wrong next tokens; an answer then counts as right if it is more likely than these.
        mode: a removed head's output becomes zero, or its mean.
        step: share of the heads that goes in each step.
        upto: share at which to stop.
        at_least: heads that stay in every layer.
        normalize: divide the importance by the L2 norm of each layer, or not.
        controls: how many random orders are run.
        matched: `layer` for random orders with the same number of heads in each layer at each step; `none` for any.
        seed: seed of the random orders.
        max_tokens: positions in one run, see `measure`.

    Returns:
        The curve, step 0 being the intact model, with every prompt's numbers.

    Raises:
        UnknownNameError: an unknown option value or column.
        SettingsError: a number outside its range, or options that contradict each other.
        EditError: a ranking of another model.
        InputError: a ranking that does not rank all heads of this model; no batch, or answers that do not fit.
        UnsupportedError: the model has no logits or no heads that can be removed.
    """
    _check(strategy, mode, normalize, matched, step, upto, at_least, controls, max_tokens)
    if ranking is not None and (strategy == "greedy" or normalize != "none"):
        raise SettingsError("a ranking was given: strategy='greedy' and normalize are for importance computed here.")
    if ranking is None and by != "score":
        raise SettingsError(f"by={by!r} is for a given ranking; importance computed here goes by its score.")
    tasks = tasks_of(lens, data, answers, wrong)
    tower = lens.anatomy.main if ranking is None else ranking.tower
    layers, _, valid = head_grid(lens, tower)
    if ranking is not None:
        _check_ranking(lens, ranking, valid)
    fill = mean_outputs(lens, tasks, layers, tower) if mode == "mean" else None
    values = None if ranking is None else _column(ranking, by)
    kept, total = [valid], int(valid.sum())
    for count in _counts(total, step, upto):
        if values is None or strategy == "greedy":
            values = _importance(lens, tasks, _factors(kept[-1][None], valid), normalize, fill)
        new = without_lowest(values, kept[-1], count - (total - int(kept[-1].sum())), at_least)
        if torch.equal(new, kept[-1]):
            break
        kept.append(new)
    if len(kept) < 2:
        raise SettingsError(
            f"nothing is removed: upto={upto} of {total} heads, at_least={at_least} stay in every layer."
        )
    steps = torch.stack(kept)
    random = random_orders(steps, controls, matched, at_least, seed)
    # The intact model is the first step of every order.
    wanted = torch.cat([steps, random[:, 1:].flatten(0, 1)])
    found = measure(lens, tasks, _factors(wanted, valid), tower=tower, fill=fill, max_tokens=max_tokens)
    own, other = found[:, : len(steps)], found[:, len(steps) :].unflatten(1, (controls, len(steps) - 1))
    other = torch.cat([own[:, None, :1].expand(-1, controls, -1, -1), other], 2)
    settings = settings_of(lens, tasks[0].batch, method="prune", strategy=strategy, mode=mode, by=by)
    settings |= {"step": step, "upto": upto, "at_least": at_least, "normalize": normalize, "matched": matched}
    settings |= {"prompts": sum(len(t.batch) for t in tasks), "tokens": sum(int(t.batch.mask.sum()) for t in tasks)}
    settings |= {"seed": seed, "answers": answers is not None, "wrong": wrong is not None}
    return PruningCurve(
        name="importance" if ranking is None else ranking.name,
        metrics=tasks[0].metrics,
        values=own,
        random=other,
        kept=steps,
        random_kept=random,
        tower=tower,
        settings=settings,
    )


def without_lowest(values: Float[Tensor, "layer head"], kept: Grid, count: int, at_least: int = 0) -> Grid:
    """The heads that stay when the lowest of those that are there are removed, or as many as may be.

    Args:
        values: the ranking; of equal values the first layer and head goes first.
        kept: heads that are there.
        count: how many to remove.
        at_least: heads that stay in every layer.
    """
    left, new = kept.sum(1).tolist(), kept.clone()
    for place in values.masked_fill(~kept, torch.inf).flatten().argsort(stable=True).tolist():
        layer, head = divmod(place, kept.shape[1])
        if count < 1:
            break
        if new[layer, head] and left[layer] > at_least:
            new[layer, head] = False
            left[layer] -= 1
            count -= 1
    return new


def random_orders(
    kept: Bool[Tensor, "step layer head"],
    draws: int,
    matched: Literal["layer", "none"] = "layer",
    at_least: int = 0,
    seed: int = 0,
) -> Bool[Tensor, "draw step layer head"]:
    """Random orders of removal, each step removing what the step before removed and more.

    Args:
        kept: the heads that stay in each step of the order to compare with, the first step holding all.
        draws: how many.
        matched: the same number in each layer at each step, or in all layers together.
        at_least: heads that stay in every layer, for `none`.
        seed: seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    out = kept.new_empty(draws, *kept.shape)
    for draw in range(draws):
        values = torch.rand(kept.shape[1:], generator=generator)
        for i in range(len(kept)):
            removed = kept[0].sum(1) - kept[i].sum(1)
            if matched == "none":
                out[draw, i] = without_lowest(values, kept[0], int(removed.sum()), at_least)
                continue
            for layer, count in enumerate(removed.tolist()):
                rows = slice(layer, layer + 1)
                out[draw, i, rows] = without_lowest(values[rows], kept[0, rows], count)
    return out


def _importance(
    lens: Lens,
    tasks: Sequence[Task],
    factors: Float[Tensor, "1 layer head"],
    normalize: str,
    fill: Mapping[int, Tensor] | None,
) -> Float[Tensor, "layer head"]:
    """The importance of every head in the model that is left, over all batches."""
    total, prompts = torch.zeros(factors.shape[1:]), 0
    for task in tasks:
        edits = scaling(factors, len(task.batch), fill=fill)
        found = importance(lens, task.batch, answers=task.answers, wrong=task.wrong, edits=edits)
        total, prompts = total + found.scores.nan_to_num(0) * len(task.batch), prompts + len(task.batch)
    mean = total / prompts
    return mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-20) if normalize == "layer" else mean


def _factors(kept: Bool[Tensor, "setting layer head"], valid: Grid) -> Float[Tensor, "setting layer head"]:
    """Zero for heads that are removed, one for those that stay and where there is none."""
    return (kept | ~valid).float()


def _column(ranking: HeadScores, by: str) -> Float[Tensor, "layer head"]:
    if by in ("score", "abs"):
        return ranking.scores.abs() if by == "abs" else ranking.scores
    if by not in ranking.extra:
        raise unknown("column", by, ("score", "abs", *ranking.extra), f"the scores of {ranking.name}")
    return ranking.extra[by]


def _counts(total: int, step: float, upto: float) -> list[int]:
    """How many heads are gone after each step."""
    steps = math.ceil(upto / step - 1e-9)
    shares = [min(i * step, upto) for i in range(1, steps + 1)]
    return sorted({n for share in shares if (n := math.floor(share * total + 0.5)) > 0})


def _check_ranking(lens: Lens, ranking: HeadScores, valid: Grid) -> None:
    check_model(ranking.settings.get("model"), lens.name, "prune")
    there = ranking.scores.isfinite()
    if there.shape != valid.shape or not torch.equal(there, valid):
        raise InputError(
            f"the ranking is of {int(there.sum())} heads {list(there.shape)}, but {lens.name} has {int(valid.sum())} "
            f"that can be removed, {list(valid.shape)}: it is of another model, or ranks some layers only."
        )


def _check(
    strategy: str,
    mode: str,
    normalize: str,
    matched: str,
    step: float,
    upto: float,
    at_least: int,
    controls: int,
    max_tokens: int,
) -> None:
    options = {
        "strategy": (strategy, ("one_shot", "greedy")),
        "mode": (mode, ("zero", "mean")),
        "normalize": (normalize, ("none", "layer")),
        "matched": (matched, ("layer", "none")),
    }
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise unknown(name, value, allowed)
    if not (0 < step <= 1 and 0 < upto <= 1):
        raise SettingsError(f"step and upto are shares above 0 and up to 1, got {step} and {upto}.")
    if at_least < 0 or controls < 0 or max_tokens < 1:
        raise SettingsError(
            f"at_least and controls are not negative, max_tokens is at least 1: got {at_least}, {controls}, "
            f"{max_tokens}."
        )
