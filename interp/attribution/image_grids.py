"""The rectangular grids that image tokens stand in: what filters and windows slide over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import InputError, UnsupportedError
from interp.grids import explain
from interp.lens import Lens
from interp.patches import Patches

PLACED = ("patch", "tile", "thumbnail")


@dataclass(frozen=True, slots=True, eq=False)
class ImageGrid:
    """One grid of tokens: a picture, all of its tiles together, or its thumbnail.

    Attributes:
        sample: the sample that it stands in.
        image: which image of that sample.
        kind: `patch`, `tile` or `thumbnail`.
        rows: for each place of the grid, the row of the patch map [height, width].
    """

    sample: int
    image: int
    kind: str
    rows: Int[Tensor, "height width"]


def image_grids(patches: Patches) -> list[ImageGrid]:
    """Every grid of a patch map, in the order of its tokens; tokens without a place of their own are in none.

    Raises:
        UnsupportedError: the tokens of a picture fill no rectangle.
    """
    places = zip(patches.sample.tolist(), patches.image.tolist(), patches.kind, strict=True)
    members: dict[tuple[int, int, str], list[int]] = {}
    for n, key in enumerate(places):
        if key[2] in PLACED:
            members.setdefault(key, []).append(n)
    found: list[ImageGrid] = []
    for (sample, image, kind), listed in members.items():
        index = torch.tensor(listed)
        row, col = patches.row[index], patches.col[index]
        height, width = int(row.max()) + 1, int(col.max()) + 1
        grid = torch.full((height, width), -1)
        if int(row.min()) >= 0 and int(col.min()) >= 0:
            grid[row, col] = index
        if len(listed) != height * width or bool((grid < 0).any()):
            raise UnsupportedError(
                f"the {len(listed)} tokens of kind {kind!r} of image {image} in sample {sample} do not fill their grid "
                f"of {height} x {width}."
            )
        found.append(ImageGrid(sample, image, kind, grid))
    return found


def needed_grids(lens: Lens, patches: Patches | None, purpose: str) -> list[ImageGrid]:
    """The grids of a batch, for a purpose that cannot do without.

    Raises:
        InputError: the batch has no patch map, or a map without grids; the message says why.
        UnsupportedError: the tokens of a picture fill no rectangle.
    """
    if patches is None:
        raise InputError(f"{purpose} needs to know where the image tokens look: {explain(lens.model.config)}")
    grids = image_grids(patches)
    if not grids:
        kinds = ", ".join(sorted(set(patches.kind)))
        raise InputError(f"{purpose} needs image tokens with a place of their own; those of {lens.name} are: {kinds}.")
    return grids
