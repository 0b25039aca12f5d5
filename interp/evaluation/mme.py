"""MME-style pairs: two questions on each image, one with the answer yes and one with no.

Source: "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", arXiv 2306.13394, and its
code:

    score(task) = 100 accuracy + 100 accuracy+,    accuracy+ = share of images with both questions right

An answer is read from its first four characters; what is neither yes nor no is wrong. A task has at most 200 points.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp.errors import InputError
from interp.evaluation.ids import by_id, same_ids
from interp.evaluation.intervals import check_options
from interp.evaluation.measured import Measured, merged_settings
from interp.evaluation.parsers import parse_answer_mme
from interp.evaluation.questions import Question, check_questions
from interp.results import jsonable, register

if TYPE_CHECKING:
    import pandas as pd


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MmeScores(Measured):
    """Answers to paired questions, scored. Made by `mme`.

    For each task (the questions' kind): `score` (points, up to 200), `accuracy`, `accuracy_plus`. The part `all` has
    the sum of the tasks' `score`. Images are resampled within each task.

    Attributes:
        questions: what was asked.
        answers: the answers, in the order of the questions.
        settings: seed, resamples, and what the caller recorded.
        right: 1 where the answer is right, else 0, int64 [question].

    Raises:
        InputError: the fields are of different lengths, or an image of a task has not one yes and one no question.
    """

    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    settings: Mapping[str, Any]
    right: Int[Tensor, " question"] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.questions) != len(self.answers):
            raise InputError(f"{len(self.answers)} answers were given to {len(self.questions)} questions.")
        check_questions(self.questions)
        for (task, image), pair in self._pairs().items():
            truth = sorted(self.questions[i].answer for i in pair)
            if truth != ["no", "yes"]:
                raise InputError(
                    f"image {image!r} of task {task!r} needs one question with the answer yes and one with no, found "
                    f"{', '.join(truth)}."
                )
        pairs = zip(self.questions, self.answers, strict=True)
        right = [int(parse_answer_mme(text) == question.answer) for question, text in pairs]
        object.__setattr__(self, "right", torch.tensor(right))
        object.__setattr__(self, "settings", jsonable(self.settings, "settings"))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(dict.fromkeys(question.kind for question in self.questions))

    @property
    def score(self) -> float:
        """The sum of the tasks' points."""
        return self.value("score", "all")

    def frame(self) -> "pd.DataFrame":
        """A row for each question: its fields, `said` (the answer given) and `right`."""
        import pandas as pd

        frame = pd.DataFrame([asdict(question) for question in self.questions])
        return frame.assign(said=list(self.answers), right=self.right.numpy().astype(bool))

    def _pairs(self) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = {}
        for i, question in enumerate(self.questions):
            found.setdefault((question.kind, question.image), []).append(i)
        return found

    def _groups(self) -> list[np.ndarray]:
        tasks = np.array([task for task, _ in self._pairs()])
        return [np.flatnonzero(tasks == task) for task in self.tasks]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        right = self.right.numpy()
        each = np.array([right[pair] for pair in self._pairs().values()])  # [image, 2]
        always = np.ones(len(weights), dtype=bool)
        found, total = {}, np.zeros(len(weights))
        for task, group in zip(self.tasks, self._groups(), strict=True):
            chosen = weights[:, group] / weights[:, group].sum(1, keepdims=True)
            accuracy, both = chosen @ each[group].mean(1), chosen @ each[group].all(1)
            score = 100 * (accuracy + both)
            total = total + score
            for metric, value in {"score": score, "accuracy": accuracy, "accuracy_plus": both}.items():
                found[task, metric] = (value, always)
        return {**found, ("all", "score"): (total, always)}

    def _shares(self, names: list[str]) -> list[str]:
        return ["score"]

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join(["MME", *([str(model)] if model else []), f"{len(self.questions)} questions"])

    def _tensors(self) -> dict[str, Tensor]:
        return {"right": self.right}

    def _fields(self) -> dict[str, Any]:
        rows = [asdict(question) for question in self.questions]
        return {"questions": rows, "answers": list(self.answers), "settings": self.settings}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> "MmeScores":
        questions = tuple(Question(**row) for row in fields["questions"])
        made = cls(questions, tuple(fields["answers"]), fields["settings"])
        if not torch.equal(made.right, tensors["right"]):
            raise InputError("what is right is not that of the answers.")
        return made


def mme(
    answers: Mapping[Any, str],
    questions: Iterable[Question],
    *,
    seed: int = 0,
    resamples: int = 1000,
    settings: Mapping[str, Any] | None = None,
) -> MmeScores:
    """Score answers to paired questions (see [`interp.evaluation.mme`][interp.evaluation.mme]).

    Args:
        answers: a text for each question id.
        questions: two for each image of a task (`kind`), one with the answer yes and one with no.
        seed: seed of the bootstrap over images.
        resamples: how often the images are drawn anew for an interval.
        settings: what to record beside the metric's own settings.

    Raises:
        InputError: an answer without its question, a question without its answer, or an image without such a pair.
        SettingsError: an option lies outside its range, or settings cannot be written as json.
    """
    check_options(0.95, resamples, seed)
    asked = check_questions(questions)
    said = by_id(answers, "answers")
    same_ids(said, asked, what="answers", of="questions")
    own = {"parser": "mme", "seed": seed, "resamples": resamples}
    texts = tuple(said[one] for one in asked)
    return MmeScores(tuple(asked.values()), texts, merged_settings(settings, own))
