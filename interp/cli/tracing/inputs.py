"""What a run of `interp trace` reads: prompts with their pictures, and batches, masks and edges made of them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.cli.prompts import images_of, prepared, prompts_sha256
from interp.cli.tracing.settings import FILES, GROUPS, TraceSettings
from interp.data import Prompt, read_prompts
from interp.errors import FileError, InputError, SettingsError
from interp.files import sha256

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from interp.batch import Batch
    from interp.lens import Lens


def prompts_of(settings: TraceSettings) -> list[Prompt]:
    """The prompts of a run, checked against what is asked; the paths of all pictures are whole.

    Raises:
        FileError, InputError: the prompt file cannot be used, or does not fit; the message gives the line or prompt.
        SettingsError, UnsupportedError: as `TraceSettings.check_prompts`.
    """
    prompts = read_prompts(str(settings.prompts), images=settings.images)
    folder = Path(str(settings.prompts)).parent if settings.images is None else Path(settings.images)
    found = []
    for i, prompt in enumerate(prompts):
        paths = {name: (folder / prompt.labels[name]).resolve() for name in FILES if name in prompt.labels}
        for name, path in paths.items():
            if not path.is_file():
                raise FileError(f"prompt {i + 1} of {settings.prompts}: there is no file {path}, its {name}.")
        found.append(replace(prompt, labels=prompt.labels | {name: str(path) for name, path in paths.items()}))
    settings.check_prompts(found)
    return found


def digest_of(prompts: Sequence[Prompt]) -> str:
    """The sha256 of the prompts with the contents of all their pictures."""
    files = [{n: sha256(Path(p.labels[n])) for n in FILES if n in p.labels} for p in prompts]
    plain = [replace(p, labels={k: v for k, v in p.labels.items() if k not in FILES}) for p in prompts]
    return hashlib.sha256(json.dumps([prompts_sha256(plain), files]).encode()).hexdigest()


def check_lengths(lens: "Lens", prompts: Sequence[Prompt], first: int) -> None:
    """Whether clean and corrupt texts have as many tokens each.

    Args:
        lens: the model.
        prompts: some prompts.
        first: the number of the first of them.

    Raises:
        InputError: one does not, or a corrupt text is the text itself; it is named.
    """
    some = [(i, p) for i, p in enumerate(prompts, first + 1) if "corrupt" in p.labels]
    if not some:
        return
    clean = prepared(lens, [p for _, p in some]).lengths.tolist()
    corrupt = prepared(lens, [_corrupt(p) for _, p in some]).lengths.tolist()
    for (i, prompt), one, other in zip(some, clean, corrupt, strict=True):
        if prompt.labels["corrupt"] == prompt.text and "corrupt_image" not in prompt.labels:
            raise InputError(f"prompt {i}: the corrupt text is the text itself, so the corruption changes nothing.")
        if one != other:
            raise InputError(
                f"prompt {i} has {one} tokens and its corrupt text {other}: positions must correspond. Choose a "
                f"corruption with as many tokens; {prompt.text[:60]!r}, {prompt.labels['corrupt'][:60]!r}."
            )


def pair_of(lens: "Lens", prompts: Sequence[Prompt]) -> "tuple[Batch, Batch]":
    """The clean and the corrupt batch, padded on the left."""
    corrupt = [_corrupt(p) for p in prompts]
    return prepared(lens, prompts, padding_side="left"), prepared(lens, corrupt, padding_side="left")


def _corrupt(prompt: Prompt) -> Prompt:
    image = prompt.labels.get("corrupt_image")
    return replace(
        prompt,
        text=prompt.labels.get("corrupt", prompt.text),
        image=prompt.image if image is None else Path(image),
    )


def answers_of(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """The answers and wrong answers, where there are any."""
    found = {"answers": [p.answer for p in prompts], "wrong": [p.wrong for p in prompts]}
    return {name: [str(v) for v in values] for name, values in found.items() if values[0] is not None}


def objects_of(prompts: Sequence[Prompt], first: int) -> "list[np.ndarray]":
    """The pixels of each prompt's object: bools [height, width] of its picture.

    Raises:
        InputError: a box is no box within the picture, or a mask has another size or no pixel.
    """
    pictures: Any = images_of(prompts)
    out = []
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True), first + 1):
        shape = (picture.height, picture.width)
        mask = _mask(prompt, shape, i) if "mask" in prompt.labels else _box(prompt.labels["box"], shape, i)
        if not mask.any():
            raise InputError(f"prompt {i}: the object has no pixel of the picture.")
        out.append(mask)
    return out


def _box(text: str, shape: tuple[int, int], i: int) -> np.ndarray:
    try:
        x0, y0, x1, y1 = (float(part) for part in re.split(r"[,\s]+", text.strip()))
    except ValueError as error:
        raise InputError(f"prompt {i}: box is 'x0 y0 x1 y1' in pixels, found {text!r}.") from error
    if not (0 <= x0 < x1 <= shape[1] and 0 <= y0 < y1 <= shape[0]):
        raise InputError(f"prompt {i}: the box {text!r} is not inside the picture, {shape[1]} x {shape[0]} pixels.")
    mask = np.zeros(shape, dtype=bool)
    mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    return mask


def _mask(prompt: Prompt, shape: tuple[int, int], i: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    path = prompt.labels["mask"]
    try:
        mask = np.asarray(Image.open(path).convert("L")) > 127
    except UnidentifiedImageError as error:
        raise InputError(f"prompt {i}: {path} is not an image that can be read.") from error
    if mask.shape != shape:
        raise InputError(
            f"prompt {i}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels, the picture {shape[1]} x {shape[0]}."
        )
    return mask


def edges_of(
    settings: TraceSettings, batch: "Batch", prompts: Sequence[Prompt], first: int
) -> "dict[str, tuple[Tensor, Tensor]]":
    """The edges that are cut, as masks over the columns; the tokens of `to` are no part of `from`.

    Raises:
        InputError: a text does not stand in its prompt, or a group has no tokens in a prompt.
        SettingsError: a name is neither a group nor a field of every prompt, or the two ends are the same.
    """
    named = settings.edge_list() or [("image", "text"), ("text", "last"), ("image", "last")]
    masks = {n: _group(n, batch, prompts, first) for edge in named for n in edge}
    out = {}
    for come, to in named:
        keys = masks[come] & ~masks[to]
        empty = [first + 1 + int(i) for i in (~keys.any(1)).nonzero()[:, 0]]
        if empty:
            raise SettingsError(f"edge {come}>{to}: in prompt {empty[0]} no token of {come} is left beside {to}.")
        out[f"{come} to {to}"] = keys, masks[to]
    return out


def _group(name: str, batch: "Batch", prompts: Sequence[Prompt], first: int) -> "Bool[Tensor, 'batch pos']":
    import torch

    if name == "text":  # the last token is a group of its own
        return batch.span("text") & ~batch.span("last")
    if name in GROUPS[1:]:
        return batch.span(name)
    if not all(name in p.labels for p in prompts):
        known = ", ".join(GROUPS[1:])
        raise SettingsError(f"{name!r} is no group of tokens ({known}), nor a field that every prompt has.")
    found = torch.zeros_like(batch.mask)
    for i, prompt in enumerate(prompts):
        try:
            mark = batch[i].find(prompt.labels[name])[0]
        except InputError as error:
            raise InputError(f"prompt {first + i + 1}: {error}") from error
        found[i, batch.mask[i].nonzero()[:, 0][mark]] = True
    return found
