"""Logistic regression on few or many columns, with an L2 penalty (L-BFGS) or an L1 penalty (FISTA)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_STEPS = 500


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A linear classifier of two classes.

    Attributes:
        weight: in the units of the columns it was fitted on [column].
        bias: number.
    """

    weight: np.ndarray
    bias: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Log-odds of the positive class [row]."""
        return x @ self.weight + self.bias


def fit(x: np.ndarray, y: np.ndarray, *, l2: float = 1.0, balanced: bool = False) -> Probe:
    """Minimise the sum of log-losses plus l2/2 |w|^2, columns brought to mean 0 and standard deviation 1 before.

    Args:
        x: [row, column].
        y: bool [row], both classes there.
        l2: weight of the penalty; the bias has none.
        balanced: give both classes the same weight in sum.
    """
    from scipy.optimize import minimize

    scaled, mean, scale = _scaled(x)
    sign, weight = _signed(y, balanced)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (scaled @ at[:-1] + at[-1])
        pull = -weight * sign * _sigmoid(-margin)
        gradient = np.append(scaled.T @ pull + l2 * at[:-1], pull.sum())
        return float(weight @ np.logaddexp(0, -margin) + l2 / 2 * at[:-1] @ at[:-1]), gradient

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
    return _unscaled(found, mean, scale)


def fit_sparse(x: np.ndarray, y: np.ndarray, *, l1: float, balanced: bool = False) -> Probe:
    """Minimise the mean log-loss plus l1 |w|_1, columns brought to mean 0 and standard deviation 1 before.

    Args:
        x: [row, column].
        y: bool [row], both classes there.
        l1: weight of the penalty; the bias has none.
        balanced: give both classes the same weight in sum.
    """
    scaled, mean, scale = _scaled(x)
    sign, weight = _signed(y, balanced)
    weight = weight / weight.sum()
    wide = np.column_stack([scaled, np.ones(len(x))])
    # The largest curvature of the loss: a quarter of the largest eigenvalue of the weighted Gram matrix.
    rate = 4 / max(np.linalg.norm((wide * np.sqrt(weight)[:, None]), 2) ** 2, 1e-12)
    at = ahead = np.zeros(wide.shape[1])
    momentum = 1.0
    for _ in range(_STEPS):
        pull = -weight * sign * _sigmoid(-sign * (wide @ ahead))
        new = ahead - rate * (wide.T @ pull)
        new[:-1] = np.sign(new[:-1]) * np.maximum(np.abs(new[:-1]) - rate * l1, 0)
        after = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / after * (new - at)
        if np.abs(new - at).max() < 1e-7:
            at = new
            break
        at, momentum = new, after
    return _unscaled(at, mean, scale)


def f1(said: np.ndarray, y: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is found."""
    hits = int((said & y).sum())
    return 2 * hits / (int(said.sum()) + int(y.sum())) if hits else 0.0


def split(strata: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Which rows are held out, bool [row]: about this share of each stratum, at least one of two or more."""
    out = np.zeros(len(strata), dtype=bool)
    for one in np.unique(strata):
        rows = random.permutation(np.flatnonzero(strata == one))
        if len(rows) > 1:
            out[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    return out


def _scaled(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    return (x - mean) / scale, mean, scale


def _signed(y: np.ndarray, balanced: bool) -> tuple[np.ndarray, np.ndarray]:
    weight = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum())) if balanced else np.ones(len(y))
    return np.where(y, 1.0, -1.0), weight


def _unscaled(at: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Probe:
    weight = at[:-1] / scale
    return Probe(weight, float(at[-1] - weight @ mean))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
