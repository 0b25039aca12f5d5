"""Vision-aware head divergence: how far each head's output moves when the image is taken away.

Source: He et al. 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv
2412.13949. With A(l, i) the output of head i of layer l at the last position, before the output projection,

    absolute    VHD(l, i) = |A(l, i; image and text) - A(l, i; text)|               the paper's
    relative    divided by the mean of the two norms, from 0 to 2
    cosine      1 - the cosine of the two outputs, from 0 to 2
    projected   the same as absolute of the head's contribution to the residual stream, |(A - A') W_O(i)|

VHD is a distance: heads of large norm have a large one whatever they do, hence the other forms, and the extra columns
`seen` and `unseen` with the two norms. `projected` takes in what a family puts behind the projection (norms, each with
the scale of its own run, multipliers). What "without the image" means is said in
[`without_image`][interp.without_image.without_image]; the paper's formula is `drop`, under which a part of the
divergence comes from the moved positions alone.

The paper's second step leaves out heads "that react negatively": in their layer both the divergence and the squared
norm without the image lie more than a standard deviation above the mean over heads. It belongs to the choice of heads
to reinforce, not to the definition of VHD, so by default such heads are only counted (`outlier`). Which standard
deviation the paper takes is not said.

No attention weight is read: a model keeps its fused attention, save for `mask`, which edits scores.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.errors import unknown
from interp.heads.common import head_grid, head_scores, settings_of
from interp.lens import Lens
from interp.reads import Read
from interp.scores import HeadScores
from interp.without_image import Mode, without_image

Form = Literal["absolute", "relative", "cosine", "projected"]
Outliers = Literal["keep", "biased", "unbiased"]
UNITS = {"absolute": "norm", "relative": "share of the norm", "cosine": "1 - cosine", "projected": "norm in the stream"}


def vision_divergence(
    lens: Lens,
    batch: Batch,
    *,
    without: Mode = "drop",
    form: Form = "absolute",
    outliers: Outliers = "keep",
    seed: int = 0,
) -> HeadScores:
    """How far each head's output at the last position moves when the image is taken away.

    Args:
        lens: a vision-language model.
        batch: prompts with images.
        without: how the images are taken away: `drop drop_keep_positions mask zero mean noise`.
        form: `absolute`, `relative`, `cosine` or `projected`.
        outliers: `keep`, or give heads that the paper's rule leaves out a zero, with the `biased` or `unbiased`
            standard deviation over the heads of a layer.
        seed: for `without="noise"`.

    Returns:
        Scores [layer, head], the mean over prompts, with `per_prompt`, and the extra columns `seen` and `unseen` (mean
        norms with and without the image) and `outlier` (the share of prompts in which the rule holds).

    Raises:
        UnknownNameError: an unknown option value.
        UnsupportedError: the model takes no images, cannot do without them in this way, or has no readable heads.
        InputError: the batch holds no images.
    """
    check_options(form, outliers)
    blind = without_image(lens, batch, without, seed=seed)
    site = "result" if form == "projected" else "z"
    read = Read(site, positions="last")
    seen = lens.run(batch, read)
    unseen = lens.run(blind.batch, read, blind.edits)
    layers, counts, valid = head_grid(lens, site=site)
    per_prompt, with_norm, without_norm, outlier = (torch.zeros(len(batch), *valid.shape) for _ in range(4))
    for layer in layers:
        at = (slice(None), layer, slice(counts[layer]))
        one, two = seen[read, layer][:, 0], unseen[read, layer][:, 0]
        per_prompt[at], outlier[at] = (x.cpu() for x in ruled(one, two, form, outliers))
        with_norm[at], without_norm[at] = (x.float().norm(dim=-1).cpu() for x in (one, two))
    settings = settings_of(
        lens, batch, method="vision_divergence", form=form, outliers=outliers, site=site, **blind.settings
    )
    extra = {"seen": with_norm.mean(0), "unseen": without_norm.mean(0), "outlier": outlier.mean(0)}
    return head_scores("vision_divergence", UNITS[form], per_prompt, valid, settings, lens.anatomy.main, extra=extra)


def check_options(form: str, outliers: str) -> None:
    """Whether the options exist.

    Raises:
        UnknownNameError: one does not.
    """
    if form not in UNITS:
        raise unknown("form of divergence", form, UNITS)
    if outliers not in get_args(Outliers):
        raise unknown("treatment of outliers", outliers, get_args(Outliers))


def divergence(
    seen: Float[Tensor, "*batch head d"], unseen: Float[Tensor, "*batch head d"], form: str
) -> Float[Tensor, "*batch head"]:
    """The divergence of two outputs of each head, in float32 or wider; zero where they are equal.

    Args:
        seen: outputs with the image.
        unseen: outputs without it.
        form: `absolute` or `projected` (the outputs are then contributions to the stream), `relative` or `cosine`.
    """
    wide = torch.promote_types(seen.dtype, torch.float32)
    one, two = seen.to(wide), unseen.to(wide)
    if form in ("absolute", "projected"):
        return (one - two).norm(dim=-1)
    norms = one.norm(dim=-1), two.norm(dim=-1)
    if form == "relative":
        mean = (norms[0] + norms[1]) / 2
        return (one - two).norm(dim=-1) / mean.masked_fill(mean == 0, 1)
    # Half the squared distance of the directions is 1 - cosine, without its rounding near zero.
    ways = [x / n.masked_fill(n == 0, 1)[..., None] for x, n in zip((one, two), norms, strict=True)]
    value = (ways[0] - ways[1]).square().sum(-1) / 2
    return torch.where((norms[0] == 0) ^ (norms[1] == 0), torch.ones_like(value), value)


def outlying(
    divergences: Float[Tensor, "*batch head"], squared: Float[Tensor, "*batch head"], *, unbiased: bool = False
) -> Bool[Tensor, "*batch head"]:
    """The heads of a layer that the paper leaves out: both numbers lie above mean plus standard deviation.

    Args:
        divergences: of the heads of one layer.
        squared: the squared norm of each head's output without the image.
        unbiased: whether the variance is divided by the number of heads less one.
    """
    heads = divergences.shape[-1]
    if heads < 2:
        return torch.zeros_like(divergences, dtype=torch.bool)

    def far(x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=-1, keepdim=True, correction=int(unbiased))
        return x > mean + std

    return far(divergences) & far(squared)


def ruled(
    seen: Float[Tensor, "*batch head d"], unseen: Float[Tensor, "*batch head d"], form: str, outliers: str
) -> tuple[Float[Tensor, "*batch head"], Bool[Tensor, "*batch head"]]:
    """The divergence of the heads of one layer after the rule on outliers, and which of them it holds for."""
    found = divergence(seen, unseen, form)
    out = outlying(found, unseen.to(found).square().sum(-1), unbiased=outliers == "unbiased")
    return (found if outliers == "keep" else found.masked_fill(out, 0.0)), out
