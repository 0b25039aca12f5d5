"""The result types: what a method found, with the settings it was found with.

A result is a frozen value: it checks itself when made, turns into a tidy pandas frame or a picture, and is saved as
json and safetensors. [`load`][interp.scores.load] reads any of them back.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError, SettingsError, unknown
from interp.results import Scores, checked, describe, jsonable, load, register
from interp.tokens import TokenScores

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["HeadScores", "Scores", "TokenScores", "load", "register"]

_RESERVED = ("score", "abs", "rank", "layer", "head", "prompt", "valid", "per_prompt")


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadScores(Scores):
    """One number for each attention head.

    Numbers are kept on the CPU in float32, or float64 where they came so. Where a head does not exist (layers with
    different numbers of heads) every tensor is NaN, and `valid` is False.

    Attributes:
        scores: the scores [layer, head], in `unit`.
        name: the method, such as `direct_effect`.
        unit: what the scores are measured in, such as `logits`; empty for a plain number.
        settings: what they were computed with (model, seed, versions, ...): anything that json can hold.
        per_prompt: the scores of each prompt [batch, layer, head], or None.
        extra: further columns by name, each [layer, head].
        tower: the tower that the heads are in.
        valid: which heads exist [layer, head]; all of them when not given.

    Raises:
        InputError: a tensor has the wrong shape or is not of floats, or an extra column has a reserved name.
        NonFiniteError: NaN or infinity at a head that exists; the message gives the first place.
        SettingsError: something in `settings` cannot be written as json.
    """

    scores: Float[Tensor, "layer head"]
    name: str
    unit: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_prompt: Float[Tensor, "batch layer head"] | None = None
    extra: Mapping[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    tower: str = "text"
    valid: Bool[Tensor, "layer head"] | None = None

    def __post_init__(self):
        if not self.name:
            raise InputError("scores need the name of the method that made them.")
        if self.scores.ndim != 2 or not self.scores.numel():
            raise InputError(f"scores are [layer, head] with at least one head, found shape {list(self.scores.shape)}.")
        sizes: dict[str, int] = {"layer": self.scores.shape[0], "head": self.scores.shape[1]}
        valid = torch.ones(self.scores.shape, dtype=torch.bool) if self.valid is None else self.valid.detach().cpu()
        if valid.shape != self.scores.shape or valid.dtype != torch.bool or not valid.any():
            wanted = f"bools of shape {list(self.scores.shape)}, not all False"
            raise InputError(f"valid must be {wanted}; found {describe(valid)} with {int(valid.sum())} heads.")
        for key in self.extra:
            if key in _RESERVED or not key:
                raise InputError(f"an extra column cannot be named {key!r}; taken: {', '.join(_RESERVED)}.")
        keep: dict[str, Any] = {"scores": checked("scores", self.scores, sizes, valid), "valid": valid}
        keep["extra"] = {key: checked(key, column, sizes, valid) for key, column in self.extra.items()}
        if self.per_prompt is not None:
            if not self.per_prompt.ndim or not len(self.per_prompt):
                raise InputError(f"per_prompt is [prompt, layer, head], found {describe(self.per_prompt)}.")
            keep["per_prompt"] = checked(
                "per_prompt", self.per_prompt, {"prompt": len(self.per_prompt), **sizes}, valid
            )
        keep["settings"] = jsonable(self.settings, "settings")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def _tensors(self) -> dict[str, Tensor]:
        own = {"scores": self.scores, "valid": self.valid, "per_prompt": self.per_prompt}
        named = {f"extra.{key}": column for key, column in self.extra.items()}
        return {key: tensor for key, tensor in (own | named).items() if tensor is not None}

    def _fields(self) -> dict[str, Any]:
        return {
            **{"name": self.name, "unit": self.unit, "tower": self.tower},
            **{"settings": self.settings, "extra": list(self.extra)},
        }

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> "HeadScores":
        fields["extra"] = {key: tensors.pop(f"extra.{key}") for key in fields["extra"]}
        return cls(**tensors, **fields)

    def frame(self, per_prompt: bool = False) -> "pd.DataFrame":
        """A tidy pandas frame, one row for each head that exists, in the order of layers and heads.

        Columns: `layer`, `head`, `score`, the extra columns, and `rank` (1 for the largest score; equal scores are
        ranked in the order of layers and heads). With `per_prompt`, one row for each prompt and head, with `prompt`
        first, ranked within the prompt; extra columns are left out, for they are not known by prompt.

        Its `attrs` name the model and the tower, so that edits refuse the heads of another model.

        Raises:
            InputError: `per_prompt` is asked for, and these scores have none.
        """
        import pandas as pd

        layers, heads = (index.numpy() for index in self._mask().nonzero(as_tuple=True))
        if per_prompt:
            table = self._prompts()[:, layers, heads].numpy()
            count = len(layers)
            columns = {
                "prompt": np.repeat(np.arange(len(table)), count),
                "layer": np.tile(layers, len(table)),
                "head": np.tile(heads, len(table)),
                "score": table.ravel(),
                "rank": np.concatenate([_ranks(row) for row in table]),
            }
            return self._named(pd.DataFrame(columns))
        score = self.scores[layers, heads].numpy()
        extra = {key: column[layers, heads].numpy() for key, column in self.extra.items()}
        frame = pd.DataFrame({"layer": layers, "head": heads, "score": score, **extra, "rank": _ranks(score)})
        return self._named(frame)

    def top(self, k: int = 10, by: str = "score", *, largest: bool = True) -> "pd.DataFrame":
        """The first `k` heads of a ranking (all of them where there are fewer), best first.

        Args:
            k: how many heads, at least 1.
            by: `score`, `abs` (the size of the score without its sign), or the name of an extra column.
            largest: rank from the largest value down; False ranks from the smallest up.

        Returns:
            A frame with `rank` (1 first; in this ranking), `layer`, `head`, `score` and the extra columns. Edits take
            it as a list of heads: `edits.scale_heads(scores.top(16), -1.0)`.

        Raises:
            UnknownNameError: `by` names nothing to rank by.
            SettingsError: `k` is not a whole number of at least 1.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SettingsError(f"k is a whole number of at least 1, found {k!r}.")
        if by not in (names := ("score", "abs", *self.extra)):
            raise unknown("column", by, names, f"the scores of {self.name}")
        frame = self.frame()
        key = frame["score"].abs() if by == "abs" else frame[by]
        frame["rank"] = _ranks(key.to_numpy() if largest else -key.to_numpy())
        frame = frame.sort_values("rank", ignore_index=True).head(k)
        return self._named(frame.reindex(columns=["rank", "layer", "head", "score", *self.extra]))

    def plot(
        self,
        *,
        kind: Literal["heatmap", "bars"] = "heatmap",
        column: str = "score",
        k: int = 20,
        title: str | None = None,
        diverging: bool | None = None,
    ) -> "go.Figure":
        """A plotly picture: all heads as a heat map, or the `k` strongest (by size) as bars.

        Bars of `score` carry a 95% bootstrap interval where one can be computed.

        Args:
            kind: `heatmap` or `bars`.
            column: `score` or the name of an extra column.
            k: how many bars.
            title: None writes the method, the tower and the model.
            diverging: for the heat map, a colour scale centred on zero; None decides by the sign of the values.

        Raises:
            UnknownNameError: `kind` or `column` does not exist.
        """
        from interp.figures import head_heatmap, ranked_bars

        if kind not in ("heatmap", "bars"):
            raise unknown("kind of plot", kind, ("heatmap", "bars"))
        if column not in (names := ("score", *self.extra)):
            raise unknown("column", column, names, f"the scores of {self.name}")
        title = self._title() + ("" if column == "score" else f" · {column}") if title is None else title
        unit = self.unit if column == "score" else ""
        if kind == "heatmap":
            values = self.scores if column == "score" else self.extra[column]
            return head_heatmap(values, title=title, unit=unit, diverging=diverging)
        top = self.top(k, by="abs") if column == "score" else self.top(k, by=column)
        low = high = None
        if column == "score" and self._has_interval():
            low, high = (end.numpy()[top["layer"], top["head"]] for end in self.interval())
        labels = [f"L{layer} H{head}" for layer, head in zip(top["layer"], top["head"], strict=True)]
        return ranked_bars(labels, top[column].to_numpy(), low=low, high=high, title=title, unit=unit)

    def to_circuitsvis(self) -> Any:
        """The heads as CircuitsVis shows tokens: `L5H1` and so on, coloured by the score or an extra column.

        Returns:
            CircuitsVis's `RenderedHTML`, which a notebook shows.

        Raises:
            MissingPackageError: CircuitsVis is not installed.
        """
        from interp.figures import circuitsvis_tokens

        layers, heads = self._mask().nonzero(as_tuple=True)
        names = [f"L{layer}H{head}" for layer, head in zip(layers.tolist(), heads.tolist(), strict=True)]
        columns = [column[layers, heads].numpy() for column in (self.scores, *self.extra.values())]
        return circuitsvis_tokens(names, np.stack(columns, 1), ["score", *self.extra])

    def interval(
        self, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """A bootstrap interval of each score over prompts, by percentiles of the resampled mean.

        Args:
            confidence: between 0 and 1.
            resamples: how often the prompts are drawn anew, with replacement.
            seed: seed of the draws.

        Returns:
            The lower and the upper ends [layer, head], in the unit of the scores; NaN where no head exists.

        Raises:
            InputError: there are no scores by prompt, fewer than two prompts, or the scores are not their mean.
            SettingsError: `confidence` or `resamples` lies outside its range.
        """
        if not 0 < confidence < 1 or resamples < 1:
            raise SettingsError(
                f"confidence lies between 0 and 1 and resamples from 1: found {confidence}, {resamples}."
            )
        prompts = self._prompts().double()
        if (count := len(prompts)) < 2:
            raise InputError("an interval over prompts needs at least two prompts, found one.")
        if not self._is_mean():
            raise InputError(
                f"the scores of {self.name} are not the mean of per_prompt: resampling that mean says nothing on them."
            )
        generator = torch.Generator().manual_seed(seed)
        means = []
        for start in range(0, resamples, 256):
            drawn = torch.randint(count, (min(256, resamples - start), count), generator=generator)
            weights = torch.zeros(len(drawn), count, dtype=torch.float64)
            weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            means.append(weights @ prompts.flatten(1) / count)
        tail = (1 - confidence) / 2
        ends = np.quantile(torch.cat(means).numpy(), [tail, 1 - tail], axis=0)
        low, high = torch.from_numpy(ends).view(2, *self.scores.shape).to(self.scores.dtype)
        return low, high

    def __repr__(self) -> str:
        layers, heads = self.scores.shape
        best = self.top(1, by="abs").iloc[0]
        many = "" if self.per_prompt is None else f", {len(self.per_prompt)} prompts"
        return (
            f"HeadScores({self._title()}: {layers} layers x {heads} heads{many}; "
            f"strongest L{best['layer']:.0f} H{best['head']:.0f} = {best['score']:.4g} {self.unit}".rstrip()
            + ")"
        )

    def _repr_html_(self) -> str:
        from interp.palette import thumbnail

        (layers, heads), top = self.scores.shape, self.top(8, by="abs")
        cell = "text-align:right;padding:2px 8px"
        cells = "".join(
            "<tr>" + "".join(f"<td style='{cell}'>{html.escape(_show(v))}</td>" for v in row) + "</tr>"
            for row in top.itertuples(index=False)
        )
        names = "".join(f"<th style='{cell}'>{html.escape(str(c))}</th>" for c in top.columns)
        wide, tall = max(120, min(360, heads * 28)), max(80, min(300, layers * 14))
        picture = (
            f"<img alt='heat map of the scores' src='{thumbnail(self.scores)}' style='width:{wide}px;height:{tall}px;"
            "image-rendering:pixelated;border:1px solid #8888;max-width:none'>"
        )
        many = "" if self.per_prompt is None else f", {len(self.per_prompt)} prompts"
        return (
            f"<div><p><b>{html.escape(self._title())}</b><br>{layers} layers (downwards) &times; {heads} heads{many}"
            f"{', in ' + html.escape(self.unit) if self.unit else ''}</p>"
            f"<div style='display:flex;flex-wrap:wrap;gap:24px;align-items:flex-start'>{picture}"
            f"<table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></div></div>"
        )

    def _named(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        model = self.settings.get("model")
        frame.attrs.update({"tower": self.tower} | ({"model": model} if isinstance(model, str) else {}))
        return frame

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join(
            [self.name, *([] if self.tower == "text" else [self.tower]), *([str(model)] if model else [])]
        )

    def _mask(self) -> Tensor:
        assert self.valid is not None  # __post_init__ fills it in
        return self.valid

    def _prompts(self) -> Tensor:
        if self.per_prompt is None:
            raise InputError(
                f"the scores of {self.name} were computed without per_prompt, so none are known by prompt."
            )
        return self.per_prompt

    def _is_mean(self) -> bool:
        mean, scores = self._prompts().double().mean(0), self.scores.double()
        size = self._prompts().double().abs().mean(0)
        return bool(((mean - scores).abs() <= 1e-3 * size + 1e-12)[self._mask()].all())

    def _has_interval(self) -> bool:
        return self.per_prompt is not None and len(self.per_prompt) > 1 and self._is_mean()


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
