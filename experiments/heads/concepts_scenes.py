"""(b) Head Pursuit on the scenes model: heads of categories and colours, turned around while it captions.

    python -m experiments.heads.concepts_scenes [--n 80]

Concepts are the five categories of objects (keywords: their objects' names) and the colours. Heads are ranked by their
outputs over the image tokens, as in the paper, on pictures of the validation split; the top of a ranking is turned
around (times -1) while the model captions pictures of the test split and answers what colour the background is.
Captions never name a colour, so colours count as answers to that question.

Counted: words of the concept relative to the unchanged captions, words of the other categories likewise, and, since a
model that says less, or other things, also says less of a concept: how many of the concept's objects that are there are
named (its recall), how many of the others', CHAIR and length. Beside them: as many random heads of the
same layers, the same heads with the size of what each layer's attention adds kept, and the logit lens. The model has
48 heads in all, of which 16 are a third, so 2 and 4 are tried as well.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

import interp
from experiments.records import Row, record, show
from interp import edits, heads
from interp.batch import Batch
from interp.data import scenes
from interp.evaluation import Vocabulary, chair
from interp.evaluation.intervals import draws, ends, rate
from interp.scores import HeadScores

SIZES = (2, 4, 8, 16)
SCALE = -1.0
LONGEST = 20  # tokens; a caption of five objects has 18
RESAMPLES = 1000
COLOUR = "colours"
QUESTION = "what color is the background ?"
CATEGORIES = scenes.CATEGORIES
KEYWORDS: dict[str, tuple[str, ...]] = {
    **{one: tuple(name for name in scenes.NAMES if scenes.CATEGORY[name] == one) for one in CATEGORIES},
    COLOUR: tuple(scenes.COLOURS),
}
PLAIN, FLOOR, LENS = "pursuit", "pursuit, above floor", "logit lens"
KEPT = "pursuit, size kept"
BY = {PLAIN: "score", FLOOR: "above_floor", LENS: "score"}
CONTROLLED = (PLAIN, LENS)
BEFORE = "nothing"
VOCABULARY = Vocabulary.of(scenes.NAMES)
Pairs = list[tuple[int, int]]
Ranked = Mapping[tuple[str, str], HeadScores]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What the model says with some heads changed, counted for each scene.

    Attributes:
        categories: mentions of each category [scene, category].
        recalled: how many of the scene's objects of each category are named [scene, category].
        there: how many there are [scene, category].
        counts: those of `ChairScores`: mentions, hallucinated, objects, recalled, words, ... [scene, 7].
        colour: whether the colour is right [scene].
    """

    categories: np.ndarray
    recalled: np.ndarray
    there: np.ndarray
    counts: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Scenes, as batches for captions and for the colour."""

    drawn: list[scenes.Scene]
    captions: Batch
    colours: Batch

    @classmethod
    def of(cls, lens: interp.Lens, split: scenes.Split, n: int) -> Pictures:
        """The first `n` scenes of a split."""
        drawn = list(scenes.scenes(split, n))
        images = [scene.image for scene in drawn]
        made = [lens.prepare([f"<image> {text}"] * n, images=images) for text in (scenes.CAPTION_PROMPT, QUESTION)]
        return cls(drawn, *made)


def count_names(rows: Sequence[Collection[str]]) -> np.ndarray:
    """How many names of objects of each category there are in each row, with repetition [row, category]."""
    kinds = [[scenes.CATEGORY[name] for name in row] for row in rows]
    return np.array([[row.count(one) for one in CATEGORIES] for row in kinds])


def speak(lens: interp.Lens, pictures: Pictures, changes: Sequence[Any] = (), *, colour: bool = True) -> Said:
    """Captions, and colours where asked for, with edits."""
    texts = lens.generate(pictures.captions, changes, max_new_tokens=LONGEST).texts or ()
    there = {scene.id: scene.names for scene in pictures.drawn}
    scored = chair(dict(zip(there, texts, strict=True)), there, vocabulary=VOCABULARY)
    right = np.full(len(texts), np.nan)
    if colour:
        words = lens.generate(pictures.colours, changes, max_new_tokens=1).texts or ()
        right = np.array([w.strip() == s.colour for w, s in zip(words, pictures.drawn, strict=True)], dtype=float)
    said = [[mention.name for mention in row] for row in scored.mentions]
    both = [set(row) & set(names) for row, names in zip(said, scored.objects, strict=True)]
    return Said(count_names(said), count_names(both), count_names(scored.objects), scored.counts.numpy(), right)


def rankings(
    lens: interp.Lens, pictures: Pictures, *, lists: int = 200, seed: int = 0
) -> dict[tuple[str, str], HeadScores]:
    """Every ranking for every concept, from head outputs over the image tokens of both kinds of prompts."""
    data = [pictures.captions, pictures.colours]
    moments = heads.head_moments(lens, data, positions="image")
    frozen = heads.head_moments(lens, data, positions="image", frozen_scale=True)
    found: dict[tuple[str, str], HeadScores] = {}
    for concept, words in KEYWORDS.items():
        found[concept, PLAIN] = heads.pursuit(lens, moments, words, random_lists=lists, seed=seed)
        found[concept, FLOOR] = found[concept, PLAIN]
        found[concept, LENS] = heads.logit_lens_ranking(lens, frozen, words, apply_final_norm="full")
    return found


def top(scores: HeadScores, name: str, k: int) -> Pairs:
    """The first `k` heads of a ranking."""
    frame = scores.top(k, by=BY[name])
    return [(int(layer), int(head)) for layer, head in zip(frame["layer"], frame["head"], strict=True)]


class Spoken:
    """Everything that was said: without changes, with chosen heads turned around, and with random ones.

    Attributes:
        before: without changes.
        chosen: for each (concept, ranking, k).
        random: for each (concept, ranking, k) one for each draw.
    """

    def __init__(self, lens: interp.Lens, pictures: Pictures, ranked: Ranked, *, controls: int, seed: int) -> None:
        self.before = speak(lens, pictures)
        self.chosen: dict[tuple[str, str, int], Said] = {}
        self.random: dict[tuple[str, str, int], list[Said]] = {}
        memory: dict[Any, Said] = {}  # rankings share many sets of heads

        def turned(pairs: Pairs, keep: bool = False, colour: bool = True) -> Said:
            key = (tuple(sorted(pairs)), keep, colour)
            if key not in memory:
                changes = heads.norm_matched(lens, pairs, SCALE) if keep else edits.scale_heads(pairs, SCALE)
                memory[key] = speak(lens, pictures, changes, colour=colour)
            return memory[key]

        for (concept, name), scores in ranked.items():
            for k in SIZES:
                pairs = top(scores, name, k)
                self.chosen[concept, name, k] = turned(pairs)
                if name == PLAIN:
                    self.chosen[concept, KEPT, k] = turned(pairs, keep=True)
                if name in CONTROLLED:
                    lists = heads.random_heads(pairs, lens, matched="nearest", draws=controls, seed=seed)
                    said = [turned(one, colour=concept == COLOUR) for one in lists]
                    self.random[concept, name, k] = said


class Weights:
    """A bootstrap over scenes: ratios of sums with their intervals."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.draws = np.concatenate(list(draws([np.arange(n)], RESAMPLES, seed)))

    def ratio(self, part: np.ndarray, whole: np.ndarray, *, times: float = 1.0) -> dict[str, float]:
        """The sum of `part` over scenes divided by that of `whole`, both [scene] or summed over [run, scene]."""
        part, whole = (x.reshape(-1, self.draws.shape[1]).sum(0).astype(float) for x in (part, whole))
        value = rate(part.sum(), whole.sum())
        low, high = ends(rate(self.draws @ part, self.draws @ whole), 0.95)
        return {key: round(times * float(x), 3) for key, x in (("value", value), ("low", low), ("high", high))}


