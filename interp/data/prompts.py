"""Prompts: read from jsonl and csv files, every line checked, or generated (indirect objects, repeated tokens)."""

import csv
import difflib
import io
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import FileError, InputError, SettingsError

FIELDS = ("text", "answer", "wrong", "image")
_MISSPELT = {"img": "image"}  # too short for its likeness to be found by comparing letters

# After Wang et al. 2022, "Interpretability in the Wild" (arXiv:2211.00593), appendix E. The names, places and objects
# are common words that GPT-2 and most later vocabularies hold, with a leading space, as one token.
NAMES = (
    *("Aaron", "Adam", "Amanda", "Amy", "Andrew", "Angela", "Anthony", "Benjamin", "Alexander", "Brian"),
    *("Charles", "Christopher", "Daniel", "David", "Elizabeth", "Emily", "Eric", "James", "Jason", "Jennifer"),
    *("Jeremy", "Jessica", "John", "Jonathan", "Joseph", "Joshua", "Justin", "Kevin", "Laura", "Lisa"),
    *("Mark", "Mary", "Matthew", "Michael", "Michelle", "Nathan", "Nicholas", "Patrick", "Paul", "Rachel"),
    *("Rebecca", "Richard", "Robert", "Ryan", "Samuel", "Sarah", "Scott", "Stephen", "Thomas", "William"),
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "book", "letter", "basketball", "computer", "necklace", "drink", "snack")
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {giver} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. {giver} decided to give a {object} to",
    "Then, {first} and {second} were thinking about going to the {place}. {giver} wanted to give a {object} to",
    "Then, {first} and {second} had a long argument, and afterwards {giver} gave a {object} to",
    "After {first} and {second} went to the {place}, {giver} gave a {object} to",
    "When {first} and {second} got a {object} at the {place}, {giver} decided to give it to",
    "While {first} and {second} were working at the {place}, {giver} gave a {object} to",
    "Afterwards, {first} and {second} went to the {place}. {giver} gave a {object} to",
    "The {place} that {first} and {second} went to had a {object}. {giver} gave it to",
    "Friends {first} and {second} found a {object} at the {place}. {giver} gave it to",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with what is known about it.

    Attributes:
        text: what the model reads; empty only where a picture stands alone.
        answer: the right continuation with its leading space, such as ` Mary`.
        wrong: a continuation that is to be told apart from the answer.
        image: the picture that goes with the text.
        labels: everything else that is known, by name.

    Raises:
        InputError: the text is blank, or empty without an image; a continuation is empty, or answer and wrong are the
            same.
    """

    text: str
    answer: str | None = None
    wrong: str | None = None
    image: Path | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("text", "answer", "wrong"):
            value = getattr(self, name)
            if value is None and name != "text":
                continue
            if not isinstance(value, str):
                raise InputError(f"{name} is text in quotes, found {json.dumps(value, default=repr)}.")
            alone = name == "text" and value == "" and self.image is not None
            if not alone and not (value.strip() if name == "text" else value):
                raise InputError(f"{name} is empty{', or nothing but white space' if name == 'text' else ''}.")
            if any("\ud800" <= letter <= "\udfff" for letter in value):
                raise InputError(f"{name} holds half of a surrogate pair, which is not text: {value!r}.")
        if self.answer is not None and self.answer == self.wrong:
            raise InputError(
                f"answer and wrong are the same: {self.answer!r}; wrong is the continuation to tell apart."
            )


def read_prompts(path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """Read prompts from a UTF-8 file: `.jsonl` (a json object on each line) or `.csv` (a header, then rows).

    Fields: `text` (required, unless there is an image alone), `answer`, `wrong`, `image` (a path); every other field is
    kept in `labels` as text (json numbers and booleans as json writes them). In csv an empty cell of an optional field
    means that it is absent. White space is kept: the leading space of an answer matters.

    Args:
        path: the file.
        images: the folder that the paths of images are relative to; None for the file's own.

    Raises:
        FileError: the file or an image is missing, the path is a folder, or the bytes are not UTF-8.
        InputError: the extension is another, the file holds no prompts, or a line cannot be used; the message names the
            file, the line, what was found and what is allowed. A field with nearly the name of a known one is an error.
    """
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".csv"):
        found = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        what = "it is a folder" if path.is_dir() else f"it has {found}"
        kind = FileError if path.is_dir() else InputError
        raise kind(f"{path} is not a prompt file: {what}; allowed: .jsonl and .csv.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read prompts from {path}: {error.strerror or error}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise FileError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file in UTF-8."
        ) from error
    rows = _jsonl if path.suffix.lower() == ".jsonl" else _csv
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder} with the images of {path}.")
    prompts = [_prompt(row, path, line, folder) for line, row in rows(text, path)]
    if not prompts:
        raise InputError(f"{path} holds no prompts; it needs at least one with a text.")
    return prompts


def indirect_objects(n: int, *, seed: int = 0) -> list[Prompt]:
    """Prompts of indirect object identification: "Then, Mary and John went to the store. John gave a drink to".

    The two orders of names, `ABBA` (answer first) and `BABA` (the giver first), alternate in pairs that share a
    template, so each makes up half (for odd `n`, but for one); templates are used equally often, but for one pair. No
    two prompts are the same. Labels: `order`, `template`, `io`, `subject`, `place`, `object`.

    Args:
        n: how many prompts.
        seed: seed of every choice.

    Returns:
        Prompts with answer ` Mary` (the indirect object) and wrong ` John` (the subject).

    Raises:
        SettingsError: `n` lies outside 1 to 100,000.
    """
    if not 1 <= n <= 100_000:
        raise SettingsError(f"n lies between 1 and 100,000, found {n}.")
    source = random.Random(seed)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    deck: list[int] = []
    while len(prompts) < n:
        if not deck:
            deck = source.sample(range(len(TEMPLATES)), len(TEMPLATES))
        template = deck.pop()
        for order in source.sample(("ABBA", "BABA"), 2)[: n - len(prompts)]:
            prompt = _indirect_object(source, template, order)
            while prompt.text in seen:
                prompt = _indirect_object(source, template, order)
            seen.add(prompt.text)
            prompts.append(prompt)
    return prompts


def repeated_tokens(
    n: int,
    length: int,
    *,
    vocab_size: int | None = None,
    allowed_ids: Sequence[int] | Tensor | None = None,
    bos_id: int | None = None,
    seed: int = 0,
) -> Int[Tensor, "batch pos"]:
    """Random tokens, then the same tokens again: the input on which induction heads show.

    Within a row the first `length` tokens are all different, so each repeated token has exactly one earlier place.

    Args:
        n: how many rows.
        length: how many different tokens each row repeats.
        vocab_size: draw from the ids 0 to `vocab_size - 1`. Give this or `allowed_ids`.
        allowed_ids: draw from these ids (say, all but the special tokens).
        bos_id: put this id before each row, and never draw it.
        seed: seed of the draws.

    Returns:
        Ids [n, 2 * length], or [n, 1 + 2 * length] with `bos_id`.

    Raises:
        SettingsError: not exactly one source of ids, a count below 1, or fewer ids than `length`.
    """
    if n < 1 or length < 1:
        raise SettingsError(f"n and length are at least 1, found n={n} and length={length}.")
    if (vocab_size is None) == (allowed_ids is None):
        raise SettingsError("give vocab_size or allowed_ids: exactly one of them.")
    pool = torch.arange(vocab_size or 0) if allowed_ids is None else torch.as_tensor(allowed_ids).long().unique()
    if bos_id is not None:
        pool = pool[pool != bos_id]
    if len(pool) < length:
        raise SettingsError(
            f"each row repeats {length} different tokens, but there are {len(pool)} to draw from; lower length."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:length]] for _ in range(n)])
    start = torch.full((n, 0 if bos_id is None else 1), bos_id or 0, dtype=torch.long)
    return torch.cat([start, drawn, drawn], dim=1)


def _indirect_object(source: random.Random, template: int, order: str) -> Prompt:
    io_name, subject = source.sample(NAMES, 2)
    place, thing = source.choice(PLACES), source.choice(OBJECTS)
    first, second = (io_name, subject) if order == "ABBA" else (subject, io_name)
    text = TEMPLATES[template].format(first=first, second=second, giver=subject, place=place, object=thing)
    names = {"order": order, "template": str(template), "io": io_name, "subject": subject}
    used = {k: v for k, v in (("place", place), ("object", thing)) if f"{{{k}}}" in TEMPLATES[template]}
    return Prompt(text, answer=f" {io_name}", wrong=f" {subject}", labels=names | used)


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = text.split("\n")  # not splitlines: json text may hold other line ends, such as U+2028
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        if not line.strip():
            raise InputError(f"{place}: the line is empty; each line holds one json object.")
        try:
            row = json.loads(line, object_pairs_hook=lambda pairs, place=place: _unique(pairs, place))
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: not json: {error.msg} at column {error.colno}.") from error
        if not isinstance(row, dict):
            raise InputError(f"{place}: a json object such as {{'text': '...'}} is needed, found {_short(row)}.")
        yield number, row


def _csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        _unique([(name, None) for name in header], f"{path}, line 1")
        start = reader.line_num + 1
        for cells in reader:
            if not cells and not text[_offset(text, start) :].strip():
                return  # empty lines at the end
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, line {start}: {len(cells)} cells, but the header has {len(header)} "
                    f"({', '.join(header)}); put text that holds commas in double quotes."
                )
            row = dict(zip(header, cells, strict=True))
            yield start, {k: v for k, v in row.items() if v or k not in FIELDS[1:]}
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not csv: {error}.") from error


def _offset(text: str, line: int) -> int:
    place = 0
    for _ in range(line - 1):
        place = text.find("\n", place) + 1
    return place


def _unique(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{place}: the field {name!r} stands there twice; each may stand once.")
        found[name] = value
    return found


def _prompt(row: Mapping[str, Any], path: Path, line: int, folder: Path) -> Prompt:
    place = f"{path}, line {line}"
    for name in row:
        if name not in FIELDS and (meant := _meant(name)):
            raise InputError(f"{place}: the field {name!r} does not exist; did you mean {meant!r}? ({_allowed()})")
        if not name.strip():
            raise InputError(f"{place}: a field has no name. ({_allowed()})")
    if "text" not in row and row.get("image") is None:
        raise InputError(f"{place}: no field 'text'; found {', '.join(map(repr, row)) or 'none'}. ({_allowed()})")
    labels = {name: _label(value, name, place) for name, value in row.items() if name not in FIELDS}
    image = row.get("image")
    if image is not None:
        if not isinstance(image, str) or not image.strip():
            raise InputError(f"{place}: image is a path in quotes, found {_short(image)}.")
        image = folder / image
        if not image.is_file():
            base = "the prompt file" if folder == path.parent else str(folder)
            raise FileError(f"{place}: there is no image file {image}; paths are relative to {base}.")
    try:
        return Prompt(row.get("text", ""), row.get("answer"), row.get("wrong"), image, labels)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _meant(name: str) -> str | None:
    plain = name.strip().lower()
    near = difflib.get_close_matches(plain, FIELDS, n=1, cutoff=0.8)
    return near[0] if near else _MISSPELT.get(plain)


def _label(value: Any, name: str, place: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, list | dict):
        raise InputError(f"{place}: label {name!r} is text, a number, true or false; found {_short(value)}.")
    return json.dumps(value)


def _allowed() -> str:
    return "known: text (required, but for a picture alone), answer, wrong, image; any other name is a label"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
