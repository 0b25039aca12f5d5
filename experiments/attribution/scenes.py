"""(b) Every map on the scenes model, against the exact masks of objects and by deletion curves.

    python -m experiments.attribution.scenes [--n 200]

Two questions to each scene of the test split: the answer to "is there a dog in the image ?" for an object that is there
(yes less no at the last position), and the object's own word in the model's caption, at the position that predicts it.
Maps over the image tokens are scored by pointing, IoU at Otsu's threshold and pixel AUROC against the object's mask,
and by how much faster the answer falls than in random orders when image tokens are taken away (patches become the
picture's mean colour, or are hidden from attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

import interp
from experiments.records import Row, interval, record, show
from interp import attribution
from interp.batch import Batch
from interp.data import scenes
from interp.evaluation import deletion_curve, iou, pointing
from interp.tokens import TokenScores

CURVES = {"mean": "deletion gain, mean colour", "mask": "deletion gain, mask"}
SWEPT = ("layer 1", "layer 3", "layer 4")
"""Layers that are shown for their maps alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is asked of the model, and where the truth lies.

    Attributes:
        batch: prompts with pictures.
        general: the same pictures with the general instruction.
        target: the position that is explained.
        asked: answers and wrong answers.
        masks: the object's pixels.
    """

    batch: Batch
    general: Batch
    target: Any
    asked: dict[str, Any]
    masks: list[np.ndarray]


def questions(lens: interp.Lens, drawn: list[scenes.Scene]) -> Task:
    """Is it there? For the first object of each scene."""
    names = [scene.names[0] for scene in drawn]
    images = [scene.image for scene in drawn]
    batch = lens.prepare([f"<image> {scenes.existence(name)}" for name in names], images=images)
    general = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * len(drawn), images=images)
    asked = {"answers": ["yes"] * len(drawn), "wrong": ["no"] * len(drawn)}
    return Task(batch, general, "last", asked, [s.mask(name) for s, name in zip(drawn, names, strict=True)])


def captions(lens: interp.Lens, drawn: list[scenes.Scene]) -> Task:
    """The first right word of each caption; scenes without one are left out."""
    said = _captions(lens, drawn)
    kept = [(scene, text, word) for scene, (text, word) in zip(drawn, said, strict=True) if word]
    images = [scene.image for scene, _, _ in kept]
    prompts = [f"<image> {scenes.CAPTION_PROMPT}" for _ in kept]
    general = lens.prepare(prompts, images=images)
    # The caption up to the word: its last position is the one that predicts it.
    starts = []
    for prompt, (_, text, word) in zip(prompts, kept, strict=True):
        words = text.split()
        starts.append(" ".join([prompt, *words[: words.index(word)]]))
    batch = lens.prepare(starts, images=images)
    return Task(batch, general, "last", {"answers": [word for _, _, word in kept]}, [s.mask(w) for s, _, w in kept])


def _captions(lens: interp.Lens, drawn: list[scenes.Scene]) -> list[tuple[str, str]]:
    batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * len(drawn), images=[s.image for s in drawn])
    texts = lens.generate(batch, max_new_tokens=48).texts or ()
    return [(t, next((w for w in t.split() if w in s.names), "")) for t, s in zip(texts, drawn, strict=True)]


def methods(lens: interp.Lens, task: Task) -> dict[str, Callable[[], TokenScores]]:
    """Every method, by name."""
    batch, target, asked = task.batch, {"target": task.target}, {"target": task.target, **task.asked}
    answers = {"answers": task.asked["answers"]}
    depth = len(lens.anatomy.towers["text"].layers)
    relative = attribution.relative_attention
    found: dict[str, Callable[[], TokenScores]] = {
        **{
            f"raw_attention, layer {i}": lambda i=i: attribution.raw_attention(lens, batch, layer=i, **target)
            for i in range(depth)
        },
        "rollout": lambda: attribution.rollout(lens, batch, **target),
        "rollout, max over heads": lambda: attribution.rollout(lens, batch, fusion="max", **target),
        "flow": lambda: attribution.flow(lens, batch, **target),
        "globenc": lambda: attribution.globenc(lens, batch, **target),
        "attention_times_gradient, last layer": lambda: attribution.attention_times_gradient(lens, batch, **asked),
        "relevance": lambda: attribution.relevance(lens, batch, **asked),
        "input_gradient": lambda: attribution.input_gradient(lens, batch, **asked),
        "gradient_x_input": lambda: attribution.gradient_x_input(lens, batch, **asked),
        "integrated_gradients": lambda: attribution.integrated_gradients(lens, batch, steps=16, **asked),
        "blank_out by mask": lambda: attribution.blank_out(lens, batch, image="mask", **asked),
        "blank_out, mean colour": lambda: attribution.blank_out(lens, batch, image="mean", **asked),
        "token_activation_map": lambda: attribution.token_activation_map(lens, batch, **target, **answers),
        "token_activation_map, raw": lambda: attribution.token_activation_map(
            lens, batch, **target, **answers, eci=False, filter=False
        ),
        **{
            f"relative_attention, layer {i}": lambda i=i: relative(lens, batch, general=task.general, layer=i, **target)
            for i in range(depth)
        },
        "relative_attention, gradient": lambda: relative(lens, batch, form="gradient", **target, **answers),
        "relative_attention, pixel gradient": lambda: relative(
            lens, batch, general=task.general, form="pixel_gradient", **target, **answers
        ),
    }
    return found


def table(lens: interp.Lens, task: Task, fewer: Task) -> list[Row]:
    """One row for each method; curves, which take a run for each set of patches, on fewer samples."""
    found = {name: make() for name, make in methods(lens, task).items()}
    point, overlap = pointing(found, task.masks), iou(found, task.masks)
    tested = {name: make() for name, make in methods(lens, fewer).items() if not name.endswith(SWEPT)}
    steps = (0, 0.05, 0.1, 0.2, 0.4, 1)
    options: dict[str, Any] = {"sources": "image", "measure": "logit", "fractions": steps, "baseline": 4, **fewer.asked}
    curves = {how: deletion_curve(lens, fewer.batch, tested, image=how, **options) for how in ("mean", "mask")}
    rows: list[Row] = []
    for name in found:
        row: Row = {
            "map": name,
            "pointing": interval(point, "pointing", name),
            "IoU": interval(overlap, "iou", name),
            "AUROC of pixels": interval(overlap, "auroc", name),
        }
        for how, title in CURVES.items():
            row[title] = interval(curves[how], "gain", name) if name in tested else ""
        rows.append(row)
    area = interval(point, "chance", next(iter(found)))
    zero = dict.fromkeys(CURVES.values(), 0.0)
    return [*rows, {"map": "chance", "pointing": area, "IoU": area, "AUROC of pixels": 0.5, **zero}]


def main(n: int = 100, curves: Annotated[int, typer.Option(help="scenes for the deletion curves")] = 40) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    lens = interp.load("scenes", device="cpu")
    drawn = list(scenes.scenes("test", n))
    tables: dict[str, list[Row]] = {}
    sizes = {}
    for title, make in (("scenes, question", questions), ("scenes, caption", captions)):
        task = make(lens, drawn)
        sizes[title] = len(task.batch)
        tables[title] = table(lens, task, make(lens, drawn[:curves]))
        show(title, tables[title])
    record("attribution", "scenes", {"scenes": n, "scenes for curves": curves, "samples": sizes}, tables)


if __name__ == "__main__":
    typer.run(main)
