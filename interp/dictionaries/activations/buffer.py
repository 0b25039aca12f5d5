"""`MixingBuffer`: rows of many contexts, mixed.

The buffer holds at least `rows` rows. Each batch is drawn from all of them without replacement, and new contexts take
the places that became free: every row is handed out exactly once. (SAELens serves half of a shuffled buffer before it
fills it again.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.dictionaries.activations.batches import Contexts, Rows, Source, State, check_settings
from interp.errors import SettingsError

_PLACES = ("context", "position")


class MixingBuffer:
    """Batches of rows from a source of contexts or rows, mixed over a window; see `Source`.

    Its state holds the rows that are in it. At the end of the source it runs empty: the last batch may be shorter.

    Args:
        source: what is mixed; a model's stream is best put behind a `Prefetch`.
        rows: rows to mix over; a draw sees at least so many as long as the source lasts.
        batch: rows handed out at once.
        seed: of the draws.
        device: where the rows are held; None where the source makes them.
        dtype: what they are held in; None for the source's own.

    Raises:
        SettingsError: `batch` is below 1, or greater than `rows`.
    """

    def __init__(
        self,
        source: Source[Contexts] | Source[Rows],
        *,
        rows: int,
        batch: int,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= batch <= rows:
            raise SettingsError(f"a batch is at least 1 row and at most the buffer's; found {batch=}, {rows=}.")
        self.source, self.rows, self.batch, self.seed = source, rows, batch, seed
        self._device, self._dtype = device, dtype
        self._random = np.random.default_rng(seed)
        self._held: dict[str, Tensor] = {}
        self._count = 0
        self._ended = False

    @property
    def d_in(self) -> Mapping[str, int]:
        """Width of each read."""
        return self.source.d_in

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which rows come."""
        own = {"rows": self.rows, "batch": self.batch, "seed": self.seed, "dtype": str(self._dtype)}
        return {**own, "source": self.source.settings}

    def __len__(self) -> int:
        """Rows that are in it now."""
        return self._count

    def __iter__(self) -> MixingBuffer:
        """Itself."""
        return self

    def __next__(self) -> Rows:
        """The next batch."""
        while self._count < self.rows and not self._ended:
            self._take()
        if self._count == 0:
            raise StopIteration
        drawn = self._random.choice(self._count, min(self.batch, self._count), replace=False)
        device = self._held["context"].device
        index = torch.from_numpy(drawn).to(device)
        out = {k: v[index] for k, v in self._held.items()}
        self._close_gaps(drawn)
        values = {k: v for k, v in out.items() if k not in _PLACES}
        return Rows(values, out["context"], out["position"])

    def _take(self) -> None:
        try:
            item = next(self.source)
        except StopIteration:
            self._ended = True
            return
        rows = (item.rows() if isinstance(item, Contexts) else item).to(self._device, self._dtype)
        new = {**rows.values, "context": rows.context, "position": rows.position}
        size = self._count + len(rows)
        if not self._held or size > len(self._held["context"]):
            # Room for what is held and one item of the source: it grows once or twice.
            room = max(size, self.rows + len(rows))
            old, self._held = self._held, {k: v.new_empty(room, *v.shape[1:]) for k, v in new.items()}
            for k, v in old.items():
                self._held[k][: self._count] = v[: self._count]
        for k, v in new.items():
            self._held[k][self._count : size] = v
        self._count = size

    def _close_gaps(self, drawn: np.ndarray) -> None:
        """Rows from the end go to the places of those that were handed out."""
        left = self._count - len(drawn)
        holes = np.sort(drawn[drawn < left])
        movers = np.setdiff1d(np.arange(left, self._count), drawn[drawn >= left], assume_unique=True)
        device = self._held["context"].device
        to, source = torch.from_numpy(holes).to(device), torch.from_numpy(movers).to(device)
        for value in self._held.values():
            value[to] = value[source]
        self._count = left

    def state(self) -> State:
        """All of it: the source's place, the rows held, and the random state."""
        inner, tensors = self.source.state().within("source")
        own = {"kind": "buffer", "settings": self.settings, "random": self._random.bit_generator.state}
        tensors |= {f"held.{k}": v[: self._count].clone() for k, v in self._held.items()}
        return State({**own, "ended": self._ended, **inner}, tensors)

    def restore(self, state: State) -> None:
        """Go to a place.

        Raises:
            SettingsError: the state is of a buffer or a source with other settings.
        """
        check_settings(state.values.get("settings"), self.settings, "this state")
        self.source.restore(state.part("source"))
        held = {k.removeprefix("held."): v for k, v in state.tensors.items() if k.startswith("held.")}
        self._held = {k: v.to(self._device or v.device).clone() for k, v in held.items()}
        self._count = len(held["context"]) if held else 0
        self._random.bit_generator.state = state.values["random"]
        self._ended = state.values["ended"]

    def close(self) -> None:
        """Close the source, and give the rows' memory back."""
        self.source.close()
        self._held, self._count, self._ended = {}, 0, True