def overall(spoken: Spoken, weights: Weights) -> list[Row]:
    """One row for each size and way to choose heads, over the five categories with the heads of each."""
    base = [spoken.before] * len(CATEGORIES)
    rows = [{"heads": 0, "chosen by": BEFORE, **_numbers(base, base, weights, 1)}]
    for k in SIZES:
        for name in (PLAIN, KEPT, FLOOR, LENS):
            said = [spoken.chosen[concept, name, k] for concept in CATEGORIES]
            rows.append({"heads": k, "chosen by": name, **_numbers(said, base, weights, 1)})
        for name in CONTROLLED:
            lists = [spoken.random[concept, name, k] for concept in CATEGORIES]
            said, times = [one for row in lists for one in row], len(lists[0])
            many = [spoken.before] * len(said)
            rows.append({"heads": k, "chosen by": f"random, as {name}", **_numbers(said, many, weights, times)})
    return rows


def _numbers(said: Sequence[Said], base: Sequence[Said], weights: Weights, each: int) -> Row:
    """The numbers of a row; of the runs, `each` in a row belong to a category."""
    own = np.eye(len(CATEGORIES), dtype=int).repeat(each, 0)[:, None]
    after, before = (np.stack([one.categories for one in runs]) for runs in (said, base))
    recalled, there = np.stack([one.recalled for one in said]), np.stack([one.there for one in said])
    counts = np.stack([one.counts for one in said])
    return {
        "own words": weights.ratio((after * own).sum(2), (before * own).sum(2)),
        "other objects": weights.ratio((after * (1 - own)).sum(2), (before * (1 - own)).sum(2)),
        "own recall, %": weights.ratio((recalled * own).sum(2), (there * own).sum(2), times=100),
        "others' recall, %": weights.ratio((recalled * (1 - own)).sum(2), (there * (1 - own)).sum(2), times=100),
        "CHAIR_I, %": weights.ratio(counts[..., 1], counts[..., 0], times=100),
        "CHAIR_S, %": weights.ratio(counts[..., 1] > 0, np.ones(counts.shape[:2]), times=100),
        "length": weights.ratio(counts[..., 4], np.ones(counts.shape[:2])),
    }


