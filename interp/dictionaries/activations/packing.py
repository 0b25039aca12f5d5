"""From documents to contexts: tokens cut or packed to a length, and which of them to use.

Packed contexts hold the end of one document and the beginning of the next, with a separator between. Attention is the
model's own: in a plain causal model tokens look back across the separator into the document before, as in SAELens and
as most models were trained. Where that must not be, take one document in each context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from interp.data.corpora import Corpus, Document
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.grids import image_token_ids
from interp.inputs import tokenizer_of
from interp.lens import Lens

Special = Literal["tokenizer", "bos", "none"]
Separator = Literal["eos", "bos", "none"]
Tokens = Literal["all", "text", "image"]


@dataclass(frozen=True, slots=True)
class Packing:
    """How documents become contexts.

    Attributes:
        context: tokens of a context, special ones included; pictures with prompts keep their own length.
        packed: fill contexts with one document after the other; else each document has contexts of its own, the last
            of them shorter.
        special: what stands around each context: what the `tokenizer` puts around a text, a `bos` in front, or `none`.
        separator: what follows each document of packed contexts.
        tokens: which to use: `all`, `text` (no image tokens) or `image` (only these). Special tokens never are, but for
            the unknown token, which stands for a word.
        drop_first: leave out the first position of each context, where many models keep an attention sink whose norm
            is a thousand times that of other tokens.
        epochs: how often to go through the corpus; None for ever.
    """

    context: int = 256
    packed: bool = True
    special: Special = "tokenizer"
    separator: Separator = "eos"
    tokens: Tokens = "all"
    drop_first: bool = True
    epochs: int | None = 1

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            SettingsError, UnknownNameError: one is out of its range.
        """
        for name, kind in (("special", Special), ("separator", Separator), ("tokens", Tokens)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        if self.context < 2:
            raise SettingsError(f"a context holds at least 2 tokens, found context={self.context}.")
        if self.epochs is not None and self.epochs < 1:
            raise SettingsError(f"epochs is at least 1, or None for ever; found {self.epochs}.")


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the contexts of a corpus.

    Attributes:
        epoch: how often the corpus has been gone through.
        document: how many documents of the epoch lie before.
        token: how many tokens of the next document lie before.
        number: how many contexts lie before, over all epochs.
    """

    epoch: int = 0
    document: int = 0
    token: int = 0
    number: int = 0

    def json(self) -> dict[str, int]:
        """The place as json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Context:
    """One context before the model has seen it.

    Attributes:
        number: counted from the beginning of the corpus.
        ids: its tokens; None for a document with pictures, which the model's processor turns into tokens.
        owner: for each token the number of its document, -1 for tokens of none.
        document: the document with pictures.
        after: the place behind it.
    """

    number: int
    ids: list[int] | None
    owner: list[int]
    document: Document | None
    after: Place


class Packer:
    """Turns the documents of a corpus into contexts, from any place on.

    Args:
        lens: whose tokenizer is used.
        corpus: the documents.
        packing: the settings.

    Raises:
        InputError: the model has no tokenizer, or no token that the settings name.
        SettingsError: special tokens leave no room in a context.
    """

    def __init__(self, lens: Lens, corpus: Corpus, packing: Packing) -> None:
        self.corpus, self.packing = corpus, packing
        self.tokenizer: Any = tokenizer_of(lens.processor)
        self.image_ids = image_token_ids(lens.model.config)
        self.special: list[int] = []
        self._name = lens.name
        self._around: tuple[list[int], list[int]] = ([], [])
        self._between: list[int] = []
        if self.tokenizer is None:
            return
        self.special = special_ids(self.tokenizer, self.image_ids)
        self._around = self._surroundings()
        if packing.packed and packing.separator != "none":
            self._between = [self._named(packing.separator, "separator")]
        self.special = sorted({*self.special, *self._around[0], *self._around[1], *self._between})
        if packing.context - sum(map(len, self._around)) < 1:
            raise SettingsError(f"special tokens leave no room in a context of {packing.context} tokens.")

    def _named(self, name: str, option: str) -> int:
        found = getattr(self.tokenizer, f"{name}_token_id", None)
        # BERT's tokenizers have no begin and end, but tokens of the same use.
        found = (
            getattr(self.tokenizer, {"bos": "cls", "eos": "sep"}[name] + "_token_id", None) if found is None else found
        )
        if found is None:
            raise InputError(f"the tokenizer of {self._name} has no {name} token: choose another {option}, or 'none'.")
        return int(found)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        if self.packing.special == "none":
            return [], []
        if self.packing.special == "bos":
            return [self._named("bos", "special")], []
        whole = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
        if start is None:
            raise UnsupportedError(
                f"the tokenizer of {self._name} does not just put tokens around a text; choose special='bos' or 'none'."
            )
        return whole[:start], whole[start + len(bare) :]

    def contexts(self, place: Place) -> Iterator[Context]:
        """All contexts from a place on.

        Raises:
            InputError: a whole epoch holds no token, or a text holds an image placeholder.
            UnsupportedError: the model has no tokenizer for the text, or takes no pictures.
        """
        while self.packing.epochs is None or place.epoch < self.packing.epochs:
            whole, any_token = place.document == place.token == 0, False
            for context in self._epoch(place):
                any_token = True
                place = context.after
                yield context
            if whole and not any_token:
                raise InputError(f"the corpus holds no usable token: {self.corpus!r}.")
            place = Place(place.epoch + 1, 0, 0, place.number)

    def _epoch(self, place: Place) -> Iterator[Context]:
        room = self.packing.context - sum(map(len, self._around))
        number, skip, seen = place.number, place.token, place.document
        body: list[int] = []
        owner: list[int] = []
        for seen, document in enumerate(self.corpus.documents(place.document, epoch=place.epoch), place.document):
            if document.images:
                if body:
                    raise InputError(
                        f"document {document.index} holds pictures and the one before does not: mixed corpus."
                    )
                number += 1
                yield Context(number - 1, None, [], document, Place(place.epoch, seen + 1, 0, number))
                continue
            ids = self._tokens(document)
            done, skip = skip, 0
            while done < len(ids):
                taken = ids[done : done + room - len(body)]
                done += len(taken)
                body += taken
                owner += [document.index] * len(taken)
                if len(body) == room or (not self.packing.packed and done == len(ids)):
                    number += 1
                    after = (seen, done) if done < len(ids) else (seen + 1, 0)
                    yield self._context(number - 1, body, owner, Place(place.epoch, *after, number))
                    body, owner = [], []
        if body:
            yield self._context(number, body, owner, Place(place.epoch, seen + 1, 0, number + 1))

    def _context(self, number: int, body: list[int], owner: list[int], after: Place) -> Context:
        front, back = self._around
        return Context(number, [*front, *body, *back], [*[-1] * len(front), *owner, *[-1] * len(back)], None, after)

    def _tokens(self, document: Document) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"{self._name} has no tokenizer: the corpus for it holds pictures, not text alone.")
        ids = self.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.image_ids and set(ids) & set(self.image_ids):
            raise InputError(f"document {document.index} holds an image placeholder, but no picture.")
        return [*ids, *self._between] if ids else []


def special_ids(tokenizer: Any, image_ids: list[int]) -> list[int]:
    """Ids that stand for no text and no image: all special ones but the unknown token."""
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} - set(image_ids))
