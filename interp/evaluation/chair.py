"""CHAIR: which objects a caption mentions that are not in the image.

Source: Rohrbach, Hendricks, Burns, Darrell, Saenko, "Object Hallucination in Image Captioning", EMNLP 2018, arXiv
1809.02156:

    CHAIR_I = mentions of objects that are not in the image / all mentions of objects
    CHAIR_S = captions with at least one such mention / all captions

Mentions count with repetition and are pooled over captions, as in the paper's code. Recall is that of the standalone
script that most work on vision-language models uses: sum |objects there and mentioned| / sum |objects there|. The code
raises ZeroDivisionError where no caption mentions an object; here the rate is 0 and the result says so (`undefined`).
"""

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import InputError, unknown
from interp.evaluation.ids import by_id, same_ids
from interp.evaluation.intervals import check_options, rate
from interp.evaluation.marking import marked
from interp.evaluation.measured import Measured, merged_settings
from interp.evaluation.vocabulary import Mention, Vocabulary
from interp.evaluation.words import grams, words
from interp.results import describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd

COUNTS = ("mentions", "hallucinated", "objects", "recalled", "words", "grams", "distinct")
GRAM = 4


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ChairScores(Measured):
    """What captions mention, against what is in the images. Made by `chair`.

    The metrics, all but `length` between 0 and 1: `chair_i`, `chair_s`, `recall`, `length` (mean words per caption) and
    `repetition` (1 - distinct / all runs of four words, counted within captions and pooled over them). A rate without
    anything to divide by is 0, and is listed in `undefined`.

    Attributes:
        ids: of the images.
        captions: of the images.
        objects: for each image the classes that are in it, sorted.
        mentions: for each image what its caption mentions, in order, with repetition.
        settings: vocabulary (name and sha256), seed, resamples, and what the caller recorded.
        counts: for each image how many mentions, hallucinated mentions, objects, recalled objects, words, runs of four
            words and different ones there are, int64 [image, 7].

    Raises:
        InputError: there are no images, or the fields are of different lengths.
    """

    ids: tuple[str, ...]
    captions: tuple[str, ...]
    objects: tuple[tuple[str, ...], ...]
    mentions: tuple[tuple[Mention, ...], ...]
    settings: Mapping[str, Any]
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = [len(self.ids), len(self.captions), len(self.objects), len(self.mentions)]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise InputError(f"ids, captions, objects and mentions are of one length from 1, found {lengths}.")
        rows = [_count(*row) for row in zip(self.captions, self.objects, self.mentions, strict=True)]
        object.__setattr__(self, "counts", torch.tensor(rows))
        object.__setattr__(self, "settings", jsonable(self.settings, "settings"))

    @property
    def chair_i(self) -> float:
        """The share of mentions that are of objects not in the image."""
        return self.value("chair_i")

    @property
    def chair_s(self) -> float:
        """The share of captions with at least one such mention."""
        return self.value("chair_s")

    @property
    def recall(self) -> float:
        """The share of the images' objects that their captions mention."""
        return self.value("recall")

    @property
    def length(self) -> float:
        """Mean number of words in a caption."""
        return self.value("length")

    @property
    def repetition(self) -> float:
        """1 - distinct / all runs of four words."""
        return self.value("repetition")

    def frame(self) -> "pd.DataFrame":
        """A row for each image.

        Columns: `id`, `caption`, `objects`, `mentioned` (classes in order, with repetition), `hallucinated` (those of
        them that are not in the image), `missed` (objects that are not mentioned), `words` (how many), `chair_i`
        (of this caption; 0 where it mentions nothing).
        """
        import pandas as pd

        rows = []
        for i, name in enumerate(self.ids):
            there, said = self.objects[i], [mention.name for mention in self.mentions[i]]
            wrong = [one for one in said if one not in there]
            row = {"id": name, "caption": self.captions[i], "objects": list(there), "mentioned": said}
            row |= {"hallucinated": wrong, "missed": [one for one in there if one not in said]}
            rows.append(row | {"words": int(self.counts[i, 4]), "chair_i": len(wrong) / len(said) if said else 0.0})
        return pd.DataFrame(rows)

    def marked(self, image: str | int) -> str:
        """The caption of one image as HTML, right and hallucinated words marked.

        Raises:
            UnknownNameError: there is no such image.
        """
        if str(image) not in self.ids:
            raise unknown("image", image, self.ids[:20], self._title())
        i = self.ids.index(str(image))
        return marked(self.captions[i], self.mentions[i], self.objects[i])

    def _groups(self) -> list[np.ndarray]:
        return [np.arange(len(self.ids))]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        counts = self.counts.numpy().astype(np.float64)
        said, wrong, there, recalled, length, runs, distinct = (weights @ counts).T
        captions = weights.sum(1)
        bad = weights @ (counts[:, 1] > 0)
        always = np.ones(len(weights), dtype=bool)
        return {
            ("all", "chair_i"): (rate(wrong, said), said > 0),
            ("all", "chair_s"): (bad / captions, always),
            ("all", "recall"): (rate(recalled, there), there > 0),
            ("all", "length"): (length / captions, always),
            ("all", "repetition"): (rate(runs - distinct, runs), runs > 0),
        }

    def _shares(self, names: list[str]) -> list[str]:
        return [name for name in names if name != "length"]

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join(["CHAIR", *([str(model)] if model else []), f"{len(self.ids)} images"])

    def _more_html(self) -> str:
        shown = "".join(
            f"<li><b>{html.escape(self.ids[i])}</b>: {marked(self.captions[i], self.mentions[i], self.objects[i])}</li>"
            for i in range(min(4, len(self.ids)))
        )
        return f"<ul>{shown}</ul>"

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def _fields(self) -> dict[str, Any]:
        return {
            "ids": list(self.ids),
            "captions": list(self.captions),
            "objects": [list(there) for there in self.objects],
            "mentions": [[list(mention) for mention in row] for row in self.mentions],
            "settings": self.settings,
        }

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> "ChairScores":
        mentions = tuple(tuple(Mention(*mention) for mention in row) for row in fields["mentions"])
        objects = tuple(map(tuple, fields["objects"]))
        made = cls(tuple(fields["ids"]), tuple(fields["captions"]), objects, mentions, fields["settings"])
        if not torch.equal(made.counts, tensors["counts"]):
            raise InputError(f"the counts are not those of the captions ({describe(tensors['counts'])}).")
        return made


