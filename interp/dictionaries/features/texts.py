"""What stands in the contexts that windows lie in: texts of tokens, what kind they are, where image tokens look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.attribution.common import Stream, stream_of, token_text
from interp.data.corpora import Corpus
from interp.dictionaries.activations import ActivationStream
from interp.dictionaries.activations.packing import Context, Place
from interp.dictionaries.features.contexts import KINDS
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.patches import Patches
from interp.reads import Read


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One context.

    Attributes:
        ids: its tokens; None where the tower reads none.
        document: the document of each position, -1 for none.
        number: its number in the corpus.
        ordinal: which row it is of those with this number (towers have several for one document).
    """

    ids: Int[Tensor, " pos"] | None
    document: Int[Tensor, " pos"]
    number: int
    ordinal: int


def write_texts(
    lens: Lens, corpus: Corpus, stream: ActivationStream, site: Read, texts: Sequence[Text], *, pictures: bool
) -> dict[str, Any]:
    """The fields of `FeatureContexts` that say what stands in its contexts.

    With `pictures`, documents are prepared once more, without the model, to learn where their image tokens look.
    """
    tokenizer = tokenizer_of(lens.processor)
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    width = max((len(text.document) for text in texts), default=0)
    vocabulary: dict[str, int] = {}
    by_id: dict[int, str] = {}
    token, kind, document = (torch.full((len(texts), width), fill) for fill in (-1, 0, -1))
    found: list[Patches | None] = []
    streams: dict[int, Stream] = {}
    for row, text in enumerate(texts):
        length = len(text.document)
        patches = None
        if pictures:
            if text.number not in streams:
                context = Context(text.number, None, [], corpus.document(int(text.document.max())), Place())
                streams = {text.number: stream_of(lens, stream._prepare([context]), site.tower)}
            names, kinds, patches = _of_stream(streams[text.number], text.ordinal)
        elif text.ids is None:
            names, kinds = [str(i) for i in range(length)], ["text"] * length
        else:
            ids = text.ids.tolist()
            by_id |= {i: token_text(tokenizer, i) for i in set(ids) - by_id.keys()}
            names, kinds = [by_id[i] for i in ids], ["special" if i in special else "text" for i in ids]
        token[row, :length] = torch.tensor([vocabulary.setdefault(name, len(vocabulary)) for name in names])
        kind[row, :length] = torch.tensor([KINDS.index(k) for k in kinds])
        document[row, :length] = text.document
        found.append(patches)
    return {
        "token": token.int(),
        "kind": kind.to(torch.int8),
        "document": document,
        "number": torch.tensor([text.number for text in texts], dtype=torch.long),
        "vocabulary": tuple(vocabulary),
        "patches": _joined(found),
        "between": _between(tokenizer),
    }


def _between(tokenizer: Any) -> str:
    """A blank where tokens hold no spaces, so that text is lost when they are put together; else nothing."""
    if tokenizer is None:
        return ""
    ids = tokenizer("a photo of", add_special_tokens=False)["input_ids"]
    return "" if any(c.isspace() for i in ids for c in token_text(tokenizer, i)) else " "


def _of_stream(stream: Stream, row: int) -> tuple[list[str], list[str], Patches | None]:
    columns = stream.mask[row].nonzero()[:, 0].tolist()
    marks = {name: stream.spans[name][row].tolist() for name in ("image", "special") if name in stream.spans}
    kinds = [next((name for name in ("special", "image") if name in marks and marks[name][c]), "text") for c in columns]
    names = [str(stream.tokens[row][c]) for c in columns]
    return names, kinds, None if stream.patches is None else stream.patches.sample_alone(row, columns)


def _joined(rows: Sequence[Patches | None]) -> Patches | None:
    """The maps of several contexts as one."""
    there = [(i, p) for i, p in enumerate(rows) if p is not None]
    if not there:
        return None
    fields = {
        name: torch.cat([getattr(p, name) for _, p in there]) for name in ("column", "image", "box", "row", "col")
    }
    return Patches(
        sample=torch.cat([torch.full_like(p.sample, i) for i, p in there]),
        **fields,
        kind=tuple(k for _, p in there for k in p.kind),
        sizes=tuple(() if p is None else p.sizes[0] for p in rows),
    )
