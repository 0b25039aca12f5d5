"""`ActivationStore`: harvested activations, replayed as rows or whole contexts, in order or shuffled by a seed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from interp.dictionaries.activations.batches import check_settings
from interp.dictionaries.activations.identity import fingerprint
from interp.dictionaries.activations.manifest import NAME, Manifest
from interp.dictionaries.activations.replay import StoredContexts, StoredRows
from interp.dictionaries.activations.shard import Shard
from interp.errors import FileError, SettingsError
from interp.lens import Lens


class ActivationStore:
    """A folder that `harvest` wrote; nothing is loaded but what is asked for.

    Args:
        folder: of the store, or the one above the folders of several processes.
        verify: read every shard and compare its hash; else sizes are compared.

    Attributes:
        d_in: width of each read.
        used: tokens to train on.
        tokens: tokens held, with those that are not used.
        keep: `contexts` or `rows`.
        settings: model, reads, corpus and how contexts were made of it.
        identity: a digest of the content.

    Raises:
        FileError: there is no store, or a shard is missing, cut short or damaged.
        SettingsError: the folders of several processes do not belong together.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.folder = Path(folder)
        parts = [self.folder] if (self.folder / NAME).exists() else sorted(self.folder.glob("rank-*-of-*"))
        if not parts:
            raise FileError(f"{self.folder} holds no store of activations: there is no {NAME}.")
        manifests = [Manifest.read(p) for p in parts]
        first = manifests[0]
        world = first.settings.get("world", 1)
        if parts != [self.folder] and len(parts) != world:
            raise FileError(f"{self.folder} holds the shares of {len(parts)} processes, but {world} harvested it.")
        shared = [{k: v for k, v in m.plan.items() if k != "rank"} for m in manifests]
        for part, plan in zip(parts, shared, strict=True):
            check_settings(plan, shared[0], f"the store {part}")
        self.settings: dict[str, Any] = first.settings
        self.d_in, self.keep, self.dtype = first.d_in, first.keep, first.dtype
        digest = hashlib.sha256()
        self._shards: list[tuple[Path, int, int]] = []
        for part, manifest in zip(parts, manifests, strict=True):
            missing = manifest.check(part, hashes=verify)
            if missing:
                raise FileError(
                    f"the shard {part / manifest.pieces[missing[0]].file} is missing: harvest again with the same "
                    "settings to have it made anew."
                )
            for piece in manifest.pieces:
                digest.update(piece.sha256.encode())
                self._shards.append((part / piece.file, piece.used, piece.contexts))
        self.identity = digest.hexdigest()
        self.used = sum(m.used for m in manifests)
        self.tokens = sum(p.tokens for m in manifests for p in m.pieces)
        self._open: dict[int, Shard] = {}

    def __repr__(self) -> str:
        """What is in it."""
        return (
            f"ActivationStore({self.folder}, {self.used} tokens of {self.settings['model']}, {self.d_in}, {self.dtype})"
        )

    def counts(self, what: str) -> list[int]:
        """For each shard its `rows` (tokens to use) or `contexts`."""
        return [used if what == "rows" else contexts for _, used, contexts in self._shards]

    def shard(self, index: int) -> Shard:
        """A shard, mapped into memory.

        Raises:
            FileError: it is missing or damaged.
        """
        if index not in self._open:
            self._open[index] = Shard(self._shards[index][0])
        return self._open[index]

    def close(self) -> None:
        """Let the maps of all shards go."""
        self._open.clear()

    def check_model(self, lens: Lens) -> None:
        """See that the activations are of this model.

        Raises:
            SettingsError: they are of another one, or its weights have changed.
        """
        if self.settings.get("fingerprint") != fingerprint(lens):
            raise SettingsError(
                f"the store {self.folder} was harvested from {self.settings.get('model')}, whose weights are not those "
                f"of {lens.name}."
            )

    def rows(
        self,
        *,
        batch: int,
        seed: int | None = 0,
        epochs: int | None = 1,
        window: int = 8,
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
    ) -> StoredRows:
        """The tokens to use, each once an epoch.

        Args:
            batch: rows of a batch, over all processes.
            seed: of the order: shards are shuffled, and the rows of `window` shards at a time all together. None for
                the order of the corpus.
            epochs: how often; None for ever.
            window: shards that are mixed.
            rank: this process; it gets every `world`-th row of each batch.
            world: how many processes share a batch. The rows of a batch do not depend on it.
            dtype: what they are handed out in; None for the store's own.
            device: where.

        Raises:
            SettingsError: an option is out of its range.
        """
        return StoredRows(self, batch, seed, epochs, window, rank, world, dtype, device)

    def contexts(
        self,
        *,
        batch: int,
        seed: int | None = 0,
        epochs: int | None = 1,
        window: int = 8,
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
    ) -> StoredContexts:
        """Whole contexts, padded on the right, each once an epoch; the options are those of `rows`.

        Raises:
            SettingsError: an option is out of its range, or the store holds only the tokens to use.
        """
        if self.keep != "contexts":
            raise SettingsError(
                f"the store {self.folder} was harvested with keep='rows': whole contexts are not in it."
            )
        return StoredContexts(self, batch, seed, epochs, window, rank, world, dtype, device)
