"""Cross-modal causal tracing (FCCT): through which tokens, layers and components an object gets from image to answer.

Source: Li et al. 2026, "Causal Tracing of Object Representations in Large Vision Language Models: Mechanistic
Interpretability and Hallucination Mitigation", AAAI 2026, arXiv 2511.05923. The model is asked whether an object is in
the picture. In the corrupt run the picture is spoilt; one component of one layer (what attention or the MLP adds, or
the stream) is put back to its clean value at all tokens of a group, and with P the metric of the answer

    recovery rate = (P patched - P corrupt) / (P clean - P corrupt)

Groups of tokens. The paper names seven; with those that it leaves out they are a partition:

    prefix            text in front of the image (cannot change when only the picture does)
    image, early      image tokens before the object, in the order in which they stand
    image, object     image tokens on the object: at least half of the token's pixels, or any where none has half
    image, between    image tokens between the first and the last of these that are not on it
    image, late       image tokens behind
    text, early       text between the image and the object's name
    text, object      the object's name
    text, late        text behind it, without the last token
    last              the last token, where the answer is read

Departures. The size of the paper's noise is not known, nor whether it was added to pixels or to embeddings (`noise` and
`embedding_noise` count in standard deviations of either); `corrupt` takes any other pictures, and the counterfactual
without the object is the cleaner question: noise takes the model where it has never been. The rate is given as the
ratio of the means and as the mean of ratios, without prompts in which the corruption does next to nothing
(`CausalMap.left_out`); `settings["tokens"]` has the mean size of each group, for a rate per token.

What it does not see: a group of many tokens brings back more than a group of one; a probability saturates, which a
logit difference (`wrong`) does not; noise on embeddings leaves alone what a model writes into the image tokens of later
layers (DeepStack).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, Where
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.heads.common import Answers
from interp.heads.visual_concentration import mask_shares
from interp.lens import Lens
from interp.reads import Read
from interp.tracing.causal_map import CausalMap
from interp.tracing.grid_run import Direction
from interp.tracing.metrics import Metric
from interp.tracing.sweep import patch_sweep
from interp.without_image import without_image

Corruption = Literal["noise", "mean", "swap"]
COMPONENTS = ("attn_out", "mlp_out", "resid_post")
IMAGE = ("image, early", "image, object", "image, between", "image, late")
TEXT = ("text, early", "text, object", "text, late")


def cross_modal_trace(
    lens: Lens,
    clean: Batch,
    corrupt: Batch | Corruption | Literal["embedding_noise"] = "noise",
    *,
    objects: Sequence[Any],
    names: Sequence[str],
    answers: Answers,
    wrong: Answers | None = None,
    components: str | Sequence[str] = COMPONENTS,
    layers: int | Sequence[int] | None = None,
    metric: Metric | None = None,
    direction: Direction = "denoise",
    noise: float = 1.0,
    min_gap: float = 0.1,
    seed: int = 0,
    memory: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CausalMap:
    """How far each group of tokens brings the answer back, in each component and layer.

    Args:
        lens: a vision-language model whose images stand in the text.
        clean: prompts that ask for an object, each with one picture, made by `lens.prepare(texts, images)`.
        corrupt: the same prompts with other pictures (such as the scene without the object), or what to do to the
            pixels: `noise` adds normal noise, `mean` takes the picture's own mean colour, `swap` the next prompt's
            picture; `embedding_noise` adds normal noise to the streams of the image tokens where they enter the first
            layer, the same for every prompt.
        objects: for each prompt the pixels of the object: bools [height, width] of the picture that was given.
        names: for each prompt the object's name as it stands in the text.
        answers: the right answer of each prompt, one token.
        wrong: a wrong one, for a logit difference.
        components: which sites are put back.
        layers: which; None for all.
        metric: as for `patch_sweep`; None takes the logit difference with `wrong`, else the probability.
        direction: `denoise` as in the paper, or `noise`.
        noise: standard deviation of the noise, in those of the pixels that the model gets, or of the numbers in a
            prompt's own image streams.
        min_gap: see `CausalMap`.
        seed: of the noise.
        memory: bytes that a pass may take.
        checkpoint: a folder in which finished passes are kept.
        progress: whether to show a progress bar.

    Returns:
        A map with a cell for each component, layer and group.

    Raises:
        InputError: no images, objects or names that do not fit, or a corruption that changes nothing.
        SettingsError: the noise is not above 0, or there is nothing to swap with.
        UnknownNameError: another corruption, site or layer.
        UnsupportedError: the images do not stand in the text, or the pixels cannot be changed.
    """
    masks = token_groups(lens, clean, objects, names)
    spoilt: list[Edit] = []
    if corrupt == "embedding_noise":
        made, spoilt = clean, [embedding_noise(noise=noise, seed=seed)]
    else:
        made = corrupt if isinstance(corrupt, Batch) else corrupted(lens, clean, corrupt, noise=noise, seed=seed)
    groups = {name: mask for name, mask in masks.items() if bool(mask.any())}
    if metric is None:
        metric = "probability" if wrong is None else "logit_difference"
    found = patch_sweep(
        lens,
        clean,
        made,
        sites=components,
        layers=layers,
        positions=groups,
        metric=metric,
        answers=answers,
        wrong=wrong,
        direction=direction,
        corrupt_edits=spoilt,
        min_gap=min_gap,
        memory=memory,
        checkpoint=checkpoint,
        progress=progress,
    )
    sizes = {name: float(mask.sum(1).float().mean()) for name, mask in groups.items()}
    how = {"corruption": corrupt if isinstance(corrupt, str) else "given"}
    how |= {"noise": noise, "seed": seed} if corrupt in ("noise", "embedding_noise") else {}
    return replace(found, settings={**found.settings, "method": "cross_modal_trace", "tokens": sizes, **how})


def token_groups(
    lens: Lens, batch: Batch, objects: Sequence[Any], names: Sequence[str]
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """The groups of tokens, each a mask over the columns; together they hold every real token once.

    Args:
        lens: the model.
        batch: prompts with one picture each.
        objects: the pixels of each object.
        names: the name of each object in its text; its last occurrence counts.

    Raises:
        InputError: no images, as many objects or names as prompts are not given, an object that no image token sees,
            or a name that does not stand behind the image.
    """
    if len(names) != len(batch):
        raise InputError(f"{len(names)} names were given for {len(batch)} prompts.")
    image = batch.span("image").cpu()
    shares = torch.zeros(batch.mask.shape)
    chosen = batch.select("image")
    shares.scatter_(1, chosen.index.cpu(), mask_shares(batch, objects) * chosen.valid.cpu())
    found = {name: torch.zeros(batch.mask.shape, dtype=torch.bool) for name in ("prefix", *IMAGE, *TEXT, "last")}
    for i, name in enumerate(names):
        real = batch.mask[i].cpu()
        columns = torch.arange(len(real))
        seen = (shares[i] >= 0.5) & image[i]
        seen = seen if bool(seen.any()) else (shares[i] > 0) & image[i]
        if not bool(seen.any()):
            raise InputError(f"no image token of prompt {i} sees the object {name!r}: its mask is empty.")
        low, high = int(columns[seen].min()), int(columns[seen].max())
        border, end = int(columns[image[i]].max()), int(columns[real].max())
        called = torch.zeros_like(real)
        try:
            called[columns[real]] = batch[i].find(name, occurrence=-1)[0].cpu()
        except InputError as error:
            raise InputError(f"prompt {i}: {error}") from error
        called &= columns < end
        if not bool(called.any()) or int(columns[called].min()) < border:
            raise InputError(f"the name {name!r} of prompt {i} must stand behind the image and before the last token.")
        first, last = int(columns[called].min()), int(columns[called].max())
        text = real & ~image[i]
        parts = {
            "prefix": text & (columns < border),
            "image, early": image[i] & (columns < low),
            "image, object": seen,
            "image, between": image[i] & (columns > low) & (columns < high) & ~seen,
            "image, late": image[i] & (columns > high),
            "text, early": text & (columns > border) & (columns < first),
            "text, object": called,
            "text, late": text & (columns > first) & ~called & (columns < end),
            "last": columns == end,
        }
        if last - first + 1 > int(called.sum()):
            parts["text, late"] &= columns > last
        for group, mask in parts.items():
            found[group][i] = mask
    device = batch.mask.device
    return {group: mask.to(device) for group, mask in found.items()}


def corrupted(lens: Lens, batch: Batch, how: Corruption, *, noise: float = 1.0, seed: int = 0) -> Batch:
    """The same prompts with spoilt pictures.

    Args:
        lens: the model.
        batch: prompts with pictures.
        how: `noise`, `mean` or `swap`; see `cross_modal_trace`.
        noise: standard deviation of the noise, in those of the pixels.
        seed: of the noise.

    Raises:
        UnknownNameError: another corruption.
        SettingsError: the noise is not above 0, or one prompt has nothing to swap with.
        UnsupportedError: the pixels cannot be told apart by prompt.
    """
    if how not in get_args(Corruption):
        known = (*get_args(Corruption), "embedding_noise (of cross_modal_trace)")
        raise unknown("corruption", how, known)
    if how == "mean":
        return without_image(lens, batch, "mean").batch
    pixels = batch.inputs.get("pixel_values")
    if not isinstance(pixels, Tensor):
        raise UnsupportedError(f"{lens.name}: this batch holds no pixels that could be spoilt.")
    if how == "noise":
        _check(noise)
        drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        new = pixels + noise * pixels.float().std() * drawn.to(pixels)
    else:
        if len(batch) < 2:
            raise SettingsError("a picture is swapped with that of the next prompt: give at least two prompts.")
        if len(pixels) != len(batch):
            raise UnsupportedError(
                f"{lens.name}: pictures are packed over prompts and cannot be swapped; give `corrupt`."
            )
        new = pixels.roll(-1, 0)
    return replace(batch, inputs={**batch.inputs, "pixel_values": new.to(pixels)})


def embedding_noise(*, noise: float = 1.0, seed: int = 0) -> Edit:
    """Normal noise on the streams of image tokens where they enter the first layer; an edit for `patch_sweep`.

    Args:
        noise: its standard deviation, in that of the numbers in a prompt's own image streams.
        seed: of the noise, which is the same for every prompt: token by token, in their order.

    Raises:
        SettingsError: the noise is not above 0.
    """
    _check(noise)

    def change(value: Tensor, where: Where) -> Tensor:
        count, width = value.shape[1:]
        random = torch.Generator().manual_seed(seed)
        # Token by token, so that a token's noise does not depend on how many there are.
        drawn = torch.stack([torch.randn(width, generator=random) for _ in range(count)])
        real = where.valid[..., None].to(value.device)
        size = torch.stack(
            [row[chosen].float().std(correction=0) for row, chosen in zip(value, where.valid, strict=True)]
        )
        added = noise * size[:, None, None] * drawn.to(value.device, torch.float32)
        return torch.where(real, value + added.to(value), value)

    return Edit(Read("resid_pre", layers=(0,), positions="image"), change, "embedding_noise")


def _check(noise: float) -> None:
    if not 0 < noise < math.inf:
        raise SettingsError(f"noise is a finite number above 0, got {noise}.")
