"""(a) Does a low T-VHD tell hallucinated object words from right ones, on the scenes model?

    python -m experiments.heads.detector [--n 1000]

Captions of scenes of the test split, greedy and sampled. Each mention of an object is right or hallucinated by the
scene's exact labels. T-VHD of the word (its token: object names are single tokens here) stands beside what costs
nothing: the token's probability, the entropy at the position that predicts it, the attention that this position pays
to the image, and the word's place among the object words of its caption.

AUROC is the chance that a hallucinated word looks more suspicious than a right one; suspicious is a low T-VHD,
probability and image attention, a high entropy, a late place. Intervals draw captions, not words. Hallucination and
T-VHD both change along a caption, so the same number is also computed among words of the same place, of the same place
in captions with equally many object words, among words of the same tenth of probability, and without the words that
their caption has named before (which count as right here, being in the picture).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

import interp
from experiments.records import Row, record, show
from interp.attribution.continued import continued
from interp.data import scenes
from interp.evaluation import Vocabulary
from interp.evaluation.intervals import auroc, draws, ends, rate
from interp.heads import token_divergence

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Any

BATCH = 50
RESAMPLES = 1000
TVHD: dict[str, dict[str, Any]] = {
    "T-VHD, absolute (the paper's)": {},
    "T-VHD, relative": {"form": "relative"},
    "T-VHD, cosine": {"form": "cosine"},
    "T-VHD, absolute, one head a layer": {"k": 1},
    "T-VHD, absolute, all heads": {"k": 8},
}
SUSPICIOUS_IF_HIGH = ("entropy", "place in the caption")
BARE = ("token probability", "entropy", "image attention", "place in the caption")
WITHIN = {
    "same place": ["place in the caption"],
    "same place, same number of words": ["place in the caption", "words in the caption"],
    "same tenth of probability": ["tenth of probability"],
}


def object_words(
    lens: interp.Lens, drawn: list[scenes.Scene], *, temperature: float | None = None, seed: int = 0
) -> pd.DataFrame:
    """One row for each mention of an object in the model's captions.

    Args:
        lens: the scenes model.
        drawn: scenes to caption.
        temperature: for sampled captions; None for greedy ones.
        seed: of the sampling.

    Returns:
        A frame with `caption` (its number), `word`, `wrong` (it is not in the scene), `repeated` (the caption named it
        before), and a column for each detector.
    """
    import pandas

    vocabulary = Vocabulary.of(scenes.NAMES)
    how: dict[str, Any] = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    rows: list[Row] = []
    for first in range(0, len(drawn), BATCH):
        some = drawn[first : first + BATCH]
        batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * len(some), images=[s.image for s in some])
        made = lens.generate(batch, max_new_tokens=48, **(how and {**how, "seed": seed + first}))
        scores = {name: token_divergence(lens, batch, made.tokens, **options) for name, options in TVHD.items()}
        bare = _bare(lens, batch, made.tokens)
        answers = next(iter(scores.values()))
        tokens = answers.words().set_index(["prompt", "start"])["token"]
        for i, scene in enumerate(some):
            said: list[str] = []
            mentions = vocabulary.mentions(answers.texts[i])
            for place, mention in enumerate(mentions, 1):
                at = i, int(tokens[i, mention.start])
                row: Row = {"caption": first + i, "word": mention.name, "wrong": mention.name not in scene.names}
                row |= {"repeated": mention.name in said, "words in the caption": len(mentions)}
                row |= {name: float(one.scores[at]) for name, one in scores.items()}
                rows.append(row | {name: float(one[at]) for name, one in bare.items()} | {BARE[-1]: place})
                said.append(mention.name)
    frame = pandas.DataFrame(rows)
    frame["tenth of probability"] = frame["token probability"].rank(pct=True, method="max").mul(10).apply(np.ceil)
    return frame


def _bare(lens: interp.Lens, batch: interp.Batch, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a single pass gives for each token of an answer [batch, token]."""
    whole, predicts = continued(lens, batch, tokens)
    pattern = interp.Read("pattern", positions=predicts, reduce="head_mean")
    trace = lens.run(whole, ["logits", pattern])
    chosen = whole.select(predicts)
    logs = trace.logits.log_softmax(-1)
    logs = logs.gather(1, chosen.index[:, :, None].expand(-1, -1, logs.shape[-1]))
    ids = whole.inputs["input_ids"].gather(1, (chosen.index + 1).clamp(max=whole.mask.shape[1] - 1))
    image = whole.span("image").float()
    mass = torch.stack([v @ image[:, :, None] for (read, _), v in trace.values.items() if read == pattern]).mean(0)
    found = (logs.gather(2, ids[:, :, None])[..., 0].exp(), -(logs.exp() * logs).sum(-1), mass[..., 0])
    return dict(zip(BARE, found, strict=False))


