"""`DictionaryScores`: what `evaluate` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.evaluation.intervals import rate
from interp.evaluation.measured import Measured
from interp.results import checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd

SUMS = ("tokens", "spread", "error", "active", "l1", "ratio", "cosine", "written", "inner")
"""Sums over the tokens of a context that fidelity is made of; `spread` is about the mean of all tokens."""

MEANINGS = {
    "fvu": "share of the variance that is not explained, about the mean of all tokens",
    "explained_variance": "1 - fvu",
    "explained_variance_legacy": "the form of SAEBench's tables and Neuronpedia; depends on the batches",
    "mse": "squared error of a token, summed over d",
    "l0": "active latents of a token",
    "l1": "sum of the latents' sizes in a token",
    "l2_ratio": "length of a reconstruction by that of its activation",
    "cosine": "of a reconstruction and its activation",
    "relative_reconstruction_bias": "below 1: reconstructions are too short",
    "dead": "latents that were never active in these tokens",
    "ce_original": "loss of the model as it is, nats a token",
    "ce_reconstruction": "loss with the reconstruction in place of the site",
    "ce_zero": "loss with zeros in its place",
    "ce_mean": "loss with the mean activation in its place",
    "kl_reconstruction": "KL(original || with the reconstruction), nats a token",
    "kl_zero": "KL(original || with zeros)",
    "kl_mean": "KL(original || with the mean)",
    "ce_recovered_zero": "(ce_zero - ce_reconstruction) / (ce_zero - ce_original)",
    "ce_recovered_mean": "(ce_mean - ce_reconstruction) / (ce_mean - ce_original)",
    "kl_recovered_zero": "1 - kl_reconstruction / kl_zero",
    "kl_recovered_mean": "1 - kl_reconstruction / kl_mean",
}
"""Every number in one line."""


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DictionaryScores(Measured):
    """How faithful a dictionary is to its activations, and the model with it to itself. Made by `evaluate`.

    `summary()` has every number with a bootstrap interval over contexts. Numbers that are not sums over tokens
    (`explained_variance_legacy`, `dead`) have none. A recovered share is undefined where the ablation costs nothing.

    Attributes:
        columns: names of what `table` holds: sums over the tokens of a context.
        table: float64 [context, column].
        density: share of tokens in which each latent is active [d_sae].
        fixed: numbers without an interval, by name.
        error_term: with the reconstruction and its error together in place of the site, the largest difference of a
            log-probability from the model as it is, in the first batch: rounding, or something is wrong. None where no
            losses were computed.
        settings: what they were computed with, with `seed` and `resamples`.

    Raises:
        InputError: shapes that do not fit together.
        NonFiniteError: NaN or infinity among the numbers.
        SettingsError: something in `settings` cannot be written as json.
    """

    columns: tuple[str, ...]
    table: Float[Tensor, "context column"]
    density: Float[Tensor, " d_sae"]
    fixed: Mapping[str, float]
    error_term: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    _over: ClassVar[str] = "contexts"

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not self.table.numel() or not set(SUMS) <= set(self.columns):
            raise InputError(f"the table is [context, column] with {', '.join(SUMS)}: {describe(self.table)}.")
        sizes = {"context": len(self.table), "column": len(self.columns)}
        keep: dict[str, Any] = {"table": checked("table", self.table.double(), sizes), "columns": tuple(self.columns)}
        keep["density"] = checked("density", self.density, {"d_sae": self.density.numel()})
        keep |= {"fixed": dict(self.fixed), "settings": jsonable(self.settings, "settings")}
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of contexts."""
        return len(self.table)

    @property
    def tokens(self) -> int:
        """Tokens that the dictionary was applied to."""
        return int(self.table[:, self.columns.index("tokens")].sum())

    @property
    def dead(self) -> Tensor:
        """Numbers of the latents that were never active [dead]."""
        return (self.density == 0).nonzero()[:, 0]

    def frame(self) -> pd.DataFrame:
        """One row for each context: means over its tokens (`fvu` is about the mean of all tokens)."""
        import pandas as pd

        weights = np.eye(len(self))
        found = {metric: values for (_, metric), (values, _) in self._compute(weights).items()}
        frame = pd.DataFrame({name: values for name, values in found.items() if name not in self.fixed})
        column = {name: self.table[:, i].numpy() for i, name in enumerate(self.columns)}
        frame.insert(0, "tokens", column["tokens"].astype(int))
        if "predictions" in column:
            frame.insert(1, "predictions", column["predictions"].astype(int))
        frame.insert(0, "context", np.arange(len(self)))
        return frame

    def _groups(self) -> list[np.ndarray]:
        return [np.arange(len(self))]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        total = {name: weights @ self.table[:, i].numpy() for i, name in enumerate(self.columns)}
        tokens = total["tokens"]
        found = {"fvu": rate(total["error"], total["spread"], np.nan)}
        found["explained_variance"] = 1 - found["fvu"]
        found |= {
            "mse": rate(total["error"], tokens, np.nan),
            "l0": rate(total["active"], tokens, np.nan),
            "l1": rate(total["l1"], tokens, np.nan),
            "l2_ratio": rate(total["ratio"], tokens, np.nan),
            "cosine": rate(total["cosine"], tokens, np.nan),
            "relative_reconstruction_bias": np.divide(
                total["written"], total["inner"], out=np.full(len(weights), np.nan), where=total["inner"] != 0
            ),
        }
        means = [name for name in self.columns if name.startswith(("ce_", "kl_"))]
        found |= {name: rate(total[name], total["predictions"], np.nan) for name in means}
        for name in (n.removeprefix("kl_") for n in means if n not in ("kl_reconstruction",) and n.startswith("kl_")):
            ce, base = total[f"ce_{name}"], total["ce_original"]
            found[f"ce_recovered_{name}"] = rate(ce - total["ce_reconstruction"], ce - base, np.nan)
            kl = total[f"kl_{name}"]
            found[f"kl_recovered_{name}"] = rate(kl - total["kl_reconstruction"], kl, np.nan)
        # What is no sum over tokens is known for all contexts together only.
        whole = (weights == 1).all(1)
        found |= {name: np.where(whole, value, np.nan) for name, value in self.fixed.items()}
        return {("all", name): (found[name], ~np.isnan(found[name])) for name in MEANINGS if name in found}

    def _shares(self, names: list[str]) -> list[str]:
        return [n for n in names if "recovered" in n or n in ("explained_variance", "cosine")]

    def _title(self) -> str:
        names = [str(self.settings[key]) for key in ("model", "read", "target") if self.settings.get(key)]
        return " · ".join([*dict.fromkeys(names), f"{self.tokens:,} tokens in {len(self)} contexts"])

    def _tensors(self) -> dict[str, Tensor]:
        return {"table": self.table, "density": self.density}

    def _fields(self) -> dict[str, Any]:
        plain = {"columns": list(self.columns), "fixed": dict(self.fixed), "error_term": self.error_term}
        return plain | {"settings": self.settings}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> DictionaryScores:
        fields["columns"] = tuple(fields["columns"])
        return cls(**tensors, **fields)


def density_classes(density: Float[Tensor, " d_sae"]) -> dict[str, int]:
    """How many latents are how often active: never, in less than one token of 100,000, of 10,000, and so on."""
    edges = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    names = ["never", "below 0.001%", "0.001% to 0.01%", "0.01% to 0.1%", "0.1% to 1%", "1% to 10%", "10% and more"]
    place = torch.bucketize(density, torch.tensor(edges, dtype=density.dtype), right=True) + 1
    place = place.masked_fill(density == 0, 0)
    return dict(zip(names, torch.bincount(place, minlength=len(names)).tolist(), strict=True))
