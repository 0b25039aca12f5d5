"""One scene: objects on a coloured, noisy background, with exact masks and boxes, and the scene changed in one thing.

A scene keeps the recipe (background, noise and what stands where), so a picture of the scene with an object removed or
swapped is computed exactly: outside that object's mask every pixel is the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from PIL import Image

from interp.data.scenes.catalogue import CATEGORY, COLOURS, NAMES, ROW, SIDE
from interp.data.scenes.sprites import sprite
from interp.errors import InputError, unknown

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Placed:
    """An object in a scene: its name, the length of its longer side in pixels, and its top left corner."""

    name: str
    size: int
    left: int
    top: int

    @property
    def category(self) -> str:
        """The category of the object, such as `"animal"`."""
        return CATEGORY[self.name]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = sprite(self.name, self.size)[1].shape
        return height, width

    @property
    def box(self) -> Box:
        """Left, top, right and bottom in pixels; right and bottom lie just outside. Covered parts are included."""
        height, width = self.shape
        return self.left, self.top, self.left + width, self.top + height

    @property
    def outline(self) -> np.ndarray:
        """The pixels that the object takes, covered parts included: bool [SIDE, SIDE]."""
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        left, top, right, bottom = self.box
        mask[top:bottom, left:right] = sprite(self.name, self.size)[1] > 0
        return mask


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with its truth.

    Attributes:
        id: what the scene is called, such as `"test-00017"`; a changed scene's id says what was changed.
        colour: the name of the background's colour.
        background: the picture with no object in it, uint8 [SIDE, SIDE, 3].
        noise: what is added to the objects' colours, int16 [SIDE, SIDE, 3]; the background has it already.
        objects: what stands there, from back to front; no name occurs twice.
        themes: the themes that the objects were drawn from, the main one first.
    """

    id: str
    colour: str
    background: np.ndarray = field(repr=False)
    noise: np.ndarray = field(repr=False)
    objects: tuple[Placed, ...]
    themes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.colour not in COLOURS:
            raise unknown("colour", self.colour, COLOURS)
        if self.background.shape != (SIDE, SIDE, 3) or self.background.dtype != np.uint8:
            raise InputError(
                f"The background of a scene is uint8 [{SIDE}, {SIDE}, 3]; "
                f"found {self.background.dtype} {list(self.background.shape)}."
            )
        if self.noise.shape != (SIDE, SIDE, 3):
            raise InputError(f"The noise of a scene is [{SIDE}, {SIDE}, 3]; found {list(self.noise.shape)}.")
        names = [o.name for o in self.objects]
        for name in names:
            if name not in NAMES:
                raise unknown("object", name, NAMES)
        if len(set(names)) < len(names):
            raise InputError(f"An object stands twice in scene {self.id!r}: {', '.join(names)}.")
        for placed in self.objects:
            left, top, right, bottom = placed.box
            if left < 0 or top < 0 or right > SIDE or bottom > SIDE:
                raise InputError(f"{placed} reaches out of the {SIDE} x {SIDE} pixels of scene {self.id!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names in reading order, which is that of the caption.

        Rows of ROW pixels from the top, each from left to right, by the middle of the objects' boxes.
        """

        def place(placed: Placed) -> tuple[int, int, str]:
            left, top, right, bottom = placed.box
            return (top + bottom) // 2 // ROW, left + right, placed.name

        return tuple(placed.name for placed in sorted(self.objects, key=place))

    @property
    def caption(self) -> str:
        """The caption of the picture; see the function of that name."""
        return caption(self.names)

    @property
    def pixels(self) -> np.ndarray:
        """The picture, uint8 [SIDE, SIDE, 3]. Wherever an object is seen, it differs from the background."""
        return self._painted[0]

    @property
    def image(self) -> Image.Image:
        """The picture as an RGB image."""
        return Image.fromarray(self.pixels)

    def mask(self, name: str) -> np.ndarray:
        """Where an object is seen (not covered by others): bool [SIDE, SIDE].

        Raises:
            UnknownNameError: no such object stands in the scene.
        """
        return self._painted[1] == self._index(name)

    def object(self, name: str) -> Placed:
        """The object of that name.

        Raises:
            UnknownNameError: no such object stands in the scene.
        """
        return self.objects[self._index(name)]

    def without(self, name: str) -> "Scene":
        """The same scene with one object removed; pixels outside its outline are the same.

        Raises:
            UnknownNameError: no such object stands in the scene.
        """
        index = self._index(name)
        return replace(self, id=f"{self.id}-no-{name}", objects=self.objects[:index] + self.objects[index + 1 :])

    def swapped(self, name: str, other: str) -> "Scene":
        """The same scene with one object replaced by another of the same size and middle; the rest is the same.

        Pixels outside the two outlines are the same. The other object is moved inside the picture where it would
        reach out of it.

        Raises:
            UnknownNameError: no such object stands in the scene, or there is no `other` in the catalogue.
            InputError: `other` stands in the scene already.
        """
        index = self._index(name)
        if other not in NAMES:
            raise unknown("object", other, NAMES)
        if other in self.names:
            raise InputError(f"A {other} stands in scene {self.id!r} already, so the {name} cannot be swapped for it.")
        old = self.objects[index]
        left, top, right, bottom = old.box
        height, width = sprite(other, old.size)[1].shape
        new = Placed(
            other,
            old.size,
            min(max((left + right - width) // 2, 0), SIDE - width),
            min(max((top + bottom - height) // 2, 0), SIDE - height),
        )
        changed = (*self.objects[:index], new, *self.objects[index + 1 :])
        return replace(self, id=f"{self.id}-{name}-to-{other}", objects=changed)

    def _index(self, name: str) -> int:
        for index, placed in enumerate(self.objects):
            if placed.name == name:
                return index
        raise unknown("object", name, self.names, f"scene {self.id!r}")

    @cached_property
    def _painted(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture, and the index of the object seen at each pixel (-1: background)."""
        picture = self.background.astype(np.float32)
        seen = np.full((SIDE, SIDE), -1, dtype=np.int8)
        for index, placed in enumerate(self.objects):
            colours, opacity = sprite(placed.name, placed.size)
            left, top, right, bottom = placed.box
            place = np.s_[top:bottom, left:right]
            alpha = opacity[..., None]
            picture[place] = alpha * (colours + self.noise[place]) + (1 - alpha) * picture[place]
            seen[place][opacity > 0] = index
        pixels = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
        # An object's pixel may happen to have the background's colour: one step in red makes the mask readable again.
        same = (seen >= 0) & (pixels == self.background).all(-1)
        pixels[same, 0] ^= 1
        pixels.flags.writeable = seen.flags.writeable = False
        return pixels, seen


def article(name: str) -> str:
    """`"an"` before a vowel, else `"a"`."""
    return "an" if re.match("[aeiou]", name) else "a"


def caption(names: Sequence[str]) -> str:
    """The caption of a picture with these objects: `"a photo of a dog , a car and a tree ."`.

    Words and marks are set apart by blanks, as the tokenizer of the scenes model writes them. With no object it is
    `"a photo of nothing ."`.
    """
    listed = [f"{article(name)} {name}" for name in names]
    if len(listed) < 2:
        return f"a photo of {listed[0] if listed else 'nothing'} ."
    return f"a photo of {' , '.join(listed[:-1])} and {listed[-1]} ."
