"""Files of captions, answers and questions: every line checked, written whole or not at all."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from interp.errors import FileError, InputError
from interp.evaluation.ids import by_id, same_ids, text_id
from interp.evaluation.questions import Question, check_questions
from interp.files import write_text

_IMAGE, _QUESTION = ("image", "image_id"), ("id", "question_id")


def read_captions(path: str | os.PathLike[str], *, images: Collection[Any] | None = None) -> dict[str, str]:
    """Captions by image id (as text) from a UTF-8 file.

    `.jsonl` holds an object such as `{"image": "17", "caption": "a dog"}` on each line, `.json` a list of them, as
    COCO's results do; `image_id` is taken as well as `image`. Other fields are left alone.

    Args:
        path: the file.
        images: ids that must be there, neither more nor fewer; None takes what there is.

    Raises:
        FileError: the file is missing or not UTF-8.
        InputError: another extension, a line without its fields, an image twice, or ids that are missing or not known;
            the message gives the line or entry.
    """
    found = dict(_texts(Path(path), _IMAGE, "caption"))
    if images is not None:
        same_ids(found, [text_id(one) for one in images], what="captions", of="images", hint=f" The file is {path}.")
    return found


def write_captions(path: str | os.PathLike[str], captions: Mapping[Any, str]) -> None:
    """Write captions as `.jsonl`, for `read_captions`.

    Raises:
        InputError: there are none, or one is no text.
        FileError: the file cannot be written.
    """
    _write(path, [{"image": one, "caption": text} for one, text in by_id(captions, "captions").items()], "caption")


def read_answers(
    path: str | os.PathLike[str], *, questions: Iterable[Question] | None = None
) -> tuple[dict[str, str], dict[str, float] | None]:
    """Answers by question id (as text) from a UTF-8 file, and p(yes) where every line has it.

    `.jsonl` holds an object such as `{"id": "random-1", "answer": "yes", "p_yes": 0.9}` on each line, `.json` a list of
    them; `question_id` is taken as well as `id`, and `p_yes` may be left out.

    Args:
        path: the file.
        questions: whose ids must be there, neither more nor fewer; None takes what there is.

    Returns:
        The answers, and p(yes) or None.

    Raises:
        FileError: the file is missing or not UTF-8.
        InputError: another extension, a line without its fields, a question twice, p(yes) on some lines only, or ids
            that are missing or not known; the message gives the line or entry.
    """
    path = Path(path)
    rows = list(_rows(path))
    answers = dict(_texts(path, _QUESTION, "answer", rows))
    if questions is not None:
        wanted = check_questions(questions)
        same_ids(answers, wanted, what="answers", of="questions", hint=f" The file is {path}.")
    having = [(place, row) for place, row in rows if "p_yes" in row]
    if not having:
        return answers, None
    if len(having) < len(rows):
        place = next(place for place, row in rows if "p_yes" not in row)
        raise InputError(f"{place}: no field 'p_yes', but other lines have it; give it on every line or on none.")
    for place, row in having:
        value = row["p_yes"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{place}: p_yes is a number from 0 to 1, found {value!r}.")
    return answers, {one: float(row["p_yes"]) for one, (_, row) in zip(answers, having, strict=True)}


def write_answers(
    path: str | os.PathLike[str], answers: Mapping[Any, str], yes_probability: Mapping[Any, float] | None = None
) -> None:
    """Write answers (and p(yes)) as `.jsonl`, for `read_answers`.

    Raises:
        InputError: there are none, one is no text, or the probabilities are of other questions.
        FileError: the file cannot be written.
    """
    rows: list[dict[str, Any]] = [{"id": one, "answer": text} for one, text in by_id(answers, "answers").items()]
    if yes_probability is not None:
        chance = by_id(yes_probability, "probabilities")
        same_ids(chance, [row["id"] for row in rows], what="probabilities", of="answers")
        for row in rows:
            row["p_yes"] = chance[row["id"]]
    _write(path, rows, "answer")


def read_questions(path: str | os.PathLike[str], *, kind: str | None = None) -> list[Question]:
    """Questions from a UTF-8 file: `write_questions`' own, or those that POPE released.

    Each line (or entry of a `.json` list) holds `id` or `question_id`, `image`, `text`, and `answer` or `label`, which
    is yes or no; `kind` and `object` may follow.

    Args:
        path: the file.
        kind: the kind of the questions that name none; None takes the file's name without its extension. It is put
            before the ids of such questions (`NAME-1`), because POPE numbers each of its files from 1.

    Raises:
        FileError: the file is missing or not UTF-8.
        InputError: another extension, a line without its fields, or an id twice; the message gives the line or entry.
    """
    path = Path(path)
    found: dict[str, Question] = {}
    for place, row in _rows(path):
        own = row.get("kind")
        name = path.stem if kind is None else kind
        one = _id(row, _QUESTION, place)
        values = {
            "id": one if own is not None else f"{name}-{one}",
            "image": _id(row, ("image", "image_id"), place),
            "text": row.get("text"),
            "answer": row.get("answer", row.get("label")),
            "kind": name if own is None else own,
            "object": row.get("object", ""),
        }
        try:
            question = Question(**values)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if question.id in found:
            raise InputError(f"{place}: the question {question.id!r} stands there twice.")
        found[question.id] = question
    return list(found.values())


def write_questions(path: str | os.PathLike[str], questions: Iterable[Question]) -> None:
    """Write questions as `.jsonl`, for `read_questions`.

    Raises:
        InputError: there are none, or two share an id.
        FileError: the file cannot be written.
    """
    _write(path, [asdict(question) for question in check_questions(questions).values()], "text")


def _texts(
    path: Path, names: tuple[str, str], field: str, rows: Iterable[tuple[str, dict[str, Any]]] | None = None
) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for place, row in _rows(path) if rows is None else rows:
        one = _id(row, names, place)
        if one in seen:
            raise InputError(f"{place}: {names[0]} {one!r} stands there twice; each may stand once.")
        seen.add(one)
        if not isinstance(row.get(field), str):
            raise InputError(
                f"{place}: {field} is text, found {row.get(field)!r} (fields: {', '.join(row) or 'none'})."
            )
        yield one, row[field]


def _id(row: Mapping[str, Any], names: tuple[str, str], place: str) -> str:
    there = [name for name in names if name in row]
    if not there:
        raise InputError(f"{place}: no field {names[0]!r} (or {names[1]!r}); found {', '.join(row) or 'none'}.")
    return text_id(row[there[0]], f"{place}: {there[0]}")


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path} has the extension {path.suffix!r}; allowed: .jsonl and .json.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8.") from error
    found = _lines(text, path) if path.suffix == ".jsonl" else _list(text, path)
    count = 0
    for place, row in found:
        if not isinstance(row, dict):
            raise InputError(f"{place}: a json object is needed, found {type(row).__name__}.")
        count += 1
        yield place, row
    if not count:
        raise InputError(f"{path} is empty; it needs at least one entry.")


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            if number == 1 and not text.strip():
                return
            raise InputError(f"{place}: the line is empty; each line holds one json object.")
        try:
            yield place, json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: not json ({error}).") from error


def _list(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        # POPE's own files hold json lines under the name .json.
        if text.lstrip().startswith("{") and "\n" in text.strip():
            yield from _lines(text, path)
            return
        raise InputError(f"{path}: not json ({error}).") from error
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise InputError(f"{path}: a list of json objects is needed, found {type(found).__name__}.")
    yield from ((f"{path}, entry {i}", row) for i, row in enumerate(found))


def _write(path: str | os.PathLike[str], rows: list[dict[str, Any]], field: str) -> None:
    for row in rows:
        if not isinstance(row[field], str):
            raise InputError(f"{field} is text, found {row[field]!r}.")
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    # Line separators inside texts (such as U+2028) are escaped by nobody: only "\n" ends a line here.
    write_text(path, "".join(line + "\n" for line in lines))