def chair(
    captions: Mapping[Any, str],
    objects: Mapping[Any, Collection[str]],
    *,
    vocabulary: Vocabulary,
    subset: bool = False,
    seed: int = 0,
    resamples: int = 1000,
    settings: Mapping[str, Any] | None = None,
) -> ChairScores:
    """Score captions against what is in the images (see [`interp.evaluation.chair`][interp.evaluation.chair]).

    Args:
        captions: a caption for each image id (text or whole number; both sides are compared as text).
        objects: the classes that are in each image. For COCO, `coco_objects` gives them.
        vocabulary: which words name which class.
        subset: allow `objects` to hold images without a caption (they count nowhere); otherwise these are an error.
        seed: seed of the bootstrap over images.
        resamples: how often the images are drawn anew for an interval.
        settings: what to record beside the metric's own settings, such as model and prompt.

    Raises:
        InputError: a caption without its image, an image without a caption, a caption that is no text.
        UnknownNameError: an object that is no class of the vocabulary.
        SettingsError: an option lies outside its range, or settings cannot be written as json.
    """
    check_options(0.95, resamples, seed)
    said, there = by_id(captions, "captions"), by_id(objects, "objects")
    hint = " Give every caption, or subset=True to score those that are there."
    same_ids(said, there, what="captions", of="annotated images", subset=subset, hint=hint)
    own = {"vocabulary": vocabulary.name, "vocabulary_sha256": vocabulary.hash, "seed": seed, "resamples": resamples}
    return ChairScores(
        ids=tuple(said),
        captions=tuple(said.values()),
        objects=tuple(classes_of(one, there[one], vocabulary) for one in said),
        mentions=tuple(tuple(vocabulary.mentions(text)) for text in said.values()),
        settings=merged_settings(settings, own),
    )


def classes_of(image: str, objects: Collection[str], classes: Collection[str]) -> tuple[str, ...]:
    """The objects of one image, sorted, each once.

    Raises:
        InputError: they are no collection of names.
        UnknownNameError: one of them is no class.
    """
    if isinstance(objects, str) or not isinstance(objects, Collection):
        raise InputError(f"the objects of image {image!r} are a collection of names, found {objects!r}.")
    for name in objects:
        if name not in classes:
            raise unknown("object", name, classes, f"the classes, asked for image {image!r}")
    return tuple(sorted(set(objects)))


def _count(caption: str, objects: Sequence[str], mentions: Sequence[Mention]) -> list[int]:
    said = [mention.name for mention in mentions]
    there = set(objects)
    text = [word.text for word in words(caption)]
    runs = list(grams(text, GRAM))
    wrong = sum(name not in there for name in said)
    return [len(said), wrong, len(there), len(there & set(said)), len(text), len(runs), len(set(runs))]
