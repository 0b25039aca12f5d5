"""Lists of heads: (layer, head) pairs, or a frame of a ranking, which knows the model and the tower that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp.errors import EditError

if TYPE_CHECKING:
    import pandas as pd

    Heads = Sequence[tuple[int, int]] | pd.DataFrame
    """(layer, head) pairs, or a frame with these two columns, such as `scores.top(16)`."""
else:
    Heads = Any  # pandas is not loaded for a name


@dataclass(frozen=True, slots=True)
class HeadList:
    """Heads that were named one by one, and what is known of where the list comes from.

    Attributes:
        pairs: (layer, head), none twice.
        tower: the tower that they are in, where a ranking named them.
        model: the model that was ranked.
    """

    pairs: tuple[tuple[int, int], ...]
    tower: str | None = None
    model: str | None = None

    @staticmethod
    def of(heads: Heads) -> HeadList:
        """Read pairs, or a frame with the columns `layer` and `head` (one made by `HeadScores` says whose they are).

        Raises:
            EditError: it is neither, or holds no heads.
        """
        rows, origin = heads, {}
        columns = getattr(heads, "columns", None)
        if columns is not None:
            missing = [name for name in ("layer", "head") if name not in columns]
            if missing:
                raise EditError(f"a frame of heads has columns layer and head; this one has {list(columns)}.")
            origin = getattr(heads, "attrs", {})
            rows = zip(heads["layer"].tolist(), heads["head"].tolist(), strict=True)  # type: ignore[call-overload]
        try:
            rows = list(rows)
            pairs = [(int(layer), int(head)) for layer, head in rows]
            whole = all(a == b for pair, row in zip(pairs, rows, strict=True) for a, b in zip(pair, row, strict=True))
        except (TypeError, ValueError, OverflowError):
            whole, pairs = False, []
        if not whole or not pairs:
            raise EditError(
                "heads are (layer, head) pairs of whole numbers, at least one, or a frame with columns layer and head; "
                f"found {str(rows)[:120]}."
            )
        return HeadList(tuple(dict.fromkeys(pairs)), origin.get("tower"), origin.get("model"))

    def within(self, tower: str | None, what: str) -> str | None:
        """The tower to look in: the given one, or that of the list.

        Raises:
            EditError: both are known, and differ.
        """
        if tower is not None and self.tower not in (None, tower):
            raise EditError(f"{what}: tower {tower!r} is asked for, but the heads were ranked in tower {self.tower!r}.")
        return self.tower if tower is None else tower

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """The heads of each layer, layers ascending."""
        found: dict[int, list[int]] = {}
        for layer, head in self.pairs:
            found.setdefault(layer, []).append(head)
        return {layer: tuple(heads) for layer, heads in sorted(found.items())}


def check_model(ranked: str | None, model: str, what: str) -> None:
    """Whether a list of heads is of this model, as far as that is known.

    Args:
        ranked: the model that was ranked; None where nothing is known.
        model: the model that the heads are looked for in.
        what: what needs them, for the error.

    Raises:
        EditError: it is another model.
    """
    if ranked not in (None, model):
        raise EditError(
            f"{what}: a head list from another model: it names heads of {ranked!r}, and this is {model!r}. Give plain "
            "(layer, head) pairs to use it all the same."
        )
