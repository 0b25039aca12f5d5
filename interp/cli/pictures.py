"""The pictures of a report: kept beside the scores at the size of their patch maps, and drawn under heat maps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.files import write_bytes
from interp.palette import colour_range, is_diverging
from interp.report import Scale

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp.batch import Batch
    from interp.tokens import TokenScores

NEGATIVE, POSITIVE, STRONG = "#1f66a8", "#e8590c", "#b02a02"
SMALL, LARGE, COLOURS = 288, 384, 128  # pixels of a drawn picture's longer side, and its colours


def keep_picture(folder: Path, i: int, scores: "TokenScores", n: int, batch: "Batch", given: "Image | None") -> None:
    """Save the picture that the map of one sample is over, if there is one of its size.

    Args:
        folder: where to.
        i: number of the prompt.
        scores: a result.
        n: the sample in it.
        batch: what the model was given.
        given: the prompt's picture.
    """
    size = _size(scores, n)
    if size is None or place(folder, i, size).is_file():
        return
    picture = given if given is not None and given.size == size else _processed(batch, n, size)
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write_bytes(place(folder, i, size), buffer.getvalue())


def place(folder: Path, i: int, size: tuple[int, int]) -> Path:
    """Where the picture of a prompt is, by the size of the map over it."""
    return folder / f"{i}-{size[0]}x{size[1]}.png"


def picture_of(folder: Path, i: int, scores: "TokenScores") -> "Image | None":
    """The picture under the map of a prompt's scores, if it was kept."""
    from PIL import Image

    size = _size(scores, 0)
    if size is None or not (path := place(folder, i, size)).is_file():
        return None
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _size(scores: "TokenScores", n: int) -> tuple[int, int] | None:
    """Pixels of a sample's first picture; None where no token has a place in it."""
    patches = scores.patches
    if patches is None or not patches.sizes[n]:
        return None
    rows = patches.sample_rows(n)
    kinds = zip(rows.kind, rows.image.tolist(), strict=True)
    return patches.sizes[n][0] if any(k in ("patch", "tile", "thumbnail") and m == 0 for k, m in kinds) else None


def _processed(batch: "Batch", n: int, size: tuple[int, int]) -> "Image | None":
    """A sample's picture as the model gets it, brought back to 0 to 255."""
    from PIL import Image

    pixels: Any = batch.inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or len(pixels) != len(batch) or pixels.shape[-2:] != (size[1], size[0]):
        return None
    array = pixels[n].detach().cpu().float().numpy()
    low, high = array.min((1, 2), keepdims=True), array.max((1, 2), keepdims=True)
    plain = (array - low) / np.where(high > low, high - low, 1) * 255
    return Image.fromarray(plain.round().astype(np.uint8).transpose(1, 2, 0)[..., :3])


def overlay(grid: np.ndarray, picture: "Image | None", *, signed: bool | None = None) -> tuple[bytes, Scale]:
    """A heat map over a picture made grey, as a PNG, and what its colours mean.

    Args:
        grid: scores [height, width]; NaN is left clear.
        picture: of that size; None for a light ground.
        signed: whether zero stands in the middle of the colours; None where a score is negative.
    """
    from PIL import Image

    signed = is_diverging(grid) if signed is None else signed
    low, high = colour_range(grid, signed)
    stops = np.array([0.0, 0.5, 1.0])
    value = np.clip((np.nan_to_num(grid) - low) / (high - low), 0, 1)
    colours = (NEGATIVE, "#ffffff", POSITIVE) if signed else (POSITIVE, POSITIVE, STRONG)
    alphas = (0.85, 0.0, 0.85) if signed else (0.0, 0.5, 0.88)
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
