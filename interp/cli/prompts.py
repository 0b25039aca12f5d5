"""The prompts of a run: read, checked, written into its folder, and their images opened."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.files import sha256, write_text

if TYPE_CHECKING:
    from interp.data import Prompt


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
