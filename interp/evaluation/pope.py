"""POPE: yes/no questions after objects, half of them absent.

Source: Li et al., EMNLP 2023, arXiv 2305.10355. Positive is yes:

    accuracy, precision = TP / (TP + FP), recall = TP / present, F1 = 2 precision recall / (precision + recall),
    yes_ratio = answers that are yes / all

The original parser takes whatever it does not recognise for a yes (`parser="compat"`). The default reads answers
robustly (`parse_answer`); one that is neither yes nor no is then wrong, counts as no yes, and its rate is a number of
its own. How often the two parsers disagree is always given. The code raises ZeroDivisionError where no yes is
predicted; here precision is 0, and the result says so (`undefined`). AUROC of p(yes) needs no threshold: changes of the
yes-ratio alone leave it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError, NonFiniteError, unknown
from interp.evaluation.ids import by_id, same_ids
from interp.evaluation.intervals import auroc, check_options, rate
from interp.evaluation.measured import Measured, merged_settings
from interp.evaluation.parsers import Parsed, parse_answer, parse_answer_compat
from interp.evaluation.questions import Question, check_questions
from interp.results import jsonable, register

if TYPE_CHECKING:
    import pandas as pd

PARSERS = {"robust": parse_answer, "compat": parse_answer_compat}
_CODES: dict[Parsed, int] = {"yes": 1, "no": 0, None: -1}


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PopeScores(Measured):
    """Answers to yes/no questions, scored. Made by `pope`.

    The metrics, all between 0 and 1: `accuracy`, `precision`, `recall`, `f1`, `yes_ratio`, `unparsed` (answers that are
    neither yes nor no), `disagreement` (of the robust parser with the original's) and, where p(yes) is known, `auroc`.
    They are given for each kind of question (part), and for `all` together where there are several. A rate without
    anything to divide by is 0, an AUROC without pairs 0.5; both are listed in `undefined`.

    Attributes:
        questions: what was asked.
        answers: the answers, in the order of the questions.
        settings: parser, seed, resamples, and what the caller recorded.
        yes_probability: p(yes) of each question, float64 [question], or None.
        predicted: 1 for yes, 0 for no, -1 for neither, int64 [question].

    Raises:
        InputError: the fields are of different lengths, or a probability lies outside 0 to 1.
        NonFiniteError: a probability is NaN or infinite.
    """

    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    settings: Mapping[str, Any]
    yes_probability: Float[Tensor, " question"] | None = None
    predicted: Int[Tensor, " question"] = field(init=False)
    _apart: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if len(self.questions) != len(self.answers):
            raise InputError(f"{len(self.answers)} answers were given to {len(self.questions)} questions.")
        check_questions(self.questions)
        if self.yes_probability is not None:
            given = self.yes_probability.detach().cpu().double()
            _check_probability(given, self.questions)
            object.__setattr__(self, "yes_probability", given)
        parse = PARSERS[self.settings["parser"]]
        object.__setattr__(self, "predicted", torch.tensor([_CODES[parse(text)] for text in self.answers]))
        apart = [parse_answer(text) != parse_answer_compat(text) for text in self.answers]
        object.__setattr__(self, "_apart", np.array(apart))
        object.__setattr__(self, "settings", jsonable(self.settings, "settings"))

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of questions, and `all` where there are several."""
        kinds = tuple(dict.fromkeys(question.kind for question in self.questions))
        return kinds if len(kinds) == 1 else (*kinds, "all")

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.value("accuracy")

    @property
    def precision(self) -> float:
        """The share of yes answers that are right."""
        return self.value("precision")

    @property
    def recall(self) -> float:
        """The share of present objects that were answered with yes."""
        return self.value("recall")

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return self.value("f1")

    @property
    def yes_ratio(self) -> float:
        """The share of yes among the answers."""
        return self.value("yes_ratio")

    def frame(self) -> "pd.DataFrame":
        """A row for each question.

        Columns: `id`, `image`, `text`, `answer` (the truth), `kind`, `object`, `said` (the answer given), `robust` and
        `compat` (as the two parsers read it; None for neither), `right` (by the parser of the settings), and `p_yes`
        where it is known.
        """
        import pandas as pd

        frame = pd.DataFrame([asdict(question) for question in self.questions])
        frame["said"] = list(self.answers)
        frame["robust"] = pd.Series([parse_answer(text) for text in self.answers], dtype=object)
        frame["compat"] = [parse_answer_compat(text) for text in self.answers]
        frame["right"] = self.predicted.numpy() == self._present()
        if self.yes_probability is not None:
            frame["p_yes"] = self.yes_probability.numpy()
        return frame

    def _present(self) -> np.ndarray:
        return np.array([question.answer == "yes" for question in self.questions])

    def _images(self) -> tuple[int, np.ndarray]:
        """The number of images, and the index of the image of each question."""
        order = {one: i for i, one in enumerate(dict.fromkeys(question.image for question in self.questions))}
        return len(order), np.array([order[question.image] for question in self.questions])

    def _groups(self) -> list[np.ndarray]:
        return [np.arange(self._images()[0])]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        each = weights[:, self._images()[1]]  # all questions of an image are drawn together
        kinds = np.array([question.kind for question in self.questions])
        found = {}
        for part in self.parts:
            chosen = np.flatnonzero(kinds == part) if part != "all" or len(self.parts) == 1 else np.arange(len(kinds))
            found |= {(part, metric): pair for metric, pair in self._part(each[:, chosen], chosen).items()}
        return found

    def _part(self, weights: np.ndarray, chosen: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The metrics of some questions, for weights [draw, question]."""
        present, predicted = self._present()[chosen], self.predicted.numpy()[chosen]
        total = weights.sum(1)
        right, hits, there = weights @ (predicted == present), weights @ (present & (predicted == 1)), weights @ present
        said = weights @ (predicted == 1)
        some = total > 0
        found = {
            "accuracy": (rate(right, total), some),
            "precision": (rate(hits, said), said > 0),
            "recall": (rate(hits, there), there > 0),
            "f1": (rate(2 * hits, said + there), said + there > 0),
            "yes_ratio": (rate(said, total), some),
            "unparsed": (rate(weights @ (predicted == -1), total), some),
            "disagreement": (rate(weights @ self._apart[chosen], total), some),
        }
        if self.yes_probability is not None:
            area, pairs = auroc(self.yes_probability.numpy()[chosen], present, weights)
            found["auroc"] = (area, pairs > 0)
        return found

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join(["POPE", *([str(model)] if model else []), f"{len(self.questions)} questions"])

    def _tensors(self) -> dict[str, Tensor]:
        known = {} if self.yes_probability is None else {"yes_probability": self.yes_probability}
        return {"predicted": self.predicted, **known}

    def _fields(self) -> dict[str, Any]:
        rows = [asdict(question) for question in self.questions]
        return {"questions": rows, "answers": list(self.answers), "settings": self.settings}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> "PopeScores":
        questions = tuple(Question(**row) for row in fields["questions"])
        made = cls(questions, tuple(fields["answers"]), fields["settings"], tensors.get("yes_probability"))
        if not torch.equal(made.predicted, tensors["predicted"]):
            raise InputError("the predictions are not those of the answers.")
        return made


def pope(
    answers: Mapping[Any, str],
    questions: Iterable[Question],
    *,
    yes_probability: Mapping[Any, float] | None = None,
    parser: Literal["robust", "compat"] = "robust",
    seed: int = 0,
    resamples: int = 1000,
    settings: Mapping[str, Any] | None = None,
) -> PopeScores:
    """Score answers to yes/no questions (see [`interp.evaluation.pope`][interp.evaluation.pope]).

    Args:
        answers: a text for each question id.
        questions: from `pope_questions` (of several splits together, if wanted) or `read_questions`.
        yes_probability: p(yes) for each question id, for the AUROC.
        parser: which reading of the answers the numbers follow.
        seed: seed of the bootstrap over images (all questions of an image are drawn together).
        resamples: how often the images are drawn anew for an interval.
        settings: what to record beside the metric's own settings, such as model and prompt.

    Raises:
        InputError: an answer without its question or a question without its answer (or p(yes)), two questions of one
            id, a probability outside 0 to 1.
        UnknownNameError: there is no such parser.
        SettingsError: an option lies outside its range, or settings cannot be written as json.
    """
    if parser not in PARSERS:
        raise unknown("parser", parser, PARSERS)
    check_options(0.95, resamples, seed)
    asked = check_questions(questions)
    said = by_id(answers, "answers")
    same_ids(said, asked, what="answers", of="questions")
    chance = None
    if yes_probability is not None:
        given = by_id(yes_probability, "probabilities")
        same_ids(given, asked, what="probabilities", of="questions")
        chance = torch.tensor([float(given[one]) for one in asked], dtype=torch.float64)
    own = {"parser": parser, "seed": seed, "resamples": resamples}
    return PopeScores(
        questions=tuple(asked.values()),
        answers=tuple(said[one] for one in asked),
        settings=merged_settings(settings, own),
        yes_probability=chance,
    )


def _check_probability(given: Tensor, questions: Sequence[Question]) -> None:
    if given.shape != (len(questions),):
        raise InputError(
            f"yes_probability is [question], found shape {list(given.shape)} for {len(questions)} questions."
        )
    if not bool(given.isfinite().all()):
        i = int((~given.isfinite()).nonzero()[0])
        raise NonFiniteError(f"the probability of question {questions[i].id!r} is {given[i].item()}.")
    bad = (given < 0) | (given > 1)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise InputError(f"the probability of question {questions[i].id!r} is {given[i].item():.4g}, outside 0 to 1.")
