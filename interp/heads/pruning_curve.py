"""`PruningCurve`: how a model fares as more and more of its heads are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.bootstrap import check_options, ends
from interp.errors import InputError, UnknownNameError, unknown
from interp.heads.measure import HIGH_IS_GOOD, UNITS
from interp.heads.resampled import double_means, means
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
else:
    pd = go = Any

RANDOM = "random order"


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PruningCurve(Scores):
    """The loss, the accuracy, ... after each step of removing heads, beside random orders. Made by `prune`.

    Attributes:
        name: what ranked the heads.
        metrics: what was measured: `loss`, `accuracy`, and with answers `logit` or `logit difference`.
        values: the numbers of every prompt [metric, step, prompt]; the first step is the intact model.
        random: those of random orders [metric, draw, step, prompt].
        kept: the heads that are left in each step [step, layer, head].
        random_kept: those of random orders [draw, step, layer, head].
        tower: the tower of the heads.
        settings: what it was computed with: anything that json can hold.

    Raises:
        InputError: shapes that do not fit together, or steps that do not remove heads.
        NonFiniteError: NaN or infinity among the numbers.
        SettingsError: something in `settings` cannot be written as json.
    """

    name: str
    metrics: tuple[str, ...]
    values: Float[Tensor, "metric step prompt"]
    random: Float[Tensor, "metric draw step prompt"]
    kept: Bool[Tensor, "step layer head"]
    random_kept: Bool[Tensor, "draw step layer head"]
    tower: str = "text"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not self.values.numel() or len(self.metrics) != len(self.values):
            raise InputError(
                f"values are [metric, step, prompt], a name for each metric: found {describe(self.values)}, "
                f"{list(self.metrics)}."
            )
        count, steps, prompts = self.values.shape
        orders = self.random.shape[1] if self.random.ndim == 4 else 0
        keep: dict[str, Any] = {"metrics": tuple(self.metrics), "settings": jsonable(self.settings, "settings")}
        keep["values"] = checked("values", self.values, {"metric": count, "step": steps, "prompt": prompts})
        sizes = {"metric": count, "draw": orders, "step": steps, "prompt": prompts}
        keep["random"] = checked("random", self.random, sizes)
        grids = {"kept": self.kept.detach().cpu(), "random_kept": self.random_kept.detach().cpu()}
        fits = grids["kept"].ndim == 3 and len(grids["kept"]) == steps > 1
        if not fits or grids["random_kept"].shape != (orders, *grids["kept"].shape):
            raise InputError(
                f"kept is [step {steps}, layer, head] with two steps at least, and random_kept [draw {orders}, step, "
                f"layer, head]: found {describe(self.kept)} and {describe(self.random_kept)}."
            )
        for name, grid in grids.items():
            back = grid[..., 1:, :, :] & ~grid[..., :-1, :, :]
            if grid.dtype != torch.bool or bool(back.any()):
                raise InputError(f"{name} is of bools, and a head that is removed stays removed.")
        left = grids["kept"].sum((1, 2))
        if not bool((left.diff() < 0).all()):
            raise InputError(f"every step removes heads: found {left.tolist()} left after each.")
        for key, value in (keep | grids).items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of prompts."""
        return self.values.shape[2]

    @property
    def counts(self) -> list[int]:
        """How many heads are gone at each step."""
        left = self.kept.sum((1, 2))
        return (left[0] - left).tolist()

    @property
    def shares(self) -> list[float]:
        """Which share of the heads is gone at each step."""
        whole = int(self.kept[0].sum())
        return [count / whole for count in self.counts]

    def removed(self, step: int) -> list[tuple[int, int]]:
        """The (layer, head) pairs that are gone at a step, for `edits.scale_heads(curve.removed(3), 0.0)`.

        Raises:
            UnknownNameError: there is no such step.
        """
        if not -len(self.kept) <= step < len(self.kept):
            raise UnknownNameError(f"step {step} does not exist: the curve has {len(self.kept)} steps.")
        gone = self.kept[0] & ~self.kept[step]
        return [(int(layer), int(head)) for layer, head in gone.nonzero()]

    def frame(self, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """A tidy pandas frame, one row for each curve, metric and step.

        Columns: `curve` (what ranked the heads, or `random order`, which is the mean over these), `metric`, `step`,
        `removed`, `share`, `value`, and `low` and `high`, the ends of a bootstrap interval over prompts, and for random
        orders over these too (NaN with a single prompt).

        Args:
            confidence: between 0 and 1.
            resamples: how often the prompts are drawn anew.
            seed: seed of the draws.

        Raises:
            SettingsError: an option lies outside its range.
        """
        import pandas

        rows = []
        for curve, (mean, low, high) in self._bands(confidence, resamples, seed).items():
            for i, metric in enumerate(self.metrics):
                for step, (count, share) in enumerate(zip(self.counts, self.shares, strict=True)):
                    row = {"curve": curve, "metric": metric, "step": step, "removed": count, "share": share}
                    rows.append(row | {"value": mean[i, step], "low": low[i, step], "high": high[i, step]})
        return pandas.DataFrame(rows)

    def summary(self, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The area under each curve, divided by the range of shares: the mean of the metric over all steps.

        Args:
            confidence: between 0 and 1.
            resamples: how often the prompts, and the random orders, are drawn anew.
            seed: seed of the draws.

        Returns:
            A frame with a row for each metric: `area` with `low` and `high`; and where random orders were run, `random`
            (their mean area) and `gain`, by how much the ranking does better than they do, with `gain_low` and
            `gain_high`. Ends are NaN with a single prompt.

        Raises:
            SettingsError: an option lies outside its range.
        """
        import pandas

        check_options(confidence, resamples, seed)
        own, random = self._areas(self.values), self._areas(self.random)
        several = len(self) > 1
        low = high = np.full(len(own), np.nan)
        if several:
            low, high = ends(drawn := means(own, resamples, seed), confidence)
        rows = []
        for i, metric in enumerate(self.metrics):
            row = {"metric": metric, "area": own[i].mean(), "low": low[i], "high": high[i]}
            if random.shape[1]:
                sign = 1 if metric in HIGH_IS_GOOD else -1
                row |= {"random": random[i].mean(), "gain": sign * (own[i].mean() - random[i].mean())}
                row |= {"gain_low": np.nan, "gain_high": np.nan}
                if several:
                    apart = sign * (drawn[:, i] - double_means(random[i], resamples, seed))
                    row["gain_low"], row["gain_high"] = map(float, ends(apart, confidence))
            rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self, metric: str | None = None, *, title: str | None = None) -> go.Figure:
        """The curve of one metric and that of random orders, with their 95% bootstrap intervals.

        Args:
            metric: which; None for the loss.
            title: None writes what ranked the heads, and the model.

        Raises:
            UnknownNameError: there is no such metric.
        """
        from interp.figures import interval_lines

        metric = self.metrics[0] if metric is None else metric
        if metric not in self.metrics:
            raise unknown("metric", metric, self.metrics, self._title())
        at, several = self.metrics.index(metric), len(self) > 1
        bands = self._bands(0.95, 1000, 0)
        return interval_lines(
            np.array(self.shares),
            {
                n: (mean[at], low[at], high[at]) if several else (mean[at], None, None)
                for n, (mean, low, high) in bands.items()
            },
            title=self._title() if title is None else title,
            x_title="share of heads removed",
            unit=f"{metric}, {UNITS[metric]}" if metric in UNITS else metric,
            quiet=(RANDOM,),
        )

    def __repr__(self) -> str:
        """The title, and the first metric of the intact and of the last model."""
        ends_ = self.values[0].mean(-1)
        return (
            f"PruningCurve({self._title()}: {self.metrics[0]} {float(ends_[0]):.4g} with all {int(self.kept[0].sum())} "
            f"heads, {float(ends_[-1]):.4g} without {self.counts[-1]} of them)"
        )

    def _bands(self, confidence: float, resamples: int, seed: int) -> dict[str, tuple[np.ndarray, ...]]:
        """For each curve its mean and the ends of its interval [metric, step]."""
        check_options(confidence, resamples, seed)
        own, random = self.values.double().numpy(), self.random.double().transpose(1, 2).numpy()
        nan = np.full(own.shape[:2], np.nan)
        none, several = (nan, nan), len(self) > 1
        found = ends(means(own, resamples, seed), confidence) if several else none
        out = {f"{self.name}, {self.settings.get('strategy', 'one_shot')}": (own.mean(-1), *found)}
        if random.shape[2]:
            found = ends(double_means(random, resamples, seed), confidence) if several else none
            out[RANDOM] = random.mean((2, 3)), *found
        return out

    def _areas(self, values: Tensor) -> np.ndarray:
        share = torch.tensor(self.shares, dtype=torch.float64)
        return (torch.trapezoid(values.double(), share, dim=-2) / (share[-1] - share[0])).numpy()

    def _title(self) -> str:
        model = self.settings.get("model")
        first = f"pruning by {self.name}, {self.settings.get('strategy', 'one_shot')}"
        return " · ".join([first, *([str(model)] if model else []), f"{len(self)} prompts"])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("values", "random", "kept", "random_kept")}

    def _fields(self) -> dict[str, Any]:
        return {"name": self.name, "metrics": list(self.metrics), "tower": self.tower, "settings": self.settings}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> PruningCurve:
        fields["metrics"] = tuple(fields["metrics"])
        return cls(**tensors, **fields)
