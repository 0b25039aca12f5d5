"""`FileCorpus`: documents in files: text, json lines and parquet, one file or a folder of them.

Files are scanned once for where their documents begin; texts are read when they are asked for.
"""

from __future__ import annotations

import bisect
import codecs
import hashlib
import itertools
import json
import os
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, get_args

from interp.data.corpora.corpus import Corpus, Document, check_seed
from interp.errors import FileError, InputError, SettingsError, unknown

Documents = Literal["paragraphs", "lines", "files"]
TEXT = (".txt", ".text", ".md", ".rst", ".tex")
TABLES = (".jsonl", ".parquet")
_TAIL = 1 << 16


class FileCorpus(Corpus):
    """The documents of a file, or of all files below a folder, in the order of their paths.

    Text files (any ending but `.jsonl` and `.parquet`; in a folder `.txt .text .md .rst .tex`) hold documents as
    `documents` says: `paragraphs` are separated by blank lines, `lines` are one each, `files` are whole. Tables hold a
    document in each row of a column. With a seed, documents of text and json lines are shuffled all together; row
    groups of parquet are shuffled, and then the rows within each, because a row group is read as a whole.

    Args:
        path: the file or folder.
        column: the column of tables; None for `text`.
        documents: of text files; None for paragraphs in a file and for whole files in a folder.
        seed: of the order; None to keep it.

    Raises:
        FileError: nothing is there, or it cannot be read as what its name says.
        InputError: it holds no documents, or the column is missing.
        SettingsError: an option that the files do not have.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        column: str | None = None,
        documents: Documents | None = None,
        seed: int | None = None,
    ) -> None:
        self.seed = check_seed(seed)
        path = Path(path)
        if documents is not None and documents not in get_args(Documents):
            raise unknown("documents", documents, get_args(Documents))
        if not path.exists():
            raise FileError(f"there is no corpus at {path}: neither a file nor a folder.")
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in (*TEXT, *TABLES))
            if not files:
                raise InputError(f"the folder {path} holds no corpus: no file ending in {' '.join((*TEXT, *TABLES))}.")
        tables = [p.suffix.lower() in TABLES for p in files]
        if column is not None and not any(tables):
            raise SettingsError(f"column={column!r} was given, but {path} is text and has no columns.")
        if documents is not None and all(tables):
            raise SettingsError(f"documents={documents!r} is for text files; each row of {path} is a document.")
        kind = documents or ("files" if path.is_dir() else "paragraphs")
        parts = [_open(p, column or "text", kind) for p in files]
        self._parts = [p for p in parts if p.count]
        self._ends = list(itertools.accumulate(p.count for p in self._parts))
        if not self._parts:
            raise InputError(f"the corpus {path} is empty: it holds no document.")
        self._digest = hashlib.sha256("".join(p.digest for p in parts).encode()).hexdigest()
        self._kind = {"documents": kind} if not all(tables) else {}
        self._column = {"column": column or "text"} if any(tables) else {}
        self.path = path

    def __len__(self) -> int:
        """How many documents there are."""
        return self._ends[-1]

    def blocks(self) -> list[int] | None:
        """Row groups, where some of the files are parquet."""
        if not any(isinstance(p, _Parquet) for p in self._parts):
            return None
        return [n for p in self._parts for n in (p.groups if isinstance(p, _Parquet) else [p.count])]

    def document(self, index: int) -> Document:
        """The document of that number.

        Raises:
            FileError: the file changed or is gone, or holds bytes that are not UTF-8.
            InputError: the row has no text.
        """
        part = bisect.bisect_right(self._ends, index)
        before = self._ends[part - 1] if part else 0
        return Document(index, self._parts[part].text(index - before))

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, number, content (not the place) and order."""
        own = {"kind": "files", "documents": len(self), "sha256": self._digest, "seed": self.seed}
        return own | {("split_by" if k == "documents" else k): v for k, v in {**self._kind, **self._column}.items()}


