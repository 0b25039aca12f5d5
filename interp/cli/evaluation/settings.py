"""The settings of `interp evaluate`: one frozen dataclass for both tasks, checked in one place."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from interp.cli.settings import read_yaml
from interp.errors import SettingsError, unknown

TASKS = ("chair", "pope")
NEGATIVES = ("random", "popular", "adversarial")
PARSERS = ("robust", "compat")
VOCABULARIES = ("auto", "coco", "closed")
FILES = ("images", "annotations", "reference_captions", "captions", "answers", "questions")
UNHASHED = ("device", "batch_size", "examples", *FILES)
"""What does not change the meaning of a number: it may differ when a run is taken up again. Files count by content."""

_ONLY = {"chair": ("prompt", "captions", "reference_captions", "vocabulary", "subset"), "pope": (
    "template", "negatives", "per_image", "minimum", "parser", "answers", "questions")}  # fmt: skip


def _row(default: Any, help: str, *, kind: type = str, choices: tuple[str, ...] = (), least: int | None = None) -> Any:
    return field(default=default, metadata={"help": help, "kind": kind, "choices": choices, "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """Everything that is chosen for a run of `interp evaluate`.

    Raises:
        UnknownNameError: an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or settings contradict each other.
    """

    task: str = _row("", "what is evaluated: chair (captions) or pope (yes/no questions)", choices=TASKS)
    model: str = _row("", "a packaged model (`interp models`), a folder, or a hub id")
    data: str | None = _row(
        None, "labelled images: scenes (they come with the package) or coco (--images and --annotations)",
        choices=("scenes", "coco"),
    )  # fmt: skip
    split: str = _row("test", "which scenes", choices=("train", "validation", "test"))
    n: int | None = _row(
        None, "how many images: scenes 200 where nothing is said; of COCO's all, or so many drawn", kind=int, least=1
    )
    images: str | None = _row(None, "folder with the images that the annotations name")
    annotations: str | None = _row(None, "instance annotations in COCO's format (.json)")
    reference_captions: str | None = _row(None, "reference captions in COCO's format (.json): their objects are there")
    vocabulary: str = _row(
        "auto",
        "which words name which object: coco, closed (the names alone), or a file; auto: coco if it has the names",
    )
    captions: str | None = _row(None, "score this file of captions instead of running a model")
    subset: bool = _row(False, "let the file of captions hold only some of the images", kind=bool)
    answers: str | None = _row(None, "score this file of answers instead of running a model")
    questions: str | None = _row(None, "ask these questions (such as POPE's own files) instead of making them")
    prompt: str | None = _row(None, "what the model is asked; null for the one that fits the data")
    template: str | None = _row(None, "the question, with {name}; null for the one that fits the data")
    negatives: tuple[str, ...] = _row(NEGATIVES, "kinds of absent objects asked after", kind=tuple, choices=NEGATIVES)
    per_image: int = _row(3, "how many present objects of an image are asked after", kind=int, least=1)
    minimum: int = _row(3, "images with fewer objects are not asked about", kind=int, least=1)
    parser: str = _row("robust", "how answers are read; compat is POPE's original", choices=PARSERS)
    chat: bool | None = _row(None, "use the chat template; null where there is one", kind=bool)
    max_new_tokens: int | None = _row(
        None, "longest text in tokens; null for 64 (captions) or 8 (answers)", kind=int, least=1
    )
    batch_size: int = _row(16, "images or questions in one run of the model", kind=int, least=1)
    seed: int = _row(0, "seed of every random choice", kind=int, least=0)
    resamples: int = _row(1000, "how often the images are drawn anew for the intervals", kind=int, least=1)
    examples: int = _row(8, "how many images the report shows", kind=int, least=0)
    dtype: str | None = _row(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = _row(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")

    def __post_init__(self) -> None:
        for row in fields(self):
            _check(row.name, getattr(self, row.name), row.metadata, row.default)
        if not self.task:
            raise SettingsError(f"no task is named: one of {', '.join(TASKS)}.")
        other = "pope" if self.task == "chair" else "chair"
        for row in fields(self):
            if row.name in _ONLY[other] and getattr(self, row.name) != row.default:
                raise SettingsError(f"{row.name} is a setting of `interp evaluate {other}`, not of {self.task}.")
        if not self.model and self.texts is None:
            kind = "--captions" if self.task == "chair" else "--answers"
            raise SettingsError(f"no model is named: give one (see `interp models`), or {kind} FILE to score a file.")
        if self.model and self.texts is not None:
            raise SettingsError(f"a model ({self.model}) and a file ({self.texts}) are both named: take one of them.")
        if self.subset and self.captions is None:
            raise SettingsError("subset is for a file of captions: give --captions FILE.")
        self._check_source()

    def _check_source(self) -> None:
        coco = {"annotations": self.annotations, "images": self.images, "reference_captions": self.reference_captions}
        given = [name for name, value in coco.items() if value is not None]
        if self.source == "scenes":
            if given:
                raise SettingsError(
                    f"{given[0]} is for data in COCO's format, not for scenes: leave out one of the two."
                )
            if self.questions is not None:
                raise SettingsError("questions from a file are about images of a folder: give --images DIR.")
            return
        if self.questions is not None:
            if self.annotations is not None:
                raise SettingsError("questions hold their own answers: leave out annotations or questions.")
            if self.n is not None:
                raise SettingsError("questions from a file are asked as they are: leave out n.")
        elif self.annotations is None:
            raise SettingsError(f"{given[0] if given else 'data coco'} needs --annotations FILE (COCO's instances).")
        if self.images is None and self.texts is None:
            raise SettingsError("a model needs the images: give --images DIR.")

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "EvaluateSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        known = [row.name for row in fields(cls)]
        merged: dict[str, Any] = {}
        for layer in layers:
            for key, value in layer.items():
                if key not in known:
                    raise unknown("setting", key, known)
                if value is not None or key not in merged:
                    merged[key] = tuple(value) if key == "negatives" and isinstance(value, list) else value
        return cls(**merged)

    @property
    def source(self) -> str:
        """`scenes` or `coco`."""
        if self.data is not None:
            return self.data
        files = (self.annotations, self.images, self.questions, self.reference_captions)
        return "scenes" if all(file is None for file in files) else "coco"

    @property
    def texts(self) -> str | None:
        """The file of captions or answers, if no model is run."""
        return self.captions if self.task == "chair" else self.answers

    @property
    def longest(self) -> int:
        """How many tokens a text may have."""
        return self.max_new_tokens or (64 if self.task == "chair" else 8)

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what the numbers mean."""
        kept = {key: value for key, value in asdict(self).items() if key not in UNHASHED}
        more = {"data": self.source, "max_new_tokens": self.longest, "negatives": list(self.negatives)}
        return kept | more


