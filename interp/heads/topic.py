"""`HeadTopic`: the tokens that a pursuit found for one head."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadTopic(Scores):
    """What one head writes, as a list of tokens in the order in which they explain it.

    Attributes:
        layer: the head's layer.
        head: its index.
        ids: the tokens' ids [atom], the first one taken first.
        tokens: their texts.
        explained: share of the head's variance in the span of the tokens so far [atom].
        coefficients: what each prompt's output holds of each token [prompt, atom], by least squares over all of them
            (of tokens of length one if the dictionary was normalised).
        variance: of what the head writes, summed over the stream's coordinates (mean square without centring).
        name: the method.
        settings: what it was computed with: anything that json can hold.
        tower: the tower that the head is in.

    Raises:
        InputError: sizes do not fit.
        NonFiniteError: NaN or infinity in a number.
    """

    layer: int
    head: int
    ids: Int[Tensor, " atom"]
    tokens: Sequence[str]
    explained: Float[Tensor, " atom"]
    coefficients: Float[Tensor, "prompt atom"]
    variance: float
    name: str = "head_topic"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tower: str = "text"

    def __post_init__(self):
        size = len(self.tokens)
        if not size or self.ids.shape != (size,) or self.ids.dtype != torch.int64:
            raise InputError(f"ids must be int64 [{size}] with at least one token, found {describe(self.ids)}.")
        keep: dict[str, Any] = {
            "ids": self.ids.detach().cpu(),
            "tokens": tuple(map(str, self.tokens)),
            "explained": checked("explained", self.explained, {"atom": size}),
            "coefficients": checked(
                "coefficients", self.coefficients, {"prompt": len(self.coefficients), "atom": size}
            ),
            "settings": jsonable(self.settings, "settings"),
        }
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def weights(self) -> Float[Tensor, " atom"]:
        """The length of each token's coefficients over all prompts."""
        return torch.linalg.vector_norm(self.coefficients, dim=0)

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each token in the order of the pursuit.

        Columns: `rank` (from 1), `id`, `token`, `gain` (share of variance that the token added), `explained` (share
        that all tokens so far explain), `weight` (length of its coefficients).
        """
        import pandas as pd

        gain = self.explained.diff(prepend=self.explained.new_zeros(1))
        return pd.DataFrame(
            {
                "rank": range(1, len(self) + 1),
                "id": self.ids.numpy(),
                "token": list(self.tokens),
                "gain": gain.numpy(),
                "explained": self.explained.numpy(),
                "weight": self.weights.numpy(),
            }
        )

    def plot(self, *, k: int = 20, title: str | None = None) -> go.Figure:
        """The first `k` tokens as bars: the share of variance that each added.

        Args:
            k: how many tokens.
            title: None writes the head, the method and the model.
        """
        from interp.figures import ranked_bars

        frame = self.frame().head(max(1, k))
        labels = [token.replace(" ", "·").replace("\n", "↵") for token in frame["token"]]
        title = self._title() if title is None else title
        return ranked_bars(labels, frame["gain"].to_numpy(), title=title, unit="share of variance")

    def _title(self) -> str:
        model = self.settings.get("model")
        where = f"L{self.layer} H{self.head}" + ("" if self.tower == "text" else f" ({self.tower})")
        return " · ".join([self.name, where, *([str(model)] if model else [])])

    def __repr__(self) -> str:
        first = ", ".join(repr(token) for token in self.tokens[:6])
        more = ", ..." if len(self) > 6 else ""
        return f"HeadTopic({self._title()}: {first}{more}; {float(self.explained[-1]):.3g} of the variance)"

    def _repr_html_(self) -> str:
        cell = "text-align:right;padding:2px 8px"
        top = self.frame().head(20)
        rows = "".join(
            f"<tr><td style='{cell}'>{rank}</td><td style='padding:2px 8px'>"
            f"<code style='white-space:pre'>{html.escape(token)}</code></td>"
            f"<td style='{cell}'>{gain:.4f}</td><td style='{cell}'>{explained:.4f}</td></tr>"
            for rank, token, gain, explained in zip(
                *(top[name] for name in ("rank", "token", "gain", "explained")), strict=True
            )
        )
        what = f"{len(self)} tokens explain {float(self.explained[-1]):.1%} of its variance"
        names = "".join(f"<th style='{cell}'>{name}</th>" for name in ("rank", "token", "gain", "explained"))
        return (
            f"<div><p><b>{html.escape(self._title())}</b><br>{what} over {len(self.coefficients)} prompts</p>"
            f"<table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table></div>"
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "explained": self.explained, "coefficients": self.coefficients}

    def _fields(self) -> dict[str, Any]:
        plain = ("layer", "head", "variance", "name", "settings", "tower")
        return {**{name: getattr(self, name) for name in plain}, "tokens": list(self.tokens)}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> HeadTopic:
        return cls(**tensors, **fields)
