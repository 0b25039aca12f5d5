"""A concept as rows of the unembedding: keywords as token ids, the dictionary that they are rows of, their span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError, UnsupportedError, unknown
from interp.inputs import tokenizer_of
from interp.lens import Lens

Pieces = Literal["drop", "first", "all"]
FinalNorm = Literal["none", "gain", "scale_only", "full"]
FINAL_NORMS = ("none", "gain", "scale_only", "full")
RANK_TOLERANCE = 1e-5  # singular values below this share of the largest count as none

SPACE = "Ġ▁"  # how byte-level and SentencePiece vocabularies write the space in front of a word


@dataclass(frozen=True, slots=True)
class Keywords:
    """Token ids that stand for a concept, and what became of the words that they were made from.

    Attributes:
        ids: token ids, each once.
        tokens: their texts.
        words: for each id the word that it stands for.
        dropped: words that no id stands for, with the reason.
        variants: whether forms with a space in front or a capital were added.
        pieces: what was done with words of several tokens.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    dropped: Mapping[str, str]
    variants: bool
    pieces: Pieces

    def report(self) -> dict[str, Any]:
        """What was kept and dropped, for the settings of a result."""
        kept: dict[str, list[str]] = {}
        for word, token in zip(self.words, self.tokens, strict=True):
            kept.setdefault(word, []).append(token)
        return {"kept": kept, "dropped": dict(self.dropped), "variants": self.variants, "pieces": self.pieces}


def keyword_tokens(
    lens: Lens,
    words: Sequence[str] | Sequence[int] | Keywords,
    *,
    variants: bool = True,
    pieces: Pieces = "drop",
) -> Keywords:
    """Token ids of a list of keywords.

    Args:
        lens: the model, whose tokenizer reads the words.
        words: keywords, or token ids, which are taken as they are.
        variants: also take each word with a space in front, and, where it begins with a small letter, with a capital
            (a capital that was given means something, and is never made small).
        pieces: for words none of whose forms is one token: leave them out (`drop`), or take the first token (`first`)
            or all tokens (`all`) of the form with a space in front. First tokens are often single letters, which
            stand for much else.

    Raises:
        InputError: no words, an empty word, no word that can be kept, or an id outside the vocabulary.
        UnknownNameError: an unknown policy for pieces.
    """
    if isinstance(words, Keywords):
        return words
    if pieces not in ("drop", "first", "all"):
        raise unknown("policy for pieces", pieces, ("drop", "first", "all"))
    if isinstance(words, str) or not len(words):
        raise InputError(f"keywords are a list of words or of token ids with at least one, got {words!r}.")
    if not any(isinstance(word, str) for word in words):
        return _from_ids(lens, [int(i) for i in words])
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None:
        raise InputError(f"keywords are words, but {lens.name} has no tokenizer: give token ids.")
    owner: dict[int, str] = {}
    dropped: dict[str, str] = {}
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"a keyword is a word with letters in it, or all are token ids; found {word!r}.")
        rows = {form: tokenizer(form, add_special_tokens=False)["input_ids"] for form in _forms(word, variants)}
        found = [row[0] for row in rows.values() if len(row) == 1 and row[0] != tokenizer.unk_token_id]
        main = rows[next(iter(rows))]
        if not found and pieces != "drop" and tokenizer.unk_token_id not in main:
            found = main[:1] if pieces == "first" else main
        for token_id in found:
            owner.setdefault(int(token_id), word)
        if not found:
            shown = tokenizer.convert_ids_to_tokens(main)
            strange = tokenizer.unk_token_id in main
            dropped[word] = "unknown to the tokenizer" if strange else f"{len(main)} tokens: {' '.join(shown)}"
        elif word not in owner.values():
            dropped[word] = f"its tokens stand for {owner[int(found[0])]!r} already"
    if not owner:
        reasons = "; ".join(f"{word!r} is {why}" for word, why in [*dropped.items()][:5])
        raise InputError(
            f"no keyword can be used with the tokenizer of {lens.name}: {reasons}. Give words of one token, or "
            "pieces='first' or 'all' for words of several."
        )
    ids = tuple(owner)
    return Keywords(ids, token_texts(lens, ids), tuple(owner.values()), dropped, variants, pieces)


