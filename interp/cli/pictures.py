"""The pictures of a report: kept beside the scores at the size of their patch maps."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.files import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp.batch import Batch
    from interp.tokens import TokenScores


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