def matrix(spoken: Spoken, weights: Weights, k: int) -> list[Row]:
    """Heads of each concept against the recall of each category's objects, and the colours."""
    cases = [("none", BEFORE, spoken.before)]
    cases += [(c, name, spoken.chosen[c, name, k]) for name in (PLAIN, FLOOR, LENS) for c in KEYWORDS]
    rows: list[Row] = []
    for concept, name, said in cases:
        row: Row = {"heads of": concept, "chosen by": name}
        for c, other in enumerate(CATEGORIES):
            row[f"{other}, %"] = weights.ratio(said.recalled[:, c], said.there[:, c], times=100)
        rows.append(row | {"colours right, %": _right([said], weights)})
    return rows


def colours(spoken: Spoken, weights: Weights) -> list[Row]:
    """What the heads of the colours do to answers on the colour, and to captions, which name none."""
    rest = "colours right with the categories' heads, %"
    cases: list[tuple[int, str, list[Said], list[Said]]] = [(0, BEFORE, [spoken.before], [])]
    for k in SIZES:
        for name in (PLAIN, KEPT, FLOOR, LENS):
            others = [spoken.chosen[concept, name, k] for concept in CATEGORIES]
            cases.append((k, name, [spoken.chosen[COLOUR, name, k]], others))
        cases += [(k, f"random, as {name}", spoken.random[COLOUR, name, k], []) for name in CONTROLLED]
    rows: list[Row] = []
    for k, name, said, others in cases:
        counts = np.stack([one.counts for one in said])
        row: Row = {"heads": k, "chosen by": name, "colours right, %": _right(said, weights)}
        row["recall of captions, %"] = weights.ratio(counts[..., 3], counts[..., 2], times=100)
        rows.append(row | {rest: _right(others, weights) if others else ""})
    return rows


def _right(said: Sequence[Said], weights: Weights) -> dict[str, float]:
    """How often the colour is right."""
    right = np.stack([one.colour for one in said])
    return weights.ratio(right, np.ones_like(right), times=100)


def shared(ranked: Ranked, k: int = 8) -> list[Row]:
    """How many of the first `k` heads the rankings of two categories share, and the one of the colours with them."""
    rows: list[Row] = []
    for name in BY:
        sets = {concept: set(top(ranked[concept, name], name, k)) for concept in KEYWORDS}
        pairs = [len(sets[a] & sets[b]) for i, a in enumerate(CATEGORIES) for b in CATEGORIES[i + 1 :]]
        away = [len(sets[a] & sets[COLOUR]) for a in CATEGORIES]
        total = ranked[COLOUR, name].frame().shape[0]
        rows.append(
            {
                "ranking": name,
                f"of {k}: shared by two categories": round(float(np.mean(pairs)), 2),
                "shared by a category and the colours": round(float(np.mean(away)), 2),
                "by chance": round(k * k / total, 2),
            }
        )
    return rows


def main(
    n: Annotated[int, typer.Option(help="scenes to caption")] = 80,
    ranked_on: Annotated[int, typer.Option(help="scenes of the validation split to rank heads on")] = 100,
    controls: Annotated[int, typer.Option(help="draws of random heads for each set")] = 5,
    lists: Annotated[int, typer.Option(help="random lists of keywords for the floor")] = 200,
    seed: int = 0,
) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    start = time.process_time()
    lens = interp.load("scenes", device="cpu")
    ranked = rankings(lens, Pictures.of(lens, "validation", ranked_on), lists=lists, seed=seed)
    spoken = Spoken(lens, Pictures.of(lens, "test", n), ranked, controls=controls, seed=seed)
    weights = Weights(n, seed)
    tables = {"rankings": shared(ranked), "categories": overall(spoken, weights), "colours": colours(spoken, weights)}
    tables |= {f"{k} heads": matrix(spoken, weights, k) for k in (4, 8)}
    for name, rows in tables.items():
        show(name, rows)
    settings = {"model": lens.name, "scenes": n, "split": "test", "scenes to rank on": ranked_on, "scale": SCALE}
    settings |= {"controls": controls, "random lists": lists, "positions": "image", "seed": seed}
    settings["heads of the model"] = len(ranked[COLOUR, PLAIN].frame())
    settings["heads"] = {
        f"{concept}, {name}": [list(pair) for pair in top(scores, name, max(SIZES))]
        for (concept, name), scores in ranked.items()
    }
    settings["minutes"] = round((time.process_time() - start) / 60, 1)
    record("heads", "concepts_scenes", settings, tables, page="heads")


if __name__ == "__main__":
    typer.run(main)
