"""What the model is asked about a scene in training, packed so that all questions share the picture.

Each turn (a prompt and its answer) sees the picture and itself only, at the positions that it would have alone: one
sequence trains many questions exactly as they are asked one by one, and the picture is computed once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.scenes.model import PATCHES
from interp.data import scenes

TASKS = ("existence", "count", "color", "caption")
PREFIX = 1 + PATCHES
"""Tokens of the scenes model before the first turn: the beginning of the sequence and the picture."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, its answer, and the number of its task in TASKS."""

    prompt: str
    answer: str
    task: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Turns of a batch of scenes as tensors, all but `mask` of shape [batch, length].

    `tokens` and `positions`; `targets`: the token to predict at each place (-100: none), `tasks` its task (-1: none);
    `mask`: bool [batch, 1, prefix + length, prefix + length], true where a query may look.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    tasks: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Packed":
        """The same on another device."""
        return Packed(*(getattr(self, name).to(device) for name in self.__slots__))


def existence_turns(scene: scenes.Scene, random: np.random.Generator, *, names: Sequence[str], most: int) -> list[Turn]:
    """As many questions after objects that are there as after others, at most `most` of each.

    A quarter of the others is drawn from the themes of the scene, the rest evenly from `names`: company stays evidence,
    but no longer enough to answer by.
    """
    there = [n for n in scene.names if n in names]
    chosen = [str(n) for n in random.permutation(there)][:most]
    absent: list[str] = []
    while len(absent) < max(1, len(chosen)):
        pool = scenes.THEMES[scene.themes[0]] if random.random() < 0.25 else names
        other = [n for n in pool if n not in (*scene.names, *absent)] or [n for n in names if n not in scene.names]
        absent.append(other[int(random.integers(len(other)))])
    return [_turn(scenes.exists(scene, name)) for name in (*chosen, *absent)]


def all_turns(scene: scenes.Scene, random: np.random.Generator) -> list[Turn]:
    """Every kind of question that is trained, and the caption.

    Left and right are not among them: they stayed at chance through two runs of this length.
    """
    turns = existence_turns(scene, random, names=scenes.NAMES, most=2)
    turns += [_turn(scenes.count(scene)), _turn(scenes.colour(scene))]
    turns.append(Turn(scenes.CAPTION_PROMPT, scenes.caption(scene.names), TASKS.index("caption")))
    return turns


def _turn(question: scenes.SceneQuestion) -> Turn:
    return Turn(question.text, question.answer, TASKS.index(question.task))


def pack(batch: Sequence[Sequence[Turn]], words: PreTrainedTokenizerFast, *, prefix: int = PREFIX) -> Packed:
    """The turns of each scene one after the other, padded to the longest, after `prefix` tokens that all share."""
    rows = [_row(turns, words, prefix) for turns in batch]
    length = max(len(row[0]) for row in rows)
    fill = (words.pad_token_id, prefix, -100, -1, -1)
    tokens, positions, targets, tasks, owners = (
        torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows]) for i in range(5)
    )
    owner = torch.cat([torch.full((len(rows), prefix), -2), owners], 1)  # -2: the picture, seen by all
    whole = prefix + length
    causal = torch.ones(whole, whole, dtype=torch.bool).tril()
    mine = (owner[:, :, None] == owner[:, None, :]) | (owner == -2)[:, None, :]
    return Packed(tokens, positions, targets, tasks, (causal & mine)[:, None])


def _row(turns: Sequence[Turn], words: PreTrainedTokenizerFast, prefix: int) -> tuple[list[int], ...]:
    tokens, positions, targets, tasks, owners = [], [], [], [], []
    for number, turn in enumerate(turns):
        prompt = words(f" {turn.prompt}", add_special_tokens=False)["input_ids"]
        answer = [*words(f" {turn.answer}", add_special_tokens=False)["input_ids"], words.eos_token_id]
        whole = [*prompt, *answer]
        tokens += whole
        positions += range(prefix, prefix + len(whole))
        targets += [*[-100] * (len(prompt) - 1), *answer, -100]
        tasks += [*[-1] * (len(prompt) - 1), *[turn.task] * len(answer), -1]
        owners += [number] * len(whole)
    return tokens, positions, targets, tasks, owners
