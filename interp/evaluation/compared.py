"""What is compared with what: scores by name, of one batch, and those of their sources that count."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import InputError, unknown
from interp.tokens import TokenScores

Sources = Literal["all", "text", "image"] | Bool[Tensor, "batch source"]
SOURCES = ("all", "text", "image")


def by_name(scores: TokenScores | Mapping[str, TokenScores]) -> dict[str, TokenScores]:
    """Scores by name, all of the same sources.

    Raises:
        InputError: there are none, something else is among them, or they are of different batches.
    """
    named = {scores.name: scores} if isinstance(scores, TokenScores) else dict(scores)
    if not named:
        raise InputError("no scores were given.")
    for name, one in named.items():
        if not isinstance(one, TokenScores):
            raise InputError(f"{name!r} is a {type(one).__name__}; TokenScores are compared.")
    first = next(iter(named))
    for name, one in named.items():
        same_sources(named[first], one, repr(first), repr(name))
    return named


def same_sources(one: TokenScores, other: TokenScores, name: str, other_name: str) -> None:
    """Whether two scores are of the same sources.

    Raises:
        InputError: they are of another tower, number of samples, padding or text.
    """
    if one.tower != other.tower:
        raise InputError(f"{name} has its sources in tower {one.tower!r}, {other_name} in {other.tower!r}.")
    same_tokens(one.source_mask, one.tokens, other.source_mask, other.tokens, name, other_name)


def same_tokens(mask: Tensor, tokens: Any, other_mask: Tensor, other_tokens: Any, name: str, other_name: str) -> None:
    """Whether two streams are of the same batch.

    Raises:
        InputError: they are not; the message names the first difference.
    """
    if mask.shape != other_mask.shape:
        sizes = (f"{len(m)} samples of {m.shape[1]} columns" for m in (mask, other_mask))
        raise InputError(f"{name} is of another batch than {other_name}: {' and '.join(sizes)}.")
    if not torch.equal(mask, other_mask):
        row = int((mask != other_mask).any(1).nonzero()[0])
        raise InputError(f"{name} is of another batch than {other_name}: sample {row} is padded differently.")
    for i, (row, other) in enumerate(zip(tokens, other_tokens, strict=True)):
        for column, (a, b) in enumerate(zip(row, other, strict=True)):
            if a != b and bool(mask[i, column]):
                raise InputError(
                    f"{name} is of another batch than {other_name}: column {column} of sample {i} is {a!r} in one, "
                    f"{b!r} in the other."
                )


def chosen_sources(scores: TokenScores, sources: Sources, *, special: bool) -> Bool[Tensor, "batch source"]:
    """The columns that count.

    Args:
        scores: whose sources.
        sources: `all`; `text` or `image` tokens; or the columns, marked True.
        special: whether special tokens count.

    Raises:
        UnknownNameError: no such kind of sources.
        InputError: there are none of the kind in any sample, or the marks have another shape.
    """
    if isinstance(sources, Tensor):
        if sources.dtype != torch.bool or sources.shape != scores.source_mask.shape:
            raise InputError(
                f"sources are bools {list(scores.source_mask.shape)} [batch, source], found "
                f"{str(sources.dtype).removeprefix('torch.')} {list(sources.shape)}."
            )
        chosen = sources.cpu() & scores.source_mask
    elif sources not in SOURCES:
        raise unknown("kind of sources", sources, SOURCES)
    else:
        chosen = scores.source_mask if sources == "all" else scores.spans.get(sources)
    if chosen is not None and not special and "special" in scores.spans:
        chosen = chosen & ~scores.spans["special"]
    if chosen is None or not bool(chosen.any()):
        kind = "marked columns" if isinstance(sources, Tensor) else f"{sources!r} tokens"
        plain = "" if special else " beside special tokens"
        raise InputError(f"the {scores.name} scores have no {kind} among their sources{plain}.")
    return chosen
