"""Agreement of scores: rank correlation over the tokens of a sample, for each method and layer.

Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928): the relevance of
tokens by attention, against their importance by blank-out or gradients. With a and b two scores of one target over the
n sources that count,

    rho = the correlation of rank(a) and rank(b), equal values sharing their mean rank

for each target of each sample; then the mean over a sample's targets, then over samples, with a bootstrap interval over
samples. Beside it stands what chance gives: the same mean with the sources of `other` shuffled, many times.

Departures. The paper's code ranks densely and uses the formula for values without ties, which is wrong where there are
ties (a constant row gets a number); it adds each layer's correlations to those of the layers below; and special tokens
count. Here a constant row has no correlation and is counted, layers are apart, and special tokens are left out.

What to know. A row of ten tokens is a small sample: single correlations scatter by 1 / sqrt(n - 1) when nothing agrees.
Neither of two scores is the truth, and two that agree can share a mistake (both like the nearest tokens); shuffled
sources are a weak opponent. A token that its target cannot see has a score of zero from every method of a decoder and
does not count: sources behind the target are left out where both scores are zero at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError, SettingsError
from interp.evaluation.compared import Sources, chosen_sources, same_sources
from interp.evaluation.intervals import check_options
from interp.evaluation.measured import Measured
from interp.evaluation.ranks import standard_ranks
from interp.results import checked, describe, jsonable, register
from interp.tokens import TokenScores

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Key = str | int | tuple[str, int]


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Agreement(Measured):
    """Rank correlations of scores with others. Made by `agreement`.

    Each of the scores is a part, `rollout` or `rollout, layer 3`, with the number `spearman`: the mean over samples
    (of the mean over a sample's targets), without rows that have no correlation.

    Attributes:
        names: the method of each of the scores.
        layers: its layer, or None.
        other: the method that they are compared with.
        values: the correlations [one, batch, target]; NaN where there is none.
        counts: how many sources were compared [one, batch, target]; 0 for fillers.
        null: each sample's mean with shuffled sources [one, batch, shuffle]; NaN where there is none.
        settings: what they were computed with: anything that json can hold, with `seed` and `resamples`.

    Raises:
        InputError: shapes that do not fit together, or a correlation outside -1 and 1.
        NonFiniteError: infinity among the numbers.
        SettingsError: something in `settings` cannot be written as json.
    """

    names: tuple[str, ...]
    layers: tuple[int | None, ...]
    other: str
    values: Float[Tensor, "one batch target"]
    counts: Int[Tensor, "one batch target"]
    null: Float[Tensor, "one batch shuffle"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    _over: ClassVar[str] = "samples"
    _along: ClassVar[dict[str, int]] = {"values": 1, "counts": 1, "null": 1}
    _ragged: ClassVar[tuple[str, ...]] = ("values", "counts")

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.counts.shape != self.values.shape:
            raise InputError(
                f"values and counts are [one, batch, target], found {describe(self.values)}, {describe(self.counts)}."
            )
        if not len(self.names) == len(self.layers) == len(self.values) > 0:
            raise InputError(f"{len(self.values)} scores have {len(self.names)} names, {len(self.layers)} layers.")
        count, size, width = self.values.shape
        keep: dict[str, Any] = {"names": tuple(self.names), "layers": tuple(self.layers)}
        keep["settings"] = jsonable(self.settings, "settings")
        sizes = {"one": count, "sample": size, "target": width}
        keep["values"] = checked("values", self.values, sizes, ~self.values.detach().cpu().isnan())
        keep["counts"] = self.counts.detach().cpu().long()
        sizes = {"one": count, "sample": size, "shuffle": self.null.shape[-1]}
        keep["null"] = checked("null", self.null, sizes, ~self.null.detach().cpu().isnan())
        if bool((keep["values"].abs() > 1 + 1e-6).any()):
            raise InputError("a correlation lies outside -1 and 1.")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of samples."""
        return self.values.shape[1]

    @property
    def parts(self) -> tuple[str, ...]:
        """What each of the scores is called."""
        pairs = zip(self.names, self.layers, strict=True)
        return tuple(name if layer is None else f"{name}, layer {layer}" for name, layer in pairs)

    @property
    def per_sample(self) -> Float[Tensor, "one batch"]:
        """Each sample's mean over its targets; NaN where there is none."""
        return self.values.double().nanmean(-1)

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each correlation, fillers left out.

        Columns: `method`, `layer` (missing where there is none), `sample`, `target` (along the target axis), `sources`
        (how many were compared) and `spearman` (NaN where one of the two scores is constant).
        """
        import pandas as pd

        one, sample, target = (x.numpy() for x in self.counts.nonzero(as_tuple=True))
        return pd.DataFrame(
            {
                "method": np.array(self.names, dtype=object)[one],
                "layer": pd.array([self.layers[i] for i in one], dtype="Int64"),
                "sample": sample,
                "target": target,
                "sources": self.counts[one, sample, target].numpy(),
                "spearman": self.values[one, sample, target].numpy(),
            }
        )

    def summary(
        self, confidence: float = 0.95, *, resamples: int | None = None, seed: int | None = None
    ) -> pd.DataFrame:
        """One row for each of the scores.

        Args:
            confidence: of the intervals, between 0 and 1.
            resamples: how often the samples are drawn anew; None as the result was made.
            seed: seed of the draws; None as the result was made.

        Returns:
            A frame with `part`, `metric`, `value`, `low`, `high` and `defined` as in all results; then `method`,
            `layer`, `std` (between samples), `null_low` and `null_high` (where the mean lies with shuffled sources),
            `p` (how often a shuffled mean is as far from zero; at least 1 / (shuffles + 1)), `rows` (targets in all)
            and `undefined` (those without a correlation).

        Raises:
            SettingsError: an option lies outside its range.
        """
        import pandas as pd

        frame = Measured.summary(self, confidence, resamples=resamples, seed=seed)
        per_sample = self.per_sample.numpy()
        null = self.null.double().nanmean(1).numpy()
        frame["method"], frame["layer"] = list(self.names), pd.array(list(self.layers), dtype="Int64")
        frame["std"] = [x[~np.isnan(x)].std() if (~np.isnan(x)).any() else np.nan for x in per_sample]
        tail = (1 - confidence) / 2
        has = null.shape[1] > 0
        frame["null_low"], frame["null_high"] = np.quantile(null, [tail, 1 - tail], axis=1) if has else (np.nan, np.nan)
        far = (np.abs(null) >= np.abs(frame["value"].to_numpy())[:, None]).sum(1)
        frame["p"] = np.where(frame["defined"] & has, (far + 1) / (null.shape[1] + 1), np.nan)
        rows = (self.counts > 0).sum((1, 2)).numpy()
        frame["rows"], frame["undefined"] = rows, rows - (~self.values.isnan()).sum((1, 2)).numpy()
        return frame

    def plot(self, metrics: tuple[str, ...] | None = None, *, title: str | None = None) -> go.Figure:
        """Lines over the layers where every one of the scores has one, else bars; with 95% intervals over samples.

        Args:
            metrics: None or `("spearman",)`: there is nothing else to draw.
            title: None writes what was compared, and the model.

        Raises:
            UnknownNameError: another metric.
            InputError: nothing to draw, or more methods than colours.
        """
        from interp.figures import interval_lines

        layers = sorted({layer for layer in self.layers if layer is not None})
        if metrics is not None or None in self.layers or len(layers) < 2:
            return Measured.plot(self, metrics, title=title)
        frame = self.summary().set_index("layer")
        series = {}
        for name in dict.fromkeys(self.names):
            rows = frame[frame["method"] == name].reindex(layers)
            value, low, high = (np.asarray(rows[column], dtype=float) for column in ("value", "low", "high"))
            series[name] = (value, low, high) if len(self) > 1 else (value, None, None)
        title = self._title() if title is None else title
        return interval_lines(layers, series, title=title, x_title="layer", unit="Spearman correlation")

    def _groups(self) -> list[np.ndarray]:
        return [np.arange(len(self))]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        found = {}
        for part, value in zip(self.parts, self.per_sample.numpy(), strict=True):
            there = ~np.isnan(value)
            total = weights[:, there].sum(1)
            mean = np.full(len(weights), np.nan)
            np.divide(weights[:, there] @ value[there], total, out=mean, where=total > 0)
            found[part, "spearman"] = mean, total > 0
        return found

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join([f"agreement with {self.other}", *([str(model)] if model else []), f"{len(self)} samples"])

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "counts": self.counts, "null": self.null}

    def _fields(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "layers": list(self.layers),
            "other": self.other,
            "settings": self.settings,
        }

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Agreement:
        fields["names"], fields["layers"] = tuple(fields["names"]), tuple(fields["layers"])
        return cls(**tensors, **fields)


def agreement(
    one: TokenScores | Mapping[Key, TokenScores],
    other: TokenScores,
    *,
    sources: Sources = "all",
    skip_special: bool = True,
    sizes: bool = False,
    shuffles: int = 200,
    seed: int = 0,
    resamples: int = 1000,
) -> Agreement:
    """The rank correlation of scores with others of the same batch and targets, for each method and layer.

    Args:
        one: scores; or several, by method, by layer or by (method, layer).
        other: what they are compared with.
        sources: `all`, `text` or `image` tokens, or the columns [batch, source] marked True.
        skip_special: whether special tokens are left out.
        sizes: compare the sizes of the scores without their signs.
        shuffles: how often the sources are shuffled, for what chance gives.
        seed: seed of the shuffles and of the bootstrap over samples.
        resamples: how often the samples are drawn anew for an interval.

    Returns:
        A correlation for each of the scores, sample and target, with their means, intervals and null.

    Raises:
        InputError: scores of another batch, tower or target; no such sources.
        UnknownNameError: no such kind of sources.
        SettingsError: an option lies outside its range.
    """
    check_options(0.95, resamples, seed)
    if isinstance(shuffles, bool) or not isinstance(shuffles, int) or shuffles < 0:
        raise SettingsError(f"shuffles is a whole number from 0, found {shuffles!r}.")
    many: Mapping[Key, TokenScores] = {one.name: one} if isinstance(one, TokenScores) else one
    if not many:
        raise InputError("no scores were given.")
    count = chosen_sources(other, sources, special=not skip_special)
    real = other.targets >= 0
    names, layers, values, counts, nulls = [], [], [], [], []
    for key, scores in many.items():
        name, layer = _named(key, scores)
        label = f"the {name} scores" + ("" if layer is None else f" of layer {layer}")
        same_sources(scores, other, label, f"the {other.name} scores")
        _same_targets(scores, other, label)
        mine = count[:, None] & real[:, :, None] & ~_unseen(scores, other)
        first, second = (x.scores.abs() if sizes else x.scores for x in (scores, other))
        first, second = (standard_ranks(x.nan_to_num(0), mine) for x in (first, second))
        enough = mine.sum(-1) > 1
        rho = (first * second).sum(-1).clamp(-1, 1).masked_fill(~enough, torch.nan)
        names.append(name)
        layers.append(layer)
        values.append(rho)
        counts.append(mine.sum(-1))
        nulls.append(_null(first, second, mine, rho, shuffles, seed))
    own = {"method": "agreement", "other": other.name, "sizes": sizes, "skip_special": skip_special}
    own |= {"sources": "marked" if isinstance(sources, Tensor) else sources, "shuffles": shuffles}
    own |= {"seed": seed, "resamples": resamples, "scores": [scores.settings for scores in many.values()]}
    model = other.settings.get("model")
    return Agreement(
        names=tuple(names),
        layers=tuple(layers),
        other=other.name,
        values=torch.stack(values),
        counts=torch.stack(counts),
        null=torch.stack(nulls),
        settings=own | ({} if model is None else {"model": model}) | {"against": other.settings},
    )


def _named(key: Key, scores: TokenScores) -> tuple[str, int | None]:
    if not isinstance(scores, TokenScores):
        raise InputError(f"{key!r} is a {type(scores).__name__}; TokenScores are compared.")
    if isinstance(key, tuple):
        return str(key[0]), int(key[1])
    return (scores.name, key) if isinstance(key, int) else (key, None)


def _same_targets(one: TokenScores, other: TokenScores, label: str) -> None:
    towers = one.target_tower or one.tower, other.target_tower or other.tower
    if towers[0] != towers[1]:
        raise InputError(f"{label} explain tower {towers[0]!r}, the {other.name} scores {towers[1]!r}.")
    if one.targets.shape != other.targets.shape or not torch.equal(one.targets, other.targets):
        raise InputError(
            f"{label} are of other targets than the {other.name} scores: {one.target_tokens[0]} and "
            f"{other.target_tokens[0]} in sample 0. Give both methods the same target=."
        )


def _unseen(one: TokenScores, other: TokenScores) -> Bool[Tensor, "batch target source"]:
    """Sources behind the targets, where both scores are zero at all of them."""
    later = torch.arange(one.scores.shape[2]) > one.targets[:, :, None]
    if (one.target_tower or one.tower) != one.tower:
        return torch.zeros_like(later)
    # Padding is NaN, fillers (-1) are wholly so.
    later = later & ~one.scores.isnan()
    silent = not bool((one.scores[later] != 0).any() or (other.scores[later] != 0).any())
    return later if silent else torch.zeros_like(later)


def _null(
    first: Tensor, second: Tensor, mask: Tensor, rho: Tensor, shuffles: int, seed: int
) -> Float[Tensor, "batch shuffle"]:
    """Each sample's mean correlation with the sources that count shuffled among themselves."""
    generator = torch.Generator().manual_seed(seed)
    size, count, width = mask.shape
    # Those that count to the front, so that a shuffle is an order of the first ones.
    front = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True)
    first, second, behind = first.gather(-1, front), second.gather(-1, front), ~mask.gather(-1, front)
    found = torch.empty(size, shuffles, dtype=torch.float32)
    for i in range(shuffles):
        order = torch.rand(size, count, width, generator=generator).masked_fill(behind, 2).argsort(-1)
        mean = (first * second.gather(-1, order)).sum(-1).masked_fill(rho.isnan(), torch.nan)
        found[:, i] = mean.nanmean(-1)
    return found
