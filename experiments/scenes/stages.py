"""The three stages of training: what a step computes, on which scenes, at which rate.

1. vision: the tower alone learns the object class of every patch. Then it is frozen.
2. match: the text model learns "is there a ...?", on the objects of two themes first, of more as it masters them.
   Learned together with captions from the start, these questions stay on the prior of the language for long.
3. all: every kind of question and captions together, each task's loss averaged by itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from experiments.scenes.model import PATCHES
from experiments.scenes.pool import NOTHING, Pool, to_input
from experiments.scenes.texts import TASKS, Packed, Turn, all_turns, existence_turns, pack
from interp.data import scenes

GRID = math.isqrt(PATCHES)
"""Patches in a row, and in a column, of a picture."""

WIDENINGS = (2, 4, 8)
"""How many themes the match stage works on, one after the other."""

MASTERED = 0.85
"""The share of right answers (running mean) at which the match stage goes on to more themes, and at last ends."""


WEIGHTS = {"caption": 2.0}
"""Weights of the tasks' mean losses in their sum; 1 where not given."""


class Parts(nn.Module):
    """The model, and what only the vision stage needs: heads for a patch's class, and for its row and column."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.head = nn.Linear(width, NOTHING + 1)
        self.place = nn.Linear(width, 2 * GRID)


@dataclass
class Course:
    """What all steps share, and what changes as training goes on (`state`, kept in the checkpoint)."""

    parts: Parts
    words: PreTrainedTokenizerFast
    pool: Pool
    seed: int
    device: torch.device
    features: Tensor | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"stage": 0, "step": 0, "widening": 0, "right": 0.5})


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its steps, scenes a step, peak rate, whether the rate falls to zero (else constant), and its step."""

    name: str
    steps: int
    batch: int
    rate: float
    falls: bool
    step: "Callable[[Course, Stage, np.random.Generator], dict[str, Tensor]]"
    parameters: Callable[[Parts], list[nn.Parameter]]
    warmup: int = 60

    def is_done(self, course: Course) -> bool:
        """Whether all steps are made, or the match stage has mastered all themes."""
        return course.state["step"] >= self.steps or (
            self.name == "match" and course.state["widening"] == len(WIDENINGS)
        )

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if not self.falls:
            return self.rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def vision_step(course: Course, stage: Stage, random: np.random.Generator) -> dict[str, Tensor]:
    """The loss of the patches' classes, and of their places, which questions about sides need.

    Half of the pictures are mirrored, for a larger variety.
    """
    chosen = torch.from_numpy(random.integers(len(course.pool.scenes), size=stage.batch))
    pixels, classes = course.pool.pixels[chosen], course.pool.classes[chosen]
    mirrored = torch.from_numpy(random.random(stage.batch) < 0.5)
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
    classes = torch.where(mirrored[:, None], classes.unflatten(1, (GRID, GRID)).flip(2).flatten(1), classes)
    patches = see(course.parts.model, pixels.to(course.device))
    guesses, truth = course.parts.head(patches).flatten(0, 1), classes.flatten().to(course.device)
    weight = torch.ones(NOTHING + 1, device=course.device)
    weight[NOTHING] = 0.3
    places = course.parts.place(patches).flatten(0, 1)
    number = torch.arange(GRID * GRID, device=course.device).repeat(stage.batch)
    lost = cross_entropy(places[:, :GRID], number // GRID) + cross_entropy(places[:, GRID:], number % GRID)
    objects = truth != NOTHING
    return {
        "loss": cross_entropy(guesses, truth, weight=weight) + 0.2 * lost,
        "places": lost,
        "patches": (guesses.argmax(-1) == truth)[objects].float().mean(),
    }


def match_step(course: Course, stage: Stage, random: np.random.Generator) -> dict[str, Tensor]:
    """The loss of yes and no, on scenes of the themes that are open; opens more when these are mastered."""
    themes = list(scenes.THEMES)[: WIDENINGS[course.state["widening"]]]
    names = [name for theme in themes for name in scenes.THEMES[theme]]
    chosen = []
    while len(chosen) < stage.batch:
        index = int(random.integers(len(course.pool.scenes)))
        if course.pool.scenes[index].themes[0] in themes:
            chosen.append(index)
    turns = [existence_turns(course.pool.scenes[i], random, names=names, most=4) for i in chosen]
    result = text_losses(course, chosen, turns)
    right = 0.97 * course.state["right"] + 0.03 * float(result["existence_right"])
    course.state["right"] = right
    if right > MASTERED:
        course.state |= {"widening": course.state["widening"] + 1, "right": 0.5}
    return {**result, "themes": torch.tensor(float(len(themes)))}


def all_step(course: Course, stage: Stage, random: np.random.Generator) -> dict[str, Tensor]:
    """The loss of every task, summed: each is a mean over its own tokens, so that rare tasks count as much."""
    chosen = random.integers(len(course.pool.scenes), size=stage.batch).tolist()
    return text_losses(course, chosen, [all_turns(course.pool.scenes[i], random) for i in chosen])


def text_losses(course: Course, chosen: list[int], turns: list[list[Turn]]) -> dict[str, Tensor]:
    """The summed loss, and for each task its loss and the share of answer tokens that are right."""
    packed = pack(turns, course.words).to(course.device)
    model, seen = course.parts.model, features(course)[chosen].to(course.device).float()
    begin = torch.full((len(seen), 1), course.words.bos_token_id, device=course.device)
    prefix = torch.cat([model.get_input_embeddings()(begin), model.model.multi_modal_projector(seen)], 1)
    return task_losses(answer_logits(model, prefix, packed), packed, course.words.eos_token_id)


def task_losses(logits: Tensor, packed: Packed, end: int) -> dict[str, Tensor]:
    """Each task's mean loss and share of right answer tokens, and the weighted sum of the losses."""
    result: dict[str, Tensor] = {}
    places = packed.targets >= 0
    truth, tasks = packed.targets[places], packed.tasks[places]
    for number, task in enumerate(TASKS):
        mine = tasks == number
        if mine.any():
            result[task] = cross_entropy(logits[mine], truth[mine])
            # The end of the sequence follows every answer: counting it would flatter.
            answers = mine & (truth != end)
            result[f"{task}_right"] = (logits[answers].argmax(-1) == truth[answers]).float().mean()
    weighted = [result[task] * WEIGHTS.get(task, 1.0) for task in TASKS if task in result]
    return {"loss": torch.stack(weighted).sum(), **result}


def answer_logits(model: LlavaForConditionalGeneration, prefix: Tensor, packed: Packed) -> Tensor:
    """Logits [answer tokens, words] at the places of `packed.targets`, after the prefix's embeddings [batch, n, d]."""
    inputs = torch.cat([prefix, model.get_input_embeddings()(packed.tokens)], 1)
    positions = torch.arange(prefix.shape[1], device=prefix.device).expand(len(prefix), -1)
    mask = torch.zeros(packed.mask.shape, device=inputs.device, dtype=inputs.dtype)
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=mask.masked_fill(~packed.mask, torch.finfo(inputs.dtype).min),
        position_ids=torch.cat([positions, packed.positions], 1),
    ).last_hidden_state
    return model.lm_head(hidden[:, prefix.shape[1] :][packed.targets >= 0])


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector is given: the tower's patches [batch, patches, d] for pixels uint8 [batch, h, w, 3]."""
    return model.model.vision_tower(to_input(pixels)).last_hidden_state[:, 1:]


def features(course: Course) -> Tensor:
    """The features of the whole pool, float16 [n, patches, d], computed once: the tower is frozen by now."""
    if course.features is None:
        with torch.inference_mode():
            parts = [see(course.parts.model, p.to(course.device)).half().cpu() for p in course.pool.pixels.split(128)]
        course.features = torch.cat(parts).clone()
    return course.features


def _vision_parameters(parts: Parts) -> list[nn.Parameter]:
    return [*parts.model.model.vision_tower.parameters(), *parts.head.parameters(), *parts.place.parameters()]


def _text_parameters(parts: Parts) -> list[nn.Parameter]:
    inner = parts.model.model
    return [
        *inner.multi_modal_projector.parameters(),
        *inner.language_model.parameters(),
        *parts.model.lm_head.parameters(),
    ]


STAGES = (
    Stage("vision", 1400, 64, 1.5e-3, True, vision_step, _vision_parameters),
    Stage("match", 1200, 32, 5e-4, False, match_step, _text_parameters),
    Stage("all", 1500, 32, 1e-3, True, all_step, _text_parameters),
)
