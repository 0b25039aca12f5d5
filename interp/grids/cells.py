"""The pieces a patch map is made of: spans along an axis, grids of tokens, tokens without a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cells:
    """Tokens of one image in the order of the stream.

    Attributes:
        box: pixels of the original image: left, top, right, bottom [n, 4].
        row: row in the token's grid [n], -1 without one.
        col: column in the token's grid [n], -1 without one.
        kind: see `interp.patches.Patches`.
    """

    box: Float[Tensor, "n 4"]
    row: Int[Tensor, " n"]
    col: Int[Tensor, " n"]
    kind: tuple[str, ...]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.kind)


def axis(tiles: int, cells: int, cell: float, tile: float) -> Float[Tensor, "n 2"]:
    """Begin and end of every cell along an axis of tiles laid side by side, in processed pixels.

    Args:
        tiles: tiles along this axis.
        cells: cells in each tile; what is left of the tile behind them is seen by no token.
        cell: pixels of a cell.
        tile: pixels of a tile.
    """
    start = torch.arange(tiles, dtype=torch.float64)[:, None] * tile
    low = (start + torch.arange(cells, dtype=torch.float64) * cell).flatten()
    return torch.stack([low, low + cell], 1)


def grid(
    kind: str,
    ys: Float[Tensor, "rows 2"],
    xs: Float[Tensor, "cols 2"],
    *,
    top: int = 0,
    left: int = 0,
    breaks: bool = False,
) -> Cells:
    """A grid of tokens, row by row.

    Args:
        kind: kind of the tokens.
        ys: begin and end of each row in pixels of the original image.
        xs: begin and end of each column.
        top: number of the first row.
        left: number of the first column.
        breaks: whether a token that stands for the row follows each row.
    """
    rows, cols = len(ys), len(xs)
    row = torch.arange(rows)[:, None].expand(rows, cols)
    col = torch.arange(cols)[None].expand(rows, cols)
    box = torch.stack([xs[col, 0], ys[row, 0], xs[col, 1], ys[row, 1]], -1)
    row, col = row + top, col + left
    kinds = [kind] * cols
    if breaks:
        ends = torch.stack([xs[:, 0].min().expand(rows), ys[:, 0], xs[:, 1].max().expand(rows), ys[:, 1]], -1)
        box = torch.cat([box, ends[:, None]], 1)
        row = torch.cat([row, row[:, :1]], 1)
        col = torch.cat([col, torch.full((rows, 1), -1)], 1)
        kinds.append("break")
    return Cells(box.reshape(-1, 4), row.reshape(-1), col.reshape(-1), tuple(kinds) * rows)


def whole(kind: str, size: Size, count: int = 1) -> Cells:
    """Tokens that stand for the whole image of `size` (width, height) and have no place in a grid."""
    none = torch.full((count,), -1)
    box = torch.tensor([[0.0, 0.0, *size]], dtype=torch.float64).expand(count, 4)
    return Cells(box, none, none, (kind,) * count)


def join(parts: Sequence[Cells], size: Size) -> Cells:
    """The parts one after the other, their boxes clipped to the image of `size` (width, height).

    A cell that lies in padding only is left with an empty box at the edge.
    """
    limit = torch.tensor([*size, *size], dtype=torch.float64)
    box = torch.minimum(torch.cat([p.box for p in parts]).clamp_min(0), limit)
    kind = tuple(k for p in parts for k in p.kind)
    return Cells(box, torch.cat([p.row for p in parts]), torch.cat([p.col for p in parts]), kind)


def tiled(kind: str, size: Size, rows: int, cols: int, ys: Tensor, xs: Tensor) -> list[Cells]:
    """The tiles of an image that was stretched over a canvas of rows x cols tiles, row by row.

    Args:
        kind: kind of the tokens.
        size: (width, height) of the image.
        rows: tiles from top to bottom.
        cols: tiles from left to right.
        ys: rows of the canvas in fractions of its height [rows * n, 2].
        xs: columns of the canvas in fractions of its width [cols * m, 2].
    """
    n, m = len(ys) // rows, len(xs) // cols
    ys, xs = ys * size[1], xs * size[0]
    return [
        grid(kind, ys[r * n : (r + 1) * n], xs[c * m : (c + 1) * m], top=r * n, left=c * m)
        for r in range(rows)
        for c in range(cols)
    ]