class _Spans:
    """A file of bytes with the places of its documents."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.begins, self.ends = array("q"), array("q")
        digest = hashlib.sha256()
        place, begin, end = 0, -1, 0
        try:
            with path.open("rb") as file:
                for line in file:
                    digest.update(line)
                    after = place + len(line)
                    blank = not (line if place else line.removeprefix(codecs.BOM_UTF8)).strip()
                    if kind == "lines":
                        if not blank:
                            self._add(place, after)
                    elif kind == "paragraphs" and blank:
                        if begin >= 0:
                            self._add(begin, end)
                        begin = -1
                    elif not blank:
                        begin, end = (place if begin < 0 else begin), after
                    place = after
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
        if kind != "lines" and begin >= 0:
            self._add(0 if kind == "files" else begin, place if kind == "files" else end)
        self.count, self.size, self.digest = len(self.begins), place, digest.hexdigest()

    def _add(self, begin: int, end: int) -> None:
        self.begins.append(begin)
        self.ends.append(end)

    def text(self, index: int) -> str:
        begin, end = self.begins[index], self.ends[index]
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                raw = file.read(end - begin)
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror or error}.") from error
        if len(raw) < end - begin:
            raise FileError(f"{self.path} became shorter while it was in use.")
        try:
            text = raw.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise FileError(
                f"{self.path}, byte {begin + error.start}: 0x{raw[error.start]:02x} is not UTF-8; save it in UTF-8."
            ) from error
        return text.strip("\r\n")


class _JsonLines(_Spans):
    """A json object on each line."""

    def __init__(self, path: Path, column: str) -> None:
        self.column = column
        super().__init__(path, "lines")
        if self.count:
            self.text(0)

    def text(self, index: int) -> str:
        try:
            row = json.loads(super().text(index))
        except ValueError as error:
            raise InputError(f"{self.path}, row {index + 1}: it is not json ({error}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{self.path}, row {index + 1}: a json object was expected, found {str(row)[:60]!r}.")
        if self.column not in row:
            raise InputError(
                f"{self.path}, row {index + 1}: there is no column {self.column!r}; it has {', '.join(row) or 'none'}. "
                "Name one with column=."
            )
        return _text(row[self.column], self.path, index, self.column)


class _Parquet:
    """A column of a parquet file, read by row groups."""

    KEPT = 2

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path, self.column = path, column
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                tail = file.read()
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise FileError(f"{path} cannot be read as parquet ({error}).") from error
        names = self._file.schema_arrow.names
        if column not in names:
            raise InputError(f"{path} has no column {column!r}; it has {', '.join(names)}. Name one with column=.")
        found = self._file.metadata
        self.groups = [found.row_group(i).num_rows for i in range(found.num_row_groups)]
        self._ends = list(itertools.accumulate(self.groups))
        self.count = found.num_rows
        # The footer holds sizes, places and statistics of every column: another content has another one.
        self.digest = hashlib.sha256(f"{size} {column}".encode() + tail).hexdigest()
        self._held: OrderedDict[int, list[Any]] = OrderedDict()

    def text(self, index: int) -> str:
        group = bisect.bisect_right(self._ends, index)
        if group not in self._held:
            table = self._file.read_row_group(group, columns=[self.column])
            self._held[group] = table.column(0).to_pylist()
            while len(self._held) > self.KEPT:
                self._held.popitem(last=False)
        return _text(self._held[group][index - (self._ends[group - 1] if group else 0)], self.path, index, self.column)


def _text(value: Any, path: Path, index: int, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"{path}, row {index + 1}: {column} is no text but {type(value).__name__}: {str(value)[:60]!r}."
        )
    return value


def _open(path: Path, column: str, kind: str) -> _Spans | _Parquet:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _Parquet(path, column)
    return _JsonLines(path, column) if suffix == ".jsonl" else _Spans(path, kind)
