"""Where the heads of a vision tower look, relative to where they look from.

Sources: Walmer, Suri, Gupta and Shrivastava 2023, "Teaching Matters: Investigating the Role of Supervision in Vision
Transformers", arXiv 2212.03862 (mean attention distance, aligned attention maps, offset-local heads), and Li et al.
2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt", arXiv 2303.13731 (strength at k
hops). With A the attention between patches, each row divided by its sum, and p the rows and columns of the patches,

    mass(d)     = mean over i of sum over j with p_j - p_i = d of A_ij      pairs(d) = the same with 1 for A_ij
    distance    = sum over d of mass(d) |d|                                 aligned(d) = mass(d) / pairs(d)
    profile(k)  = sum of mass(d) over d with max(|d_row|, |d_col|) = k
    centroid, spread = mean and root mean square distance from it, of aligned / sum of aligned

All of them follow from the one histogram over relative displacements: one scatter-add over each layer's attention,
which is dropped before the next layer's is made.

Departures from the code of Teaching Matters. Distances are in patches, and beside them as a multiple of the distance of
uniform attention (on a square of side one about 0.52), which pictures of any size share. Its aligned map divides by the
number of all queries and not of pictures; here every place is the mean over those queries that have a key there. Class,
distillation and register tokens are known for each family and left out, as queries and as keys. A query that has no
attention left on patches counts for nothing.

What it does not see: what stands in the patches. Sinks (a patch that all look at) make long distances with a wide
spread; near the edge a head cannot look where it looks elsewhere; far displacements rest on few queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attribution.common import entries_of
from interp.batch import Batch
from interp.errors import InputError, UnknownNameError, UnsupportedError
from interp.grids import TowerGrid, tower_patches
from interp.heads.common import head_grid, settings_of
from interp.heads.displacements import Displacements, ring_sums
from interp.lens import Lens
from interp.reads import Read
from interp.scores import HeadScores


def vision_patterns(lens: Lens, batch: Batch, *, score: str = "relative", memory: int = 2**28) -> HeadScores:
    """How far, how widely and in which direction each head of the vision tower looks.

    Args:
        lens: a model with a vision tower.
        batch: pictures.
        score: what ranks the heads: `distance relative spread offset dx dy local on_patches`; all are kept as extra
            columns. See `Displacements.scores`.
        memory: bytes of attention patterns held at a time.

    Returns:
        Scores [layer, head] of the tower `vision`.

    Raises:
        UnknownNameError: there is no such score.
        InputError: the batch holds no pictures, or one with a single patch.
        UnsupportedError: no vision tower, or one whose tokens have no fixed patch or whose patterns cannot be read.
    """
    return displacements(lens, batch, memory=memory).scores(score)


def displacements(lens: Lens, batch: Batch, *, memory: int = 2**28) -> Displacements:
    """The attention between patches of every head of the vision tower, by relative displacement.

    Args:
        lens: a model with a vision tower.
        batch: pictures. Each counts alone, as the tower takes it: a tile, where the processor cuts tiles.
        memory: bytes of attention patterns held at a time; at least one layer's are.

    Returns:
        The maps, and what follows from them.

    Raises:
        InputError: the batch holds no pictures, or one with a single patch.
        UnsupportedError: no vision tower, or one whose tokens have no fixed patch or whose patterns cannot be read.
    """
    sequences, width = _stream_shape(lens, batch)
    layers, counts, valid = head_grid(lens, "vision", "pattern")
    grid = tower_patches(lens.model.config, batch.inputs)
    if len(grid) != sequences * width:
        raise UnsupportedError(
            f"{lens.name}: its vision tower has {sequences} x {width} tokens, but {len(grid)} are known by place."
        )
    groups, rows, cols = _pictures(grid)
    count = max(1, memory // (4 * sequences * max(counts) * width**2))
    size = sum(len(g.sequences) for g in groups)
    number = sum(len(g.sequences) * len(g.row) for g in groups)
    plane = 2 * rows - 1, 2 * cols - 1
    mass = torch.zeros(*valid.shape, *plane, dtype=torch.float64)
    shape = (size, *valid.shape)
    distance, on_patches = torch.zeros(shape), torch.zeros(shape)
    rings = torch.zeros(*shape, max(rows, cols))
    far = _lengths(*plane)
    for layer, pattern in _patterns(lens, batch, layers, count):
        first = 0
        for group in groups:
            for sequence in group.sequences:
                part = pattern[sequence][:, group.position][:, :, group.position].float()
                whole = part.sum(-1)
                part = part / whole.clamp_min(torch.finfo(part.dtype).tiny)[..., None]
                found = displacement_sums(part, group.row, group.col, rows, cols).double().cpu()
                head, total = slice(0, len(found)), found.sum((1, 2)).clamp_min(1e-30)
                mass[layer, head] += found / number
                distance[first, layer, head] = ((found * far).sum((1, 2)) / total).float()
                rings[first, layer, head] = (ring_sums(found) / total[:, None]).float()
                on_patches[first, layer, head] = whole.mean(-1).cpu()
                first += 1
    pairs, uniform = torch.zeros(plane, dtype=torch.float64), []
    for group in groups:
        every = torch.ones(1, len(group.row), len(group.row))
        found = displacement_sums(every, group.row, group.col, rows, cols)[0].double()
        pairs += found * len(group.sequences) / number
        uniform += [float((found * far).sum() / found.sum())] * len(group.sequences)
    return Displacements(
        mass=mass.float(),
        pairs=pairs.float(),
        distance=distance,
        rings=rings,
        on_patches=on_patches,
        uniform=torch.tensor(uniform),
        settings=settings_of(lens, batch, method="vision_patterns", pictures=size, grid=[rows, cols]),
    )


def displacement_sums(
    pattern: Float[Tensor, "head query key"],
    row: Int[Tensor, " query"],
    col: Int[Tensor, " query"],
    rows: int,
    cols: int,
) -> Float[Tensor, "head down right"]:
    """Sums of attention between patches over all pairs with the same displacement of the key from the query.

    Args:
        pattern: attention, queries and keys being the same patches.
        row: the row of each patch.
        col: its column.
        rows: how many rows a grid can have.
        cols: how many columns.

    Returns:
        [head, 2 rows - 1, 2 cols - 1], the displacement zero in the middle.
    """
    down = row[None] - row[:, None] + rows - 1
    right = col[None] - col[:, None] + cols - 1
    place = (down * (2 * cols - 1) + right).flatten().to(pattern.device)
    out = pattern.new_zeros((2 * rows - 1) * (2 * cols - 1), len(pattern))
    out.index_add_(0, place, pattern.flatten(1).T.contiguous())
    return out.T.reshape(len(pattern), 2 * rows - 1, 2 * cols - 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Pictures whose patches stand at the same positions of their sequences."""

    sequences: list[int]
    position: Int[Tensor, " patch"]
    row: Int[Tensor, " patch"]
    col: Int[Tensor, " patch"]


