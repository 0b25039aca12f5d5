"""`HubCorpus`: a column of a data set of the `datasets` library, streamed from the Hugging Face hub or at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from interp.data.corpora.corpus import Corpus, Document, check_seed
from interp.errors import FileError, InputError, MissingPackageError, UnsupportedError


class HubCorpus(Corpus):
    """A text column of a data set.

    A name is streamed: nothing is downloaded but what is read. A stream has no length and is shuffled within a window
    of `window` documents that moves along; to resume, the documents before the place are read and passed over. A data
    set at hand (`datasets.Dataset`) is shuffled wholly, and resumed at once.

    Args:
        dataset: the name on the hub, or a `datasets.Dataset` or `IterableDataset`.
        column: the column with the text.
        split: which split, for a name.
        config: which configuration, for a name that has several.
        revision: commit or tag of the data set; name one, or what is read may change.
        seed: of the order; None to keep it.
        window: documents that a stream is shuffled within.

    Raises:
        MissingPackageError: `datasets` is not installed.
        FileError: the data set cannot be opened (the hub cannot be reached, no such name or split).
        InputError: there is no such column, or no document.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        column: str = "text",
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        seed: int | None = None,
        window: int = 10_000,
    ) -> None:
        self.seed = check_seed(seed)
        self.column, self.window = column, window
        name: dict[str, Any] = {}
        if isinstance(dataset, str):
            name = {"name": dataset, "config": config, "split": split, "revision": revision}
            dataset = _streamed(dataset, config, split, revision)
        self._data = dataset
        self._sized = hasattr(dataset, "__len__")
        found = dataset.column_names
        if isinstance(found, dict):
            raise InputError(f"the data set has several splits ({', '.join(found)}): give one of them.")
        if not found and not self._sized:
            found = list(next(iter(dataset), {}))
        if not found or (self._sized and not len(dataset)):
            raise InputError("the data set is empty: it holds no document.")
        if column not in found:
            raise InputError(
                f"the data set has no column {column!r}; it has {', '.join(found)}. Name one with column=."
            )
        if self._sized:
            self._data = dataset.select_columns([column])
            name = name or {"fingerprint": dataset._fingerprint}
        self._name = name or {"name": str(getattr(dataset.info, "dataset_name", None)), "split": str(dataset.split)}

    def __len__(self) -> int:
        """How many documents there are.

        Raises:
            UnsupportedError: it is a stream.
        """
        if not self._sized:
            raise UnsupportedError("a streamed data set does not know how many documents it holds.")
        return len(self._data)

    def __repr__(self) -> str:
        """Name and order."""
        return f"HubCorpus({self._name}, column {self.column!r}, seed {self.seed})"

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, name (of a data set at hand: its fingerprint), column and order."""
        order = {"seed": self.seed} | ({} if self._sized else {"window": self.window})
        return {"kind": "hub", **self._name, "column": self.column, **order}

    def document(self, index: int) -> Document:
        """The document of that number.

        Raises:
            UnsupportedError: it is a stream.
        """
        if not self._sized:
            raise UnsupportedError("a streamed data set is read in its order only: use documents().")
        return Document(index, self._text(self._data[index], index))

    def documents(self, start: int = 0, *, epoch: int = 0) -> Iterator[Document]:
        """The documents of an epoch, without the first `start`; numbers in a stream are those of the order read."""
        if self._sized:
            yield from super().documents(start, epoch=epoch)
            return
        data = self._data
        if self.seed is not None:
            drawn = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
            data = data.shuffle(seed=drawn, buffer_size=self.window)
        for index, row in enumerate(data.skip(start), start):
            yield Document(index, self._text(row, index))

    def _text(self, row: dict[str, Any], index: int) -> str:
        value = row.get(self.column)
        if value is not None and not isinstance(value, str):
            raise InputError(f"document {index}: column {self.column!r} is no text but {type(value).__name__}.")
        return value or ""


def _streamed(name: str, config: str | None, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"the data set {name!r} needs the datasets library: pip install 'interp[datasets]'."
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(f"the data set {name!r} (split {split!r}) cannot be opened: {str(error)[:300]}") from error
