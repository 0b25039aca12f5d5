"""Questions about a scene with their true answers: is it there, what colour, how many, which side."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from interp.data.scenes.scene import Scene, article

CAPTION_PROMPT = "describe the image ."
"""What the scenes model was trained to answer with a caption."""

TEMPLATE = "is there a {name} in the image ?"
"""The form of a question after an object; `existence(name)` fills it in, with "an" where that is right."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
"""How counts are written."""

Task = Literal["existence", "count", "position", "color"]


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question about one scene, and its answer in one word.

    `task` is the name of the benchmark task it belongs to (as in MME: existence, count, position, color).
    """

    text: str
    answer: str
    task: Task


def existence(name: str) -> str:
    """The question after one object: `"is there a dog in the image ?"`."""
    return TEMPLATE.replace(" a ", f" {article(name)} ").format(name=name)


def exists(scene: Scene, name: str) -> SceneQuestion:
    """The question after an object, answered for this scene."""
    return SceneQuestion(existence(name), "yes" if name in scene.names else "no", "existence")


def count(scene: Scene) -> SceneQuestion:
    """How many objects there are."""
    return SceneQuestion("how many objects are in the image ?", NUMBERS[len(scene.objects)], "count")


def colour(scene: Scene) -> SceneQuestion:
    """The colour of the background."""
    return SceneQuestion("what color is the background ?", scene.colour, "color")


def positions(scene: Scene, *, apart: int = 6) -> Iterator[SceneQuestion]:
    """Left or right, for every ordered pair of objects whose middles lie at least `apart` pixels apart sideways."""
    for one, other in permutations(scene.objects, 2):
        gap = (one.box[0] + one.box[2] - other.box[0] - other.box[2]) / 2
        if abs(gap) >= apart:
            yield SceneQuestion(f"is the {one.name} left of the {other.name} ?", "yes" if gap < 0 else "no", "position")