def within(score: np.ndarray, wrong: np.ndarray, strata: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """AUROC over the pairs of a wrong and a right word of the same stratum.

    Args:
        score: how suspicious each word is [word].
        wrong: bool [word].
        strata: the number of each word's stratum [word].
        weights: how often each word counts [draw, word].

    Returns:
        The values [draw], 0.5 where there is no pair, and the mean number of pairs.
    """
    good, total = np.zeros(len(weights)), np.zeros(len(weights))
    for one in np.unique(strata):
        here = strata == one
        value, pairs = auroc(score[here], wrong[here], weights[:, here])
        good, total = good + value * pairs, total + pairs
    return rate(good, total, 0.5), float(total.mean())


def table(words: pd.DataFrame, *, seed: int = 0) -> list[Row]:
    """One row for each detector, a column for each set of pairs; and how many pairs there are."""
    wrong, first = words["wrong"].to_numpy(), ~words["repeated"].to_numpy()
    captions, owner = np.unique(words["caption"], return_inverse=True)
    drawn = np.concatenate(list(draws([np.arange(len(captions))], RESAMPLES, seed)))[:, owner]
    once, alike = np.ones((1, len(words))), np.zeros(len(words))
    kinds: dict[str, tuple[np.ndarray, np.ndarray | bool]] = {
        "all words": (alike, True),
        "first mentions": (alike, first),
    }
    kinds |= {title: (words.groupby(keys).ngroup().to_numpy(), True) for title, keys in WITHIN.items()}
    rows: list[Row] = []
    for name in (*TVHD, *BARE):
        score = words[name].to_numpy(dtype=float) * (1 if name in SUSPICIOUS_IF_HIGH else -1)
        row: Row = {"detector": name}
        for title, (strata, keep) in kinds.items():
            low, high = ends(within(score, wrong, strata, drawn * keep)[0], 0.95)
            found = {"value": within(score, wrong, strata, once * keep)[0][0], "low": low, "high": high}
            row[title] = {key: round(float(number), 3) for key, number in found.items()}
        rows.append(row)
    pairs = {title: int(within(alike, wrong, strata, once * keep)[1]) for title, (strata, keep) in kinds.items()}
    return [*rows, {"detector": "pairs of words", **pairs}]


def places(words: pd.DataFrame) -> list[Row]:
    """What changes along a caption: by place, how many words, the share that is wrong, and the mean T-VHD of both."""
    rows: list[Row] = []
    name = next(iter(TVHD))
    for place, some in words.groupby(BARE[-1]):
        row: Row = {"place": int(place), "words": len(some), "wrong": int(some["wrong"].sum())}  # type: ignore[arg-type]
        row["share wrong"] = round(float(some["wrong"].mean()), 3)
        for title, kind in (("right", False), ("wrong", True)):
            those = some[some["wrong"] == kind]
            row[f"mean T-VHD, {title}"] = round(float(those[name].mean()), 2) if len(those) else ""
            row[f"mean probability, {title}"] = round(float(those[BARE[0]].mean()), 3) if len(those) else ""
        rows.append(row)
    return rows


def main(
    n: Annotated[int, typer.Option(help="how many scenes")] = 1000,
    temperature: Annotated[float, typer.Option(help="of the sampled captions")] = 1.0,
    seed: int = 0,
) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    start = time.process_time()
    lens = interp.load("scenes", device="cpu")
    drawn = list(scenes.scenes("test", n))
    tables: dict[str, list[Row]] = {}
    counts: list[Row] = []
    for how, degree in (("greedy", None), ("sampled", temperature)):
        words = object_words(lens, drawn, temperature=degree, seed=seed)
        bad = words[words["wrong"]]
        row: Row = {"captions": how, "scenes": n, "object words": len(words), "hallucinated": len(bad)}
        row |= {"captions with one": int(bad["caption"].nunique()), "named twice": int(words["repeated"].sum())}
        counts.append(row)
        tables[how] = table(words, seed=seed)
        tables[f"{how}, by place"] = places(words)
    tables = {"counts": counts, **tables}
    for name, rows in tables.items():
        show(name, rows)
    settings = {"model": lens.name, "scenes": n, "split": "test", "temperature": temperature, "resamples": RESAMPLES}
    settings |= {"without": "drop", "seed": seed, "minutes": round((time.process_time() - start) / 60, 1)}
    record("heads", "detector", settings, tables, page="heads")


if __name__ == "__main__":
    typer.run(main)
