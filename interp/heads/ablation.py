"""The exact effect of removing each head.

Source: Michel, Levy, Neubig 2019, arXiv 1905.10650, section 3 (one head at a time, the others as they are); mean and
resample ablation after Wang et al. 2023, arXiv 2211.00593.

    effect(l, h) = metric(model without head h of layer l) - metric(model)

The least work for the exact answer: a head of layer l changes nothing below l, so its run enters at layer l with the
stream of the full run, and as many heads as fit share one run, each in a copy of the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, Where
from interp.errors import SettingsError, unknown
from interp.heads.common import Answers, chosen_metric, head_grid, head_scores, settings_of
from interp.lens import Entry, Lens
from interp.reads import Read
from interp.scores import HeadScores


def ablation(
    lens: Lens,
    batch: Batch,
    *,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    mode: Literal["zero", "mean"] = "zero",
    max_copies: int = 16,
    progress: bool = False,
) -> HeadScores:
    """Change of the loss (or logit difference) when each head alone is removed.

    Args:
        lens: a model with logits.
        batch: prompts.
        answers: right next tokens; with them the metric is the logit (difference) at the last position, without
            them the mean next-token loss.
        wrong: wrong next tokens.
        mode: a head's output becomes zero, or its mean over all real tokens of the batch.
        max_copies: how many heads share one run.
        progress: whether to show a progress bar.

    Returns:
        Scores [layer, head], metric without the head minus metric with it, with `per_prompt`.

    Raises:
        UnsupportedError: the model has no logits or no readable heads.
    """
    if mode not in ("zero", "mean"):
        raise unknown("ablation mode", mode, ("zero", "mean"))
    if max_copies < 1:
        raise SettingsError(f"max_copies must be at least 1, got {max_copies}.")
    metric, unit = chosen_metric(lens, batch, answers, wrong)
    layers, counts, valid = head_grid(lens)
    streams = Read("resid_pre", layers=tuple(layers))
    output = Read("logits") if answers is None else Read("logits", positions="last")
    reads = [streams, output]
    if mode == "mean":
        reads.append(Read("z", layers=tuple(layers), reduce="mean"))
    full = lens.run(batch, reads, cache=False)
    with torch.no_grad():
        base = metric(full.logits)
    enters = all(x.skippable for x in lens.anatomy.towers[lens.anatomy.main].layers) and batch.image_mask is None
    copies = max_copies if batch.repeatable else 1
    per_prompt = torch.zeros(len(batch), *valid.shape)
    steps = [(i, h) for i in layers for h in range(0, counts[i], copies)]
    for layer, first in _bar(steps, progress):
        heads = list(range(first, min(first + copies, counts[layer])))
        wide = batch.repeat(len(heads)) if len(heads) > 1 else batch
        # The mean over the batch's real tokens: samples weigh as much as they have tokens.
        fill = None
        if mode == "mean":
            weight = batch.lengths.float() / batch.lengths.sum()
            fill = torch.einsum("b,bhd->hd", weight.to(full["z|mean", layer]), full["z|mean", layer])
        entry = None
        if enters and layer > 0:
            entry = Entry(layer, full[streams, layer].repeat(len(heads), 1, 1))
        with torch.no_grad():
            trace = lens.run(wide, [output], [_removal(layer, heads, len(batch), fill)], entry=entry)
            change = metric(trace.logits).reshape(len(heads), len(batch)) - base
        per_prompt[:, layer, heads] = change.T.cpu()
    settings = settings_of(lens, batch, method="ablation", metric=unit, mode=mode)
    return head_scores("ablation", f"change in {unit}", per_prompt, valid, settings, lens.anatomy.main)


def _removal(layer: int, heads: list[int], size: int, fill: Tensor | None) -> Edit:
    """Remove the i-th head in the i-th copy of the batch."""

    def change(z: Tensor, where: Where) -> Tensor:
        new = z.clone()
        for i, head in enumerate(heads):
            rows = slice(i * size, (i + 1) * size)
            new[rows, :, head] = 0.0 if fill is None else fill[head].to(z)
        return new

    return Edit(Read("z", layers=(layer,)), change, "ablation")


def _bar(steps: list[tuple[int, int]], show: bool) -> list[tuple[int, int]]:
    if not show:
        return steps
    from rich.progress import track

    return track(steps, description="ablating heads")  # type: ignore[return-value]
