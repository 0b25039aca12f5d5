"""The settings of `interp evaluate`: one frozen dataclass for both tasks, checked in one place."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as rows
from pathlib import Path
from typing import Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import SettingsError

TASKS = ("chair", "pope")
NEGATIVES = ("random", "popular", "adversarial")
PARSERS = ("robust", "compat")
STRENGTHS = {"vhr": 2.0, "var": 0.4}
"""The interventions, each with its usual strength."""

VOCABULARIES = ("auto", "coco", "closed")
FILES = ("images", "annotations", "reference_captions", "captions", "answers", "questions")
UNHASHED = ("device", "batch_size", "examples", *FILES)
"""What does not change the meaning of a number: it may differ when a run is taken up again. Files count by content."""

_ONLY = {"chair": ("prompt", "captions", "reference_captions", "vocabulary", "subset"), "pope": (
    "template", "negatives", "per_image", "minimum", "parser", "answers", "questions")}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """Everything that is chosen for a run of `interp evaluate`.

    Raises:
        UnknownNameError: an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or settings contradict each other.
    """

    task: str = setting("", "what is evaluated: chair (captions) or pope (yes/no questions)", choices=TASKS)
    model: str = setting("", "a packaged model (`interp models`), a folder, or a hub id")
    data: str | None = setting(
        None, "labelled images: scenes (they come with the package) or coco (--images and --annotations)",
        choices=("scenes", "coco"), named=True,
    )  # fmt: skip
    split: str = setting("test", "which scenes", choices=("train", "validation", "test"))
    n: int | None = setting(
        None, "how many images: scenes 200 where nothing is said; of COCO's all, or so many drawn", kind=int, least=1
    )
    images: str | None = setting(None, "folder with the images that the annotations name")
    annotations: str | None = setting(None, "instance annotations in COCO's format (.json)")
    reference_captions: str | None = setting(
        None, "reference captions in COCO's format (.json): their objects are there"
    )
    vocabulary: str = setting(
        "auto",
        "which words name which object: coco, closed (the names alone), or a file; auto: coco if it has the names",
    )
    captions: str | None = setting(None, "score this file of captions instead of running a model")
    subset: bool = setting(False, "let the file of captions hold only some of the images")
    answers: str | None = setting(None, "score this file of answers instead of running a model")
    questions: str | None = setting(None, "ask these questions (such as POPE's own files) instead of making them")
    prompt: str | None = setting(None, "what the model is asked; null for the one that fits the data")
    template: str | None = setting(None, "the question, with {name}; null for the one that fits the data")
    negatives: tuple[str, ...] = setting(NEGATIVES, "kinds of absent objects asked after", choices=NEGATIVES)
    per_image: int = setting(3, "how many present objects of an image are asked after", least=1)
    minimum: int = setting(3, "images with fewer objects are not asked about", least=1)
    parser: str = setting("robust", "how answers are read; compat is POPE's original", choices=PARSERS)
    chat: bool | None = setting(None, "use the chat template; null where there is one", kind=bool)
    max_new_tokens: int | None = setting(
        None, "longest text in tokens; null for 64 (captions) or 8 (answers)", kind=int, least=1
    )
    intervention: str | None = setting(
        None, "what acts on the model: vhr (vision-aware heads made louder) or var (attention moved off sinks)",
        choices=STRENGTHS, named=True,
    )  # fmt: skip
    strength: float | None = setting(
        None,
        "of the intervention; null for the usual one: 2 for vhr (1 changes nothing), 0.4 for var (0 changes nothing)",
        kind=float,
    )
    control: str | None = setting(
        None, "random: as many random heads of the same layers instead (vhr alone)", choices=("random",), named=True
    )
    batch_size: int = setting(16, "images or questions in one run of the model", least=1)
    seed: int = setting(0, "seed of every random choice", least=0)
    resamples: int = setting(1000, "how often the images are drawn anew for the intervals", least=1)
    examples: int = setting(8, "how many images the report shows", least=0)
    dtype: str | None = setting(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.task:
            raise SettingsError(f"no task is named: one of {', '.join(TASKS)}.")
        other = "pope" if self.task == "chair" else "chair"
        for row in rows(self):
            if row.name in _ONLY[other] and getattr(self, row.name) != row.default:
                raise SettingsError(f"{row.name} is a setting of `interp evaluate {other}`, not of {self.task}.")
        if not self.model and self.texts is None:
            kind = "--captions" if self.task == "chair" else "--answers"
            raise SettingsError(f"no model is named: give one (see `interp models`), or {kind} FILE to score a file.")
        if self.model and self.texts is not None:
            raise SettingsError(f"a model ({self.model}) and a file ({self.texts}) are both named: take one of them.")
        if self.subset and self.captions is None:
            raise SettingsError("subset is for a file of captions: give --captions FILE.")
        self._check_intervention()
        self._check_source()

    def _check_intervention(self) -> None:
        if self.intervention is None:
            for name in ("strength", "control"):
                if getattr(self, name) is not None:
                    raise SettingsError(f"{name} is for an intervention: give --intervention {' or '.join(STRENGTHS)}.")
            return
        if self.texts is not None:
            raise SettingsError(f"{self.intervention} acts on a model, but a file is scored: leave out one of the two.")
        if self.control is not None and self.intervention != "vhr":
            raise SettingsError(
                f"control {self.control} is for vhr, which chooses heads; {self.intervention} does not."
            )
        if not math.isfinite(self.force) or (self.intervention == "var" and not 0 <= self.force <= 1):
            span = "lies between 0 and 1" if self.intervention == "var" else "is finite"
            raise SettingsError(f"the strength of {self.intervention} {span}, found {self.force}.")

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
        return fields.merged(cls, layers)

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

    @property
    def force(self) -> float:
        """The strength of the intervention."""
        return float(STRENGTHS[self.intervention or "vhr"] if self.strength is None else self.strength)

    @property
    def acts(self) -> dict[str, Any]:
        """What acts on the model, as it is recorded; empty where nothing does."""
        if self.intervention is None:
            return {}
        return {"intervention": self.intervention, "strength": self.force, "control": self.control}

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what the numbers mean."""
        kept = {key: value for key, value in asdict(self).items() if key not in UNHASHED}
        more = {"data": self.source, "max_new_tokens": self.longest, "negatives": list(self.negatives)}
        return kept | more | self.acts  # None without an intervention, as in records of runs from before there were any


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    return fields.help_of(EvaluateSettings, name)


def template(task: str) -> str:
    """A commented config for one task, with the defaults."""
    head = f"Settings of `interp evaluate {task} --config`. Options on the command line win over this file."
    other = _ONLY["pope" if task == "chair" else "chair"]
    return fields.template(EvaluateSettings, head, {"task": task, "model": "scenes"}, without=other)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; relative names of files are taken relative to it.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    found = fields.read_config(path, EvaluateSettings, FILES)
    if isinstance(found.get("vocabulary"), str) and found["vocabulary"] not in VOCABULARIES:
        found["vocabulary"] = str(Path(path).parent / found["vocabulary"])
    return found
