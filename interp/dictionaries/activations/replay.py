"""A store read again: rows or contexts, each once an epoch, in an order that the seed decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from interp.dictionaries.activations.batches import Contexts, Rows, State, check_settings
from interp.dictionaries.activations.shard import Shard
from interp.errors import SettingsError

if TYPE_CHECKING:
    from interp.dictionaries.activations.store import ActivationStore

T = TypeVar("T")


class Replay(ABC, Generic[T]):
    """What rows and contexts have in common; see `Source`.

    The units (rows or contexts) of an epoch make one sequence: shards in a drawn order, and the units of each `window`
    of them in a drawn order. Batches are cut from it one after the other; the last of an epoch may be shorter. Its
    place is a pair of numbers, and does not depend on how many processes share the batches.
    """

    what: str

    def __init__(
        self,
        store: ActivationStore,
        batch: int,
        seed: int | None,
        epochs: int | None,
        window: int,
        rank: int,
        world: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if batch < 1 or window < 1 or not 0 <= rank < world or (epochs is not None and epochs < 1):
            raise SettingsError(
                f"batch, window and epochs are at least 1, rank is below world; found {batch=}, {window=}, {epochs=}, "
                f"{rank=}, {world=}."
            )
        if batch % world:
            raise SettingsError(f"a batch of {batch} cannot be shared by {world} processes alike.")
        self.store, self.batch, self.seed, self.epochs = store, batch, seed, epochs
        self.window, self.rank, self.world = window, rank, world
        self._dtype, self._device = dtype, device
        self._counts = store.counts(self.what)
        self._place = (0, 0)
        self._drawn: tuple[tuple[int, int], Tensor] | None = None

    @property
    def d_in(self) -> dict[str, int]:
        """Width of each read."""
        return dict(self.store.d_in)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which batches come."""
        own = {"batch": self.batch, "seed": self.seed, "epochs": self.epochs, "window": self.window}
        return {"replay": self.what, "store": self.store.identity, **own, "dtype": str(self._dtype)}

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-sum(self._counts) // self.batch)

    def __iter__(self) -> Replay[T]:
        """Itself."""
        return self

    def __next__(self) -> T:
        """The next batch: this process's part of it."""
        epoch, place = self._place
        total = sum(self._counts)
        if place >= total:
            epoch, place = epoch + 1, 0
        if total == 0 or (self.epochs is not None and epoch >= self.epochs):
            raise StopIteration
        end = min(place + self.batch, total)
        out = self._gather(self._units(epoch, place, end)[self.rank :: self.world])
        self._place = (epoch, end)
        return out

    def _units(self, epoch: int, begin: int, end: int) -> Tensor:
        """Units of a stretch of an epoch's sequence, as pairs (shard, unit of it)."""
        order = self._order(epoch, len(self._counts))
        found, place = [], 0
        for w in range(0, len(order), self.window):
            size = sum(self._counts[s] for s in order[w : w + self.window])
            if place < end and begin < place + size:
                drawn = self._mixed(epoch, w, order[w : w + self.window])
                found.append(drawn[max(begin - place, 0) : end - place])
            place += size
        return torch.cat(found)

    def _order(self, epoch: int, n: int, *more: int) -> list[int]:
        if self.seed is None:
            return list(range(n))
        return np.random.default_rng([self.seed, epoch, *more]).permutation(n).tolist()

    def _mixed(self, epoch: int, window: int, shards: list[int]) -> Tensor:
        if self._drawn is None or self._drawn[0] != (epoch, window):
            pairs = torch.cat(
                [torch.stack([torch.full((self._counts[s],), s), torch.arange(self._counts[s])], 1) for s in shards]
            )
            order = self._order(epoch, len(pairs), window + 1)
            self._drawn = (epoch, window), pairs[torch.tensor(order, dtype=torch.long)]
        return self._drawn[1]

    @abstractmethod
    def _gather(self, units: Tensor) -> T:
        """The batch of these units [unit, (shard, number in it)]."""

    def state(self) -> State:
        """The place behind the last batch."""
        return State({"kind": f"stored {self.what}", "settings": self.settings, "place": list(self._place)})

    def restore(self, state: State) -> None:
        """Go to a place.

        Raises:
            SettingsError: the state is of another store, or of other settings.
        """
        check_settings(state.values.get("settings"), self.settings, "this state")
        epoch, place = state.values["place"]
        self._place = (epoch, place)

    def close(self) -> None:
        """Let the maps of the store's shards go."""
        self.store.close()
        self._drawn = None


class StoredRows(Replay[Rows]):
    """Batches of rows of a store; made by `ActivationStore.rows`."""

    what = "rows"

    def _gather(self, units: Tensor) -> Rows:
        n = len(units)
        dtype = self._dtype
        values: dict[str, Tensor] = {}
        context, position = torch.empty(n, dtype=torch.long), torch.empty(n, dtype=torch.long)
        for s in units[:, 0].unique().tolist():
            shard = self.store.shard(s)
            to = (units[:, 0] == s).nonzero()[:, 0]
            token = shard.used[units[to, 1]]
            context[to], position[to] = shard.context[token], shard.position[token].long()
            for name, width in self.store.d_in.items():
                held = shard.values(name)
                if name not in values:
                    values[name] = torch.empty(n, width, dtype=dtype or held.dtype)
                values[name][to] = held[token].to(values[name].dtype)
        if not values:  # a share of the last batch may be empty
            values = {k: torch.empty(0, d, dtype=dtype or torch.float32) for k, d in self.store.d_in.items()}
        return Rows(values, context, position).to(self._device)


class StoredContexts(Replay[Contexts]):
    """Batches of whole contexts of a store; made by `ActivationStore.contexts`."""

    what = "contexts"

    def _gather(self, units: Tensor) -> Contexts:
        found: list[tuple[Shard, int]] = [(self.store.shard(s), c) for s, c in units.tolist()]
        lengths = [int(shard.length[c]) for shard, c in found]
        shape = (len(found), max(lengths, default=0))
        real, mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        document = torch.full(shape, -1)
        ids = torch.zeros(shape, dtype=torch.long) if found and found[0][0].ids is not None else None
        dtype = self._dtype or (found[0][0].values(next(iter(self.store.d_in))).dtype if found else torch.float32)
        values = {name: torch.zeros(*shape, width, dtype=dtype) for name, width in self.store.d_in.items()}
        for i, (shard, c) in enumerate(found):
            tokens = slice(int(shard.starts[c]), int(shard.starts[c + 1]))
            n = lengths[i]
            real[i, :n], mask[i, :n], document[i, :n] = True, shard.use[tokens], shard.document[tokens]
            if ids is not None and shard.ids is not None:
                ids[i, :n] = shard.ids[tokens]
            for name in values:
                values[name][i, :n] = shard.values(name)[tokens].to(dtype)
        number = torch.tensor([int(shard.number[c]) for shard, c in found], dtype=torch.long)
        return Contexts(values, mask, real, ids, document, number).to(self._device)
