"""Words for the first-letter task: those that the tokenizer has as one token."""

from __future__ import annotations

import string

import numpy as np

from interp.errors import InputError
from interp.inputs import tokenizer_of
from interp.lens import Lens

LETTERS = string.ascii_lowercase


def single_token_words(lens: Lens, *, least: int = 3, most: int | None = None, seed: int = 0) -> dict[str, int]:
    """Words that are one token each, with its id.

    A word stands as it does inside a text: with a space in front where the tokenizer has such tokens. Left out are
    words of several tokens, with other letters than a to z, in capitals (`The`, `USA`), shorter than `least`, and
    pieces that go on a word before them. What is one token need not be a word of the language: ` abbre` counts.

    Args:
        lens: the model, with its tokenizer.
        least: letters that a word has at least.
        most: how many words, drawn from all; None for all.
        seed: of the draw.

    Returns:
        Token ids by word, in the order of the alphabet.

    Raises:
        InputError: the model has no tokenizer, or no such words.
    """
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None:
        raise InputError(f"{lens.name} has no tokenizer, so there are no words.")
    special, spaced, bare = set(tokenizer.all_special_ids), {}, {}
    for number in range(min(len(tokenizer), lens.vocabulary)):
        if number in special:
            continue
        text = tokenizer.decode([number])
        word = text.strip(" ")
        if len(word) < least or not set(word) <= set(LETTERS):
            continue
        (spaced if text.startswith(" ") else bare)[word] = number
    kept = {}
    # Tokenizers with spaces in their tokens have pieces without one; others mark the pieces, and whole words are bare.
    for word, number in (spaced or bare).items():
        text = f" {word}" if spaced else word
        if tokenizer(text, add_special_tokens=False)["input_ids"] == [number]:
            kept[word] = number
    if not kept:
        raise InputError(f"the tokenizer of {lens.name} has no words of {least} or more letters a to z as one token.")
    words = sorted(kept)
    if most is not None and most < len(words):
        words = sorted(np.random.default_rng(seed).choice(words, most, replace=False).tolist())
    return {word: kept[word] for word in words}