def _check(name: str, value: Any, about: Mapping[str, Any], default: Any) -> None:
    """One setting: its type, its choices, its range."""
    kind = about["kind"]
    if value is None and default is None:
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a whole number", bool: "true or false", tuple: "a list of names"}
        raise SettingsError(f"{name} is {words[kind]}, found {value!r}.")
    if kind is tuple:
        names: list[Any] = [*(value or ())]
        if not names or len(set(names)) < len(names):
            raise SettingsError(
                f"{name} are one or more names, each once; found {', '.join(map(str, names)) or 'none'}."
            )
        for one in names:
            if one not in about["choices"]:
                raise unknown(name, one, about["choices"])
    elif about["choices"] and value != default and value not in about["choices"]:
        raise unknown(name, value, about["choices"])
    if about["least"] is not None and value < about["least"]:
        raise SettingsError(f"{name} must be at least {about['least']}, found {value}.")


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    row = next(row for row in fields(EvaluateSettings) if row.name == name)
    choices = row.metadata["choices"]
    rest = f" ({'|'.join(choices)})" if choices and name != "data" else ""
    default = "" if row.default in (None, "", ()) or row.metadata["kind"] is tuple else f" [default: {row.default}]"
    return f"{row.metadata['help'][0].upper()}{row.metadata['help'][1:]}{rest}.{default}"


def template(task: str) -> str:
    """A commented config for one task, with the defaults."""
    import yaml

    other = _ONLY["pope" if task == "chair" else "chair"]
    lines = [f"# Settings of `interp evaluate {task} --config`. Options on the command line win over this file."]
    for row in fields(EvaluateSettings):
        if row.name in other:
            continue
        value: Any = {"task": task, "model": "scenes"}.get(row.name, row.default)
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        choices = row.metadata["choices"]
        lines += ["", f"# {row.metadata['help']}{': ' + ' | '.join(choices) if choices else ''}", f"{row.name}: {text}"]
    return "\n".join(lines) + "\n"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; relative names of files are taken relative to it.

    Raises:
        FileError: the file is missing or not UTF-8.
        SettingsError: it is not yaml, holds a key twice, or is no mapping.
        UnknownNameError: a key is no setting.
    """
    found = read_yaml(path)
    known = [row.name for row in fields(EvaluateSettings)]
    for key in found:
        if key not in known:
            raise unknown("setting", key, known, where=str(path))
    for key in (*FILES, "vocabulary"):
        if isinstance(found.get(key), str) and found[key] not in VOCABULARIES:
            found[key] = str(Path(path).parent / found[key])
    return found
