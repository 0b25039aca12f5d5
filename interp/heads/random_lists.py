"""Random lists of tokens of the same make-up as a list of keywords: what a concept score has to be compared with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import SettingsError
from interp.heads.concepts import SPACE, Keywords
from interp.inputs import tokenizer_of
from interp.lens import Lens

_NEIGHBOURS = 256


def random_lists(
    lens: Lens,
    keywords: Keywords,
    lengths: Float[Tensor, " v"],
    *,
    count: int,
    matched: bool,
    seed: int,
) -> tuple[Int[Tensor, "count r"], str]:
    """Lists of as many tokens as there are keywords, drawn at random, without the keywords and special tokens.

    Args:
        lens: the model.
        keywords: what they are to be compared with.
        lengths: of all atoms.
        count: how many lists.
        matched: for each keyword draw a word that the vocabulary holds in the same forms (with a space in front, with
            a capital; numbers for numbers), among the 256 whose atoms are nearest in length. Otherwise any token.
        seed: seed of the draws.

    Returns:
        Token ids, and how they were drawn in words.

    Raises:
        SettingsError: the vocabulary is too small to draw from.
    """
    tokenizer = tokenizer_of(lens.processor)
    size = len(lengths) if tokenizer is None else min(len(lengths), len(tokenizer))
    barred = set(keywords.ids)
    if tokenizer is not None:
        barred |= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    free = [i for i in range(size) if i not in barred]
    if len(free) < 2 * len(keywords.ids):
        raise SettingsError(
            f"{len(free)} tokens are too few to draw random lists of {len(keywords.ids)} from; set random_lists=0."
        )
    single = [(i,) for i in free]
    pools: list[list[tuple[int, ...]]]
    if not matched:
        pools, how = [single] * len(keywords.ids), "any token"
    elif tokenizer is None:
        pools = [_nearest(single, (i,), lengths) for i in keywords.ids]
        how = f"the {_NEIGHBOURS} nearest in length"
    else:
        raw = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(size)))]
        pools = _matched_pools(keywords, raw, free, lengths)
        how = f"words of the same forms, the {_NEIGHBOURS} nearest in length"
    source = random.Random(seed)
    lists = []
    for _ in range(count):
        drawn: dict[int, None] = {}
        for pool in pools:
            left = [entry for entry in source.sample(pool, min(len(pool), 8)) if not drawn.keys() & set(entry)]
            left = left or [entry for entry in pool if not drawn.keys() & set(entry)]
            drawn |= dict.fromkeys(source.choice(left))
        lists.append([*drawn])
    return torch.tensor(lists), how


def _matched_pools(
    keywords: Keywords, raw: Sequence[str], free: Sequence[int], lengths: Float[Tensor, " v"]
) -> list[list[tuple[int, ...]]]:
    """For each word what may be drawn in its place; token by token where the vocabulary has too few such words."""
    entries: dict[str, dict[tuple[bool, str], int]] = {}
    for i in free:
        form, body = _form_of(raw[i])
        entries.setdefault(body, {}).setdefault(form, i)
    units: dict[str, list[int]] = {}
    for i, word in zip(keywords.ids, keywords.words, strict=True):
        units.setdefault(word, []).append(i)
    need = 2 * len(keywords.ids)
    pools = []
    for ids in units.values():
        forms = [_form_of(raw[i]) for i in ids]
        whole = len({body for _, body in forms}) == 1 and len({form for form, _ in forms}) == len(ids)
        found = _having(entries, [form for form, _ in forms]) if whole else []
        if len(found) >= need:
            pools.append(_nearest(found, ids, lengths))
            continue
        for i, (form, _) in zip(ids, forms, strict=True):
            found = _having(entries, [form])
            pools.append(_nearest(found if len(found) >= need else [(j,) for j in free], (i,), lengths, need))
    return pools


def _form_of(token: str) -> tuple[tuple[bool, str], str]:
    """(whether a space stands in front, what kind of word it is), and what it is in small letters."""
    spaced = token[:1] in tuple(SPACE)
    body = token[1:] if spaced else token
    if body.isascii() and body.isalpha():
        small = body[1:].islower() or not body[1:]
        kind = "other" if not small else "capital" if body[0].isupper() else "small"
        return (spaced, kind), body.lower() if small else token
    return (spaced, "number" if body.isdecimal() else "other"), token


def _having(entries: Mapping[str, Mapping[Any, int]], forms: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(e[f] for f in forms) for e in entries.values() if all(f in e for f in forms)]


def _nearest(
    candidates: list[tuple[int, ...]], ids: Sequence[int], lengths: Float[Tensor, " v"], least: int = 0
) -> list[tuple[int, ...]]:
    """The candidates whose atoms' mean length is nearest to that of some ids."""
    aim = lengths[list(ids)].mean()
    gap = (lengths[torch.tensor(candidates)].mean(1) - aim).abs()
    return [candidates[i] for i in gap.argsort(stable=True)[: max(_NEIGHBOURS, least)].tolist()]
