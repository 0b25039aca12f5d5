"""What acts on the model in a run of `interp evaluate`: an intervention of `interp.steering`, made for each batch.

A run that was cut off is taken up with other batches, so nothing here may depend on who shares a batch: sink dimensions
are found once, on the first images of the data, and random heads are drawn for each image or question by its id.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import typer

from interp.cli.evaluation.settings import EvaluateSettings
from interp.evaluation import Question, image_prompt
from interp.evaluation.answering import checked_image
from interp.steering import attention_redistribution, sink_dimensions, vision_heads

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.edits import Edit
    from interp.lens import Lens

Maker = Callable[[Sequence[str]], "Callable[[Batch], list[Edit]]"]
PROBED = 8  # images on which sink dimensions are found


def intervention(lens: "Lens", settings: EvaluateSettings, probe: "Callable[[], Batch]") -> Maker | None:
    """What makes the edits of a batch, from the ids of its images or questions; None where nothing is done.

    Args:
        lens: the model.
        settings: of the run.
        probe: the first prompts of the data, for the sink dimensions.

    Raises:
        InterpError: the model cannot be changed in this way.
    """
    if settings.intervention is None:
        return None
    strength = settings.force
    if settings.intervention == "vhr":
        return lambda ids: lambda batch: _reinforced(lens, batch, ids, settings)
    found = sink_dimensions(lens, probe())
    if not found:
        typer.echo(f"var: {lens.name} has no sink dimensions at the published threshold, so that nothing is changed.")
    return lambda ids: lambda batch: attention_redistribution(lens, batch, dimensions=found, p=1 - strength)


def first_prompts(lens: "Lens", prompt: str, images: Any, asked: Sequence[Question], chat: bool | None) -> "Batch":
    """The first prompts of the data: of its questions, or the one for captions."""
    rows = [(prompt.replace("{question}", q.text), q.image) for q in asked[:PROBED]]
    rows = rows or [(prompt, one) for one in list(images)[:PROBED]]
    texts = [image_prompt(lens, text, chat=chat) for text, _ in rows]
    return lens.prepare(texts, [checked_image(lens, images[one], one) for _, one in rows], padding_side="left")


def _reinforced(lens: "Lens", batch: "Batch", ids: Sequence[str], settings: EvaluateSettings) -> "list[Edit]":
    chosen = vision_heads(lens, batch, scale=settings.force)
    if settings.control == "random":
        alone = [replace(chosen, chosen=chosen.chosen[i : i + 1]) for i in range(len(ids))]
        drawn = [one.shuffled(lens, _seed(settings.seed, name)) for one, name in zip(alone, ids, strict=True)]
        chosen = replace(chosen, chosen=torch.cat([one.chosen for one in drawn]))
    return chosen.edits(settings.force)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
