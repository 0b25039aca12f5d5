"""`HeadEffects`: what scaling sets of heads does to a model, beside random heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from interp.bootstrap import check_options, ends
from interp.errors import InputError, unknown
from interp.heads.measure import UNITS
from interp.heads.resampled import double_means, means
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
else:
    pd = go = Any


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadEffects(Scores):
    """The change of the loss, the accuracy, ... for each set of heads. Made by `effect_of`.

    Attributes:
        sets: the (layer, head) pairs of each set, by name.
        scale: what their outputs were multiplied with.
        metrics: what was measured: `loss`, `accuracy`, and with answers `logit` or `logit difference`.
        before: the numbers of every prompt in the model as it is [metric, prompt].
        after: with each set scaled [metric, set, prompt].
        random: with random heads scaled, as many as each set has [metric, set, draw, prompt].
        tower: the tower of the heads.
        settings: what it was computed with: anything that json can hold.

    Raises:
        InputError: shapes that do not fit together.
        NonFiniteError: NaN or infinity among the numbers.
        SettingsError: something in `settings` cannot be written as json.
    """

    sets: Mapping[str, tuple[tuple[int, int], ...]]
    scale: float
    metrics: tuple[str, ...]
    before: Float[Tensor, "metric prompt"]
    after: Float[Tensor, "metric set prompt"]
    random: Float[Tensor, "metric set draw prompt"]
    tower: str = "text"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.before.ndim != 2 or not self.before.numel() or len(self.metrics) != len(self.before) or not self.sets:
            raise InputError(
                f"before is [metric, prompt], a name for each metric, and there is a set of heads: found "
                f"{describe(self.before)}, {list(self.metrics)}, {list(self.sets)}."
            )
        sizes = {"metric": len(self.before), "prompt": self.before.shape[1]}
        whole = {"metric": sizes["metric"], "set": len(self.sets), "prompt": sizes["prompt"]}
        every = {"metric": sizes["metric"], "set": len(self.sets)}
        every |= {"draw": self.random.shape[2] if self.random.ndim == 4 else 0, "prompt": sizes["prompt"]}
        keep: dict[str, Any] = {"metrics": tuple(self.metrics), "settings": jsonable(self.settings, "settings")}
        keep["sets"] = {name: tuple((int(x), int(y)) for x, y in pairs) for name, pairs in self.sets.items()}
        keep["before"] = checked("before", self.before, sizes)
        keep["after"] = checked("after", self.after, whole)
        keep["random"] = checked("random", self.random, every)
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of prompts."""
        return self.before.shape[1]

    @property
    def changes(self) -> Float[Tensor, "metric set prompt"]:
        """What scaling each set changed, for every prompt."""
        return self.after - self.before[:, None]

    @property
    def random_changes(self) -> Float[Tensor, "metric set draw prompt"]:
        """What scaling random heads changed, for every draw and prompt."""
        return self.random - self.before[:, None, None]

    def frame(self, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """A tidy pandas frame, one row for each set and metric.

        Columns: `set`, `heads` (how many), `metric`, `before`, `after`, `change` with `low` and `high`, the ends of a
        bootstrap interval over prompts (NaN with a single prompt); where random heads were run also `random` (their
        mean change), `random_low` and `random_high` (the smallest and the largest of the draws, each a mean over
        prompts), `difference`, the change less the random one, with `difference_low` and `difference_high`, whose
        interval resamples the draws too; and `p`, the share of draws that change the metric by as much or more in
        either direction, the set itself counted as one.

        Args:
            confidence: between 0 and 1.
            resamples: how often the prompts are drawn anew.
            seed: seed of the draws.

        Raises:
            SettingsError: an option lies outside its range.
        """
        import pandas

        check_options(confidence, resamples, seed)
        own, random = self.changes.double().numpy(), self.random_changes.double().numpy()
        several, none = len(self) > 1, (np.full(own.shape[:2], np.nan),) * 2
        drawn = means(own, resamples, seed) if several else np.empty(0)
        low, high = ends(drawn, confidence) if several else none
        apart = none
        if several and random.shape[2]:
            apart = ends(drawn - double_means(random, resamples, seed), confidence)
        rows = []
        for j, (name, pairs) in enumerate(self.sets.items()):
            for i, metric in enumerate(self.metrics):
                change, each = own[i, j].mean(), random[i, j].mean(1)
                row = {"set": name, "heads": len(pairs), "metric": metric, "before": float(self.before[i].mean())}
                row |= {"after": float(self.after[i, j].mean()), "change": change}
                row |= {"low": low[i, j], "high": high[i, j]}
                if len(each):
                    row |= {"random": each.mean(), "random_low": each.min(), "random_high": each.max()}
                    row |= {"difference": change - each.mean()}
                    row |= {"difference_low": apart[0][i, j], "difference_high": apart[1][i, j]}
                    row |= {"p": (1 + int((np.abs(each) >= abs(change)).sum())) / (1 + len(each))}
                rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self, metric: str | None = None, *, title: str | None = None) -> go.Figure:
        """Bars of the change of one metric for each set, with 95% bootstrap intervals, and of its random heads.

        The lines on random heads go from the smallest to the largest of the draws.

        Args:
            metric: which; None for the loss.
            title: None writes what was done, and the model.

        Raises:
            UnknownNameError: there is no such metric.
        """
        from interp.figures import ranked_bars

        metric = self.metrics[0] if metric is None else metric
        if metric not in self.metrics:
            raise unknown("metric", metric, self.metrics, self._title())
        frame = self.frame()
        bars = []
        for _, row in frame[frame["metric"] == metric].iterrows():
            bars.append((row["set"], row["change"], row["low"], row["high"]))
            if "random" in frame:
                label = f"random heads for {row['set']}"
                bars.append((label, row["random"], row["random_low"], row["random_high"]))
        labels, change, low, high = zip(*bars, strict=True)
        known = {"low": low, "high": high} if len(self) > 1 else {}
        title = self._title() if title is None else title
        return ranked_bars(labels, change, **known, title=title, unit=f"change of {metric}, {UNITS.get(metric, '')}")

    def __repr__(self) -> str:
        """The title, and the change of the first metric by each set."""
        change = self.changes[0].mean(-1).tolist()
        shown = ", ".join(f"{name} {value:+.4g}" for name, value in zip(self.sets, change, strict=True))
        return f"HeadEffects({self._title()}; change of {self.metrics[0]}: {shown})"

    def _title(self) -> str:
        model = self.settings.get("model")
        first = "heads removed" if self.scale == 0 else f"heads times {self.scale:g}"
        return " · ".join([first, *([str(model)] if model else []), f"{len(self)} prompts"])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("before", "after", "random")}

    def _fields(self) -> dict[str, Any]:
        sets = [[name, [list(pair) for pair in pairs]] for name, pairs in self.sets.items()]
        plain = {"scale": self.scale, "metrics": list(self.metrics), "tower": self.tower, "settings": self.settings}
        return {"sets": sets, **plain}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> HeadEffects:
        fields["metrics"] = tuple(fields["metrics"])
        fields["sets"] = {name: tuple((layer, head) for layer, head in pairs) for name, pairs in fields["sets"]}
        return cls(**tensors, **fields)
