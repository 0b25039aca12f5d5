"""(c) Head Pursuit on SmolLM2: do the heads of a concept carry its answers, and no others'?

    python -m experiments.heads.concepts_text [--each 13]

Four concepts (countries, months, numbers, first names), prompts whose next word is one of the concept's and which the
model answers right. The words of each concept fall into two halves. Heads are ranked with one half as keywords, on the
prompts (of all four concepts) whose answers are in these halves, and measured on the prompts of the other halves, so
no ranking has seen an answer or a prompt that it is measured on; then the halves change places.

The outputs of the top heads are turned around (times -1, as in the paper). What counts is the accuracy and the
log-probability of the answers of the concept itself and of the other three, beside as many random heads of the same
layers. Rankings:

    pursuit                the paper's: the share of a head's variance in the span of the keywords
    pursuit, above floor   that share less the mean share of random lists of the same make-up
    logit lens             the mean of the keywords' logits, read from a head's output through the final norm
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any

import numpy as np
import typer

import interp
from experiments.heads.intervals import mean_interval
from experiments.heads.prompts import CONCEPTS, Question, halves, known, questions
from experiments.records import Row, record, show
from interp import heads
from interp.scores import HeadScores

SIZES = (4, 8, 16)
SCALE = -1.0
BATCH = 20
PLAIN = "pursuit"
FLOOR = "pursuit, above floor"
LENS = "logit lens"
UNNORMED = "logit lens, without the final norm"
BY = {PLAIN: "score", FLOOR: "above_floor", LENS: "score", UNNORMED: "score"}
FLIPPED = (PLAIN, FLOOR, LENS)
KNOWN = f"{FLOOR}, answers known"
Pairs = tuple[tuple[int, int], ...]
Cell = tuple[str, str]  # concept, ranking


def rankings(
    lens: interp.Lens, prompts: Sequence[Question], half: int, *, lists: int = 200, seed: int = 0
) -> dict[Cell, HeadScores]:
    """Every ranking for every concept, from prompts and one half of the concepts' words as keywords.

    A prompt stands for itself by the mean over its tokens, as in the paper.
    """
    texts = [q.text for q in prompts]
    moments = heads.head_moments(lens, texts)
    frozen = heads.head_moments(lens, texts, frozen_scale=True)
    found: dict[Cell, HeadScores] = {}
    for concept in CONCEPTS:
        words = halves(lens, concept, seed=seed)[half]
        found[concept, PLAIN] = heads.pursuit(lens, moments, words, random_lists=lists, seed=seed)
        found[concept, FLOOR] = found[concept, PLAIN]
        found[concept, LENS] = heads.logit_lens_ranking(lens, frozen, words, apply_final_norm="full")
        found[concept, UNNORMED] = heads.logit_lens_ranking(lens, moments, words)
    return found


def top(found: dict[Cell, HeadScores], cell: Cell, k: int) -> Pairs:
    """The first `k` heads of a ranking."""
    frame = found[cell].top(k, by=BY[cell[1]])
    return tuple((int(layer), int(head)) for layer, head in zip(frame["layer"], frame["head"], strict=True))


def alike(folds: Sequence[dict[Cell, HeadScores]], k: int = 8) -> list[Row]:
    """How far the first heads depend on the half of the words, and on the concept."""
    rows: list[Row] = []
    for name in BY:
        chosen = [{c: set(top(fold, (c, name), k)) for c in CONCEPTS} for fold in folds]
        same = [len(chosen[0][c] & chosen[1][c]) for c in CONCEPTS]
        other = [len(fold[a] & fold[b]) for fold in chosen for a, b in combinations(CONCEPTS, 2)]
        low = [sum(layer == 0 for layer, _ in one) for fold in chosen for one in fold.values()]
        rows.append(
            {
                "ranking": name,
                f"of {k}: shared by the two halves": float(np.mean(same)),
                "shared by two concepts": round(float(np.mean(other)), 2),
                "in layer 0": float(np.mean(low)),
            }
        )
    return rows


def flipped(
    lens: interp.Lens, measured: Sequence[Question], sets: dict[Any, Pairs], *, controls: int, seed: int = 0
) -> heads.HeadEffects:
    """What turning around each set does to the answers of the prompts."""
    batches = [lens.prepare([q.text for q in measured[i : i + BATCH]]) for i in range(0, len(measured), BATCH)]
    named = {str(key): pairs for key, pairs in sets.items()}
    answers = [q.answer for q in measured]
    return heads.effect_of(lens, batches, named, scale=SCALE, answers=answers, controls=controls, seed=seed)


class Found:
    """Numbers of every prompt with every set turned around.

    Attributes:
        prompts: the prompts that were measured.
        own: for each (ranking, k) the accuracy and the nats lost, with the heads of each concept [2, concept, prompt].
        random: the same with random heads [2, concept, draw, prompt].
    """

    def __init__(self, prompts: Sequence[Question]) -> None:
        self.prompts = list(prompts)
        self.own: dict[tuple[str, int], np.ndarray] = {}
        self.random: dict[tuple[str, int], np.ndarray] = {}
        self._concept = np.array([CONCEPTS.index(q.concept) for q in self.prompts])

    def add(self, key: tuple[str, int], effects: heads.HeadEffects) -> None:
        """The numbers of one ranking and size, or more prompts of it."""
        at = [list(effects.sets).index(str((concept, *key))) for concept in CONCEPTS]
        new = np.stack([effects.after[1, at].numpy(), effects.changes[0, at].numpy()])
        self.own[key] = np.concatenate([self.own[key], new], -1) if key in self.own else new
        if effects.random.shape[2]:
            new = np.stack([effects.random[1, at].numpy(), effects.random_changes[0, at].numpy()])
            self.random[key] = np.concatenate([self.random[key], new], -1) if key in self.random else new

    def on(self, values: np.ndarray, concept: int, measured: int) -> np.ndarray:
        """Numbers [..., prompt] of the prompts of one concept, with the heads of one concept."""
        return values[concept][..., self._concept == measured]

    def mine(self, values: np.ndarray, concept: int | None = None) -> np.ndarray:
        """Those of each concept's prompts with its own heads; of one concept, or of all one after the other."""
        which = range(len(CONCEPTS)) if concept is None else [concept]
        return np.concatenate([self.on(values, c, c) for c in which], -1)

    def others(self, values: np.ndarray, concept: int | None = None) -> np.ndarray:
        """Those of the other concepts' prompts with a concept's heads."""
        which = range(len(CONCEPTS)) if concept is None else [concept]
        pairs = [(c, m) for c in which for m in range(len(CONCEPTS)) if m != c]
        if concept is not None:
            return np.concatenate([self.on(values, c, m) for c, m in pairs], -1)
        # Each prompt counts once: its mean over the heads of the three other concepts.
        rest = [np.mean([self.on(values, c, m) for c in which if c != m], 0) for m in which]
        return np.concatenate(rest, -1)


