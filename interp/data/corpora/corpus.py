"""`Corpus`: documents in an order that a seed decides, readable from any place in it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InputError, SettingsError


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        index: its number in the source, whatever order it is read in.
        text: what it says; None where pictures stand alone.
        images: its pictures (PIL images).
    """

    index: int
    text: str | None
    images: tuple[Any, ...] = ()


class Corpus(ABC):
    """Documents in a fixed order: the source's own without a seed, else one drawn anew from the seed for each epoch.

    A place in a corpus is two numbers, the epoch and how many of its documents lie before; `documents(start, epoch)`
    goes on from there.

    Attributes:
        seed: of the order; None for the source's own.
    """

    seed: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many documents there are."""

    @abstractmethod
    def document(self, index: int) -> Document:
        """The document of that number in the source."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another one, as json: its kind, its content and its order."""

    def blocks(self) -> list[int] | None:
        """Sizes of the runs of documents that are cheap to read together; None where every document is as cheap."""
        return None

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of all documents in the order of an epoch, int64.

        Where documents come in blocks, the blocks are shuffled and then the documents within each.
        """
        if self.seed is None:
            return np.arange(len(self))
        random = np.random.default_rng([self.seed, epoch])
        blocks = self.blocks()
        if blocks is None:
            return random.permutation(len(self))
        starts = np.cumsum([0, *blocks])
        return np.concatenate([starts[b] + random.permutation(blocks[b]) for b in random.permutation(len(blocks))])

    def documents(self, start: int = 0, *, epoch: int = 0) -> Iterator[Document]:
        """The documents of an epoch, without the first `start` of them."""
        for index in self.order(epoch)[start:].tolist():
            yield self.document(index)

    def __repr__(self) -> str:
        """Kind, size and order."""
        order = "in order" if self.seed is None else f"shuffled by seed {self.seed}"
        return f"{type(self).__name__}({len(self)} documents, {order})"


class TextCorpus(Corpus):
    """Texts that are held in memory.

    Args:
        texts: one for each document.
        seed: of the order; None to keep it.

    Raises:
        InputError: there are none, or one of them is no string.
    """

    def __init__(self, texts: Sequence[str], *, seed: int | None = None) -> None:
        self.seed = check_seed(seed)
        self._texts = list(texts)
        if not self._texts:
            raise InputError("the corpus is empty: an empty list of texts was given.")
        for i, text in enumerate(self._texts):
            if not isinstance(text, str):
                raise InputError(f"document {i} is a {type(text).__name__}; the documents of a list are strings.")
        digest = hashlib.sha256()
        for text in self._texts:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self._texts)

    def document(self, index: int) -> Document:
        """The document of that number."""
        return Document(index, self._texts[index])

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, number, content and order."""
        return {"kind": "texts", "documents": len(self), "sha256": self._digest, "seed": self.seed}


def check_seed(seed: int | None) -> int | None:
    """A seed as it is.

    Raises:
        SettingsError: it is negative or no whole number.
    """
    if seed is not None and (type(seed) is not int or seed < 0):
        raise SettingsError(
            f"the seed of a corpus is a whole number from 0 on, or None for no shuffling; found {seed!r}."
        )
    return seed
