"""The prompts of a run: read, checked, written into its folder, and made ready for a model; and lists of keywords."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import FileError, InputError
from interp.files import sha256, write_text

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.data import Prompt
    from interp.lens import Lens

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def check_answers(prompts: Sequence["Prompt"], source: str | None) -> None:
    """Whether every prompt of a file has an answer, and a wrong one, or none has.

    Raises:
        InputError: some have one and others not, or there are wrong answers alone.
    """
    for name in ("answer", "wrong"):
        have = [getattr(p, name) is not None for p in prompts]
        if any(have) and not all(have):
            raise InputError(
                f"prompt {have.index(False) + 1} of {len(have)} in {source} has no {name!r}, but others have one: give "
                "it for every prompt or for none."
            )
    if prompts and prompts[0].answer is None and prompts[0].wrong is not None:
        raise InputError(f"the prompts of {source} have 'wrong' but no 'answer' to compare it with.")


def prompts_sha256(prompts: Sequence["Prompt"]) -> str:
    """The sha256 of the prompts with the contents of their images."""
    rows = [{**asdict(p), "image": None if p.image is None else sha256(p.image)} for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def write_prompts(path: Path, prompts: Sequence["Prompt"]) -> None:
    """Write a prompt file that `read_prompts` takes from anywhere: images by their whole path."""
    lines = [json.dumps(_row(prompt), ensure_ascii=False) + "\n" for prompt in prompts]
    write_text(path, "".join(lines))


def _row(prompt: "Prompt") -> dict[str, Any]:
    known = {"text": prompt.text or None, "answer": prompt.answer, "wrong": prompt.wrong}
    image = None if prompt.image is None else str(prompt.image.resolve())
    return {k: v for k, v in {**known, "image": image}.items() if v is not None} | prompt.labels


def images_of(prompts: Sequence["Prompt"]) -> list[Any] | None:
    """The prompts' images in RGB, None for those without; None where no prompt has one.

    Raises:
        InputError: a file is no image.
    """
    if all(p.image is None for p in prompts):
        return None
    from PIL import Image, UnidentifiedImageError

    images = []
    for prompt in prompts:
        try:
            images.append(None if prompt.image is None else Image.open(prompt.image).convert("RGB"))
        except UnidentifiedImageError as error:
            raise InputError(f"{prompt.image} is not an image that can be read.") from error
    return images


def prompts_of_images(folder: str | os.PathLike[str], text: str) -> "list[Prompt]":
    """A prompt for every image file of a folder, in the order of their names, all with the same text.

    Raises:
        FileError: there is no such folder.
        InputError: it holds no images.
    """
    from interp.data import Prompt

    path = Path(folder)
    if not path.is_dir():
        raise FileError(f"there is no folder of images {path}.")
    found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in IMAGES)
    if not found:
        raise InputError(f"{path} holds no images: files ending in {', '.join(IMAGES)} are taken.")
    return [Prompt(text, image=file, labels={"name": file.name}) for file in found]


def prepared(lens: "Lens", prompts: "Sequence[Prompt]", *, padding_side: Any = None) -> "Batch":
    """Prompts as the model takes them.

    A text about an image that does not hold the image placeholder gets it in front, as `interp evaluate` does it.

    Raises:
        InputError: a prompt without a text, or an image that cannot be read.
        UnsupportedError: an image for a model that takes none.
    """
    from interp.evaluation import image_prompt
    from interp.inputs import placeholder

    texts = [p.text for p in prompts]
    if not all(texts):
        raise InputError(f"prompt {texts.index('')} has no text, which {lens.name} reads.")
    if placeholder(lens.processor) is not None:
        texts = [image_prompt(lens, p.text) if p.image else p.text for p in prompts]
    return lens.prepare(texts, images_of(prompts), padding_side=padding_side)


def read_keywords(path: str | os.PathLike[str]) -> list[str]:
    """The words of a keyword file: UTF-8, one on each line; empty lines and what stands behind a # are left out.

    Raises:
        FileError: the file cannot be read, or is not UTF-8.
        InputError: it holds no words, or one of them twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"cannot read keywords from {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"the keyword file {path} is not UTF-8.") from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].strip()
        if word in lines:
            raise InputError(f"{path}, line {number}: {word!r} stands there twice, first in line {lines[word]}.")
        if word:
            lines[word] = number
    if not lines:
        raise InputError(f"{path} holds no keywords: write one word on each line.")
    return list(lines)
