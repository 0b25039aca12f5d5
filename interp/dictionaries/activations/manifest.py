"""`manifest.json` of a store: what was harvested, and its finished shards with their hashes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import FileError
from interp.files import read_json, sha256, write_json

NAME = "manifest.json"
FORMAT = "interp-activations"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """One finished shard.

    Attributes:
        file: its name.
        sha256: of its bytes.
        bytes: its size.
        contexts: how many contexts are in it.
        tokens: how many tokens are in it.
        used: how many of them are to be trained on.
        begin: the source's state before it, as json.
    """

    file: str
    sha256: str
    bytes: int
    contexts: int
    tokens: int
    used: int
    begin: dict[str, Any]


@dataclass(slots=True)
class Manifest:
    """What a folder of a store holds.

    Attributes:
        settings: of the source: model, reads, corpus and how contexts were made of it.
        dtype: of the activations.
        keep: `contexts` (all real tokens) or `rows` (those to use).
        shard_tokens: tokens to use in each shard, at least.
        d_in: width of each read.
        after: the source's state behind the last shard (before the first: where it began), as json.
        pieces: finished shards, in order.
        ended: whether the source ended there.
    """

    settings: dict[str, Any]
    dtype: str
    keep: str
    shard_tokens: int
    d_in: dict[str, int]
    after: dict[str, Any]
    pieces: list[Piece] = field(default_factory=list)
    ended: bool = False

    @property
    def plan(self) -> dict[str, Any]:
        """What a harvest that goes on must agree in."""
        return {**self.settings, "dtype": self.dtype, "keep": self.keep, "shard_tokens": self.shard_tokens}

    @property
    def used(self) -> int:
        """Tokens to train on."""
        return sum(p.used for p in self.pieces)

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        write_json(folder / NAME, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read it.

        Raises:
            FileError: it is missing, damaged, or of another format or version.
        """
        path = folder / NAME
        held = read_json(path)
        if not isinstance(held, dict) or held.pop("format", None) != FORMAT:
            raise FileError(f"{path} is no manifest of a store of activations.")
        version = held.pop("version", None)
        if version != VERSION:
            raise FileError(f"{path} is of version {version}, this interp reads version {VERSION}.")
        try:
            held["pieces"] = [Piece(**p) for p in held["pieces"]]
            return Manifest(**held)
        except (TypeError, KeyError) as error:
            raise FileError(f"{path} is damaged ({error}).") from error

    def check(self, folder: Path, *, hashes: bool) -> list[int]:
        """See that all finished shards are there and what they were.

        Args:
            folder: of the store.
            hashes: read them whole and compare hashes, not only sizes.

        Returns:
            The indices of shards whose files are missing.

        Raises:
            FileError: a shard is cut short or has another content.
        """
        missing = []
        for i, piece in enumerate(self.pieces):
            path = folder / piece.file
            if not path.is_file():
                missing.append(i)
                continue
            size = path.stat().st_size
            if size != piece.bytes:
                raise FileError(
                    f"the shard {path} has {size} bytes, the manifest says {piece.bytes}: remove the file, and harvest "
                    "again with the same settings to have it made anew."
                )
            if hashes and sha256(path) != piece.sha256:
                raise FileError(
                    f"the shard {path} is damaged: its sha256 is not that of the manifest. Remove the file, and "
                    "harvest again with the same settings to have it made anew."
                )
        return missing