def overall(found: Found) -> list[Row]:
    """One row for each size and ranking, over all concepts.

    Own: each prompt with the heads of its concept. Others: with those of the other concepts, the mean over them. Their
    difference is taken prompt by prompt.
    """
    rows: list[Row] = []
    for (name, k), (accuracy, nats) in found.own.items():
        row: Row = {"heads": k, "chosen by": name}
        row |= {"accuracy, own": mean_interval(found.mine(accuracy)), "others": mean_interval(found.others(accuracy))}
        drawn = found.random.get((name, k))
        row["random"] = "" if drawn is None else mean_interval(found.mine(drawn[0]))
        row |= {"nats lost, own": mean_interval(found.mine(nats)), "others'": mean_interval(found.others(nats))}
        row["random's"] = "" if drawn is None else mean_interval(found.mine(drawn[1]))
        row["own less others"] = mean_interval(found.mine(nats) - found.others(nats))
        apart = None if drawn is None else found.mine(drawn[1]) - found.others(drawn[1])
        row["random, own less others"] = "" if apart is None else mean_interval(apart)
        rows.append(row)
    return sorted(rows, key=lambda row: row["heads"])


def by_concept(found: Found, k: int) -> list[Row]:
    """One row for each concept and ranking: nats lost on the answers of every concept, and with random heads."""
    rows: list[Row] = []
    for c, concept in enumerate(CONCEPTS):
        for name in FLIPPED:
            nats, random = found.own[name, k][1], found.random[name, k][1]
            row: Row = {"heads of": concept, "chosen by": name}
            row |= {other: mean_interval(found.on(nats, c, m)) for m, other in enumerate(CONCEPTS)}
            row["random, own"] = mean_interval(found.mine(random, c))
            row["random, others"] = mean_interval(found.others(random, c))
            row["accuracy, own"] = mean_interval(found.mine(found.own[name, k][0], c))
            rows.append(row)
    return rows