def _from_ids(lens: Lens, ids: list[int]) -> Keywords:
    size = len(unembedding_rows(lens))
    for i in ids:
        if not 0 <= i < size:
            raise InputError(f"token id {i} is outside the unembedding of {lens.name}, which has {size} rows.")
    ids = [*dict.fromkeys(ids)]
    texts = token_texts(lens, ids)
    return Keywords(tuple(ids), texts, texts, {}, False, "drop")


def _forms(word: str, variants: bool) -> list[str]:
    if not variants:
        return [word]
    bare = word.strip()
    both = dict.fromkeys((bare, bare[0].upper() + bare[1:]))
    return [*(" " + form for form in both), *both]


def token_texts(lens: Lens, ids: Sequence[int]) -> tuple[str, ...]:
    """Tokens as text with the space in front that belongs to them; `[id]` where the tokenizer has none."""
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None:
        return tuple(f"[{i}]" for i in ids)
    size = len(tokenizer)
    raw = tokenizer.convert_ids_to_tokens([i if i < size else 0 for i in ids])
    texts = []
    for i, token in zip(ids, raw, strict=True):
        if i >= size or token is None:
            texts.append(f"[{i}]")
            continue
        text = tokenizer.decode([i])
        text = str(token) if not text or "\ufffd" in text else text
        texts.append(" " + text if str(token)[0] in SPACE and text[0] not in " " + SPACE else text)
    return tuple(texts)


def unembedding_rows(lens: Lens) -> Float[Tensor, "v d"]:
    """What each token's logit reads from the normed stream, for the whole vocabulary.

    Raises:
        UnsupportedError: the model has no unembedding.
    """
    head = lens.anatomy.unembed
    if head is None:
        raise UnsupportedError(
            f"{lens.name}: its head is not a final norm and one projection, so there is no dictionary of tokens."
        )
    size = getattr(head.module, "out_features", None) or len(head.module.weight)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return head.direction(torch.arange(size))


def atoms_of(lens: Lens, apply_final_norm: FinalNorm) -> Float[Tensor, "v d"]:
    """The dictionary: the unembedding's rows, through the gain of the final norm where that is asked for.

    The linear part of the norm is x -> (x - mean(x)) gain (without the mean for RMSNorm). It is folded into the rows,
    so that their products with the stream are those of the rows with the stream's linear part.

    Raises:
        UnsupportedError: there is no unembedding, or its norm is neither LayerNorm nor RMSNorm.
    """
    if apply_final_norm not in FINAL_NORMS:
        raise unknown("apply_final_norm", apply_final_norm, FINAL_NORMS)
    rows = unembedding_rows(lens)
    if apply_final_norm not in ("gain", "full"):
        return rows
    for norm in reversed(final_norms(lens)):
        rows = rows * norm.gain.to(rows.device)
        if norm.center:
            rows = rows - rows.mean(1, keepdim=True)
    return rows


def final_norms(lens: Lens) -> tuple[Any, ...]:
    """The final norms as fitted data.

    Raises:
        UnsupportedError: there is no unembedding, or its norm is neither LayerNorm nor RMSNorm.
    """
    head = lens.anatomy.unembed
    if head is None or any(norm is None for norm in head.fitted):
        what = "it has no unembedding" if head is None else "its final norm is neither LayerNorm nor RMSNorm"
        raise UnsupportedError(f"{lens.name}: {what}; use apply_final_norm='none'.")
    return head.fitted


def span_basis(
    rows: Float[Tensor, "*lists r d"],
) -> tuple[Float[Tensor, "*lists d r"], Int[Tensor, "*lists"], Float[Tensor, "*lists"]]:
    """An orthonormal basis of the span of some rows, whose lengths do not matter.

    Returns:
        The basis in float64 on the CPU (with columns of zeros where the rank is less than r), the rank, and the
        condition number of the rows at length one: large where some are nearly combinations of others.
    """
    unit = torch.nn.functional.normalize(rows.cpu().double(), dim=-1)
    values, vectors = torch.linalg.eigh(unit @ unit.mT)
    top = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    real = values > RANK_TOLERANCE**2 * top
    scale = torch.where(real, values.clamp_min(RANK_TOLERANCE**2 * top).rsqrt(), 0.0)
    condition = (top[..., 0] / values[..., 0].clamp_min(torch.finfo(torch.float64).eps * top[..., 0])).sqrt()
    return unit.mT @ (vectors * scale[..., None, :]), real.sum(-1), condition
