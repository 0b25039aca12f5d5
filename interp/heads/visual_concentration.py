"""Visual heads: how much of its attention a head puts on the image, and on how few of its tokens.

Source: Bi et al. 2025, "Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach", arXiv
2412.18108. With a(j) the attention of the position that predicts the first token of the answer, and N image tokens,

    w = sum over image tokens of a(j)        p(j) = a(j) / w        C = 1 - H(p) / log N        score = w C

The paper combines weight and concentration; neither its formula nor code for it could be found, so this one, with an
entropy H in natural logarithms, is ours. C is 0 where the attention on the image is even and 1 where it is on one
token; where w is near zero C means nothing, hence the product, and means of C over prompts are weighted by w.

Sinks. Image tokens whose stream is far larger than the others' draw attention without being read (Darcet et al. 2024,
arXiv 2309.16588; Kang et al. 2025, arXiv 2503.03321): a head that rests on one has the largest concentration on a
useless token. So all is computed a second time over the image tokens whose norm, in the stream that enters the layer,
is at most `sink` times the median of the prompt's image tokens. Models that normalise the stream itself (post-norm)
have no such tokens. Where the second score falls far below the first, the head looks at sinks.

What attention does not say: a head may look at the image and write nothing. See `vision_divergence` and `ablation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, SettingsError
from interp.heads.common import head_grid, head_scores, settings_of
from interp.lens import Lens
from interp.patches import Patches
from interp.reads import Read
from interp.scores import HeadScores


def visual_concentration(
    lens: Lens, batch: Batch, *, sink: float = 5.0, masks: Sequence[Any] | None = None
) -> HeadScores:
    """How much of its attention each head puts on the image, times how concentrated it is there.

    Args:
        lens: a vision-language model whose images stand in the text and whose patterns can be read.
        batch: prompts with images; the attention is that of their last position.
        sink: how many times the median norm makes an image token a sink; above 1.
        masks: for each prompt, the pixels of its one picture that hold the object: bools [height, width] of the size of
            the picture that was given.

    Returns:
        Scores [layer, head], the mean over prompts of w C, with `per_prompt`, and the extra columns `weight` (mean w),
        `concentration` (mean C, weighted by w), `without_sinks` (the score over image tokens that are no sinks),
        `sink_weight` (the mean attention on sinks), and with masks `inside` (the share of the attention on the image
        that lies in the mask, weighted by w; its chance is `settings["chance"]`).

    Raises:
        SettingsError: `sink` is not above 1.
        InputError: the batch holds no images, a prompt has fewer than two image tokens, or the masks do not fit.
        UnsupportedError: the model's patterns cannot be read.
    """
    if not 1 < sink < math.inf:
        raise SettingsError(f"sink is a number above 1, found {sink!r}.")
    chosen = batch.select("image")
    counts = chosen.valid.sum(1)
    if int(counts.min()) < 2:
        i = int(counts.argmin())
        raise InputError(f"prompt {i} has {int(counts[i])} image tokens; a concentration needs at least two.")
    shares = None if masks is None else mask_shares(batch, masks).to(batch.mask.device)
    layers, heads, valid = head_grid(lens, site="pattern")
    rows = Read("pattern", layers=tuple(layers), positions="last")
    norms = Read("resid_pre", layers=tuple(layers), positions="image", reduce="norm")
    trace = lens.run(batch, [rows, norms])
    names = ("score", "weight", "concentration", "without_sinks", "sink_weight", "inside")
    found = {name: torch.zeros(len(batch), *valid.shape) for name in names}
    sinks = 0
    for layer in layers:
        pattern = trace.values[rows, layer][:, :, 0].float()
        sizes = trace.values[norms, layer].masked_fill(~chosen.valid, torch.nan)
        plain = chosen.valid & ~(sizes > sink * sizes.nanmedian(1, keepdim=True).values)
        sinks += int((chosen.valid & ~plain).sum())
        seen = pattern.gather(2, chosen.index[:, None].expand(-1, pattern.shape[1], -1))
        at = (slice(None), layer, slice(heads[layer]))
        weight, concentration = concentrated(seen, chosen.valid)
        rest, focus = concentrated(seen, plain)
        found["score"][at] = (weight * concentration).cpu()
        found["weight"][at], found["concentration"][at] = weight.cpu(), (weight * concentration).cpu()
        found["without_sinks"][at], found["sink_weight"][at] = (rest * focus).cpu(), (weight - rest).cpu()
        if shares is not None:
            found["inside"][at] = (seen * shares[:, None]).sum(-1).cpu()
    extra = {name: found[name].mean(0) for name in names[1:]}
    total = extra["weight"].clamp_min(1e-30)
    extra["concentration"] = extra["concentration"] / total
    settings = settings_of(lens, batch, method="visual_concentration", sink=float(sink), sinks=sinks)
    if shares is None:
        del extra["inside"]
    else:
        extra["inside"] = extra["inside"] / total
        settings["chance"] = float((shares.sum(1) / counts).mean())
    return head_scores(
        "visual_concentration", "attention", found["score"], valid, settings, lens.anatomy.main, extra=extra
    )


def concentrated(
    seen: Float[Tensor, "batch head n"], keep: Bool[Tensor, "batch n"]
) -> tuple[Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
    """The attention on some tokens, and how concentrated it is on them: w and C of the module.

    Args:
        seen: the attention on each token.
        keep: the tokens that count; C is 0 where there are fewer than two.
    """
    seen = seen.masked_fill(~keep[:, None], 0.0)
    weight = seen.sum(-1)
    share = seen / weight.masked_fill(weight == 0, 1)[..., None]
    most = keep.sum(-1)[:, None].clamp_min(2).to(seen).log()
    concentration = (1 - torch.special.entr(share).sum(-1) / most).clamp(0, 1)
    return weight, concentration.masked_fill((weight == 0) | (keep.sum(-1)[:, None] < 2), 0.0)


def mask_shares(batch: Batch, masks: Sequence[Any]) -> Float[Tensor, "batch n"]:
    """The share of each image token's pixels that lies in its prompt's mask, in the order of the image tokens.

    A token that looks at no place of its own (a row break) counts as outside.

    Raises:
        InputError: there is no patch map, a prompt has several pictures, or a mask is not bools of its picture's size.
    """
    patches = batch.patches
    if patches is None:
        raise InputError("masks need to know where image tokens look: make the batch with lens.prepare(texts, images).")
    if len(masks) != len(batch):
        raise InputError(f"{len(masks)} masks were given for {len(batch)} prompts.")
    index = batch.select("image").index.cpu()
    table = torch.zeros(batch.mask.shape)
    for i, given in enumerate(masks):
        mask = np.asarray(given)
        if len(patches.sizes[i]) != 1:
            raise InputError(f"prompt {i} has {len(patches.sizes[i])} pictures; masks are for one picture each.")
        width, height = patches.sizes[i][0]
        if mask.dtype != np.bool_ or mask.shape != (height, width):
            raise InputError(
                f"mask {i} must be bools [{height}, {width}] as its picture, found {mask.dtype} {list(mask.shape)}."
            )
        mine = patches.sample_rows(i)
        table[i, mine.column] = torch.from_numpy(_inside(mask, mine))
    return table.gather(1, index)


def _inside(mask: np.ndarray, rows: Patches) -> np.ndarray:
    """The share of each box that lies in the mask; pixels count by how much of them the box holds."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    sums[1:, 1:] = mask.cumsum(0).cumsum(1)

    def below(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The mask's area above and left of a point, by bilinear interpolation of the sums."""
        column, row = (np.clip(v, 0, n) for v, n in ((x, mask.shape[1]), (y, mask.shape[0])))
        left, top = np.minimum(column.astype(int), mask.shape[1] - 1), np.minimum(row.astype(int), mask.shape[0] - 1)
        dx, dy = column - left, row - top
        upper = sums[top, left] * (1 - dx) + sums[top, left + 1] * dx
        lower = sums[top + 1, left] * (1 - dx) + sums[top + 1, left + 1] * dx
        return upper * (1 - dy) + lower * dy

    left, top, right, bottom = rows.box.double().numpy().T
    area = (right - left) * (bottom - top)
    share = (below(right, bottom) - below(left, bottom) - below(right, top) + below(left, top)) / np.maximum(
        area, 1e-12
    )
    placed = np.array([kind in ("patch", "tile", "thumbnail") for kind in rows.kind])
    return np.where(placed, share, 0.0).astype(np.float32)
