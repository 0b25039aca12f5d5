"""Labelled scenes: pictures of named objects on noisy backgrounds, with exact boxes, masks, captions and questions.

    one = scenes.scene("test", 0)                   # Scene: .image, .names, .mask("dog"), .caption
    scenes.dataset("test", n=200)                   # datasets.Dataset
    one.without("dog"); one.swapped("dog", "cat")   # the same picture, changed in one thing

Objects come in themes and partners (a cow seldom without a pig), and a partner is missing at times: a model that has
learned the company objects keep will name what is not there. The pictures of the objects are drawn from the Noto Color
Emoji font (SIL Open Font License 1.1, beside them).
"""

from interp.data.scenes.catalogue import (
    CATEGORIES,
    CATEGORY,
    COLOURS,
    NAMES,
    PARTNER,
    ROW,
    SIDE,
    SIZES,
    THEME_WEIGHTS,
    THEMES,
)
from interp.data.scenes.dataset import dataset, record
from interp.data.scenes.draw import SPLITS, Split, compose, scene, scenes
from interp.data.scenes.questions import (
    CAPTION_PROMPT,
    TEMPLATE,
    SceneQuestion,
    colour,
    count,
    existence,
    exists,
    positions,
)
from interp.data.scenes.scene import Placed, Scene, article, caption

__all__ = [
    "CAPTION_PROMPT",
    "CATEGORIES",
    "CATEGORY",
    "COLOURS",
    "NAMES",
    "PARTNER",
    "ROW",
    "SIDE",
    "SIZES",
    "SPLITS",
    "TEMPLATE",
    "THEMES",
    "THEME_WEIGHTS",
    "Placed",
    "Scene",
    "SceneQuestion",
    "Split",
    "article",
    "caption",
    "colour",
    "compose",
    "count",
    "dataset",
    "existence",
    "exists",
    "positions",
    "record",
    "scene",
    "scenes",
]
