"""`Patches`: where each image token of a batch looks, in pixels of the picture it came from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def picture_ids(config: Any) -> list[int]:
    """Ids of the tokens that stand for a picture in a prompt, whether or not they are filled with its features."""
    ids = [getattr(config, n, None) for n in ("image_token_id", "image_token_index")]
    return list(dict.fromkeys(i for i in ids if isinstance(i, int)))


@dataclass(frozen=True, slots=True)
class Patches:
    """One row for each image token, in the order of samples and columns.

    A token that covers no pixels of its own (a row break, a separator that carries image features, a query that
    looks at the whole image) has the box of all it stands for and the kind that says so.

    Attributes:
        sample: the sample that the token stands in [n].
        column: its column in the padded batch [n].
        image: which image of that sample [n].
        box: pixels of the original image: left, top, right, bottom [n, 4]; right and bottom excluded.
        row: row of the token in its grid [n]; -1 where it has none.
        col: column of the token in its grid [n]; -1 where it has none.
        kind: `patch`, `tile`, `thumbnail`, `break` or `whole`, one for each token.
        sizes: for each sample, the (width, height) of its images.
    """

    sample: Int[Tensor, " n"]
    column: Int[Tensor, " n"]
    image: Int[Tensor, " n"]
    box: Float[Tensor, "n 4"]
    row: Int[Tensor, " n"]
    col: Int[Tensor, " n"]
    kind: tuple[str, ...]
    sizes: tuple[tuple[tuple[int, int], ...], ...]

    def __len__(self) -> int:
        """Number of image tokens."""
        return len(self.kind)

    def __repr__(self) -> str:
        """In one line: thousands of rows would help nobody."""
        kinds = ", ".join(f"{self.kind.count(kind)} {kind}" for kind in dict.fromkeys(self.kind)) or "none"
        return f"Patches(image tokens by kind: {kinds}; images of each sample: {[len(s) for s in self.sizes]})"

    def where(self, keep: Sequence[Any] | Tensor) -> "Patches":
        """The rows marked in `keep` [n]."""
        index = torch.as_tensor(keep, dtype=torch.bool).nonzero()[:, 0]
        rows = {name: getattr(self, name)[index] for name in ("sample", "column", "image", "box", "row", "col")}
        return Patches(**rows, kind=tuple(self.kind[i] for i in index.tolist()), sizes=self.sizes)

    def sample_rows(self, i: int) -> "Patches":
        """The rows of sample `i`, still with their columns in the padded batch."""
        return self.where(self.sample == i)

    def part(self, first: int, stop: int) -> "Patches":
        """The rows of samples from `first` to before `stop`, still with their columns in the padded batch."""
        mine = self.where((self.sample >= first) & (self.sample < stop))
        return replace(mine, sample=mine.sample - first, sizes=self.sizes[first:stop])

    def sample_alone(self, i: int, columns: Sequence[int]) -> "Patches":
        """The rows of sample `i` when it is taken alone; `columns` are the columns that it keeps."""
        mine = self.sample_rows(i)
        place = {c: n for n, c in enumerate(columns)}
        column = torch.tensor([place[c] for c in mine.column.tolist()], dtype=torch.long)
        return Patches(
            torch.zeros_like(mine.sample), column, mine.image, mine.box, mine.row, mine.col, mine.kind, (self.sizes[i],)
        )
