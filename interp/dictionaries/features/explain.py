"""Explanations of latents by a chat model.

Source: Bills et al. 2023, "Language models can explain neurons in language models"; Paulo et al. 2024, "Automatically
Interpreting Millions of Features" (arXiv 2410.13928), whose form of examples this follows: windows of text in which the
tokens that activate the latent are marked, with their strengths beside. The prompts are our own, and short.

What it is worth: an explanation is a guess from a few windows. Score it (`detection_score`, `fuzzing_score`) against
windows that it was not made from, beside explanations of other latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from interp.dictionaries.features.chat import Chat
from interp.dictionaries.features.common import Latents
from interp.dictionaries.features.contexts import Example, FeatureContexts
from interp.errors import InputError, SettingsError, UnsupportedError

LEFT, RIGHT = "<<", ">>"
_TASK = (
    "A detector inside a neural network reacts to some tokens of a text and to no others. You are given passages in "
    f"which the tokens that it reacts to stand between {LEFT} and {RIGHT}. Below each passage these tokens are listed "
    "with the strength of the reaction, from 1 to 10. Find what they have in common: a word, a kind of word, a subject "
    "or a place in a sentence. Answer with one line of at most twenty words that would let somebody else find such "
    "tokens in new passages. Do not mention the passages or the detector."
)


def explain(
    contexts: FeatureContexts, chat: Chat, *, latents: Latents | None = None, examples: int = 10, threshold: float = 0.3
) -> dict[int, str]:
    """What latents react to, in the words of a chat model that sees their strongest windows.

    Args:
        contexts: from `top_contexts`, of texts.
        chat: any callable from messages to text.
        latents: which; None for all. Latents that are never active are left out.
        examples: windows that it sees, from the group `top`.
        threshold: tokens are marked that have at least this share of the window's largest activation.

    Returns:
        One line for each latent.

    Raises:
        SettingsError: examples or threshold is out of range.
        UnsupportedError: a latent is active at image tokens, which a text cannot show.
        InputError: the chat model answered nothing.
    """
    if examples < 1 or not 0 < threshold <= 1:
        raise SettingsError(f"examples is at least 1 and threshold above 0 and at most 1: {examples}, {threshold}.")
    found: dict[int, str] = {}
    for latent in listed(contexts, latents):
        shown = contexts.examples(latent)[:examples]
        if not shown:
            continue
        largest = max(np.abs(e.activations).max() for e in shown)
        passages = [_passage(n, e, threshold, largest) for n, e in enumerate(shown, 1)]
        messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": "\n\n".join(passages)}]
        lines = [line.strip() for line in chat(messages).splitlines() if line.strip()]
        if not lines:
            raise InputError(f"the chat model gave no explanation of latent {latent}.")
        found[latent] = lines[0]
    return found


def listed(contexts: FeatureContexts, latents: Latents | None) -> list[int]:
    """Latents by number; None for all of the contexts."""
    if latents is None:
        return contexts.latents.tolist()
    return [latents] if isinstance(latents, int) else [int(n) for n in latents]


def _passage(n: int, example: Example, threshold: float, largest: float) -> str:
    marks = active(example, threshold)
    at = np.flatnonzero(marks)
    strengths = np.ceil(10 * np.abs(example.activations[at]) / largest).astype(int).clip(1, 10)
    tokens = ", ".join(f"{example.tokens[i]!r} {s}" for i, s in zip(at, strengths, strict=True))
    return f"{n}. {marked(example, marks)}\n   reactions: {tokens}"


def active(example: Example, threshold: float) -> np.ndarray:
    """Which tokens have at least a share of the window's largest activation.

    Raises:
        UnsupportedError: one of them is an image token.
    """
    size = np.abs(example.activations)
    found = (size > 0) & (size >= threshold * size.max())
    if any(example.kinds[i] == "image" for i in np.flatnonzero(found)):
        raise UnsupportedError(
            f"latent {example.latent} is active at image tokens, which text cannot show to a chat model: look at its "
            "pictures, or search with tokens='text'."
        )
    return found


def marked(example: Example, marks: Sequence[bool] | np.ndarray) -> str:
    """The window's text with tokens between marks, those that stand together as one stretch."""
    out: list[str] = []
    for i, (token, kind) in enumerate(zip(example.tokens, example.kinds, strict=True)):
        piece = token if kind != "image" else "[image]"
        if kind == "image" and i and example.kinds[i - 1] == "image":
            continue
        before, after = i > 0 and bool(marks[i - 1]), i + 1 < len(marks) and bool(marks[i + 1])
        if marks[i]:
            piece = (piece if before else LEFT + piece) + ("" if after else RIGHT)
        out.append(piece)
    return example.between.join(out).replace("\n", " ")
