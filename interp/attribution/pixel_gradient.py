"""The gradient of an answer at the pixels that the model gets, and its average over the pixels of each image token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.image_grids import needed_grids
from interp.attribution.targets import Question
from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.lens import Lens
from interp.reads import Read


def pixel_gradient(lens: Lens, batch: Batch, asked: Question, target: int) -> Float[Tensor, "picture height width"]:
    """The L2 norm over colours of the gradient of one target's number at each pixel.

    Args:
        lens: an LVLM.
        batch: prompts with pictures.
        asked: what is differentiated.
        target: which of its targets.

    Raises:
        UnsupportedError: the pixels do not reach the logits differentiably.
    """
    pixels = batch.inputs["pixel_values"].detach().clone().requires_grad_()
    number, found = asked.metric(target), []

    def metric(logits: Tensor) -> Tensor:
        value = number(logits)
        found.extend(torch.autograd.grad(value.sum(), [pixels], retain_graph=True, allow_unused=True))
        return value

    # A run with a metric gives the gradient at some site too: the smallest one there is.
    top = len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
    site = Read("resid_post", layers=(top,), positions="last")
    lens.run(replace(batch, inputs={**batch.inputs, "pixel_values": pixels}), gradients=[site], metric=metric)
    if found[0] is None:
        raise UnsupportedError(f"the logits of {lens.name} do not depend differentiably on its pixels.")
    return torch.linalg.vector_norm(found[0].float(), dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class PixelGrid:
    """The pictures of a batch, and the image token of every part of them.

    Attributes:
        sample: the sample of each picture.
        columns: the column of each part of a picture [height, width], one tensor for each picture.
        shape: samples and columns of the batch.
        detail: which pixels are of fine detail.
    """

    sample: list[int]
    columns: list[Int[Tensor, "rows cols"]]
    shape: tuple[int, int]
    detail: Bool[Tensor, "picture height width"]

    def quotient(self, above: Tensor, below: Tensor, epsilon: float) -> Float[Tensor, "batch pos"]:
        """One map of pixels divided by another, fine detail alone, averaged over the pixels of each token.

        Args:
            above: the map of the question [picture, height, width].
            below: the map of the general instruction.
            epsilon: what is added to `below`, as a share of its mean over the sample's pictures.
        """
        sample = torch.tensor(self.sample, device=below.device)
        out = torch.zeros(self.shape)
        for i, columns, up, down, detail in zip(self.sample, self.columns, above, below, self.detail, strict=True):
            floor = epsilon * below[sample == i].mean().clamp_min(torch.finfo(below.dtype).tiny)
            parts = (up / (down + floor) * detail).unflatten(1, (columns.shape[1], -1)).unflatten(0, (len(columns), -1))
            out[i, columns] = parts.mean((1, 3)).cpu()
        return out


def pixel_grid(lens: Lens, batch: Batch) -> PixelGrid:
    """How the pixels of a batch belong to its image tokens.

    Raises:
        InputError: the batch has no patch map, or its tokens no place.
        UnsupportedError: pixels do not come as one picture for each image, cut evenly into the image's tokens.
    """
    grids = needed_grids(lens, batch.patches, "form='pixel_gradient'")
    assert batch.patches is not None
    pixels = batch.inputs.get("pixel_values")
    shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else None
    images = sum(map(len, batch.patches.sizes))
    one_each = shape is not None and len(shape) == 4 and shape[0] == images == len(grids)
    if not one_each or "image_sizes" in batch.inputs or any(g.kind != "patch" for g in grids):
        kinds = ", ".join(sorted({g.kind for g in grids}))
        raise UnsupportedError(
            f"form='pixel_gradient' needs pixels of one whole picture for each image, found {shape} for {images} "
            f"images (tokens of kind {kinds}); the nearest thing is input_gradient, with tower='vision' or without."
        )
    assert isinstance(pixels, Tensor)
    height, width = pixels.shape[-2:]
    for grid in grids:
        rows, cols = grid.rows.shape
        if height % rows or width % cols:
            raise UnsupportedError(
                f"pictures of {height} x {width} pixels are not cut evenly by {rows} x {cols} tokens."
            )
    ordered = sorted(grids, key=lambda g: (g.sample, g.image))
    columns = [batch.patches.column[g.rows] for g in ordered]
    size, length = batch.mask.shape
    return PixelGrid([g.sample for g in ordered], columns, (size, length), fine_detail(pixels.float()))


def fine_detail(pixels: Float[Tensor, "picture channel height width"]) -> Bool[Tensor, "picture height width"]:
    """Pixels with more fine detail than the picture's median.

    What a Gaussian (3 pixels wide, 0.8 its deviation) takes away, its L2 norm over colours, and the median of that in
    windows of 7 x 7.
    """
    tap = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=pixels.device) ** 2) / (2 * 0.8**2))
    tap = tap / tap.sum()
    wide = torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="reflect")
    blurred = (wide.unfold(2, 3, 1) * tap).sum(-1)
    blurred = (blurred.unfold(3, 3, 1) * tap).sum(-1)
    energy = torch.linalg.vector_norm(pixels - blurred, dim=1)
    rows, cols = (_mirrored(n) for n in energy.shape[1:])
    out = []
    for one in energy:
        smooth = one[rows][:, cols].unfold(0, 7, 1).unfold(1, 7, 1).flatten(-2).median(-1).values
        out.append(smooth > _middle(smooth))
    return torch.stack(out)


def _mirrored(size: int) -> list[int]:
    """Indices with three more at each end, as in a mirror at the edge."""
    return [(-1 - i) % size if i < 0 else (2 * size - 1 - i if i >= size else i) for i in range(-3, size + 3)]


def _middle(values: Tensor) -> Tensor:
    """The median, the mean of the middle two where there are two."""
    ordered = values.flatten().sort().values
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
