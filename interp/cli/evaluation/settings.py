"""The settings of `interp evaluate`: one frozen dataclass for both tasks, checked in one place."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as rows
from pathlib import Path
from typing import Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import SettingsError, unknown

TASKS = ("chair", "pope")
NEGATIVES = ("random", "popular", "adversarial")
PARSERS = ("robust", "compat")
STRENGTHS = {"vhr": 2.0, "iri": 0.26, "var": 0.4, "edit": 2.0, "vcd": 1.0, "m3id": 0.02, "avisc": 1.0}
"""The interventions, each with its usual strength."""

NOTHING = {"vhr": 1.0, "edit": 1.0}
"""The strength that changes nothing, where it is not 0."""

CONTROLS = {"vhr": ("random", "norm"), "iri": ("random",), "edit": ("random", "norm"), "avisc": ("random",)}
DOSES = (0.0, 0.5, 1.0, 2.0)

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
        None,
        "what acts on the model: vhr (heads that see, made louder), iri (early layers injected into later ones), var "
        "(attention moved off sinks), edit (top heads scaled), or a contrast: vcd, m3id, avisc; several with commas "
        "are compared",
    )
    strength: float | None = setting(
        None,
        "of one intervention; null for the usual one: 2 for vhr and edit (1 changes nothing), 0.26 for iri, 0.4 for "
        "var, 1 for vcd and avisc, 0.02 for m3id (0 changes nothing)",
        kind=float,
    )
    control: str | None = setting(
        None,
        "what stands in for one intervention: random (as many random heads or image tokens; of iri the rates permuted "
        "over layers) or norm (what attention adds keeps its size: vhr and edit)",
        choices=("random", "norm"),
        named=True,
    )
    doses: str | None = setting(
        None,
        "compare interventions at these doses, each beside its controls: 0 changes nothing, 1 is the usual strength "
        "(several interventions: 0,0.5,1,2)",
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
        names = self.names
        if not names:
            for name in ("strength", "control", "doses"):
                if getattr(self, name) is not None:
                    raise SettingsError(f"{name} is for an intervention: give --intervention {' or '.join(STRENGTHS)}.")
            return
        for name in names:
            if name not in STRENGTHS:
                raise unknown("intervention", name, STRENGTHS)
        if len(set(names)) < len(names):
            raise SettingsError(f"interventions are named once each, found {self.intervention}.")
        if self.texts is not None:
            raise SettingsError(f"{self.intervention} acts on a model, but a file is scored: leave out one of the two.")
        if self.compares:
            for name in ("strength", "control"):
                if getattr(self, name) is not None:
                    raise SettingsError(
                        f"{name} is of one intervention alone; a comparison has its doses and all controls."
                    )
            list(self.parts())  # each checks its own
            return
        if self.control is not None and self.control not in CONTROLS.get(names[0], ()):
            able = " and ".join(name for name, controls in CONTROLS.items() if self.control in controls)
            raise SettingsError(f"control {self.control} is for {able}, not for {names[0]}.")
        bounds = {"var": (0.0, 1.0), "m3id": (0.0, math.inf)}.get(names[0])
        if not math.isfinite(self.force) or (bounds and not bounds[0] <= self.force <= bounds[1]):
            span = "lies between 0 and 1" if names[0] == "var" else "is finite" + (" and at least 0" if bounds else "")
            raise SettingsError(f"the strength of {names[0]} {span}, found {self.force:g}.")

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
    def names(self) -> tuple[str, ...]:
        """The interventions."""
        return () if self.intervention is None else tuple(name.strip() for name in self.intervention.split(","))

    @property
    def compares(self) -> bool:
        """Whether several runs are compared."""
        return self.doses is not None or len(self.names) > 1

    @property
    def given_doses(self) -> tuple[float, ...]:
        """The doses of a comparison, in order.

        Raises:
            SettingsError: they are no finite numbers from 0 with commas between.
        """
        if self.doses is None:
            return DOSES
        try:
            found = tuple(sorted({float(dose) for dose in self.doses.split(",")}))
        except ValueError:
            found = ()
        if not found or not all(0 <= dose < math.inf for dose in found):
            raise SettingsError(f"doses are numbers from 0 with commas between, such as 0,0.5,1,2; found {self.doses}.")
        return found

    def parts(self) -> Iterator["tuple[str, float, EvaluateSettings]"]:
        """The runs of a comparison: each one's name, its dose, and its settings; the first is the model as it is.

        Raises:
            SettingsError: a dose is too large for an intervention.
        """
        plain = replace(self, intervention=None, doses=None, examples=0)
        yield "plain", 0.0, plain
        for name in self.names:
            nothing = NOTHING.get(name, 0.0)
            for dose in self.given_doses:
                strength = nothing + dose * (STRENGTHS[name] - nothing)
                for control in (None, *CONTROLS.get(name, ())) if dose else (None,):
                    label = f"{name} {dose:g}" if control is None else f"{name} {control} {dose:g}"
                    yield label, dose, replace(plain, intervention=name, strength=strength, control=control)

    @property
    def force(self) -> float:
        """The strength of one intervention."""
        return float(STRENGTHS[self.intervention or "vhr"] if self.strength is None else self.strength)

    @property
    def acts(self) -> dict[str, Any]:
        """What acts on the model, as it is recorded; empty where nothing does."""
        if self.intervention is None:
            return {}
        if self.compares:
            return {"intervention": ",".join(self.names), "doses": ",".join(f"{dose:g}" for dose in self.given_doses)}
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
