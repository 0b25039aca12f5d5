"""The base run of a sweep, kept: its streams, its keys and values, and the layers to be called behind them."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.errors import UnsupportedError
from interp.reads import Positions, Read
from interp.tracing.metrics import columns_of
from interp.tracing.pair import Pair
from interp.tracing.reach import first_columns, keeps_keys

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


class BaseRun:
    """The run that is patched.

    Attributes:
        reach: for each column the first one that has to be computed when it changes [batch, pos].
        first: the first column that any cell changes; what is kept begins there.
        width: number of columns.
        where: the columns from the first on, as positions.
        streams: the stream that enters each layer, and the one that leaves the last, from the first column on.
        columns: the columns that are measured [batch, n].
        finals: the last streams there [batch, n, d_model].
        entering: the stream that enters the first layer [batch, pos, d_model].
        stepper: the layers.
        sources: number of the encoder's positions; 0 without one.
        tail: the first measured column, where the measured ones are the last few of every sample; else None.

    Raises:
        UnsupportedError: the layers cannot be called alone, or do not give then what the run gave.
    """

    def __init__(self, pair: Pair) -> None:
        lens, last = pair.lens, pair.depth - 1
        if lens.anatomy.unembed is None:
            raise UnsupportedError("the head is not a final norm and one projection.")
        self.pair, self.reach = pair, first_columns(lens, pair.base)
        touched = pair.masks.any(0)
        if any(place.of_source for place in pair.places):
            touched = torch.ones_like(touched)
        self.width = touched.shape[1]
        self.first = int(torch.where(touched, self.reach, self.width - 1).amin())
        kept = torch.zeros_like(touched)
        kept[:, self.first :] = True
        self.where: Positions = kept if self.first else "all"
        streams = Read("resid_pre", positions=self.where)
        end = Read("resid_post", layers=(last,), positions=self.where)
        self.columns, self.measured = columns_of(pair.measure, pair.base), pair.measured
        # A state by layer, which recurrent layers keep, is of no use for columns.
        cache = not any("mixer" in x.branches for x in pair.layers) and keeps_keys(lens, pair.base)
        self.input = Read("resid_pre", layers=(0,))
        run = lens.run(
            pair.base, [streams, end, self.measured, self.input], pair.base_edits, cache=cache, to=touched.device
        )
        self.streams = [run.values[streams, i] for i in range(pair.depth)] + [run.values[end, last]]
        self.finals, self.entering = run.values[self.measured, last], run.values[self.input, 0]
        self.stepper = lens.stepper(pair.base, run.cache)
        encoded = getattr(run.cache, "encoder_outputs", None)
        self.sources = 0 if encoded is None else encoded.shape[1]
        ends = torch.arange(self.width - self.columns.shape[1], self.width, device=touched.device)
        alone = bool((self.columns == ends).all()) and bool((self.reach[:, ends] == ends).all())
        self.tail: int | None = int(ends[0]) if alone and run.cache is not None else None
        self._prove()

    def _prove(self) -> None:
        """The layers, called alone, give what they gave in the run: behind few and behind many columns."""
        largest = _TOLERANCE.get(self.pair.lens.dtype, 5e-2)
        some = {max(self.first, c) for c in (0, self.width // 2, self.width - 4, self.width - 1)}
        for start in sorted(some & set(self.reach.unique().tolist())):
            error = self._error(start)
            if not error <= largest and not self.stepper.joins:
                self.stepper.joins = True
                error = self._error(start)
            if not error <= largest:
                raise UnsupportedError(f"its layers, called alone behind column {start}, differ by {error:.1e}.")

    def _error(self, start: int) -> float:
        """The largest difference of a layer's output, over the largest value of what it gave in the run."""
        base = self.pair.base
        some = torch.tensor(sorted({0, int(base.lengths.argmin())}), device=base.mask.device)
        if any(x.adjusted for x in self.pair.layers):  # at columns that differ between samples
            some = torch.arange(len(base), device=base.mask.device)
        rows, real, skip = self.stepper.rows(some, start), base.mask[some][:, start:], start - self.first
        worst = 0.0
        for layer in range(self.pair.depth if bool(real.any()) else 0):
            found = rows.step(layer, self.streams[layer][some, skip:])[real].double()
            wanted = self.streams[layer + 1][some, skip:][real].double()
            error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
            worst = worst if error <= worst else error  # a NaN stays
        return worst

    def unlike(self, source: Tensor) -> Bool[Tensor, "batch pos"]:
        """The columns from the first on in which the two runs can differ at all.

        Args:
            source: the stream that enters the first layer in the source run, all its columns.
        """
        pair, every = self.pair, torch.ones_like(self.reach[:, self.first :], dtype=torch.bool)
        if self.sources and (pair.base_edits or pair.source_edits):
            return every  # the encoder's embeddings may be among them
        tokens = ("decoder_input_ids",) if self.sources else ("input_ids",)
        for name, value in pair.base.inputs.items():
            held = pair.source.inputs.get(name)
            # Tokens and pictures show in the first stream; masks, grids and sounds reach layers in other ways.
            shown = name in tokens or (name.startswith("pixel") and pair.base.image_mask is not None)
            if isinstance(value, Tensor) and not shown and not (isinstance(held, Tensor) and torch.equal(value, held)):
                return every
        differ = (source != self.entering).any(-1)
        begin = torch.where(differ, self.reach, self.width).amin(1)
        return torch.arange(self.first, self.width, device=differ.device) >= begin[:, None]
