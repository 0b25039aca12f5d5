"""(a) The protocol of Abnar and Zuidema: attention against blank-out and gradients, layer by layer.

    python -m experiments.attribution.text [--n 200]

SmolLM2 on generated sentences with subject-verb agreement: how the probability of the right form less that of the
wrong one depends on each token. MiniLM on the same sentences: how the similarity to another sentence does. For each
layer the rank correlation over the tokens of a sentence, between what attention says up to that layer and what the
references say; means over sentences with bootstrap intervals.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

import interp
from experiments.attribution.means import mean_target
from experiments.attribution.sentences import Sentence, sentences
from experiments.attribution.similarity import similarity_lens
from experiments.records import Row, interval, record, show
from interp import attribution
from interp.batch import Batch
from interp.evaluation import agreement
from interp.tokens import TokenScores

SMOLLM2 = (0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
SHOWN = (0, 14, 20, 29)
METHODS = ("raw_attention", "rollout", "flow")


def attention_scores(lens: interp.Lens, batch: Batch, layers: tuple[int, ...], target: Any) -> dict[Any, TokenScores]:
    """Raw attention of each layer, rollout and flow up to it, as they are for the target (the mean over targets)."""
    found: dict[Any, TokenScores] = {}
    for layer in layers:
        found["raw_attention", layer] = attribution.raw_attention(lens, batch, layer=layer, target=target)
        found["rollout", layer] = attribution.rollout(lens, batch, layers=layer, target=target)
        found["flow", layer] = attribution.flow(lens, batch, layers=layer, target=target)
    return found


def references(lens: interp.Lens, batch: Batch, asked: dict[str, Any], measure: Any) -> dict[str, TokenScores]:
    """What a token's loss and its gradient say."""
    return {
        "blank_out": attribution.blank_out(lens, batch, **asked, measure=measure, mode="replace"),
        "blank_out by mask": attribution.blank_out(lens, batch, **asked, measure=measure, mode="mask"),
        "gradient_x_input": attribution.gradient_x_input(lens, batch, **asked, measure=measure),
        "input_gradient": attribution.input_gradient(lens, batch, **asked, measure=measure),
    }


def rows_of(found: dict[Any, TokenScores], other: dict[str, TokenScores], sources: torch.Tensor) -> list[Row]:
    """One row for each layer, a column for each method and reference; and the references among each other."""
    results = {name: agreement(found, one, sources=sources, sizes=True) for name, one in other.items()}
    rows: list[Row] = []
    for layer in sorted({layer for _, layer in found}):
        row: Row = {"layer": layer}
        for method in METHODS:
            for name in other:
                row[f"{method} / {name}"] = interval(results[name], "spearman", f"{method}, layer {layer}")
        rows.append(row)
    return rows


def ceiling(other: dict[str, TokenScores], sources: torch.Tensor) -> list[Row]:
    """How far the references agree among themselves, and what shuffled sources give."""
    rows: list[Row] = []
    names = list(other)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            result = agreement({first: other[first]}, other[second], sources=sources, sizes=True)
            frame = result.summary().iloc[0]
            chance = f"{frame['null_low']:.2f} to {frame['null_high']:.2f}"
            rows.append(
                {"pair": f"{first} / {second}", "spearman": interval(result, "spearman", first), "chance": chance}
            )
    return rows


def subject_first(batch: Batch, drawn: list[Sentence], found: dict[str, TokenScores]) -> list[Row]:
    """How often the subject, which alone decides the verb, has the largest score; the first token left aside."""
    from scipy.stats import binomtest

    marks = [batch[i].find(one.subject)[0, 1:] for i, one in enumerate(drawn)]
    rows: list[Row] = []
    for name, scores in found.items():
        hits = 0
        for i, mark in enumerate(marks):
            hits += int(bool(mark[int(scores.select(i).scores[0, 0, 1:].abs().argmax())]))
        ends = binomtest(hits, len(drawn)).proportion_ci()
        rows.append({"scores": name, "subject first": {"value": hits / len(drawn), "low": ends.low, "high": ends.high}})
    chance = sum(float(mark.float().mean()) for mark in marks) / len(marks)
    return [*rows, {"scores": "chance", "subject first": chance}]


def smollm2(drawn: list[Sentence]) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The tables of SmolLM2, over all tokens and without the first one, where attention rests."""
    lens = interp.load("smollm2-135m", device="cpu")
    batch = lens.prepare([s.text for s in drawn])
    asked = {"answers": [s.answer for s in drawn], "wrong": [s.wrong for s in drawn]}
    other = references(lens, batch, asked, "probability")
    value = torch.tensor(other["blank_out"].settings["value"])[:, 0]
    attracted = torch.tensor([s.attracted for s in drawn])
    found = attention_scores(lens, batch, SMOLLM2, "last")
    named = {f"{method}, layer {layer}": scores for (method, layer), scores in found.items() if layer in SHOWN}
    named |= {"globenc": attribution.globenc(lens, batch), "relevance": attribution.relevance(lens, batch, **asked)}
    every = batch.mask.cpu()
    later = every & (every.long().cumsum(1) > 1)
    about = {
        "right form more likely": round(float((value > 0).float().mean()), 3),
        "with an attractor of the other number": round(float((value[attracted] > 0).float().mean()), 3),
    }
    tables = {
        "smollm2": rows_of(found, other, later),
        "smollm2, first token included": rows_of(found, other, every),
        "smollm2, references": ceiling(other, later),
        "smollm2, subject": subject_first(batch, drawn, {**named, **other}),
    }
    return tables, about


def minilm(drawn: list[Sentence]) -> dict[str, list[Row]]:
    """The tables of MiniLM: attention averaged over all positions, since the embedding is their mean."""
    texts = [s.text for s in drawn]
    lens = similarity_lens(texts)
    batch = lens.prepare(texts)
    other = references(lens, batch, {"answers": [(i + 1) % len(texts) for i in range(len(texts))]}, "logit")
    depth = len(lens.anatomy.towers["text"].layers)
    found = attention_scores(lens, batch, tuple(range(depth)), "all")
    first = mean_target(next(iter(found.values())))
    found = {key: mean_target(scores) for key, scores in found.items()}
    other = {
        name: replace(scores, targets=first.targets, target_tokens=first.target_tokens, target_mask=None)
        for name, scores in other.items()
    }
    special = first.spans.get("special", torch.zeros_like(first.source_mask))
    words = first.source_mask & ~special
    return {"minilm": rows_of(found, other, words), "minilm, references": ceiling(other, words)}


def main(n: Annotated[int, typer.Option(help="how many sentences")] = 200, write: bool = True) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    drawn = sentences(n)
    tables, about = smollm2(drawn)
    tables |= minilm(drawn)
    for name, rows in tables.items():
        show(name, rows)
    print(about)
    if write:
        record("attribution", "text", {"sentences": n, **about}, tables)


if __name__ == "__main__":
    typer.run(main)
