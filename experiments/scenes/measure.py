"""Measure the scenes model on held-out scenes, and write its model card.

    python -m experiments.scenes.measure runs/scenes/model              # print
    python -m experiments.scenes.measure scenes --card interp/models/scenes

Greedy decoding throughout. Numbers come with 95 % bootstrap intervals over scenes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import interp
from interp import evaluation
from interp.data import scenes
from interp.files import write_json, write_text

BATCH = 50
POPE_SPLITS: tuple[Any, ...] = ("random", "popular", "adversarial")


def measure(lens: interp.Lens, *, n: int, split: scenes.Split = "test") -> list[dict[str, Any]]:
    """The model's quality on the first `n` scenes of a split: rows of metric, value, low, high."""
    drawn = list(scenes.scenes(split, n))
    images, objects = {s.id: s.image for s in drawn}, {s.id: s.names for s in drawn}
    captions = evaluation.caption_images(
        lens, images, prompt=scenes.CAPTION_PROMPT, max_new_tokens=48, batch_size=BATCH
    )
    scored = evaluation.chair(captions, objects, vocabulary=evaluation.Vocabulary.of(scenes.NAMES))
    rows = _rows(scored, "caption", ("chair_i", "chair_s", "recall", "length", "repetition"))
    for kind in POPE_SPLITS:
        questions = evaluation.pope_questions(objects, split=kind, classes=scenes.NAMES, template=scenes.TEMPLATE)
        answers = evaluation.answer_questions(lens, questions, images, max_new_tokens=2, batch_size=BATCH)
        probability = answers.yes_probability
        result = evaluation.pope(answers.texts, questions, yes_probability=probability)
        rows += _rows(result, f"POPE {kind}", ("accuracy", "precision", "recall", "f1", "yes_ratio", "auroc"))
    rows += _rows(_pairs(lens, drawn, images), "MME-style existence", ("score",))
    for name, ask in (("count", scenes.count), ("color", scenes.colour)):
        rows.append(_open(lens, drawn, images, name, ask))
    return rows


def _pairs(lens: interp.Lens, drawn: Sequence[scenes.Scene], images: dict[str, Any]) -> evaluation.MmeScores:
    """MME-style pairs: in each scene that lacks a partner, the object that is there and the partner that is not."""
    questions = []
    for scene in drawn:
        lonely = [name for name in scene.names if scenes.PARTNER.get(name, name) not in scene.names]
        for name in (lonely[0], scenes.PARTNER[lonely[0]]) if lonely else ():
            one = scenes.exists(scene, name)
            answer: Any = one.answer
            questions.append(evaluation.Question(f"{scene.id}-{name}", scene.id, one.text, answer, one.task, name))
    answers = evaluation.answer_questions(lens, questions, images, max_new_tokens=2, batch_size=BATCH)
    return evaluation.mme(answers.texts, questions)


def _open(
    lens: interp.Lens,
    drawn: Sequence[scenes.Scene],
    images: dict[str, Any],
    name: str,
    ask: Callable[[scenes.Scene], scenes.SceneQuestion],
) -> dict[str, Any]:
    """The share of right one-word answers, with its Wilson interval (one question a scene: no clusters)."""
    from scipy.stats import binomtest

    asked = {scene.id: ask(scene) for scene in drawn}
    (text,) = {question.text for question in asked.values()}
    found = evaluation.caption_images(lens, images, prompt=text, max_new_tokens=2, batch_size=BATCH)
    right = sum(found[key].split()[:1] == [question.answer] for key, question in asked.items())
    interval = binomtest(right, len(asked)).proportion_ci(method="wilson")
    return {"metric": f"{name} accuracy", "value": right / len(asked), "low": interval.low, "high": interval.high}


def _rows(scored: evaluation.Measured, title: str, metrics: tuple[str, ...]) -> list[dict[str, Any]]:
    frame = scored.summary()
    several = frame["part"].nunique() > 1
    return [
        {
            "metric": f"{title} {row['metric']}" + (f" ({row['part']})" if several else ""),
            **{key: round(float(row[key]), 4) for key in ("value", "low", "high")},
        }
        for row in frame.to_dict("records")
        if row["metric"] in metrics and (row["part"] != "all" or not several)
    ]


def card(rows: list[dict[str, Any]], n: int) -> str:
    """The model card as markdown."""
    table = "\n".join(f"| {r['metric']} | {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} |" for r in rows)
    return (
        Path(__file__)
        .with_name("card.md")
        .read_text(encoding="utf-8")
        .format(
            n=n,
            table=table,
            objects=len(scenes.NAMES),
            side=scenes.SIDE,
            low=scenes.SIZES[0],
            high=scenes.SIZES[1],
            colours=len(scenes.COLOURS),
        )
    )


def main(
    model: Annotated[str, typer.Argument(help="a packaged model or a folder")] = "scenes",
    n: int = 1000,
    split: str = "test",
    folder: Annotated[Path | None, typer.Option("--card", help="write README.md and quality.json here")] = None,
) -> None:
    """Print the quality of a scenes model, and write its card."""
    rows = measure(interp.load(model), n=n, split=split)  # pyright: ignore[reportArgumentType]
    for row in rows:
        print(f"{row['metric']:32} {row['value']:.3f}  {row['low']:.3f} to {row['high']:.3f}")
    if folder is not None:
        write_json(folder / "quality.json", {"split": split, "n": n, "numbers": rows})
        write_text(folder / "README.md", card(rows, n))


if __name__ == "__main__":
    typer.run(main)