def measure(
    lens: interp.Lens, chosen: Sequence[Question], *, controls: int, lists: int, seed: int
) -> tuple[Found, list[dict[Cell, HeadScores]]]:
    """Both directions: rank on one half and measure on the other."""
    parts = [[q for q in chosen if q.half == half] for half in (0, 1)]
    parts = [sorted(part, key=lambda q: len(q.text)) for part in parts]
    folds = [rankings(lens, parts[half], half, lists=lists, seed=seed) for half in (0, 1)]
    found = Found([q for half in (0, 1) for q in parts[1 - half]])
    for half in (0, 1):
        test = parts[1 - half]
        for controlled, names, fold in ((controls, FLIPPED, folds[half]), (0, (FLOOR,), folds[1 - half])):
            labels = {name: name if controlled else KNOWN for name in names}
            sets = {(c, labels[n], k): top(fold, (c, n), k) for c in CONCEPTS for n in names for k in SIZES}
            effects = flipped(lens, test, sets, controls=controlled, seed=seed)
            for name in labels.values():
                for k in SIZES:
                    found.add((name, k), effects)
    return found, folds


def asked(
    lens: interp.Lens, every: dict[str, list[Question]], chosen: Sequence[Question], *, seed: int = 0
) -> list[Row]:
    """What became of the prompts and the words of each concept."""
    rows: list[Row] = []
    for concept, some in every.items():
        mine = [q for q in chosen if q.concept == concept]
        row: Row = {"concept": concept, "prompts": len(some), "measured": len(mine)}
        row |= {"answers": len({q.word for q in mine}), "an example": f"{mine[0].text} **{mine[0].word}**"}
        row["keywords"] = " + ".join(str(len(half)) for half in halves(lens, concept, seed=seed))
        rows.append(row)
    return rows


def main(
    each: Annotated[int, typer.Option(help="prompts of each concept and half")] = 13,
    controls: Annotated[int, typer.Option(help="draws of random heads for each set")] = 5,
    lists: Annotated[int, typer.Option(help="random lists of keywords for the floor")] = 200,
    seed: int = 0,
) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    start = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    every = {concept: questions(lens, concept, seed=seed) for concept in CONCEPTS}
    chosen = [q for some in every.values() for q in known(lens, some, each=each)]
    found, folds = measure(lens, chosen, controls=controls, lists=lists, seed=seed)
    tables = {
        "prompts": asked(lens, every, chosen, seed=seed),
        "rankings": alike(folds),
        "all concepts": overall(found),
    }
    tables |= {f"{k} heads": by_concept(found, k) for k in SIZES}
    for name, rows in tables.items():
        show(name, rows)
    settings = {"model": lens.name, "prompts": len(chosen), "scale": SCALE, "controls": controls}
    settings |= {"random lists": lists, "positions": "all", "seed": seed}
    settings["heads of the model"] = len(folds[0][CONCEPTS[0], PLAIN].frame())
    settings["heads"] = {
        f"{concept}, {name}, half {half}": [list(pair) for pair in top(fold, (concept, name), max(SIZES))]
        for half, fold in enumerate(folds)
        for concept in CONCEPTS
        for name in FLIPPED
    }
    settings["minutes"] = round((time.process_time() - start) / 60, 1)
    record("heads", "concepts_text", settings, tables, page="heads")


if __name__ == "__main__":
    typer.run(main)
