"""`Curve`: how an answer falls as its sources are taken away, or rises as they are put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError
from interp.evaluation.intervals import draws, ends
from interp.evaluation.measured import Measured
from interp.results import checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RANDOM = "random order"


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Curve(Measured):
    """Deletion or insertion curves of one or several scores on the same samples. Made by `deletion_curve` and so on.

    For each of the scores (a part): `area`, the mean over samples of the area under the curve, divided by the range of
    fractions and so in the unit of the values; and where random orders were run, `random`, their area, and `gain`, by
    how much the scores' order does better than a random one: lower where a low curve is good (deletion of the most
    relevant first, insertion of the least), higher elsewhere. Intervals resample the samples.

    Attributes:
        kind: `deletion` or `insertion`.
        order: `most` or `least`: which sources come first.
        names: the names of the scores.
        fractions: shares of a sample's sources that are taken away, or put back, ascending [step].
        values: the answer's number [curve, batch, step].
        random: the same in random orders [order, batch, step].
        counts: how many sources are taken away, or put back [batch, step].
        sizes: how many there are [batch].
        unit: what the values are measured in.
        settings: what they were computed with: anything that json can hold, with `seed` and `resamples`.
        caveat: what a reader has to know before believing them; empty when there is nothing.

    Raises:
        InputError: shapes that do not fit together, or fractions that do not ascend within 0 and 1.
        NonFiniteError: NaN or infinity among the values.
        SettingsError: something in `settings` cannot be written as json.
    """

    kind: str
    order: str
    names: tuple[str, ...]
    fractions: Float[Tensor, " step"]
    values: Float[Tensor, "curve batch step"]
    random: Float[Tensor, "order batch step"]
    counts: Int[Tensor, "batch step"]
    sizes: Int[Tensor, " batch"]
    unit: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    caveat: str = ""

    _over: ClassVar[str] = "samples"
    _along: ClassVar[dict[str, int]] = {"values": 1, "random": 1, "counts": 0, "sizes": 0}
    _ragged: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("deletion", "insertion") or self.order not in ("most", "least"):
            raise InputError(f"a curve is a deletion or an insertion, of most or least, not {self.kind}, {self.order}.")
        if self.values.ndim != 3 or not self.values.numel() or len(set(self.names)) != len(self.values):
            raise InputError(
                f"values are [curve, batch, step], a name for each curve: found {describe(self.values)}, "
                f"{list(self.names)}."
            )
        count, size, steps = self.values.shape
        keep: dict[str, Any] = {"names": tuple(self.names), "settings": jsonable(self.settings, "settings")}
        keep["fractions"] = checked("fractions", self.fractions, {"step": steps})
        inside = bool((keep["fractions"] >= 0).all() and (keep["fractions"] <= 1).all())
        if steps < 2 or not inside or not bool((keep["fractions"].diff() > 0).all()):
            raise InputError(f"fractions ascend within 0 and 1, two at least: found {self.fractions.tolist()}.")
        keep["values"] = checked("values", self.values, {"curve": count, "sample": size, "step": steps})
        keep["random"] = checked("random", self.random, {"order": len(self.random), "sample": size, "step": steps})
        if self.counts.shape != (size, steps) or self.sizes.shape != (size,):
            raise InputError(
                f"counts are [batch {size}, step {steps}] and sizes [batch {size}]: found {describe(self.counts)}, "
                f"{describe(self.sizes)}."
            )
        keep |= {"counts": self.counts.detach().cpu().long(), "sizes": self.sizes.detach().cpu().long()}
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of samples."""
        return self.values.shape[1]

    @property
    def mean(self) -> Float[Tensor, "curve step"]:
        """The mean curve of each of the scores."""
        return self.values.mean(1)

    @property
    def areas(self) -> Float[Tensor, "curve batch"]:
        """The area under each sample's curve, divided by the range of fractions."""
        return self._area(self.values)

    @property
    def gains(self) -> Float[Tensor, "curve batch"]:
        """By how much each sample's area is better than that of its random orders.

        Raises:
            InputError: no random orders were run.
        """
        if not len(self.random):
            raise InputError("these curves were made without random orders (baseline=0): no gain over them is known.")
        low_is_good = (self.kind == "deletion") == (self.order == "most")
        apart = self.areas - self._area(self.random).mean(0)
        return -apart if low_is_good else apart

    def _area(self, values: Tensor) -> Tensor:
        wide = self.fractions.double()
        return torch.trapezoid(values.double(), wide, dim=-1) / (wide[-1] - wide[0])

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each curve, sample and fraction.

        Columns: `curve` (its name, or `random order`), `draw` (which random order; missing for the others), `sample`,
        `fraction`, `count` (how many sources that is) and `value`.
        """
        import pandas as pd

        both = torch.cat([self.values, self.random.to(self.values)])
        curve, sample, step = (x.ravel() for x in np.indices(both.shape))
        names = np.array([*self.names, *[RANDOM] * len(self.random)], dtype=object)
        draw = pd.Series(curve - len(self.names), dtype="Int64")
        return pd.DataFrame(
            {
                "curve": names[curve],
                "draw": draw.mask(draw < 0),
                "sample": sample,
                "fraction": self.fractions.numpy()[step],
                "count": self.counts.numpy()[sample, step],
                "value": both.numpy().ravel(),
            }
        )

    def plot(self, metrics: tuple[str, ...] | None = None, *, title: str | None = None) -> go.Figure:
        """The mean curves with their 95% bootstrap intervals over samples, random orders in grey.

        Args:
            metrics: draws bars of these numbers instead, such as `("gain",)`.
            title: None writes the kind of the curves, and the model.

        Raises:
            UnknownNameError: a metric does not exist.
            InputError: there are more curves than colours.
        """
        from interp.figures import interval_lines

        if metrics is not None:
            return Measured.plot(self, metrics, title=title)
        lines = dict(zip(self.names, self.values.double().numpy(), strict=True))
        if len(self.random):
            lines[RANDOM] = self.random.double().mean(0).numpy()
        every = np.stack(list(lines.values()))
        low = high = every.mean(1)
        if len(self) > 1:
            pieces = draws(self._groups(), self.settings["resamples"], self.settings["seed"])
            low, high = ends(np.concatenate([np.einsum("db,cbs->dcs", w / len(self), every) for w in pieces]), 0.95)
        series = {name: (every[i].mean(0), low[i], high[i]) for i, name in enumerate(lines)}
        done = "taken away" if self.kind == "deletion" else "put back"
        return interval_lines(
            self.fractions.numpy(),
            series,
            title=self._title() if title is None else title,
            x_title=f"share of the sources {done}",
            unit=self.unit,
            quiet=(RANDOM,),
        )

    def _groups(self) -> list[np.ndarray]:
        return [np.arange(len(self))]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        share = weights / weights.sum(1, keepdims=True)
        always = np.ones(len(weights), dtype=bool)
        columns = {"area": self.areas.numpy()}
        if len(self.random):
            random = self._area(self.random).mean(0).numpy()
            columns |= {"random": np.broadcast_to(random, columns["area"].shape), "gain": self.gains.numpy()}
        return {
            (name, metric): (share @ column[i], always)
            for i, name in enumerate(self.names)
            for metric, column in columns.items()
        }

    def _title(self) -> str:
        model = self.settings.get("model")
        first = f"{self.kind}, {self.order} relevant first"
        return " · ".join([first, *([str(model)] if model else []), f"{len(self)} samples"])

    def _more_html(self) -> str:
        import html

        return f"<p><i>{html.escape(self.caveat)}</i></p>" if self.caveat else ""

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("fractions", "values", "random", "counts", "sizes")}

    def _fields(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("kind", "order", "unit", "settings", "caveat")}
        return plain | {"names": list(self.names)}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Curve:
        fields["names"] = tuple(fields["names"])
        return cls(**tensors, **fields)
