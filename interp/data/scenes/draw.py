"""Draw scenes at random, by a seed: which objects come together, where they stand, and on what background."""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from interp.data.scenes.catalogue import COLOURS, NAMES, PARTNER, SIDE, SIZES, THEME_WEIGHTS, THEMES
from interp.data.scenes.scene import Placed, Scene
from interp.data.scenes.sprites import sprite
from interp.errors import InputError, SettingsError, unknown

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

COUNTS = (0.12, 0.22, 0.28, 0.24, 0.14)
"""The probability of 1, 2, ... objects wanted in a scene (fewer stand there where no place is found)."""

WITH_PARTNER = 0.88
"""How often an object's partner comes with it, where there is room for one more."""

IN_THEME = 0.85
"""How often a further object is drawn from the scene's theme rather than from all others."""

HIDDEN = 0.12
"""The largest share of an object that others may cover."""

_TRIES = 60
_NOISE = 20.0
_OBJECT_NOISE = 36.0


def scene(split: Split, index: int, *, seed: int = 0) -> Scene:
    """The scene with this number: the same one every time.

    Every scene has its own stream of random numbers, derived from the seed, the split and the index: splits share
    none, and any scene can be drawn without those before it.

    Raises:
        UnknownNameError: no such split.
        SettingsError: a negative index or seed.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if index < 0 or seed < 0:
        raise SettingsError(f"index and seed of a scene are not negative; found index {index}, seed {seed}.")
    random = np.random.default_rng([seed, SPLITS.index(split), index])
    theme, names = _choose(random)
    colour, background, noise = _background(random)
    objects = _place(random, names)
    themes = (theme, *sorted({t for t, members in THEMES.items() for o in objects if o.name in members} - {theme}))
    return Scene(f"{split}-{index:05d}", colour, background, noise, objects, themes)


def scenes(split: Split, n: int, *, start: int = 0, seed: int = 0) -> Iterator[Scene]:
    """`n` scenes of a split, from number `start` on.

    Raises:
        UnknownNameError: no such split.
        SettingsError: `n` is not positive, or `start` or `seed` is negative.
    """
    if n < 1:
        raise SettingsError(f"n must be at least 1; found {n}.")
    return (scene(split, index, seed=seed) for index in range(start, start + n))


def compose(
    names: tuple[str, ...] | list[str], *, colour: str = "green", size: int | None = None, seed: int = 0
) -> Scene:
    """A scene with exactly these objects, at random places.

    Args:
        names: the objects, from back to front.
        colour: the background's colour.
        size: the length of every object's longer side in pixels; default: drawn for each.
        seed: of places, sizes and noise.

    Raises:
        UnknownNameError: an object or colour that does not exist.
        SettingsError: a size out of range.
        InputError: an object twice, or no room for all of them.
    """
    for name in names:
        if name not in NAMES:
            raise unknown("object", name, NAMES)
    if colour not in COLOURS:
        raise unknown("colour", colour, COLOURS)
    if size is not None and not 4 <= size <= SIDE:
        raise SettingsError(f"size must lie from 4 to {SIDE} pixels; found {size}.")
    random = np.random.default_rng([seed, len(SPLITS)])
    _, background, noise = _background(random, colour)
    for _ in range(20):
        objects = _place(random, names, size)
        if len(objects) == len(names):
            return Scene(f"composed-{'-'.join(names)}-{seed}", colour, background, noise, objects)
    raise InputError(
        f"No room for {len(names)} objects ({', '.join(names)}) with at most {HIDDEN:.0%} of each covered; "
        "ask for fewer or smaller ones."
    )


def _choose(random: np.random.Generator) -> tuple[str, list[str]]:
    """The theme and the objects wanted."""
    weights = np.array([THEME_WEIGHTS[t] for t in THEMES], dtype=float)
    theme = list(THEMES)[_pick(random, weights)]
    wanted = 1 + _pick(random, np.array(COUNTS))
    names: list[str] = []
    while len(names) < wanted:
        inside = [n for n in THEMES[theme] if n not in names]
        outside = [n for n in NAMES if n not in names and n not in THEMES[theme]]
        pool = inside if inside and (not names or random.random() < IN_THEME) else outside
        name = pool[int(random.random() * len(pool))]
        names.append(name)
        partner = PARTNER.get(name)
        if partner and partner not in names and len(names) < wanted and random.random() < WITH_PARTNER:
            names.append(partner)
    return theme, names


def _background(random: np.random.Generator, colour: str | None = None) -> tuple[str, np.ndarray, np.ndarray]:
    """A colour, the picture of a background of that colour, and the noise for objects."""
    chosen = list(COLOURS)[int(random.random() * len(COLOURS))]
    colour = colour or chosen
    base = np.array(COLOURS[colour], dtype=np.float32) + random.uniform(-14, 14, 3)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    slope = random.uniform(-40, 40, 2)
    shade = (slope[0] * rows + slope[1] * columns)[..., None]
    grain = random.standard_normal((SIDE, SIDE, 3))
    background = np.clip(np.rint(base + shade + _NOISE * grain), 0, 255).astype(np.uint8)
    return colour, background, np.rint(_OBJECT_NOISE * grain).astype(np.int16)


def _place(
    random: np.random.Generator, names: tuple[str, ...] | list[str], size: int | None = None
) -> tuple[Placed, ...]:
    """Find places where no object covers more than HIDDEN of another; one without a place is left out."""
    placed: list[Placed] = []
    seen: list[np.ndarray] = []  # what is still seen of each
    for name in names:
        chosen = size or int(random.integers(SIZES[0], SIZES[1] + 1))
        height, width = sprite(name, chosen)[1].shape
        for _ in range(_TRIES):
            new = Placed(name, chosen, int(random.integers(SIDE - width + 1)), int(random.integers(SIDE - height + 1)))
            outline = new.outline
            left = [old & ~outline for old in seen]
            if all(now.sum() >= (1 - HIDDEN) * whole.outline.sum() for now, whole in zip(left, placed, strict=True)):
                placed.append(new)
                seen = [*left, outline]
                break
    return tuple(placed)


def _pick(random: np.random.Generator, weights: np.ndarray) -> int:
    return int(
        np.searchsorted(np.cumsum(weights / weights.sum()), random.random(), side="right").clip(0, len(weights) - 1)
    )
