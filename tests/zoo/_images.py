"""Random PIL images, so that every ``pixel_values`` comes out of a family's own image processor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def image(width: int, height: int, seed: int) -> Image.Image:
    """A random image: coarse coloured blocks plus pixel noise, so that patches differ from one another."""
    rng = np.random.default_rng([seed, width, height])
    blocks = rng.integers(0, 200, (-(-height // 8), -(-width // 8), 3))
    coarse = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    noise = rng.integers(0, 56, (height, width, 3))
    return Image.fromarray((coarse + noise).astype(np.uint8))


def images(batch: int, sizes: Sequence[tuple[int, int]], seed: int) -> list[Image.Image]:
    """``batch`` images whose ``(width, height)`` cycle through ``sizes``."""
    return [image(*sizes[i % len(sizes)], seed=1000 * seed + i) for i in range(batch)]
