"""Annotations in COCO's format: which classes are in each image, and the file of each image."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.errors import FileError, InputError
from interp.evaluation.ids import text_id
from interp.evaluation.vocabulary import Vocabulary
from interp.files import read_json

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def coco_objects(
    instances: Paths,
    captions: Paths | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    images: Collection[Any] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The classes in each image of annotation files in COCO's format: the truth that CHAIR is measured against.

    Classes are those of the image's instance annotations together with those that its reference captions mention, as in
    the paper's code. Categories are brought to classes through the vocabulary.

    Args:
        instances: a file (or several, such as train and val) with `images`, `annotations` and `categories`.
        captions: a file (or several) with reference captions of these images; None takes instances alone.
        vocabulary: None takes `Vocabulary.coco()`.
        images: ids of the images wanted; None takes all, and then every annotation must be of a listed image.

    Returns:
        For each image id (as text) its classes, each once, in the order of its annotations, then of its captions. An
        image without annotations has none.

    Raises:
        FileError: a file is missing or not of this form.
        InputError: an annotation without its image, a category without its name, or a wanted image that is not there.
        UnknownNameError: a category that is no class of the vocabulary.
    """
    vocabulary = Vocabulary.coco() if vocabulary is None else vocabulary
    found: dict[str, dict[str, None]] = {}
    wanted = None if images is None else {text_id(one) for one in images}
    for path in _paths(instances):
        whole = _read(path, ("images", "annotations", "categories"))
        names = {
            row["id"]: vocabulary.class_of(row["name"]) for row in _rows(whole, "categories", ("id", "name"), path)
        }
        listed = dict.fromkeys(text_id(row["id"]) for row in _rows(whole, "images", ("id",), path))
        found |= {one: {} for one in listed if one not in found and (wanted is None or one in wanted)}
        for i, row in enumerate(_rows(whole, "annotations", ("image_id", "category_id"), path)):
            image = text_id(row["image_id"])
            if image not in listed:
                raise InputError(
                    f"{path}: annotation {_name(row, i)} is of image {image}, which the file does not list."
                )
            if row["category_id"] not in names:
                raise InputError(
                    f"{path}: annotation {_name(row, i)} has category {row['category_id']!r}, which is not listed."
                )
            if image in found:
                found[image][names[row["category_id"]]] = None
    for path in [] if captions is None else _paths(captions):
        for i, row in enumerate(_rows(_read(path, ("annotations",)), "annotations", ("image_id", "caption"), path)):
            image = text_id(row["image_id"])
            if image not in found and wanted is None:
                raise InputError(
                    f"{path}: caption {_name(row, i)} is of image {image}, which no instances file lists; give "
                    "images=... to take only some."
                )
            if image in found:
                found[image] |= dict.fromkeys(mention.name for mention in vocabulary.mentions(row["caption"]))
    missing = sorted((wanted or set()) - set(found))
    if missing:
        raise InputError(f"image {missing[0]} (of {len(missing)} such) is not in {_names(instances)}.")
    return {image: tuple(classes) for image, classes in found.items()}


def coco_files(instances: Paths) -> dict[str, str]:
    """The file name of each image in annotation files of COCO's format, by image id (as text).

    Raises:
        FileError: a file is missing or not of this form.
    """
    found = {}
    for path in _paths(instances):
        for row in _rows(_read(path, ("images",)), "images", ("id", "file_name"), path):
            if not isinstance(row["file_name"], str) or not row["file_name"]:
                raise FileError(f"{path}: the file_name of image {row['id']} is {row['file_name']!r}, not a name.")
            found[text_id(row["id"])] = row["file_name"]
    return found


def coco_classes(instances: Paths) -> tuple[str, ...]:
    """The category names in annotation files of COCO's format, in their order.

    Raises:
        FileError: a file is missing or not of this form.
    """
    rows = [row for p in _paths(instances) for row in _rows(_read(p, ("categories",)), "categories", ("name",), p)]
    return tuple(dict.fromkeys(str(row["name"]) for row in rows))


def _paths(given: Paths) -> list[Path]:
    paths = [given] if isinstance(given, str | os.PathLike) else list(given)
    if not paths:
        raise InputError("no annotation file was given.")
    return [Path(path) for path in paths]


def _read(path: Path, needed: Iterable[str]) -> Mapping[str, Any]:
    found = read_json(path)
    keys = list(needed)
    if not isinstance(found, dict) or any(not isinstance(found.get(key), list) for key in keys):
        there = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        raise FileError(
            f"{path} is not in COCO's format: it needs the lists {', '.join(keys)}; found {there or 'none'}."
        )
    return found


def _rows(whole: Mapping[str, Any], part: str, needed: Sequence[str], path: Path) -> list[Mapping[str, Any]]:
    for i, row in enumerate(whole[part]):
        lacking = list(needed) if not isinstance(row, dict) else [key for key in needed if key not in row]
        if lacking:
            raise FileError(f"{path}: entry {i} of {part} has no {lacking[0]!r}.")
    return whole[part]


def _name(row: Mapping[str, Any], i: int) -> str:
    return str(row.get("id", f"number {i}"))


def _names(paths: Paths) -> str:
    return ", ".join(str(path) for path in _paths(paths))
