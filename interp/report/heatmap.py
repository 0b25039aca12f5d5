"""A heat map over a picture, as a PNG for a page."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from interp.palette import colour_range, is_diverging
from interp.report.blocks import Scale

if TYPE_CHECKING:
    from PIL.Image import Image

NEGATIVE, POSITIVE, STRONG = "#1f66a8", "#e8590c", "#b02a02"
SMALL, LARGE, COLOURS = 288, 384, 128  # pixels of a drawn picture's longer side, and its colours


def overlay(
    grid: np.ndarray,
    picture: "Image | None",
    *,
    signed: bool | None = None,
    largest: float | None = None,
    cover: float = 1.0,
) -> tuple[bytes, Scale]:
    """A heat map over a picture made grey, as a PNG, and what its colours mean.

    Args:
        grid: scores [height, width]; NaN is left clear.
        picture: of that size; None for a light ground.
        signed: whether zero stands in the middle of the colours; None where a score is negative.
        largest: the score with the strongest colour; None for the largest in the map.
        cover: how much of the picture the colours hide; 1 for most of it where they are strongest.
    """
    from PIL import Image

    signed = is_diverging(grid) if signed is None else signed
    low, high = colour_range(grid, signed) if largest is None else (-largest if signed else 0.0, largest)
    stops = np.array([0.0, 0.5, 1.0])
    value = np.clip((np.nan_to_num(grid) - low) / (high - low), 0, 1)
    colours = (NEGATIVE, "#ffffff", POSITIVE) if signed else (POSITIVE, POSITIVE, STRONG)
    alphas = [cover * a for a in ((0.85, 0.0, 0.85) if signed else (0.0, 0.5, 0.88))]
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], dtype=float)
    alpha = np.where(np.isnan(grid), 0, np.interp(value, stops, alphas))[..., None]
    heat = np.stack([np.interp(value, stops, rgb[:, c]) for c in range(3)], -1)
    if signed:  # white in the middle would pale the picture: each side has its own colour
        heat = np.where((value < 0.5)[..., None], rgb[0], rgb[2])
    ground = np.full((*grid.shape, 1), 240.0)
    if picture is not None:
        ground = np.asarray(picture.convert("L"), dtype=float)[..., None]
    mixed = (ground * (1 - alpha) + heat * alpha).round().astype(np.uint8)
    made = Image.fromarray(mixed)
    longer = max(made.size)
    if longer < SMALL:
        factor = -(-SMALL // longer)
        made = made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)
    made.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    made.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), Scale(_on_grey(colours, alphas), f"{low:.2g}", f"{high:.2g}")


def _on_grey(colours: Sequence[str], alphas: Sequence[float]) -> list[str]:
    """The colours as they are seen on a light ground."""
    found = []
    for colour, alpha in zip(colours, alphas, strict=True):
        parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        seen = [round(240 * (1 - alpha) + part * alpha) for part in parts]
        found.append("#{:02x}{:02x}{:02x}".format(*seen))
    return found
