"""The cells of a sweep: a site, a layer (or a window of layers), a head and a group of positions each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.batch import Batch, select
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError, unknown
from interp.lens import Lens
from interp.reads import Positions, Read, check_positions

Heads = Literal["each", "all"] | int | Sequence[int]
Groups = Literal["each", "all", "last", "image", "text"] | int | Sequence[int] | Mapping[str, Positions]

EVERY = -1
"""The head of a cell that patches all heads of its site, or whose site has none."""


@dataclass(frozen=True, slots=True)
class Place:
    """A site of one tower.

    Attributes:
        site: its name.
        tower: `cross` for cross-attention; None for the main tower.
    """

    site: str
    tower: str | None

    def __str__(self) -> str:
        return f"{self.tower}:{self.site}" if self.tower else self.site

    @property
    def by_head(self) -> bool:
        """Whether the site has heads."""
        return Read(self.site).row.head_axis is not None

    @property
    def of_source(self) -> bool:
        """Whether its positions are those of the encoder."""
        return self.tower == "cross" and self.site in ("k", "v")

    def read(self, layers: Sequence[int], positions: Positions = "all") -> Read:
        """The read of these layers."""
        return Read(self.site, layers=tuple(layers), tower=self.tower, positions=positions)


@dataclass(frozen=True, slots=True)
class Cell:
    """What one run of the naive loop patches.

    Attributes:
        place: number of the place.
        layer: the layer, or the middle of the window.
        layers: the layers that are patched, from below.
        head: the head, or `EVERY`.
        group: number of the group of positions.
    """

    place: int
    layer: int
    layers: tuple[int, ...]
    head: int
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Positions that are patched together.

    Attributes:
        name: the name, or the position's number as text.
        positions: which they are.
        single: whether it is one position of a grid; samples that are shorter do without it.
    """

    name: str
    positions: Positions
    single: bool = False

    def mask(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """The columns of each sample that belong to it."""
        if self.single:
            assert isinstance(self.positions, int)
            ranks = batch.mask.long().cumsum(1) - 1
            return batch.mask & (ranks == self.positions)
        return marked(self.positions, batch.mask, batch)


def marked(positions: Positions, mask: Tensor, batch: Batch | None) -> Bool[Tensor, "batch pos"]:
    """Chosen columns of a stream, marked."""
    if isinstance(positions, str) and positions == "all":
        return mask
    found = select(positions, mask, batch)
    out = torch.zeros_like(mask)
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(found.index)
    out[rows[found.valid], found.index[found.valid]] = True
    return out & mask


def places_of(lens: Lens, sites: str | Sequence[str]) -> list[Place]:
    """The sites of a sweep.

    Raises:
        UnknownNameError: no such site or tower.
        UnsupportedError: a site of another tower than the main one, or one that cannot be patched.
        SettingsError: no site, a site twice, or a read that chooses more than its site.
    """
    main = lens.anatomy.main
    if main not in ("text", "decoder") or (lens.anatomy.unembed is None and "logits" in lens.anatomy.refused):
        raise UnsupportedError(f"{lens.name}: patching is measured at the logits of a language model; it has none.")
    places: list[Place] = []
    for name in [sites] if isinstance(sites, str) else sites:
        read = Read.of(name)
        if str(read.but(tower=None)) != read.site:
            raise SettingsError(
                f"sites are names such as 'attn_out' or 'cross:z'; choose the rest apart, not {name!r}."
            )
        tower, kind = lens.anatomy.tower(read.tower)
        if tower.name != main:
            raise UnsupportedError(
                f"{name!r}: what is patched lies in tower {main!r} or 'cross', not in {tower.name!r}."
            )
        if not read.row.per_layer or not read.row.editable:
            raise UnsupportedError(f"{name!r} cannot be patched layer by layer.")
        places.append(Place(read.site, "cross" if kind == "cross" else None))
    if not places or len(set(places)) != len(places):
        raise SettingsError(f"sites must be different names, at least one; got {list(map(str, places))}.")
    return places


def groups_of(positions: Groups, batches: Sequence[Batch]) -> list[Group]:
    """The groups of positions of a sweep.

    Raises:
        UnknownNameError: no such name.
        SettingsError: an empty list, a position twice, or something that is neither.
        InputError: a position that no sample has.
    """
    if isinstance(positions, Mapping):
        if not positions or not all(isinstance(name, str) and name for name in positions):
            raise SettingsError("groups of positions are a mapping from names to positions, with at least one.")
        return [Group(name, check_positions(chosen)) for name, chosen in positions.items()]
    lengths = torch.cat([b.lengths for b in batches]).tolist()
    if isinstance(positions, str):
        if positions == "each":
            return [Group(str(i), i, True) for i in range(max(lengths))]
        if positions not in ("all", "last", "image", "text"):
            raise unknown("positions", positions, ("each", "all", "last", "image", "text", "ints", "a mapping"))
        return [Group(positions, positions)]
    listed = [positions] if type(positions) is int else positions
    if not isinstance(listed, (list, tuple, range)) or not listed or not all(type(p) is int for p in listed):
        raise SettingsError(
            f"positions={positions!r} is no name, int or list of ints; groups are a mapping from names to positions."
        )
    if min(listed) < 0 and len(set(lengths)) > 1:
        raise InputError("positions that count from the end need prompts of one length; use a mapping for groups.")
    found = [p + max(lengths) if p < 0 else p for p in listed]
    wrong = [p for p, i in zip(listed, found, strict=True) if not 0 <= i < max(lengths)]
    if wrong:
        raise InputError(
            f"position {wrong[0]} does not exist: the longest prompt has {max(lengths)} tokens (0 to "
            f"{max(lengths) - 1})."
        )
    if len(set(found)) != len(found):
        raise SettingsError(f"positions={list(listed)} names one of them twice.")
    return [Group(str(i), i, True) for i in found]


def cells_of(
    lens: Lens,
    places: Sequence[Place],
    groups: Sequence[Group],
    layers: int | Sequence[int] | None,
    heads: Heads,
    window: int,
) -> list[Cell]:
    """All cells, in the order of places, layers, heads and groups.

    Raises:
        UnknownNameError: a layer or head does not exist.
        UnsupportedError: a layer cannot give a site.
        SettingsError: a window below 1, heads of sites that have none, or a layer or head twice.
    """
    if window < 1:
        raise SettingsError(f"window is the number of layers that are patched together, at least 1; got {window}.")
    if heads not in ("each", "all") and not any(p.by_head for p in places):
        raise SettingsError(f"heads={heads!r}: none of the sites {', '.join(map(str, places))} has heads.")
    cells = []
    for number, place in enumerate(places):
        able = lens.layers_with(place.site, tower=place.tower)
        chosen = able if layers is None else _layers(lens, place, layers)
        for layer in chosen:
            low, high = layer - window // 2, layer + (window + 1) // 2
            patched = tuple(i for i in able if low <= i < high)
            for head in _heads(lens, place, patched, heads):
                cells += [Cell(number, layer, patched, head, group) for group in range(len(groups))]
    return cells


def _layers(lens: Lens, place: Place, layers: int | Sequence[int]) -> list[int]:
    read = place.read([layers] if isinstance(layers, int) else layers)  # says what is no list of layers
    tower, _ = lens.anatomy.tower(place.tower)
    found = [tower.layer(i).index for i in read.layers or ()]
    if len(set(found)) != len(found):
        raise SettingsError(f"layers={list(read.layers or ())} names one of them twice.")
    for i in found:
        reason = lens.refusal(place.site, i, tower=place.tower)
        if reason is not None:
            raise UnsupportedError(reason)
    return found


def _heads(lens: Lens, place: Place, layers: Sequence[int], heads: Heads) -> list[int]:
    if not place.by_head or (isinstance(heads, str) and heads == "all"):
        return [EVERY]
    parts = [lens.anatomy.attention(place.tower, i, place.site) for i in layers]
    keys = place.site in ("k", "v")
    count = min(part.n_kv_heads if keys else part.n_heads for part in parts)
    if isinstance(heads, str):
        if heads != "each":
            raise unknown("heads", heads, ("each", "all", "ints"))
        return list(range(count))
    listed = [heads] if type(heads) is int else list(heads)  # type: ignore[arg-type]
    for h in listed:
        if type(h) is not int or not -count <= h < count:
            what = "key/value heads" if keys else "heads"
            raise UnknownNameError(
                f"head {h} of layer {layers[0]} does not exist: the layer has {count} {what} (0 to {count - 1})."
            )
    found = [h % count for h in listed]
    if not found or len(set(found)) != len(found):
        raise SettingsError(f"heads={listed} is empty or names one of them twice.")
    return found
