"""What becomes of a model when chosen heads are removed or scaled, against random heads of the same layers.

    effect(S) = metric(heads of S scaled) - metric(model as it is)

for the heads at the top of a ranking, those at its bottom, or any sets, each beside draws of as many random heads of
each layer (see `interp.heads.controls`). A ranking means something where its top does more than such draws do and its
bottom less. The heads of a set are scaled together; what each does alone is `ablation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from interp.batch import Batch
from interp.errors import InputError, SettingsError, unknown
from interp.headlist import Heads
from interp.heads.chosen import Pairs, chosen_heads, head_mask
from interp.heads.common import Answers, head_grid, settings_of
from interp.heads.controls import MATCHED, Matched, drawn
from interp.heads.head_effects import HeadEffects
from interp.heads.measure import measure, tasks_of
from interp.lens import Lens
from interp.scores import HeadScores


def extremes(scores: HeadScores, k: int, by: str = "score") -> Mapping[str, Heads]:
    """The heads at both ends of a ranking: `top k` and `bottom k`, as frames.

    Args:
        scores: the ranking.
        k: how many at each end.
        by: `score`, `abs` or the name of an extra column.

    Raises:
        UnknownNameError: `by` names nothing to rank by.
        SettingsError: the two ends would overlap, or `k` is no whole number from 1.
    """
    heads = {f"top {k}": scores.top(k, by), f"bottom {k}": scores.top(k, by, largest=False)}
    if 2 * k > (total := int(scores.scores.isfinite().sum())):
        raise SettingsError(f"the top and the bottom {k} of {total} heads overlap.")
    return heads


def effect_of(
    lens: Lens,
    data: Batch | Sequence[Batch],
    heads: Heads | Mapping[str, Heads],
    *,
    scale: float = 0.0,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    controls: int = 10,
    matched: Matched = "nearest",
    disjoint: bool = True,
    tower: str | None = None,
    seed: int = 0,
    max_tokens: int = 512,
) -> HeadEffects:
    """How the loss, the accuracy (and the logit difference) change when heads are scaled, beside random heads.

    Args:
        lens: a model with logits.
        data: prompts, in one batch or several.
        heads: (layer, head) pairs or a frame with these columns, or several of them by name, such as
            `extremes(scores, 16)`.
        scale: what their outputs are multiplied with: 0 removes them, -1 turns them around.
        answers: right next tokens of all prompts in order; without them the next-token loss is measured.
        wrong: wrong next tokens; an answer then counts as right if it is more likely than these.
        controls: how many random sets are drawn for each set.
        matched: `layer` for random heads with the same number in each layer, `nearest` for the same where a layer has
            enough others, `none` for any; see `random_heads`.
        disjoint: whether a random set leaves the chosen heads out, see `random_heads`.
        tower: the tower of the heads; None for that of the list, or the main one.
        seed: seed of the draws.
        max_tokens: positions in one run, see `measure`.

    Returns:
        The numbers of every prompt before, after, and for every random set.

    Raises:
        EditError: no list of heads, or one from another model or tower.
        UnknownNameError: a head does not exist, or an unknown option value.
        SettingsError: a number outside its range.
        InputError: no batch, no set of heads, sets of several towers, answers that do not fit, or too few heads to
            draw from.
        UnsupportedError: the model has no logits, or a layer's heads cannot be reached.
    """
    if matched not in MATCHED:
        raise unknown("matched", matched, MATCHED)
    if controls < 0 or max_tokens < 1 or not -float("inf") < scale < float("inf"):
        raise SettingsError(
            f"controls is not negative, max_tokens is at least 1 and the scale finite: got {controls}, {max_tokens}, "
            f"{scale}."
        )
    sets = dict(heads) if isinstance(heads, Mapping) else {"heads": heads}
    if not sets:
        raise InputError("no set of heads was given.")
    named: dict[str, Pairs] = {}
    towers: list[str] = []
    for name, one in sets.items():
        named[name], found = chosen_heads(lens, one, tower=tower, what=name)
        towers.append(found)
    if len(set(towers)) > 1:
        raise InputError(f"the sets are of several towers: {dict(zip(sets, towers, strict=True))}.")
    tasks = tasks_of(lens, data, answers, wrong)
    valid = head_grid(lens, towers[0])[2]
    masks = [head_mask(pairs, valid) for pairs in named.values()]
    random = [x for mask in masks for x in drawn(mask, valid & ~(mask & disjoint), matched, controls, seed)]
    masks = [torch.zeros_like(valid), *masks, *(head_mask(pairs, valid) for pairs in random)]
    factors = torch.where(torch.stack(masks), scale, 1.0)
    found = measure(lens, tasks, factors, tower=towers[0], max_tokens=max_tokens)
    settings = settings_of(lens, tasks[0].batch, method="effect_of", matched=matched, disjoint=disjoint, seed=seed)
    settings |= {"prompts": sum(len(t.batch) for t in tasks), "tokens": sum(int(t.batch.mask.sum()) for t in tasks)}
    settings |= {"answers": answers is not None, "wrong": wrong is not None}
    after = found[:, 1 : len(named) + 1]
    return HeadEffects(
        sets={name: tuple(pairs) for name, pairs in named.items()},
        scale=float(scale),
        metrics=tasks[0].metrics,
        before=found[:, 0],
        after=after,
        random=found[:, len(named) + 1 :].unflatten(1, (len(named), controls)),
        tower=towers[0],
        settings=settings,
    )
