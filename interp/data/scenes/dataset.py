"""Scenes as a table of the datasets library, with every object's name, category, size, box and mask."""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from interp.data.scenes.draw import Split, scenes
from interp.data.scenes.scene import Scene, caption

if TYPE_CHECKING:
    import datasets


def record(scene: Scene) -> dict[str, Any]:
    """One scene as a row of the table (see [`dataset`][interp.data.scenes.dataset])."""
    return {
        "image_id": scene.id,
        "image": scene.image,
        "background": Image.fromarray(scene.background),
        "caption": caption(scene.names),
        "color": scene.colour,
        "themes": list(scene.themes),
        "objects": [
            {
                "name": placed.name,
                "category": placed.category,
                "size": placed.size,
                "box": list(placed.box),
                "mask": Image.fromarray(scene.mask(placed.name).astype(np.uint8) * 255),
            }
            for placed in sorted(scene.objects, key=lambda o: scene.names.index(o.name))
        ],
    }


def dataset(split: Split = "test", n: int = 200, *, start: int = 0, seed: int = 0) -> "datasets.Dataset":
    """`n` scenes of a split as a `datasets.Dataset`.

    Columns: `image_id`, `image` and `background` (RGB), `caption`, `color`, `themes`, and `objects`: a list in
    reading order of `name`, `category`, `size` (the longer side in pixels), `box` (left, top, right, bottom in pixels;
    right and bottom just outside) and `mask` (where the object is seen: 255, elsewhere 0).

    Raises:
        UnknownNameError: no such split.
        SettingsError: `n` is not positive, or `start` or `seed` is negative.
    """
    from datasets import Dataset, Features, Image, List, Value

    features = Features(
        {
            "image_id": Value("string"),
            "image": Image(),
            "background": Image(),
            "caption": Value("string"),
            "color": Value("string"),
            "themes": List(Value("string")),
            "objects": List(
                {
                    "name": Value("string"),
                    "category": Value("string"),
                    "size": Value("int32"),
                    "box": List(Value("int32"), length=4),
                    "mask": Image(),
                }
            ),
        }
    )
    rows = [record(scene) for scene in scenes(split, n, start=start, seed=seed)]
    return Dataset.from_list(rows, features=features)
