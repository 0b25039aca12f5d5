"""How well explanations tell where latents are active, by a chat model that sees explanation and windows.

Source: Paulo et al. 2024 (arXiv 2410.13928), detection and fuzzing; prompts are our own.

    detection   which windows activate the latent: some about tokens drawn from all that activate it, some without any
    fuzzing     which windows are marked rightly: with the tokens that activate it, or with as many others
    accuracy    (share of right answers among the one kind + share among the other) / 2, so that 0.5 is chance

An answer that is missing counts as half right. Intervals of one latent are those of Jeffreys' posterior of both shares;
of the mean, a bootstrap over latents. The baseline judges the same windows by the explanation of another latent: an
explanation that says something true of most text scores there, too.

Departures: windows are those that `explain` did not see (`sampled`, never among the `top` ones). Silent windows are
drawn from the corpus evenly, so that detection is easier the rarer the latent's subject is; fuzzing is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from interp.bootstrap import check_options, ends
from interp.dictionaries.features.chat import Chat
from interp.dictionaries.features.contexts import Example, FeatureContexts
from interp.dictionaries.features.explain import LEFT, RIGHT, active, marked
from interp.errors import InputError, SettingsError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["detection", "fuzzing"]
_ASK = {
    "detection": (
        "You are given a description of certain tokens, and numbered passages. For each passage say whether it holds "
        "at least one token that the description fits."
    ),
    "fuzzing": (
        "You are given a description of certain tokens, and numbered passages in which some tokens stand between "
        f"{LEFT} and {RIGHT}. For each passage say whether the description fits the tokens that are set off so."
    ),
}
_FORM = "Answer with one line for each passage: its number, a blank, and yes or no. Write nothing else."
_LINE = re.compile(r"^\W*(\d+)\W+(yes|no)\b", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with an interval; both ends are NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class ExplanationScores:
    """Scores of explanations.

    Attributes:
        kind: `detection` or `fuzzing`.
        latents: which were scored.
        accuracy: balanced accuracy of each.
        baseline: the same windows by another latent's explanation; empty where there was no other one.
        mean: of the accuracies over latents.
        mean_baseline: of the baselines.
        gain: the mean of accuracy less baseline.
        windows: how many each latent was scored on.
        unanswered: how many answers were missing for each, baseline included.
        left_out: explained latents without windows of both kinds.
        settings: options.
    """

    kind: Kind
    latents: tuple[int, ...]
    accuracy: tuple[Interval, ...]
    baseline: tuple[Interval, ...]
    mean: Interval
    mean_baseline: Interval | None
    gain: Interval | None
    windows: tuple[int, ...]
    unanswered: tuple[int, ...]
    left_out: tuple[int, ...]
    settings: Mapping[str, Any]

    def frame(self) -> pd.DataFrame:
        """Columns latent, accuracy, low, high, baseline, windows, unanswered."""
        import pandas as pd

        names = ["latent", "accuracy", "low", "high", "baseline", "windows", "unanswered"]
        base = [b.value for b in self.baseline] or [float("nan")] * len(self.latents)
        rows = zip(self.latents, self.accuracy, base, self.windows, self.unanswered, strict=True)
        return pd.DataFrame([(n, a.value, a.low, a.high, b, w, u) for n, a, b, w, u in rows], columns=names)


def detection_score(
    contexts: FeatureContexts,
    explanations: Mapping[int, str],
    chat: Chat,
    *,
    windows: int = 10,
    per_call: int = 5,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> ExplanationScores:
    """Whether explanations tell windows that activate a latent from windows that do not.

    Args:
        contexts: from `top_contexts`, with `sampled` and `silent` windows.
        explanations: a line for each latent, as from `explain`.
        chat: any callable from messages to text; the judge.
        windows: of each kind for each latent, at most.
        per_call: windows that the judge sees at once.
        seed: of the order of windows and of whose explanation is the baseline.
        confidence: of the intervals.
        resamples: draws for them.

    Raises:
        SettingsError: an option is out of range.
        UnknownNameError: an explained latent is not among the contexts.
        UnsupportedError: a latent is active at image tokens.
        InputError: no latent has windows of both kinds.
    """

    def made(latent: int, random: np.random.Generator) -> list[tuple[str, bool]]:
        loud, silent = contexts.examples(latent, "sampled")[:windows], contexts.examples(latent, "silent")[:windows]
        for example in loud:
            active(example, 1.0)
        return [(_plain(e), True) for e in loud] + [(_plain(e), False) for e in silent]

    options = {"windows": windows, "per_call": per_call, "seed": seed}
    return _score("detection", contexts, explanations, chat, made, options, confidence, resamples)


def fuzzing_score(
    contexts: FeatureContexts,
    explanations: Mapping[int, str],
    chat: Chat,
    *,
    windows: int = 10,
    threshold: float = 0.3,
    per_call: int = 5,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> ExplanationScores:
    """Whether explanations tell tokens that activate a latent from others in the same windows.

    Args:
        contexts: from `top_contexts`, with `sampled` windows.
        explanations: a line for each latent, as from `explain`.
        chat: any callable from messages to text; the judge.
        windows: for each latent at most; each is shown marked rightly and, in another place, wrongly.
        threshold: tokens are marked that have at least this share of the window's largest activation.
        per_call: windows that the judge sees at once.
        seed: of the order of windows, of wrong marks, and of whose explanation is the baseline.
        confidence: of the intervals.
        resamples: draws for them.

    Raises:
        SettingsError: an option is out of range.
        UnknownNameError: an explained latent is not among the contexts.
        UnsupportedError: a latent is active at image tokens.
        InputError: no latent has windows with tokens that do not activate it.
    """
    if not 0 < threshold <= 1:
        raise SettingsError(f"threshold lies above 0 and at most at 1, found {threshold}.")

    def made(latent: int, random: np.random.Generator) -> list[tuple[str, bool]]:
        out: list[tuple[str, bool]] = []
        for example in contexts.examples(latent, "sampled")[:windows]:
            right = active(example, threshold)
            quiet = np.flatnonzero((example.activations == 0) & (np.array(example.kinds) == "text"))
            if not len(quiet):
                continue
            wrong = np.zeros_like(right)
            wrong[random.choice(quiet, min(int(right.sum()), len(quiet)), replace=False)] = True
            out += [(marked(example, right), True), (marked(example, wrong), False)]
        return out

    options = {"windows": windows, "per_call": per_call, "seed": seed, "threshold": threshold}
    return _score("fuzzing", contexts, explanations, chat, made, options, confidence, resamples)


def _plain(example: Example) -> str:
    return marked(example, np.zeros(len(example.tokens), dtype=bool))


def _score(
    kind: Kind,
    contexts: FeatureContexts,
    explanations: Mapping[int, str],
    chat: Chat,
    made: Callable[[int, np.random.Generator], list[tuple[str, bool]]],
    options: Mapping[str, Any],
    confidence: float,
    resamples: int,
) -> ExplanationScores:
    check_options(confidence, resamples, options["seed"])
    if options["windows"] < 1 or options["per_call"] < 1:
        raise SettingsError(f"windows and per_call are at least 1, found {dict(options)}.")
    random = np.random.default_rng(options["seed"])
    tasks: dict[int, list[tuple[str, bool]]] = {}
    for latent in explanations:
        task = made(latent, random)
        if {truth for _, truth in task} == {True, False}:
            tasks[latent] = [task[i] for i in random.permutation(len(task))]
    if not tasks:
        raise InputError(
            f"{kind}: no explained latent has windows of both kinds. Search with sampled and silent above 0; a dense "
            "latent has silent windows where window= is small."
        )
    order = [list(tasks)[i] for i in random.permutation(len(tasks))]
    other = dict(zip(order, [*order[1:], order[0]], strict=True))
    found: dict[str, list[Interval]] = {"own": [], "other": []}
    unanswered = []
    for latent, task in tasks.items():
        missing = 0
        for name, of in (("own", latent), ("other", other[latent]))[: 2 if len(tasks) > 1 else 1]:
            right = list(_judged(kind, explanations[of], task, chat, options["per_call"]))
            missing += right.count(0.5)
            found[name].append(_balanced(right, [truth for _, truth in task], confidence, resamples, options["seed"]))
        unanswered.append(missing)
    own, base = (np.array([x.value for x in found[name]]) for name in ("own", "other"))
    means = (own, base, own - base) if len(base) else (own,)
    mean = [_mean(x, confidence, resamples, options["seed"]) for x in means]
    return ExplanationScores(
        kind=kind,
        latents=tuple(tasks),
        accuracy=tuple(found["own"]),
        baseline=tuple(found["other"]),
        mean=mean[0],
        mean_baseline=mean[1] if len(base) else None,
        gain=mean[2] if len(base) else None,
        windows=tuple(map(len, tasks.values())),
        unanswered=tuple(unanswered),
        left_out=tuple(n for n in explanations if n not in tasks),
        settings={**options, "confidence": confidence, "resamples": resamples, "contexts": dict(contexts.settings)},
    )


def _judged(
    kind: Kind, explanation: str, task: Sequence[tuple[str, bool]], chat: Chat, per_call: int
) -> Iterator[float]:
    """1 for each right answer, 0 for each wrong one, 0.5 for each that is missing."""
    for first in range(0, len(task), per_call):
        part = task[first : first + per_call]
        passages = "\n".join(f"{n}. {text}" for n, (text, _) in enumerate(part, 1))
        messages = [
            {"role": "system", "content": f"{_ASK[kind]} {_FORM}"},
            {"role": "user", "content": f"Description: {explanation}\n\nPassages:\n{passages}"},
        ]
        answers = {int(n): word.lower() == "yes" for n, word in _LINE.findall(chat(messages))}
        for n, (_, truth) in enumerate(part, 1):
            yield 0.5 if n not in answers else float(answers[n] == truth)


def _balanced(right: Sequence[float], truth: Sequence[bool], confidence: float, resamples: int, seed: int) -> Interval:
    kinds = [[r for r, t in zip(right, truth, strict=True) if t == kind] for kind in (True, False)]
    random = np.random.default_rng(seed)
    draws = [random.beta(sum(k) + 0.5, len(k) - sum(k) + 0.5, resamples) for k in kinds]
    low, high = ends((draws[0] + draws[1]) / 2, confidence)
    return Interval(float(np.mean([np.mean(k) for k in kinds])), float(low), float(high))


def _mean(values: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    """Over latents; a single one has no interval."""
    if len(values) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    drawn = values[np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = ends(drawn, confidence)
    return Interval(float(values.mean()), float(low), float(high))
