"""The pictures of the objects: small images with transparency, scaled to the size asked for."""

from functools import lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image

from interp.data.scenes.catalogue import NAMES
from interp.errors import unknown

_FAINT = 64
"""Below this opacity (of 255) a pixel is left out, so that every pixel of a mask is seen in the picture."""


@lru_cache(maxsize=len(NAMES))
def _original(name: str) -> Image.Image:
    if name not in NAMES:
        raise unknown("object", name, NAMES)
    with (files("interp.data.scenes") / "sprites" / f"{name}.png").open("rb") as file:
        return Image.open(file).convert("RGBA")


@lru_cache(maxsize=2048)
def sprite(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An object's picture with its longer side scaled to `size` pixels.

    Returns:
        The colours, float32 [height, width, 3] from 0 to 255, and the opacity, float32 [height, width] from 0 to 1.
        No row or column is empty. Both arrays are read-only, since they are kept.

    Raises:
        UnknownNameError: no object has this name.
    """
    picture = _original(name)
    scale = size / max(picture.size)
    wanted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Scaling premultiplied colours keeps the background of the sprite (invisible, but black) out of the edges.
    scaled = np.asarray(picture.convert("RGBa").resize(wanted, Image.Resampling.BOX).convert("RGBA"), dtype=np.float32)
    opacity = np.where(scaled[..., 3] >= _FAINT, scaled[..., 3] / 255, 0).astype(np.float32)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    colours, opacity = np.ascontiguousarray(scaled[inside][..., :3]), np.ascontiguousarray(opacity[inside])
    colours.flags.writeable = opacity.flags.writeable = False
    return colours, opacity
