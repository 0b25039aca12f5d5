"""Two batches of a sweep, what is patched in them and what is measured: data that both ways of sweeping share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit
from interp.errors import InputError
from interp.lens import Lens
from interp.reads import Read
from interp.tracing.grid import Cell, Group, Place, marked
from interp.tracing.metrics import Measure

INSIDE = {
    "attn_out": ("q", "k", "v", "scores", "pattern", "z", "attn_out"),
    "mlp_out": ("mlp_act", "mlp_out"),
    "mixer_out": ("mixer_out",),
}
"""What a module adds to the stream, and the sites that act through it alone."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One pair of batches.

    Attributes:
        lens: the model.
        source: where patched values come from.
        base: what is run with them.
        source_edits: edits of `embed` in the source run.
        base_edits: edits of `embed` in the base run.
        places: the sites.
        groups: the groups of positions.
        cells: the cells.
        measure: the metric.
        severed: what is held at its value in the base run beside what is patched, or None.
    """

    lens: Lens
    source: Batch
    base: Batch
    source_edits: Sequence[Edit]
    base_edits: Sequence[Edit]
    places: Sequence[Place]
    groups: Sequence[Group]
    cells: Sequence[Cell]
    measure: Measure
    severed: Place | None = None

    @cached_property
    def layers(self) -> tuple:
        """The layers of the main tower."""
        return self.lens.anatomy.towers[self.lens.anatomy.main].layers

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @cached_property
    def severable(self) -> tuple[int, ...]:
        """The layers in which something is held."""
        if self.severed is None:
            return ()
        return tuple(self.lens.layers_with(self.severed.site, tower=self.severed.tower))

    def severs(self, place: int, layers: Sequence[int], layer: int) -> bool:
        """Whether a layer is held where some layers of a place are patched: from the first on, but for the patches."""
        if self.severed is None or layer not in self.severable or layer < layers[0]:
            return False
        own, kind = self.places[place], INSIDE[self.severed.site]
        return layer not in layers or own.site not in kind or own.tower != self.severed.tower

    @property
    def measured(self) -> Read:
        """The last streams at the positions whose logits are measured."""
        return Read("resid_post", layers=(self.depth - 1,), positions=self.measure.positions)

    @cached_property
    def of_source(self) -> bool:
        """Whether every site has the encoder's positions."""
        return all(place.of_source for place in self.places)

    @cached_property
    def masks(self) -> Bool[Tensor, "group batch pos"]:
        """The columns of each group; none where every site has the encoder's positions."""
        if self.of_source:
            return torch.zeros(len(self.groups), *self.base.mask.shape, dtype=torch.bool, device=self.base.mask.device)
        return torch.stack([group.mask(self.base) for group in self.groups])

    def source_masks(self, width: int) -> Bool[Tensor, "group batch pos"]:
        """The positions of the encoder in each group, of which there are `width`.

        Raises:
            InputError: a group is not `all` and no mask of these positions.
        """
        mask = self.base.source_mask
        if mask is None or mask.shape[1] != width:
            mask = torch.ones(len(self.base), width, dtype=torch.bool, device=self.base.mask.device)
        found = []
        for group in self.groups:
            chosen = group.positions
            fits = chosen.dtype == torch.bool if isinstance(chosen, Tensor) else chosen == "all"
            if not fits:
                raise InputError(
                    f"cross-attention's keys and values have the encoder's positions: group {group.name!r} must be "
                    f"'all' or a mask [batch, {width}]."
                )
            found.append(marked(chosen, mask, None))
        return torch.stack(found)

    @cached_property
    def exists(self) -> Bool[Tensor, "group batch"]:
        """Which samples have each group."""
        if self.of_source:
            return torch.ones(len(self.groups), len(self.base), dtype=torch.bool)
        return self.masks.any(2).cpu()


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a sweep of one pair found.

    Attributes:
        values: the metric of every cell and sample; NaN where a sample does not have the positions.
        exists: which samples have the positions of each group.
        source: the metric of the source run.
        base: the metric of the base run.
        computed: how many (cell, sample) were computed; the others cannot differ from the base run.
        way: how it was computed, in words.
    """

    values: Float[Tensor, "cell batch"]
    exists: Bool[Tensor, "group batch"]
    source: Float[Tensor, " batch"]
    base: Float[Tensor, " batch"]
    computed: int
    way: str
