"""Which rows of a sweep travel together: those with nearly the same first column, as many as memory holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from interp.estimate import free_bytes
from interp.lens import Lens

# What calling a layer costs beside its tokens, counted in tokens: on a CPU about what reading its weights takes, on a
# GPU the time in which it would have computed many more.
_CALL = {"cpu": 24, "cuda": 1024}
# More tokens at once are slower on a CPU, whose caches they do not fit.
_TOKENS = {"cpu": 1024}
_SHARE, _MOST = 4, 2**31


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """How much may be computed at once.

    Attributes:
        rows: the most rows of a pass, or None.
        memory: bytes that a pass may take, as far as they can be foreseen.
        tokens: the most tokens that are better computed at once than one after the other, or None.
    """

    rows: int | None
    memory: int
    tokens: int | None = None

    def count(self, bytes_each: int, columns: int) -> int:
        """How many rows a pass may have, each of this many bytes and columns."""
        fits = max(1, self.memory // max(1, bytes_each))
        if self.rows is not None:
            return min(self.rows, fits)
        return fits if self.tokens is None else min(fits, max(1, self.tokens // columns))


def limits_of(lens: Lens, rows: int | None, memory: int | None) -> Limits:
    """The limits of a sweep; `memory` is found where it is None."""
    device = lens.input_device
    return Limits(rows, _free(device) if memory is None else memory, _TOKENS.get(device.type))


def _free(device: torch.device) -> int:
    """Bytes for a pass: a part of the memory that is free where the model is, and no more than 2 GiB."""
    free = free_bytes(device)
    if device.type == "cuda":
        return min(8 * _MOST, free // 2)
    return min(_MOST, max(2**26, free // _SHARE))


def shared_starts(starts: np.ndarray, work: np.ndarray, width: int, device: str) -> np.ndarray:
    """For each row the column at which its pass begins, not behind its own.

    Rows that begin early cost many columns, and each beginning costs its own calls of the layers: the starts are chosen
    so that the sum is least.

    Args:
        starts: the first column that each row needs.
        work: how many layers each row goes through.
        width: number of columns.
        device: the kind of device.
    """
    known, where = np.unique(starts, return_inverse=True)
    if len(known) < 2:
        return starts
    load = np.bincount(where, weights=work)
    calls = np.zeros(len(known))
    np.maximum.at(calls, where, work)
    total = np.concatenate([[0.0], np.cumsum(load)])
    price = _CALL.get(device, _CALL["cuda"])
    # best[j]: the least cost of the rows of the first j starts; each group begins at the first of its starts.
    best, first = np.full(len(known) + 1, np.inf), np.zeros(len(known) + 1, dtype=int)
    best[0] = 0.0
    for j in range(1, len(known) + 1):
        most = np.maximum.accumulate(calls[:j][::-1])[::-1]
        cost = best[:j] + (total[j] - total[:j]) * (width - known[:j]) + price * most
        first[j] = int(cost.argmin())
        best[j] = cost[first[j]]
    shared = np.empty(len(known), dtype=starts.dtype)
    j = len(known)
    while j:
        shared[first[j] : j] = known[first[j]]
        j = first[j]
    return shared[where]


def passes(starts: np.ndarray, boundaries: np.ndarray, count: Callable[[int], int]) -> list[tuple[int, np.ndarray]]:
    """Rows with the same start in the order in which they join, cut into pieces of nearly equal size.

    Args:
        starts: the column at which each row's pass begins.
        boundaries: the layer at which each row joins.
        count: how many rows a pass with a start may have.

    Returns:
        For each pass its start and its rows.
    """
    out: list[tuple[int, np.ndarray]] = []
    for start in np.unique(starts).tolist():
        rows = np.flatnonzero(starts == start)
        rows = rows[np.argsort(boundaries[rows], kind="stable")]
        pieces = -(-len(rows) // count(start))
        out += [(start, piece) for piece in np.array_split(rows, pieces)]
    return out
