"""`CausalMap`: what patching each site, layer, head and group of positions does to a metric."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.bootstrap import check_options
from interp.errors import InputError, SettingsError, unknown
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
else:
    pd = go = Any

Of = Literal["effect", "mean_ratio", "value"]
RANKED = ("effect", "abs", "mean_ratio", "value")


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CausalMap(Scores):
    """The metric with each cell patched, for every prompt. Made by `patch_sweep`.

    An effect is the share of the way from the run that is patched to the run that the patch comes from:

        effect = (value - base) / (source - base),   denoise: source clean, base corrupt;   noise: the other way round

    `effects` is the ratio of the means over prompts; `mean_ratios` is the mean of each prompt's own ratio, without the
    prompts whose denominator is smaller than `min_gap` times the mean one (`left_out` says how many these are).

    Attributes:
        values: the metric with each cell patched [cell, prompt]; NaN where a prompt does not have the positions.
        clean: the metric of the clean run [prompt].
        corrupt: the metric of the corrupt run [prompt].
        cells: site, layer, head and group of each cell [cell, 4]; head -1 stands for all heads, or a site without any.
        exists: which prompts have the positions of each group [group, prompt].
        sites: names of the sites.
        groups: names of the groups of positions; the number of the position where each is a single one.
        direction: `denoise` or `noise`.
        metric: name of the metric.
        unit: what it is measured in; empty for a plain number.
        single: whether each group is a single position.
        tokens: the token of each group, where it is a single position and the same in all prompts; else empty.
        min_gap: see above.
        settings: what it was computed with: anything that json can hold.

    Raises:
        InputError: tensors or names that do not fit together.
        NonFiniteError: NaN or infinity among the numbers.
        SettingsError: something in `settings` cannot be written as json, or `min_gap` is negative.
        UnknownNameError: another direction.
    """

    values: Float[Tensor, "cell prompt"]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]
    cells: Int[Tensor, "cell 4"]
    exists: Bool[Tensor, "group prompt"]
    sites: tuple[str, ...]
    groups: tuple[str, ...]
    direction: str
    metric: str
    unit: str = ""
    single: bool = False
    tokens: tuple[str, ...] = ()
    min_gap: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.direction not in ("denoise", "noise"):
            raise unknown("direction", self.direction, ("denoise", "noise"))
        if not 0 <= self.min_gap < float("inf"):
            raise SettingsError(f"min_gap is a share of the mean gap, not negative; got {self.min_gap}.")
        cells, exists = self.cells.detach().cpu().long(), self.exists.detach().cpu().bool()
        if cells.ndim != 2 or cells.shape[1] != 4 or not len(cells):
            raise InputError(f"cells are [cell, 4] with at least one, found {describe(self.cells)}.")
        if exists.shape != (len(self.groups), len(self.clean)) or len(self.clean) == 0:
            raise InputError(
                f"exists is [group {len(self.groups)}, prompt {len(self.clean)}], found {describe(self.exists)}."
            )
        inside = (cells[:, 0] >= 0) & (cells[:, 0] < len(self.sites)) & (cells[:, 3] >= 0)
        if not bool((inside & (cells[:, 3] < len(self.groups))).all()) or (
            self.tokens and len(self.tokens) != len(self.groups)
        ):
            raise InputError("cells name a site or group that is not there, or there is not one token for each group.")
        sizes = {"cell": len(cells), "prompt": len(self.clean)}
        keep: dict[str, Any] = {"cells": cells, "exists": exists}
        keep["values"] = checked("values", self.values, sizes, exists[cells[:, 3]])
        for name in ("clean", "corrupt"):
            keep[name] = checked(name, getattr(self, name), {"prompt": len(self.clean)})
        for name in ("sites", "groups", "tokens"):
            keep[name] = tuple(getattr(self, name))
        keep["settings"] = jsonable(self.settings, "settings")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.clean)

    @property
    def base(self) -> Float[Tensor, " prompt"]:
        """The metric of the run that is patched."""
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def source(self) -> Float[Tensor, " prompt"]:
        """The metric of the run that patches come from."""
        return self.clean if self.direction == "denoise" else self.corrupt

    @property
    def gaps(self) -> Float[Tensor, " prompt"]:
        """Source minus base, the denominator of each prompt, in float64."""
        return self.source.double() - self.base.double()

    @property
    def kept(self) -> Bool[Tensor, " prompt"]:
        """The prompts whose gap is large enough for a ratio of their own."""
        size = self.gaps.abs()
        return (size > 0) & (size >= self.min_gap * size.mean())

    @property
    def left_out(self) -> int:
        """How many prompts are left out of `mean_ratios` for their small gap."""
        return int((~self.kept).sum())

    @property
    def ratios(self) -> Float[Tensor, "cell prompt"]:
        """The effect in each prompt by itself; NaN where the prompt is left out or does not have the positions."""
        ratios = (self.values.double() - self.base.double()) / self.gaps
        return ratios.masked_fill(~self.kept, torch.nan)

    @property
    def effects(self) -> Float[Tensor, " cell"]:
        """The effect of each cell: the ratio of the means over prompts."""
        shares = torch.ones(1, len(self), dtype=torch.float64)
        return torch.from_numpy(self._resampled(shares.numpy())[0])

    @property
    def mean_ratios(self) -> Float[Tensor, " cell"]:
        """The effect of each cell: the mean of the ratios of the prompts that are kept; NaN where none is."""
        return self.ratios.nanmean(1)

    def _resampled(self, weights: np.ndarray) -> np.ndarray:
        """Ratios of weighted means [draw, cell]."""
        there = self.exists[self.cells[:, 3]].numpy()
        moved = (self.values.double() - self.base.double()).nan_to_num(0.0).numpy() * there
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (weights @ moved.T) / (weights @ (there * self.gaps.numpy()).T)
        return np.where(np.isfinite(found), found, np.nan)

    def interval(
        self, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
        """A bootstrap interval of each effect over prompts, by percentiles of the resampled ratio of means.

        Args:
            confidence: between 0 and 1.
            resamples: how often the prompts are drawn anew.
            seed: seed of the draws.

        Returns:
            The lower and the upper ends [cell]; NaN with a single prompt.

        Raises:
            SettingsError: an option lies outside its range.
        """
        check_options(confidence, resamples, seed)
        if len(self) < 2:
            none = torch.full((len(self.cells),), torch.nan, dtype=torch.float64)
            return none, none.clone()
        count = len(self)
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
        tail = (1 - confidence) / 2
        low, high = np.nanquantile(self._resampled(drawn / count), [tail, 1 - tail], axis=0)
        return torch.from_numpy(low), torch.from_numpy(high)

    def frame(self, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """A tidy pandas frame, one row for each cell.

        Columns: `site`, `layer`, `position` with `token` (or `group`), `head` (-1 for all heads, or none), `value` (the
        mean over prompts), `effect` with `low` and `high`, the ends of its bootstrap interval over prompts (NaN with a
        single prompt), `mean_ratio`, and `prompts`, how many have the positions.

        Args:
            confidence: between 0 and 1.
            resamples: how often the prompts are drawn anew.
            seed: seed of the draws.

        Raises:
            SettingsError: an option lies outside its range.
        """
        import pandas

        low, high = self.interval(confidence, resamples=resamples, seed=seed)
        site, layer, head, group = self.cells.numpy().T
        columns: dict[str, Any] = {"site": np.array(self.sites, dtype=object)[site], "layer": layer}
        if self.single:
            columns["position"] = np.array([int(name) for name in self.groups])[group]
            if self.tokens:
                columns["token"] = np.array(self.tokens, dtype=object)[group]
        else:
            columns["group"] = np.array(self.groups, dtype=object)[group]
        columns |= {"head": head, "value": self.values.double().nanmean(1).numpy(), "effect": self.effects.numpy()}
        columns |= {"low": low.numpy(), "high": high.numpy(), "mean_ratio": self.mean_ratios.numpy()}
        columns["prompts"] = self.exists.sum(1).numpy()[group]
        frame = pandas.DataFrame(columns)
        model = self.settings.get("model")
        frame.attrs.update({"model": model} if isinstance(model, str) else {})
        return frame

    def top(self, k: int = 10, by: str = "effect", *, site: str | None = None, largest: bool = True) -> pd.DataFrame:
        """The first `k` cells of a ranking, best first.

        Args:
            k: how many, at least 1.
            by: `effect`, `abs` (its size without the sign), `mean_ratio` or `value`.
            site: only cells of this site; None for all.
            largest: from the largest value down; False from the smallest up.

        Raises:
            UnknownNameError: `by` or `site` names nothing.
            SettingsError: `k` is below 1.
        """
        if by not in RANKED:
            raise unknown("ranking", by, RANKED)
        if not isinstance(k, int) or k < 1:
            raise SettingsError(f"k is a whole number from 1, got {k!r}.")
        frame: Any = self.frame()
        if site is not None:
            frame = frame[frame["site"] == self.sites[self._site(site)]]
        keys = frame["effect"].abs() if by == "abs" else frame[by]
        return frame.loc[keys.sort_values(ascending=not largest, kind="stable").index[:k]].reset_index(drop=True)

    def grid(self, site: str | None = None, *, head: int | None = None, of: Of = "effect") -> pd.DataFrame:
        """The cells of one site as a table with a row for each layer, lowest first.

        Args:
            site: which; None where there is one only.
            head: which head, for one column for each group; None gives that where the site's heads were patched
                together, and one column for each head where there is a single group.
            of: `effect`, `mean_ratio` or `value`.

        Raises:
            UnknownNameError: no such site or head, or another `of`.
            InputError: several sites, or heads and groups both, of which one has to be chosen.
        """
        if of not in ("effect", "mean_ratio", "value"):
            raise unknown("number", of, ("effect", "mean_ratio", "value"))
        number = self._site(site)
        mine = self.cells[:, 0] == number
        numbers = {"effect": lambda: self.effects, "mean_ratio": lambda: self.mean_ratios}
        shown = numbers[of]() if of in numbers else self.values.double().nanmean(1)
        frame: Any = self._places().assign(shown=shown.numpy())[mine.numpy()]
        heads = sorted(frame["head"].unique().tolist())
        if head is not None:
            if head not in heads:
                raise unknown("head", head, heads, f"site {self.sites[number]!r}")
            frame, by = frame[frame["head"] == head], "group"
        elif heads == [-1] or len(heads) == 1:
            by = "group"
        elif frame["group"].nunique() == 1:
            by = "head"
        else:
            raise InputError(
                f"{self.sites[number]!r} was patched by heads and by groups: choose a head, one of {heads}."
            )
        table = frame.pivot_table(index="layer", columns=by, values="shown", aggfunc="first", dropna=False)
        if by == "group":
            names = {g: int(self.groups[g]) if self.single else self.groups[g] for g in table.columns}
            table = table.rename(columns=names).rename_axis(columns="position" if self.single else "group")
        return table

    def _places(self) -> pd.DataFrame:
        import pandas

        return pandas.DataFrame(self.cells.numpy(), columns=["site", "layer", "head", "group"])

    def _site(self, site: str | None) -> int:
        if site is None:
            if len(self.sites) > 1:
                raise InputError(f"there are several sites, choose one: {', '.join(self.sites)}.")
            return 0
        if site not in self.sites:
            raise unknown("site", site, self.sites)
        return self.sites.index(site)

    def plot(
        self,
        site: str | Sequence[str] | None = None,
        *,
        head: int | None = None,
        of: Of = "effect",
        title: str | None = None,
    ) -> go.Figure:
        """A heat map for each site: layers downwards, positions (or groups, or heads) to the right.

        Args:
            site: which site or sites; None for all.
            head: which head, where a site was patched by heads and by positions.
            of: `effect`, `mean_ratio` or `value`.
            title: None writes the direction, the metric and the model.

        Raises:
            UnknownNameError: no such site or head, or another `of`.
            InputError: heads and groups both, of which one has to be chosen.
        """
        from interp.tracing.figure import panels

        chosen = list(self.sites) if site is None else [site] if isinstance(site, str) else list(site)
        tables = {name: self.grid(name, head=head, of=of) for name in chosen}
        labels: dict[Any, str] = {}
        if self.single and self.tokens:
            labels = {int(p): token or p for p, token in zip(self.groups, self.tokens, strict=True)}
        unit = self.unit if of == "value" else "share"
        return panels(tables, labels=labels, title=self._title() if title is None else title, unit=unit)

    def to_circuitsvis(self, site: str | None = None, *, of: Of = "effect") -> Any:
        """The tokens (or groups of positions) as CircuitsVis shows them, coloured by what one layer's cells do.

        Args:
            site: which; None for all, each layer and head of each with a button of its own.
            of: `effect`, `mean_ratio` or `value`.

        Returns:
            CircuitsVis's `RenderedHTML`, which a notebook shows.

        Raises:
            MissingPackageError: CircuitsVis is not installed.
            UnknownNameError: no such site, or another `of`.
            InputError: some cells have no number, for no prompt's gap is large enough.
        """
        from interp.figures import circuitsvis_tokens

        columns, labels = [], []
        for name in self.sites if site is None else [site]:
            mine = self.cells[self.cells[:, 0] == self._site(name)]
            for head in sorted({int(h) for h in mine[:, 2]}):
                grid = self.grid(name, head=head, of=of)
                columns += list(grid.to_numpy(dtype=float))
                labels += [f"{name} L{layer}" + (f" H{head}" if head >= 0 else "") for layer in grid.index]
        return circuitsvis_tokens(self.tokens or self.groups, np.stack(columns, 1), labels)

    def __repr__(self) -> str:
        best = self.top(1, by="abs").iloc[0]
        where = best["position"] if self.single else best["group"]
        head = "" if best["head"] < 0 else f" H{best['head']}"
        return (
            f"CausalMap({self._title()}: {len(self.cells)} cells, {len(self)} prompts; strongest {best['site']} "
            f"L{best['layer']}{head} @{where} = {best['effect']:.4g})"
        )

    def _repr_html_(self) -> str:
        from interp.palette import thumbnail

        top = self.top(8, by="abs").drop(columns=["low", "high", "mean_ratio"])
        cell = "text-align:right;padding:2px 8px"
        names = "".join(f"<th style='{cell}'>{html.escape(str(c))}</th>" for c in top.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td style='{cell}'>{html.escape(_show(v))}</td>" for v in row) + "</tr>"
            for row in top.itertuples(index=False)
        )
        pictures = []
        for name in self.sites:
            try:
                table = self.grid(name)
            except InputError:  # by heads and by groups: no single picture
                continue
            wide, tall = max(120, min(360, table.shape[1] * 24)), max(80, min(300, len(table) * 12))
            pictures.append(
                f"<figure style='margin:0'><figcaption>{html.escape(name)}</figcaption><img alt='heat map of the "
                f"effects' src='{thumbnail(table.to_numpy())}' style='width:{wide}px;height:{tall}px;"
                "image-rendering:pixelated;border:1px solid #8888;max-width:none'></figure>"
            )
        head = f"{len(self.cells)} cells, {len(self)} prompts; {self.left_out} left out of the mean of ratios"
        return (
            f"<div><p><b>{html.escape(self._title())}</b><br>{head}</p><div style='display:flex;flex-wrap:wrap;"
            f"gap:24px;align-items:flex-start'>{''.join(pictures)}<table><thead><tr>{names}</tr></thead><tbody>{rows}</tbody>"
            "</table></div></div>"
        )

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join([self.direction, self.metric, *([str(model)] if model else [])])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("values", "clean", "corrupt", "cells", "exists")}

    def _fields(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("direction", "metric", "unit", "single", "min_gap", "settings")}
        return {**plain, **{name: list(getattr(self, name)) for name in ("sites", "groups", "tokens")}}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> CausalMap:
        for name in ("sites", "groups", "tokens"):
            fields[name] = tuple(fields[name])
        return cls(**tensors, **fields)


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
