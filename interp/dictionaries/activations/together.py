"""`Together`: several sources as one, such as the shares of several processes in a single one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from interp.dictionaries.activations.batches import Contexts, Rows, Source, State, check_settings
from interp.errors import SettingsError


class Together:
    """Each batch is one batch of every source, in order; see `Source`.

    A single process that puts the shares of `n` processes together trains on the same rows in each step as these do:

        Together([MixingBuffer(ActivationStream(..., rank=r, world=2), rows=..., batch=2048) for r in range(2)])

    Contexts are padded to the longest.
    It ends when all sources have ended; before that, a source that has ended is left out.

    Args:
        sources: sources of rows, or of contexts, with the same reads.

    Raises:
        SettingsError: there are none, or their reads differ.
    """

    def __init__(self, sources: Sequence[Source[Rows]] | Sequence[Source[Contexts]]) -> None:
        self.sources = list(sources)
        if not self.sources or any(dict(s.d_in) != dict(self.sources[0].d_in) for s in self.sources):
            raise SettingsError(
                f"sources to put together have the same reads; found {[dict(s.d_in) for s in sources]}."
            )

    @property
    def d_in(self) -> Mapping[str, int]:
        """Width of each read."""
        return self.sources[0].d_in

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the sources."""
        return {"sources": [s.settings for s in self.sources]}

    def __iter__(self) -> Together:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """One batch of every source: rows, or contexts."""
        found: list[Any] = [item for item in (next(s, None) for s in self.sources) if item is not None]
        if not found:
            raise StopIteration
        if isinstance(found[0], Contexts):
            return Contexts.joined(found)
        values = {k: torch.cat([r.values[k] for r in found]) for k in found[0].values}
        return Rows(values, torch.cat([r.context for r in found]), torch.cat([r.position for r in found]))

    def state(self) -> State:
        """The places of all sources."""
        values: dict[str, Any] = {"kind": "together", "settings": self.settings}
        tensors: dict[str, torch.Tensor] = {}
        for i, source in enumerate(self.sources):
            inner, more = source.state().within(str(i))
            values |= inner
            tensors |= more
        return State(values, tensors)

    def restore(self, state: State) -> None:
        """Go to a place.

        Raises:
            SettingsError: the state is of other sources.
        """
        check_settings(state.values.get("settings"), self.settings, "this state")
        for i, source in enumerate(self.sources):
            source.restore(state.part(str(i)))

    def close(self) -> None:
        """Close all sources."""
        for source in self.sources:
            source.close()
