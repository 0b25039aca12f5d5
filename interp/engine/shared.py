"""Attention of many rows that share the keys and values of a prefix, which are not copied for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from interp.engine.attention import AttentionCall, attention_pattern, check_options, finished, widened

LONG = 64
"""Prefixes below this length are joined to the rows' own keys."""


class Unfit(Exception):
    """The call does not have the form that is expected of a call behind a prefix."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """Keys and values of the columns before the rows' own, and which sample's each row has.

    Attributes:
        keys: [sample, kv_head, prefix, d_head].
        values: [sample, kv_head, prefix, d_value].
        samples: the sample of each row [row].
    """

    keys: Float[Tensor, "sample kv_head prefix d_head"]
    values: Float[Tensor, "sample kv_head prefix d_value"]
    samples: Int[Tensor, " row"]

    def pays(self, n_heads: int, columns: int) -> bool:
        """Whether the scores of the rows, which are held, are smaller than the copies that are spared."""
        _, n_kv, length, d_head = self.keys.shape
        return length >= LONG and 3 * columns * n_heads <= n_kv * (d_head + self.values.shape[-1])

    def attend(self, call: AttentionCall, delegate: Callable[[AttentionCall], tuple]) -> tuple:
        """Attention over the prefix and the rows' own keys, which are all that the call holds.

        Raises:
            Unfit: the call's mask is not one over prefix and own keys.
        """
        check_options(call.options, call.module)
        self._check(call)
        (size, n_heads, columns, _), (_, n_kv, length, _) = call.query.shape, self.keys.shape
        groups, own = n_heads // n_kv, call.key.shape[2]
        query = widened(call.query).reshape(size, n_kv, groups * columns, -1)
        scores = query.new_empty(size, n_kv, groups * columns, length + own)
        scores[..., length:] = query @ widened(call.key).transpose(-1, -2)
        some = [(s, (self.samples == s).nonzero()[:, 0]) for s in self.samples.unique().tolist()]
        for sample, rows in some:
            folded = query[rows].transpose(0, 1).flatten(1, 2)  # one product for all rows of the sample
            found = folded @ widened(self.keys[sample]).transpose(-1, -2)
            scores[rows, ..., :length] = found.unflatten(1, (len(rows), -1)).transpose(0, 1)
        seen = call.key[:, :, :1].expand(-1, -1, length + own, -1)  # only its shape is looked at
        whole = AttentionCall(call.module, call.query, seen, call.value, call.mask, call.options)
        scores = finished(scores.view(size, n_heads, columns, -1), whole)
        pattern = attention_pattern(scores, whole, closed=call.mask is not None).to(call.value.dtype)
        pattern = pattern.view(size, n_kv, groups * columns, -1)
        mixed = pattern[..., length:] @ call.value
        for sample, rows in some:
            folded = pattern[rows, ..., :length].transpose(0, 1).flatten(1, 2)
            found = folded @ self.values[sample].to(folded)
            mixed[rows] += found.unflatten(1, (len(rows), -1)).transpose(0, 1)
        return mixed.view(size, n_heads, columns, -1).transpose(1, 2).contiguous(), None

    def _check(self, call: AttentionCall) -> None:
        columns, own, length = call.query.shape[2], call.key.shape[2], self.keys.shape[2]
        fits = own == columns and call.key.shape[1] == self.keys.shape[1] and len(self.samples) == len(call.query)
        if isinstance(call.mask, Tensor):
            fits = fits and call.mask.ndim == 4 and call.mask.shape[2:] == (columns, length + own)
        else:
            fits = fits and call.mask is None and columns == 1  # a single query sees everything
        if not fits:
            raise Unfit
