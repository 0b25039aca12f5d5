"""Patches as edits: in some rows of a run, chosen columns and heads of a site are set to those of the source run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.edits import Edit, Where
from interp.errors import EditError
from interp.tracing.grid import EVERY, Place


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """One site of one layer, patched in some rows.

    Attributes:
        place: the site.
        layer: the layer.
        rows: the rows [n].
        samples: the sample that each row is a copy of [n].
        heads: the head of each row [n], or `EVERY`.
        mask: the columns of each row [n, pos], over the whole width; for `pattern` and `scores` the queries.
        source: the source run's values of every sample, for the last columns of the width at least; or of `scores` the
            keys that are cut off [sample, key], as bools.
    """

    place: Place
    layer: int
    rows: Int[Tensor, " n"]
    samples: Int[Tensor, " n"]
    heads: Int[Tensor, " n"]
    mask: Bool[Tensor, "n pos"]
    source: Tensor

    def edit(self) -> Edit:
        """The patch as an edit."""

        def change(value: Tensor, where: Where) -> Tensor:
            rows = self.rows.to(value.device)
            new = self._patched(value, rows)
            if self.source.dtype == torch.bool:
                self._seeing(value.index_select(0, rows), new, where)
            return value.index_copy(0, rows, new)

        return Edit(self.place.read([self.layer]), change, "patch_sweep")

    def _patched(self, value: Tensor, rows: Tensor) -> Tensor:
        by_query = self.place.site in ("pattern", "scores")
        position, head = (2, 1) if by_query else (1, 2 if value.ndim == 4 else None)
        count, device = value.shape[position], value.device
        mask = self.mask[:, self.mask.shape[1] - count :].to(device)
        shape = [1] * value.ndim
        shape[0], shape[position] = mask.shape
        mask = mask.reshape(shape)
        if head is not None and bool((self.heads != EVERY).any()):
            heads = self.heads.to(device)[:, None]
            chosen = (heads == EVERY) | (heads == torch.arange(value.shape[head], device=device))
            shape = [1] * value.ndim
            shape[0], shape[head] = chosen.shape
            mask = mask & chosen.reshape(shape)
        samples, old = self.samples.to(self.source.device), value.index_select(0, rows)
        if self.source.dtype == torch.bool:
            keys = self.source.index_select(0, samples).to(device)
            return old.masked_fill(mask & keys[:, None, None, :], -torch.inf)
        source = self.source.narrow(position, self.source.shape[position] - count, count)
        return torch.where(mask, source.index_select(0, samples).to(value), old)

    def _seeing(self, old: Tensor, new: Tensor, where: Where) -> None:
        """Refuse to leave a query nothing to look at."""
        blind = (new == -torch.inf).all(-1) & ~(old == -torch.inf).all(-1)
        if bool(blind.any()):
            row, _, query = blind.nonzero()[0].tolist()
            raise EditError(
                f"in layer {self.layer} the query at column {int(where.columns[0, query])} of sample "
                f"{int(self.samples[row])} would be left with no key at all; leave it one (itself, or the first token)."
            )
