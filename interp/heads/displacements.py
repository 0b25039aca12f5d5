"""`Displacements`: how far, and where to, each head of a vision tower looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, SettingsError, UnknownNameError, unknown
from interp.results import Scores, checked, describe, jsonable, register
from interp.scores import HeadScores

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
else:
    pd = go = Any

UNITS = {"distance": "patches", "spread": "patches", "offset": "patches", "dx": "patches", "dy": "patches"}
COLUMNS = ("distance", "relative", "spread", "offset", "dx", "dy", "local", "on_patches")
_BY_PICTURE = ("distance", "relative", "local", "on_patches")


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Displacements(Scores):
    """The attention between patches, by relative displacement. Made by `displacements`.

    Displacements (down, right) are those of the key from the query, in patches; in the last two axes of a map zero is
    in the middle. Everything is of attention between patches alone, each query's made to sum to one.

    Attributes:
        mass: the attention at each displacement, the mean over queries and pictures [layer, head, down, right]; zero
            where a head does not exist.
        pairs: how many keys a query has at each displacement, the mean over queries and pictures [down, right].
        distance: the mean distance of the keys in each picture [picture, layer, head], in patches.
        rings: the attention at each Chebyshev distance (k-hop) in each picture [picture, layer, head, ring].
        on_patches: which part of the patches' attention is on patches (the rest is on class and register tokens)
            [picture, layer, head].
        uniform: the distance of attention that is the same everywhere, in each picture [picture].
        settings: what they were computed with: anything that json can hold.

    Raises:
        InputError: shapes that do not fit together.
        NonFiniteError: NaN or infinity at a head that exists.
        SettingsError: something in `settings` cannot be written as json.
    """

    mass: Float[Tensor, "layer head down right"]
    pairs: Float[Tensor, "down right"]
    distance: Float[Tensor, "picture layer head"]
    rings: Float[Tensor, "picture layer head ring"]
    on_patches: Float[Tensor, "picture layer head"]
    uniform: Float[Tensor, " picture"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mass.ndim != 4 or any(n % 2 == 0 for n in self.mass.shape[2:]) or not len(self.distance):
            raise InputError(
                f"mass is [layer, head, down, right], odd in the last two, of one picture at least: found "
                f"{describe(self.mass)} and distances {describe(self.distance)}."
            )
        layers, heads, down, right = self.mass.shape
        plane, grid = {"down": down, "right": right}, {"layer": layers, "head": heads}
        each = {"picture": len(self.distance), **grid}
        rings = {"ring": (max(down, right) + 1) // 2}
        keep: dict[str, Any] = {"settings": jsonable(self.settings, "settings")}
        keep["mass"] = checked("mass", self.mass, {**grid, **plane})
        keep["pairs"] = checked("pairs", self.pairs, plane)
        keep["distance"] = checked("distance", self.distance, each)
        keep["rings"] = checked("rings", self.rings, {**each, **rings})
        keep["on_patches"] = checked("on_patches", self.on_patches, each)
        keep["uniform"] = checked("uniform", self.uniform, {"picture": each["picture"]})
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.distance)

    def __repr__(self) -> str:
        """Model and sizes."""
        layers, heads, down, right = self.mass.shape
        model = self.settings.get("model", "a vision tower")
        return f"Displacements({model}: {layers} layers x {heads} heads, {down} x {right}, {len(self)} pictures)"

    @property
    def aligned(self) -> Float[Tensor, "layer head down right"]:
        """The aligned attention map: every query moved to the middle, the mean over those that have such a key."""
        return torch.where(self.pairs > 0, self.mass / self.pairs.clamp_min(1e-30), 0.0)

    @property
    def steps(self) -> tuple[Float[Tensor, "down right"], Float[Tensor, "down right"]]:
        """The displacement downwards and to the right at each place of a map, in patches."""
        down, right = (torch.arange(n, dtype=self.mass.dtype) - n // 2 for n in self.mass.shape[2:])
        return tuple(torch.meshgrid(down, right, indexing="ij"))  # type: ignore[return-value]

    @property
    def centroid(self) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """The centre of the aligned map, as its displacement downwards and to the right, in patches."""
        share = self._share()
        return tuple((share * step).sum((2, 3)) for step in self.steps)  # type: ignore[return-value]

    @property
    def spread(self) -> Float[Tensor, "layer head"]:
        """The root mean square distance of the aligned map from its centre, in patches."""
        apart = [step - centre[..., None, None] for step, centre in zip(self.steps, self.centroid, strict=True)]
        return (self._share() * (apart[0].square() + apart[1].square())).sum((2, 3)).sqrt()

    def profile(self, *, per_patch: bool = False) -> Float[Tensor, "layer head ring"]:
        """The attention at each Chebyshev distance from the query, the mean over pictures.

        Args:
            per_patch: divided by how many patches a query has at that distance.
        """
        mean = self.rings.mean(0)
        if not per_patch:
            return mean
        return mean / ring_sums(self.pairs).clamp_min(1e-30)

    def scores(self, score: str = "relative") -> HeadScores:
        """A ranking of the heads.

        Args:
            score: which of the columns below; the others are kept as extra columns.

        Returns:
            Scores [layer, head]. `distance`: the mean distance of the keys, in patches; `relative`: that as a multiple
            of the distance of uniform attention; `dx`, `dy`: the centre of the aligned map to the right and downwards;
            `offset`: its distance from the query; `spread`: the root mean square distance from it; `local`: the
            attention on the query itself and its eight neighbours; `on_patches`: the part of attention that is on
            patches. Those that are means over pictures have `per_prompt`, by picture.

        Raises:
            UnknownNameError: there is no such column.
        """
        if score not in COLUMNS:
            raise unknown("score of displacements", score, COLUMNS)
        by_picture = {
            "distance": self.distance,
            "relative": self.distance / self.uniform[:, None, None],
            "local": self.rings[..., :2].sum(-1),
            "on_patches": self.on_patches,
        }
        dy, dx = self.centroid
        columns = {name: by_picture[name].mean(0) for name in _BY_PICTURE}
        columns |= {"spread": self.spread, "offset": (dx.square() + dy.square()).sqrt(), "dx": dx, "dy": dy}
        valid = self.mass.sum((2, 3)) > 0
        return HeadScores(
            scores=columns[score],
            name=f"vision_patterns.{score}",
            unit=UNITS.get(score, "attention" if score in ("local", "on_patches") else "of uniform attention"),
            settings=self.settings,
            per_prompt=by_picture.get(score),
            extra={name: columns[name] for name in COLUMNS},
            tower="vision",
            valid=valid,
        )

    def offset_local(self, *, spread: float = 0.4, nearest: float = 0.5, farthest: float = 2.0) -> pd.DataFrame:
        """Heads that look at one place near by, the same for every patch: a small spread, and an offset.

        Where to draw the lines is this package's choice; the papers look at the maps.

        Args:
            spread: the largest spread, as a share of that of a map which is the same everywhere.
            nearest: the smallest offset of the centre from the query, in patches.
            farthest: the largest.

        Returns:
            A frame with `rank` (1 for the smallest spread), `layer`, `head`, `score` (the spread) and the other
            columns; empty where there are none. Edits take it as a list of heads.

        Raises:
            SettingsError: a number outside its range.
        """
        if not spread > 0 or not 0 <= nearest < farthest:
            raise SettingsError(
                f"spread is positive and 0 <= nearest < farthest: found {spread}, {nearest} and {farthest}."
            )
        scores = self.scores("spread")
        frame = scores.top(int(scores.scores.isfinite().sum()), largest=False)
        down, right = self.steps
        limit = spread * float((down.square() + right.square()).mean().sqrt())
        near = (frame["score"] <= limit) & frame["offset"].between(nearest, farthest)
        return frame.loc[near].reset_index(drop=True)

    def plot(self, layer: int, head: int, *, reach: int | None = None, title: str | None = None) -> go.Figure:
        """The aligned attention map of a head as a picture, the query in the middle.

        Args:
            layer: which layer.
            head: which head of it.
            reach: how many patches to show in each direction; None for all.
            title: None writes the head and the model.

        Raises:
            UnknownNameError: there is no such head.
        """
        from interp.figures import pattern_heatmap

        layers, heads = self.mass.shape[:2]
        if not (-layers <= layer < layers and -heads <= head < heads) or not bool(self.mass[layer, head].any()):
            raise UnknownNameError(f"there is no head {head} of layer {layer}: {layers} layers of {heads} heads.")
        shown, names = self.aligned[layer, head], []
        for axis, size in enumerate(shown.shape):
            keep = size // 2 if reach is None else min(reach, size // 2)
            shown = shown.narrow(axis, size // 2 - keep, 2 * keep + 1)
            names.append([f"{i:+d}" if i else "0" for i in range(-keep, keep + 1)])
        model = self.settings.get("model")
        title = f"L{layer % layers} H{head % heads}" + (f" · {model}" if model else "") if title is None else title
        figure = pattern_heatmap(shown, names[1], query_tokens=names[0], title=title, unit="attention")
        figure.update_traces(hovertemplate="%{y} down, %{x} right<br><b>%{z:.4g}</b> attention<extra></extra>")
        figure.update_xaxes(title_text="patches to the right", tickangle=0)
        figure.update_yaxes(title_text="patches downwards")
        return figure

    def _share(self) -> Tensor:
        """The aligned maps, each with the sum one."""
        aligned = self.aligned
        return aligned / aligned.sum((2, 3), keepdim=True).clamp_min(1e-30)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("mass", "pairs", "distance", "rings", "on_patches", "uniform")
        return {name: getattr(self, name) for name in names}

    def _fields(self) -> dict[str, Any]:
        return {"settings": self.settings}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Displacements:
        return cls(**tensors, **fields)


def ring_sums(maps: Float[Tensor, "*lead down right"]) -> Float[Tensor, "*lead ring"]:
    """Sums of maps over displacements of the same Chebyshev length, 0, 1, ..."""
    down, right = maps.shape[-2:]
    rows, cols = torch.arange(down) - down // 2, torch.arange(right) - right // 2
    ring = torch.maximum(rows.abs()[:, None], cols.abs()[None]).flatten().to(maps.device)
    out = maps.new_zeros(*maps.shape[:-2], (max(down, right) + 1) // 2)
    return out.index_add_(-1, ring, maps.flatten(-2))