def _pictures(grid: TowerGrid) -> tuple[list[_Group], int, int]:
    """The pictures of a batch in groups, and the rows and columns of the largest grid."""
    patch = torch.tensor([kind == "patch" for kind in grid.kind])
    groups: dict[tuple, _Group] = {}
    for picture in grid.image.unique().tolist():
        mine = patch & (grid.image == picture)
        places = [x[mine] for x in (grid.position, grid.row, grid.col)]
        if len(places[0]) < 2:
            raise InputError(f"picture {picture} has {len(places[0])} patches: nothing lies apart in it.")
        key = tuple(tuple(x.tolist()) for x in places)
        groups.setdefault(key, _Group([], *places)).sequences.append(int(grid.sequence[mine][0]))
    found = [*groups.values()]
    return found, *(1 + max(int(getattr(g, name).max()) for g in found) for name in ("row", "col"))  # type: ignore[return-value]


def _stream_shape(lens: Lens, batch: Batch) -> tuple[int, int]:
    """Rows and columns of the vision tower's stream; by running it the tower is found, where text alone did not do."""
    if not any(name.startswith("pixel") for name in batch.inputs):
        raise InputError(f"the batch holds no pictures: its inputs are {sorted(batch.inputs)}.")
    read = Read("resid_pre", layers=(0,), tower="vision")
    try:
        found = lens.run(batch, read).values[read, 0].shape
    except UnknownNameError as error:
        raise UnsupportedError(f"{lens.name} has no vision tower: {error}") from error
    return found[0], found[1]


def _patterns(lens: Lens, batch: Batch, layers: Sequence[int], count: int) -> Iterator[tuple[int, Tensor]]:
    """The pattern of each layer, `count` layers to a run, each run entered where it begins."""
    parts = [list(layers[i : i + count]) for i in range(0, len(layers), count)]
    entries = entries_of(lens, batch, [p[0] for p in parts], "vision") if len(parts) > 1 else {}
    for part in parts:
        read = Read("pattern", layers=tuple(part), tower="vision")
        trace = lens.run(batch, read, entry=entries.pop(part[0], None))
        values = dict(trace.values)
        del trace
        for layer in part:
            yield layer, values.pop((read, layer))


def _lengths(down: int, right: int) -> Float[Tensor, "down right"]:
    """The length of each displacement."""
    rows, cols = torch.arange(down).double() - down // 2, torch.arange(right).double() - right // 2
    return (rows.square()[:, None] + cols.square()[None]).sqrt()
