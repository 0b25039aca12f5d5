"""What a run is about: the images, what is in them, the vocabulary, the questions; from scenes or from files."""

import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.evaluation.settings import VOCABULARIES, EvaluateSettings
from interp.errors import FileError, InputError, unknown
from interp.evaluation import (
    Question,
    Vocabulary,
    coco_classes,
    coco_files,
    coco_objects,
    pope_questions,
    read_questions,
)
from interp.files import sha256

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES = 200
DETAIL = "Please describe this image in detail."
IS_THERE = "Is there a {name} in the image?"


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """What a run is about.

    Attributes:
        objects: for each image what is in it; empty where questions come from a file.
        images: the images, loaded when they are asked for; None where there are none at hand.
        vocabulary: which words name which object; None where questions come from a file.
        questions: for POPE.
        prompt: what the model is asked.
        sha256: of all this but the images.
    """

    objects: dict[str, tuple[str, ...]]
    images: "Images | None"
    vocabulary: Vocabulary | None
    questions: list[Question]
    prompt: str
    sha256: str


class Images(Mapping[str, Any]):
    """Images that are loaded one at a time."""

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self.sources = sources

    def __getitem__(self, one: str) -> "Image":
        """Load an image.

        Raises:
            FileError, InputError: its file cannot be read.
        """
        from PIL import Image, UnidentifiedImageError

        source = self.sources[one]
        if not isinstance(source, Path):
            return source
        try:
            with Image.open(source) as opened:
                opened.load()
                return opened
        except UnidentifiedImageError as error:
            raise InputError(f"{source} (image {one!r}) is not an image that can be read.") from error
        except OSError as error:
            raise FileError(f"cannot read {source} (image {one!r}): {error.strerror or error}.") from error

    def __iter__(self) -> Iterator[str]:
        """The ids."""
        return iter(self.sources)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.sources)

    def digest(self) -> str:
        """The sha256 of all their contents."""
        whole = hashlib.sha256()
        for one, source in self.sources.items():
            content = sha256(source) if isinstance(source, Path) else hashlib.sha256(source.tobytes()).hexdigest()
            whole.update(f"{one} {content}\n".encode())
        return whole.hexdigest()


def load_data(settings: EvaluateSettings) -> Data:
    """The data of a run; every file is read and checked, no model is loaded.

    Raises:
        InterpError: a file is missing or cannot be used, or does not fit the others.
    """
    if settings.source == "scenes":
        found = _scenes(settings)
    elif settings.questions is not None:
        found = _asked(settings)
    else:
        found = _coco(settings)
    rows = [[q.id, q.image, q.text, q.answer, q.kind, q.object] for q in found.questions]
    table = found.vocabulary.hash if found.vocabulary else ""
    text = json.dumps([{one: sorted(there) for one, there in found.objects.items()}, rows, table, found.prompt])
    return replace(found, sha256=hashlib.sha256(text.encode()).hexdigest())


def _scenes(settings: EvaluateSettings) -> Data:
    from interp.data import scenes

    rows = scenes.dataset(split=settings.split, n=settings.n or SCENES, seed=settings.seed)  # pyright: ignore[reportArgumentType]
    objects, pictures = {}, {}
    for row in rows:
        objects[row["image_id"]] = tuple(placed["name"] for placed in row["objects"])  # pyright: ignore
        pictures[row["image_id"]] = row["image"]  # pyright: ignore
    vocabulary = _vocabulary(settings, scenes.NAMES)
    questions = _questions(settings, objects, scenes.NAMES, scenes.TEMPLATE)
    prompt = settings.prompt or (scenes.CAPTION_PROMPT if settings.task == "chair" else "{question}")
    return Data(objects, Images(pictures), vocabulary, questions, prompt, "")


def _coco(settings: EvaluateSettings) -> Data:
    annotations = str(settings.annotations)
    names = coco_classes(annotations)
    vocabulary = _vocabulary(settings, names)
    files = coco_files(annotations)
    wanted = list(files)
    if settings.n is not None:
        if settings.n > len(wanted):
            raise InputError(f"{settings.n} images were asked for, but {annotations} lists {len(wanted)}.")
        drawn = set(random.Random(settings.seed).sample(sorted(wanted), settings.n))
        wanted = [one for one in wanted if one in drawn]
    references = settings.reference_captions
    objects = coco_objects(
        annotations, references, vocabulary=vocabulary, images=None if settings.n is None else wanted
    )
    questions = _questions(settings, objects, [vocabulary.class_of(name) for name in names], IS_THERE)
    images = None
    if settings.images is not None:
        needed = dict.fromkeys(q.image for q in questions) if settings.task == "pope" else wanted
        images = _files(Path(settings.images), {one: files[one] for one in needed}, annotations)
    prompt = settings.prompt or (DETAIL if settings.task == "chair" else "{question}")
    return Data(objects, images, vocabulary, questions, prompt, "")


def _asked(settings: EvaluateSettings) -> Data:
    source = str(settings.questions)
    questions = read_questions(source)
    names = dict.fromkeys(question.image for question in questions)
    images = None if settings.images is None else _files(Path(settings.images), {one: one for one in names}, source)
    return Data({}, images, None, questions, "{question}", "")


def _files(folder: Path, names: Mapping[str, str], source: str) -> Images:
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder} with the images of {source}.")
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if missing:
        raise FileError(
            f"{len(missing)} of {len(names)} images of {source} are not in {folder}; the first is {missing[0]!r}."
        )
    return Images({one: folder / name for one, name in names.items()})


def _vocabulary(settings: EvaluateSettings, names: Any) -> Vocabulary:
    how = settings.vocabulary
    if how not in VOCABULARIES:
        if not Path(how).is_file():
            raise unknown("vocabulary", how, (*VOCABULARIES, "a file"))
        return Vocabulary.read(how)
    coco = Vocabulary.coco()
    known = settings.source == "coco" and all(name in coco for name in names)
    return coco if how == "coco" or (how == "auto" and known) else Vocabulary.of(names)


def _questions(settings: EvaluateSettings, objects: Mapping[str, Any], classes: Any, ask: str) -> list[Question]:
    if settings.task != "pope":
        return []
    found = []
    for split in settings.negatives:
        found += pope_questions(
            objects,
            split=split,  # pyright: ignore[reportArgumentType]
            classes=classes,
            per_image=settings.per_image,
            minimum=settings.minimum,
            seed=settings.seed,
            template=settings.template or ask,
        )
    return found


def png(image: "Image", side: int = 320) -> bytes:
    """A picture as PNG, no side longer than `side` pixels; small ones are kept."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()
