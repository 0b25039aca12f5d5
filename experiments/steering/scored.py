"""What a model says about scenes with edits, counted for each scene, and the numbers with intervals over scenes.

All rows of a table are resampled together: a draw of scenes is the same one for every row, so that the interval of a
difference is that of a paired one. Of an intervention with random parts there are several runs; its number is the mean
of theirs, and the runs are drawn anew as the scenes are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import interp
from interp.batch import Batch
from interp.data import scenes
from interp.edits import Edit
from interp.evaluation import (
    Question,
    Vocabulary,
    answer_tokens,
    caption_surprise,
    chair,
    image_prompt,
    parse_answer,
    pope_questions,
)
from interp.evaluation.intervals import auroc, draws, ends, rate
from interp.lens import Generation
from interp.steering import Contrast

BATCH = 50
LONGEST = 32  # tokens; a caption of five objects has 18
RESAMPLES = 1000
VOCABULARY = Vocabulary.of(scenes.NAMES)
Change = Callable[[Batch], Sequence[Edit | Contrast]]
Metrics = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Scenes in batches, to be captioned and asked about.

    Attributes:
        drawn: the scenes.
        captions: batches with the caption prompt.
        questions: POPE's adversarial ones on the first scenes.
        asked: batches with the questions.
        owner: the scene of each question [question].
    """

    drawn: list[scenes.Scene]
    captions: list[Batch]
    questions: list[Question]
    asked: list[Batch]
    owner: np.ndarray

    @classmethod
    def of(cls, lens: interp.Lens, split: scenes.Split, n: int, questioned: int) -> Pictures:
        """The first `n` scenes of a split, of which the first `questioned` are asked about."""
        drawn = list(scenes.scenes(split, n))
        place = {scene.id: i for i, scene in enumerate(drawn)}
        objects = {scene.id: scene.names for scene in drawn[:questioned]}
        questions = pope_questions(objects, split="adversarial", classes=scenes.NAMES, template=scenes.TEMPLATE)
        owner = [place[question.image] for question in questions]
        text = image_prompt(lens, scenes.CAPTION_PROMPT)
        asked = [(image_prompt(lens, q.text), drawn[i]) for q, i in zip(questions, owner, strict=True)]
        captions = batches(lens, [(text, scene) for scene in drawn])
        return cls(drawn, captions, questions, batches(lens, asked), np.array(owner))


def batches(lens: interp.Lens, rows: Sequence[tuple[str, scenes.Scene]]) -> list[Batch]:
    """Texts with their scenes, in batches."""
    some = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    return [lens.prepare([t for t, _ in part], [s.image for _, s in part], padding_side="left") for part in some]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What the model says, counted.

    Attributes:
        captions: the texts.
        counts: those of `ChairScores`: mentions, hallucinated, objects, recalled, words, runs, distinct [scene, 7].
        nats: what the caption costs under the plain model, with its end, and how many tokens that is [scene, 2].
        answers: 1 for yes, 0 for no, -1 for neither [question].
        chance: p(yes) [question].
    """

    captions: tuple[str, ...]
    counts: np.ndarray
    nats: np.ndarray
    answers: np.ndarray
    chance: np.ndarray


def speak(lens: interp.Lens, pictures: Pictures, change: Change) -> Said:
    """Captions and answers with the edits and contrasts of each batch, greedy."""
    texts: list[str] = []
    nats = []
    for batch in pictures.captions:
        made = said_with(lens, batch, change(batch), max_new_tokens=LONGEST)
        texts += made.texts or ()
        nats.append(caption_surprise(lens, batch, made.tokens))
    there = {scene.id: scene.names for scene in pictures.drawn}
    scored = chair(dict(zip(there, texts, strict=True)), there, vocabulary=VOCABULARY)
    answers, chance = answered(lens, pictures.asked, change)
    return Said(tuple(texts), scored.counts.numpy(), torch.cat(nats).numpy(), answers, chance)


def said_with(lens: interp.Lens, batch: Batch, change: Sequence[Edit | Contrast], **options: Any) -> Generation:
    """A generation with edits and contrasts."""
    made = [one for one in change if isinstance(one, Edit)]
    contrasts = [one for one in change if isinstance(one, Contrast)]
    return lens.generate(batch, made, logits_processor=contrasts or None, **options)


def answered(lens: interp.Lens, asked: Sequence[Batch], change: Change) -> tuple[np.ndarray, np.ndarray]:
    """The first word of each answer (1 yes, 0 no, -1 neither), and p(yes)."""
    yes, no = answer_tokens(lens)
    words, chance = [], []
    for batch in asked:
        made = change(batch)
        last = lens.run(batch, "logits@last", [one for one in made if isinstance(one, Edit)]).logits[:, -1].double()
        said = last
        for one in made:
            if isinstance(one, Contrast):
                said, last = one(batch.inputs["input_ids"], said), one.uncut(batch.inputs["input_ids"], last)
        words += lens.processor.tokenizer.batch_decode(said.argmax(-1)[:, None])
        chance.append(torch.sigmoid(last[:, yes].logsumexp(-1) - last[:, no].logsumexp(-1)))
    codes = {"yes": 1, "no": 0, None: -1}
    return np.array([codes[parse_answer(word)] for word in words], dtype=int), torch.cat(chance).numpy()


class Scale:
    """The metrics of what was said, and draws of scenes that all rows share."""

    def __init__(self, pictures: Pictures, seed: int = 0, resamples: int = RESAMPLES) -> None:
        n = len(pictures.drawn)
        self.seed = seed
        self.once = np.ones((1, n))
        self.drawn = np.concatenate(list(draws([np.arange(n)], resamples, seed)))
        self.owner = pictures.owner
        self.present = np.array([question.answer == "yes" for question in pictures.questions])

    def of(self, runs: Sequence[Said]) -> tuple[Metrics, Metrics]:
        """Each metric of the mean of some runs: its value [1], and those of the draws [draw]."""
        each = [(self._metrics(said, self.once), self._metrics(said, self.drawn)) for said in runs]
        random = np.random.default_rng(self.seed + 1)
        shares = random.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=len(self.drawn)) / len(runs)
        names = each[0][0]
        value = {name: np.mean([one[name] for one, _ in each], axis=0) for name in names}
        return value, {name: sum(shares[:, i] * d[name] for i, (_, d) in enumerate(each)) for name in names}  # type: ignore[misc]

    def _metrics(self, said: Said, weights: np.ndarray) -> Metrics:
        mentions, wrong, there, recalled, words, runs, distinct = (weights @ said.counts.astype(float)).T
        total = weights.sum(1)
        nats, tokens = (weights @ said.nats).T
        each = weights[:, self.owner]
        right = each @ (said.answers == self.present)
        return {
            "CHAIR_I, %": 100 * rate(wrong, mentions),
            "CHAIR_S, %": 100 * (weights @ (said.counts[:, 1] > 0)) / total,
            "recall, %": 100 * rate(recalled, there),
            "length": words / total,
            "repetition, %": 100 * rate(runs - distinct, runs),
            "perplexity": np.exp(nats / tokens),
            "POPE right, %": 100 * rate(right, each.sum(1)),
            "POPE yes, %": 100 * rate(each @ (said.answers == 1), each.sum(1)),
            "POPE AUROC, %": 100 * auroc(said.chance, self.present, each)[0],
        }


def interval(value: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """A number with its 95% interval, as a cell of a table."""
    low, high = ends(drawn, 0.95)
    return {key: round(float(x), 3) for key, x in (("value", value[0]), ("low", low), ("high", high))}
