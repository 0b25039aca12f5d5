"""The pictures that the model is trained on: drawn once, held in memory."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.scenes.model import PATCH
from interp.data import scenes

NOTHING = len(scenes.NAMES)
"""The class of a patch that shows no object."""

_COVERED = 0.2
"""A patch has the class of the object that covers most of it, if that covers at least this share."""

_CHUNK = 250


@dataclass(frozen=True, slots=True)
class Pool:
    """Scenes without their pictures' recipe, and pixels uint8 [n, height, width, 3], classes int64 [n, patches]."""

    scenes: list[scenes.Scene]
    pixels: Tensor
    classes: Tensor


def draw(split: scenes.Split, n: int, *, workers: int = 2) -> Pool:
    """The first `n` scenes of a split."""
    starts = range(0, n, _CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_chunk, [split] * len(starts), starts, [min(_CHUNK, n - s) for s in starts]))
    return Pool(
        [scene for part in parts for scene in part[0]],
        torch.from_numpy(np.concatenate([part[1] for part in parts])),
        torch.from_numpy(np.concatenate([part[2] for part in parts])),
    )


def _chunk(split: scenes.Split, start: int, n: int) -> tuple[list[scenes.Scene], np.ndarray, np.ndarray]:
    drawn = list(scenes.scenes(split, n, start=start))
    pixels = np.stack([scene.pixels for scene in drawn])
    classes = np.stack([patch_classes(scene) for scene in drawn])
    empty = np.zeros((scenes.SIDE, scenes.SIDE, 3), np.uint8)
    # The texts need only what stands where: backgrounds of thousands of scenes would fill the memory.
    light = [scenes.Scene(s.id, s.colour, empty, empty, s.objects, s.themes) for s in drawn]
    return light, pixels, classes


def patch_classes(scene: scenes.Scene) -> np.ndarray:
    """For each patch, row by row, the number of the object that covers most of it, or NOTHING: int64 [patches]."""
    side = scenes.SIDE // PATCH
    cover = np.zeros((NOTHING + 1, side, side))
    cover[NOTHING] = _COVERED
    for placed in scene.objects:
        mask = scene.mask(placed.name).reshape(side, PATCH, side, PATCH)
        cover[scenes.NAMES.index(placed.name)] = mask.mean((1, 3))
    return cover.argmax(0).reshape(-1)


def to_input(pixels: Tensor) -> Tensor:
    """Pixels uint8 [..., height, width, 3] as the processor gives them: float32 [..., 3, height, width]."""
    return (pixels.movedim(-1, -3).float() / 255 - 0.5) / 0.25
