"""What results over images share: a table of numbers with bootstrap intervals, a picture, a notebook form."""

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from interp.errors import InputError, unknown
from interp.evaluation.intervals import check_options, draws, ends
from interp.results import Scores

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class Number(NamedTuple):
    """One number of a result.

    Attributes:
        part: what it was computed on: `all`, a kind of negatives, a task.
        metric: its name.
        value: the number.
        defined: False where it would be a division by zero; the value is then the one that its metric's
            documentation gives.
    """

    part: str
    metric: str
    value: float
    defined: bool


class Measured(Scores):
    """A result whose numbers are computed from images, so that resampling the images gives their intervals.

    A subclass gives `settings` (with `seed` and `resamples`), `_groups` and `_compute`.
    """

    __slots__ = ()
    settings: Mapping[str, Any]
    _over: ClassVar[str] = "images"  # what is resampled, in words

    def _groups(self) -> list[np.ndarray]:
        """Indices of the images, in groups that are resampled within themselves."""
        raise NotImplementedError

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """Each (part, metric) with its values [draw] and whether they are defined [draw], for weights [draw, image]."""
        raise NotImplementedError

    def _title(self) -> str:
        raise NotImplementedError

    @property
    def numbers(self) -> tuple[Number, ...]:
        """Every number, in the order of `summary`."""
        found = self._compute(np.ones((1, sum(map(len, self._groups())))))
        return tuple(
            Number(part, metric, float(value[0]), bool(defined[0]))
            for (part, metric), (value, defined) in found.items()
        )

    @property
    def undefined(self) -> tuple[str, ...]:
        """The numbers that would be a division by zero, as `metric`, or `metric (part)` where there are parts."""
        numbers = self.numbers
        several = len({number.part for number in numbers}) > 1
        return tuple(f"{n.metric} ({n.part})" if several else n.metric for n in numbers if not n.defined)

    def value(self, metric: str, part: str | None = None) -> float:
        """One number.

        Args:
            metric: its name, as in `summary`.
            part: `all`, a kind of negatives, a task; None takes `all`, or the only part there is.

        Raises:
            UnknownNameError: there is no such metric or part.
        """
        numbers = self.numbers
        parts = list(dict.fromkeys(number.part for number in numbers))
        part = (parts[0] if len(parts) == 1 else "all") if part is None else part
        if part not in parts:
            raise unknown("part", part, parts, self._title())
        for number in numbers:
            if (number.part, number.metric) == (part, metric):
                return number.value
        raise unknown("metric", metric, dict.fromkeys(n.metric for n in numbers if n.part == part), self._title())

    def summary(
        self, confidence: float = 0.95, *, resamples: int | None = None, seed: int | None = None
    ) -> "pd.DataFrame":
        """Every number with its bootstrap interval over images (percentiles).

        Args:
            confidence: between 0 and 1.
            resamples: how often the images are drawn anew, with replacement; None as the result was made.
            seed: seed of the draws; None as the result was made.

        Returns:
            A frame with `part`, `metric`, `value`, `low`, `high` and `defined`. `low` and `high` are NaN where there
            are fewer than two images. The same seed gives the same interval.

        Raises:
            SettingsError: an option lies outside its range.
        """
        import pandas as pd

        draw: int = self.settings["resamples"] if resamples is None else resamples
        start: int = self.settings["seed"] if seed is None else seed
        check_options(confidence, draw, start)
        numbers, groups = self.numbers, self._groups()
        low = high = np.full(len(numbers), np.nan)
        if any(len(group) > 1 for group in groups):
            pieces = [[value for value, _ in self._compute(w).values()] for w in draws(groups, draw, start)]
            low, high = ends(np.concatenate([np.stack(piece, axis=1) for piece in pieces]), confidence)
        frame = pd.DataFrame(numbers, columns=list(Number._fields))
        frame.insert(3, "low", low)
        frame.insert(4, "high", high)
        return frame

    def plot(self, metrics: tuple[str, ...] | None = None, *, title: str | None = None) -> "go.Figure":
        """A plotly picture: one bar for each number, with its 95% bootstrap interval over images.

        Args:
            metrics: which metrics; None takes all that lie between 0 and 1 (of MME: all).
            title: None writes what was measured, and the model.

        Raises:
            UnknownNameError: a metric does not exist.
        """
        from interp.figures import ranked_bars

        every = self.summary().to_dict("records")
        names = list(dict.fromkeys(row["metric"] for row in every))
        for name in metrics or ():
            if name not in names:
                raise unknown("metric", name, names, self._title())
        wanted = self._shares(names) if metrics is None else metrics
        rows = [row for row in every if row["metric"] in wanted]
        if not rows:
            raise InputError("nothing to draw: give at least one metric.")
        several = len({row["part"] for row in rows}) > 1
        labels = [f"{row['part']}: {row['metric']}" if several else row["metric"] for row in rows]
        values, low, high = ([row[key] for row in rows] for key in ("value", "low", "high"))
        known = not np.isnan(low).any()
        title = self._title() if title is None else title
        return ranked_bars(labels, values, low=low if known else None, high=high if known else None, title=title)

    def _shares(self, names: list[str]) -> list[str]:
        return names

    def __repr__(self) -> str:
        """The title and the numbers."""
        frame = self.numbers
        part = "all" if any(number.part == "all" for number in frame) else frame[0].part
        shown = ", ".join(f"{n.metric} {n.value:.4g}" for n in frame if n.part == part)
        return f"{type(self).__name__}({self._title()}: {shown})"

    def _repr_html_(self) -> str:
        cell = "text-align:right;padding:2px 8px"
        rows, every = [], self.summary().to_dict("records")
        several = len({row["part"] for row in every}) > 1
        for row in every:
            name = f"{row['part']}: {row['metric']}" if several else row["metric"]
            span = "" if row["low"] != row["low"] else f"{row['low']:.4g} to {row['high']:.4g}"
            note = "" if row["defined"] else "nothing to divide by"
            cells = (name, f"{row['value']:.4g}", span, note)
            rows.append("<tr>" + "".join(f"<td style='{cell}'>{html.escape(c)}</td>" for c in cells) + "</tr>")
        head = "".join(f"<th style='{cell}'>{c}</th>" for c in ("", "value", f"95% interval over {self._over}", ""))
        return (
            f"<div><p><b>{html.escape(self._title())}</b></p><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>{self._more_html()}</div>"
        )

    def _more_html(self) -> str:
        return ""


def merged_settings(settings: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's settings with those of the metric over them.

    Raises:
        InputError: the caller's hold a name that the metric records itself.
    """
    given = dict(settings or {})
    taken = [key for key in given if key in own]
    if taken:
        raise InputError(f"settings hold {taken[0]!r}, which the metric records itself; give it another name.")
    return given | dict(own)
