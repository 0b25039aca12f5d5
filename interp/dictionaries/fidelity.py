"""How well a dictionary reconstructs, and with how many latents, in one pass over any number of batches.

With x the targets, y the reconstructions, f the latents, and means over all tokens that were seen,

    fvu                          sum |x - y|^2 / sum |x - mean x|^2, with the mean of all tokens
    explained_variance           1 - fvu
    explained_variance_legacy    mean over tokens of 1 - |x - y|^2 / |x - mean x of its batch|^2
    mse                          mean of |x - y|^2 (sum over d)
    l0, l1                       mean number of f != 0, mean of the sum of |f|
    density, dead                share of tokens in which each latent is active; latents that never are
    l2_ratio                     mean of |y| / |x|
    cosine                       mean cosine of x and y
    relative_reconstruction_bias mean |y|^2 / mean <x, y>: below 1 where reconstructions are too short

The legacy form is that of SAEBench's tables and of Neuronpedia: it depends on the batches, gives every token the same
weight however long it is, and is often far from the right one. SAELens up to 6.18 had a third form, whose total
variance was nearly mean |x|^2; it is not offered.

Sums are float64; the variance is merged from batch to batch (Chan, Golub and LeVeque 1979), not found as a difference
of large sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.sparse import Reduce, Sparse
from interp.errors import InputError, NonFiniteError


@dataclass(frozen=True, slots=True, eq=False)
class FidelityScores:
    """What `Fidelity.result` returns; each is explained in the module's text.

    Attributes:
        tokens: how many were seen.
        density: share of tokens in which each latent is active [d_sae].
        dead: number of latents that were never active.
    """

    tokens: int
    fvu: float
    explained_variance: float
    explained_variance_legacy: float
    mse: float
    l0: float
    l1: float
    dead: int
    l2_ratio: float
    cosine: float
    relative_reconstruction_bias: float
    density: Float[Tensor, " d_sae"]

    def numbers(self) -> dict[str, float]:
        """All but the density, by name."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "density"}


_SUMS = ("error", "legacy", "l1", "ratio", "cosine", "written", "inner")


class Fidelity:
    """Collects batches: `update` for each, then `result`.

    Args:
        d_out: width of the targets.
        d_sae: number of latents.
        device: where sums are kept.
    """

    def __init__(self, d_out: int, d_sae: int, *, device: torch.device | str = "cpu"):
        wide = {"dtype": torch.float64, "device": device}
        self.tokens = torch.zeros((), **wide)
        self.mean, self.spread = torch.zeros(d_out, **wide), torch.zeros((), **wide)
        self.active = torch.zeros(d_sae, **wide)
        self.sums = {name: torch.zeros((), **wide) for name in _SUMS}

    @torch.no_grad()
    def update(
        self,
        target: Float[Tensor, "*tokens d_out"],
        reconstruction: Float[Tensor, "*tokens d_out"],
        latents: Float[Tensor, "*tokens d_sae"] | Sparse,
    ) -> None:
        """Add a batch.

        Raises:
            InputError: shapes do not fit each other or the widths that were given.
            NonFiniteError: a reconstruction or a target holds NaN or infinity.
        """
        d_out, d_sae = len(self.mean), len(self.active)
        if target.shape != reconstruction.shape or target.shape[-1] != d_out:
            found = f"{list(target.shape)} and {list(reconstruction.shape)}"
            raise InputError(f"target and reconstruction are both [..., {d_out}], found {found}.")
        x, y = (t.reshape(-1, d_out).to(self.mean) for t in (target, reconstruction))
        if latents.shape[-1] != d_sae or latents.shape[:-1].numel() != len(x):
            raise InputError(f"latents are [..., {d_sae}] of {len(x)} tokens, found shape {list(latents.shape)}.")
        if not len(x):
            return
        error = (x - y).square().sum(1)
        if not error.isfinite().all():
            place = int((~error.isfinite()).nonzero()[0])
            raise NonFiniteError(f"target or reconstruction of token {place} of this batch holds NaN or infinity.")
        mean = x.mean(0)
        away = (x - mean).square().sum(1)
        self._merge(len(x), mean, away.sum())
        inner, long, short = (x * y).sum(1), x.norm(dim=1), y.norm(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        added = {
            "error": error,
            # A batch of equal tokens has no variance: all of it is explained only where there is no error.
            "legacy": torch.where(away > 0, 1 - error / away.clamp_min(tiny), (error == 0).double()),
            "ratio": short / long.clamp_min(tiny),
            "cosine": inner / (long * short).clamp_min(tiny),
            "written": short.square(),
            "inner": inner,
        }
        for name, value in added.items():
            self.sums[name] += value.sum()
        if isinstance(latents, Sparse):
            self.sums["l1"] += latents.values.abs().sum(dtype=torch.float64)
            self.active += latents.counts()
        else:
            self.sums["l1"] += latents.abs().sum(dtype=torch.float64)
            self.active += (latents != 0).reshape(-1, d_sae).sum(0)

    def _merge(self, count: int | Tensor, mean: Tensor, spread: Tensor) -> None:
        total = self.tokens + count
        gap = mean - self.mean
        self.spread += spread + gap.square().sum() * self.tokens * count / total
        self.mean += gap * count / total
        self.tokens = total

    def result(self, reduce: Reduce | None = None) -> FidelityScores:
        """The scores of all batches so far; with `reduce`, of all processes together.

        Raises:
            InputError: no token was seen.
        """
        bring = (lambda t: t) if reduce is None else (lambda t: reduce(t.clone(), "sum"))
        tokens = bring(self.tokens)
        if not tokens > 0:
            raise InputError("no token was seen; call update first.")
        mean = bring(self.mean * self.tokens) / tokens
        spread = bring(self.spread + self.tokens * (self.mean - mean).square().sum())
        sums = {name: bring(value) for name, value in self.sums.items()}
        active = bring(self.active)
        fvu = float(sums["error"] / spread) if spread > 0 else (0.0 if sums["error"] == 0 else float("inf"))
        share = {name: float(value / tokens) for name, value in sums.items()}
        return FidelityScores(
            tokens=int(tokens),
            fvu=fvu,
            explained_variance=1 - fvu,
            explained_variance_legacy=share["legacy"],
            mse=share["error"],
            l0=float(active.sum() / tokens),
            l1=share["l1"],
            dead=int((active == 0).sum()),
            l2_ratio=share["ratio"],
            cosine=share["cosine"],
            relative_reconstruction_bias=share["written"] / share["inner"] if share["inner"] else float("nan"),
            density=(active / tokens).float().cpu(),
        )
