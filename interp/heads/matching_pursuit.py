"""Simultaneous orthogonal matching pursuit of one head over a large dictionary, exactly, without the n x d matrix.

Source: Basile et al. 2025, "Head Pursuit", arXiv 2510.21518, section 3. With A [n, d_head] a head's outputs for n
samples, W [d_head, d] its part of the output projection, H = A W what it writes, and D [v, d] a dictionary, each step
takes the atom with the largest score and then the least-squares residual over all atoms taken so far:

    score(j) = sum over samples s of |D_j . R_s|        R = H - X D_S,   X = argmin ||H - X D_S||

The same atoms are found here with far less work. With q_1, q_2, ... the taken atoms made orthonormal one after the
other, the residual is R = A W', W' = W (I - Q Q^T), for least squares is a projection of every row. With A = U M (QR),
U having orthonormal columns, an atom's score is the L1 norm of U y_j, y_j = M W' D_j in R^d_head, and

    y_j <- y_j - (D_j . q) M W' q              costs v (d + d_head) in each step, instead of v n d
    score(j) <= sqrt(n) |y_j|                  by Cauchy and Schwarz
    score(j) <= old score(j) + |D_j . q| |U M W' q|_1        by the triangle, for atoms that were scored before

so only atoms whose bound is above the best score are scored, in the order of their bounds. All this is done in float32
with margins for its rounding; what they cannot decide is scored in float64, and so are the residual and the shares.
Atoms whose scores are exactly equal (tokens with one and the same embedding) are taken in the order of the dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InputError, NonFiniteError, SettingsError

# Rounding of float32 products, by torch's setting of how exact they have to be (TF32 and bfloat16 are allowed below).
_ROUNDING = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
_NOTHING = 1e-10  # a residual of this share of the whole is rounding
_CHUNK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """Atoms to choose from, on any device.

    Attributes:
        rows: the atoms as they came.
        normalize: whether each is divided by its length.
        screen: the same in float32.
        sizes: their lengths in float32; ones for atoms of length zero.
    """

    rows: Float[Tensor, "v d"]
    normalize: bool
    screen: Float[Tensor, "v d"]
    sizes: Float[Tensor, " v"]

    @staticmethod
    def of(rows: Float[Tensor, "v d"], *, normalize: bool) -> Dictionary:
        """A dictionary of these rows.

        Raises:
            NonFiniteError: a row holds NaN or infinity.
        """
        screen = rows.detach().float()
        sizes = torch.linalg.vector_norm(screen, dim=1)
        if not bool(sizes.isfinite().all()):
            raise NonFiniteError(f"atom {int((~sizes.isfinite()).nonzero()[0])} holds NaN or infinity.")
        return Dictionary(rows.detach(), normalize, screen, sizes.masked_fill(sizes == 0, 1.0))

    def __len__(self) -> int:
        """Number of atoms."""
        return self.rows.shape[0]

    def exact(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Some atoms in float64 on the CPU."""
        rows = self.rows[index.to(self.rows.device)].cpu().double()
        if not self.normalize:
            return rows
        sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / sizes.masked_fill(sizes == 0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Pursuit:
    """What a pursuit took.

    Attributes:
        atoms: rows of the dictionary in the order in which they were taken.
        explained: share of H's sum of squares in the span of the atoms so far.
        coefficients: of the least-squares reconstruction by all atoms, for each sample.
        total: H's sum of squares.
        scored: how many scores were computed in all.
    """

    atoms: Int[Tensor, " k"]
    explained: Float[Tensor, " k"]
    coefficients: Float[Tensor, "n k"]
    total: float
    scored: int


def matching_pursuit(
    outputs: Float[Tensor, "n d_head"], weight: Float[Tensor, "d_head d"], dictionary: Dictionary, k: int
) -> Pursuit:
    """The first `k` atoms of the pursuit, fewer where nothing is left to explain.

    Args:
        outputs: the head's output for each sample, centred if the pursuit is to explain variance.
        weight: what it is multiplied with to give what the head writes.
        dictionary: the atoms.
        k: how many atoms.

    Raises:
        SettingsError: `k` is less than 1, or more than there are atoms.
        InputError: the head writes nothing.
        NonFiniteError: NaN or infinity in the outputs or the weight.
    """
    if not 1 <= k <= len(dictionary):
        raise SettingsError(f"k must lie between 1 and the number of atoms, {len(dictionary)}; got {k}.")
    basis, factor = torch.linalg.qr(outputs.detach().cpu().double())
    whole = factor @ weight.detach().cpu().double()
    total = float(whole.square().sum())
    if not total < float("inf"):
        raise NonFiniteError("the head's outputs or its weight hold NaN or infinity.")
    if total <= 0:
        raise InputError("the head writes nothing that could be explained: all its outputs are equal.")
    residual, screen = whole.clone(), _Screen(dictionary, basis, whole)
    atoms: list[int] = []
    directions = whole.new_empty(whole.shape[1], 0)
    gains: list[Tensor] = []
    while len(atoms) < k and float(residual.square().sum()) > _NOTHING**2 * total:
        atom = screen.best(residual)
        direction = _orthogonal(dictionary.exact(torch.tensor([atom]))[0], directions)
        if direction is None:
            break
        written = residual @ direction
        residual -= written[:, None] * direction
        atoms.append(atom)
        gains.append(written.square().sum() / total)
        directions = torch.cat([directions, direction[:, None]], 1)
        if len(atoms) < k:
            screen.remove(atom, direction, written, residual)
    index = torch.tensor(atoms)
    # D_S = T^T Q^T with T triangular, and X D_S = H Q Q^T.
    triangle = (directions.T @ dictionary.exact(index).T).triu()
    along = basis @ (whole @ directions)
    coefficients = torch.linalg.solve_triangular(triangle, along.T, upper=True).T
    return Pursuit(index, torch.stack(gains).cumsum(0), coefficients, total, screen.scored)


def _orthogonal(row: Float[Tensor, " d"], directions: Float[Tensor, "d k"]) -> Float[Tensor, " d"] | None:
    """The part of a row that is orthogonal to all directions, of length one; None where that is rounding."""
    left = row - directions @ (directions.T @ row)
    left = left - directions @ (directions.T @ left)  # once more, for what rounding left
    size = torch.linalg.vector_norm(left)
    return None if size <= _NOTHING * torch.linalg.vector_norm(row) else left / size


class _Screen:
    """Bounds on the score of every atom, in float32 on the dictionary's device.

    Attributes:
        parts: y_j of the description above [v, r].
        carried: bounds that stem from scores computed before; infinite for atoms that were not.
        inexact: of a score computed from exact parts, at most: this number times sqrt(n) |y_j|.
        error: of parts, at most: this number times the atom's length (one for normalised atoms).
        scored: how many scores were computed.
    """

    def __init__(self, dictionary: Dictionary, basis: Float[Tensor, "n r"], whole: Float[Tensor, "r d"]) -> None:
        self.dictionary, self.basis = dictionary, basis
        self.device = dictionary.screen.device
        self.samples = basis.T.float().to(self.device).contiguous()
        self.unit = _ROUNDING[torch.get_float32_matmul_precision()]
        self.sizes = torch.ones_like(dictionary.sizes) if dictionary.normalize else dictionary.sizes
        r, n = self.samples.shape
        # Of a score beside sqrt(n) |y_j|: of the product with the samples, and of the sum over them.
        self.inexact = self.unit * (r * r**0.5 + n + r + 4)
        # Of a product with an atom, and of the division by its length.
        self.rounding = (whole.shape[1] + 8) * self.unit * (2 if dictionary.normalize else 1)
        self.carried = torch.full_like(dictionary.sizes, torch.inf)
        self.taken: list[int] = []
        self.scored = 0
        self._begin(whole)

    def _products(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "v c"]:
        found = self.dictionary.screen @ columns.float().to(self.device)
        return found / self.dictionary.sizes[:, None] if self.dictionary.normalize else found

    def _begin(self, residual: Float[Tensor, "r d"]) -> None:
        """All parts anew, so that their rounding is small beside the residual that is left."""
        self.size = float(torch.linalg.matrix_norm(residual))
        self.parts = self._products(residual.T)
        self.error = self.rounding * self.size

    def best(self, residual: Float[Tensor, "r d"]) -> int:
        """The atom with the largest score."""
        root = self.samples.shape[1] ** 0.5
        lengths = torch.linalg.vector_norm(self.parts, dim=1)
        upper = (lengths * (root + root * self.inexact)).add_(self.sizes, alpha=root * self.error)
        torch.minimum(upper, self.carried, out=upper)
        upper[self.taken] = -torch.inf
        first = upper.topk(min(64, len(upper))).indices
        found = [(first, self._scores(first, lengths, upper))]
        low = found[0][1][0]
        rest = (upper > low).nonzero()[:, 0]
        rest = rest[upper[rest].argsort(descending=True)]
        while len(rest):
            some, rest = rest[:_CHUNK], rest[_CHUNK:]
            found.append((some, self._scores(some, lengths, upper)))
            low = max(low, found[-1][1][0])
            rest = rest[: int((upper[rest] > low).sum())]
        near = torch.cat([index[high >= low] for index, (_, high) in found]).cpu()
        if len(near) == 1:
            return int(near)
        rows = residual @ self.dictionary.exact(near).T
        exact = torch.cat([(self.basis @ part).abs().sum(0) for part in rows.split(_CHUNK, 1)])
        return int(near[exact == exact.max()].min())

    def _scores(
        self, index: Int[Tensor, " n"], lengths: Float[Tensor, " v"], upper: Float[Tensor, " v"]
    ) -> tuple[float, Float[Tensor, " n"]]:
        """Score some atoms: the largest of the scores' lower bounds, and their upper bounds."""
        margin = self.samples.shape[1] ** 0.5 * (self.error * self.sizes[index] + self.inexact * lengths[index])
        score = (self.parts[index] @ self.samples).abs().sum(1).masked_fill(upper[index] == -torch.inf, -torch.inf)
        high = score + margin
        score = score - margin
        self.carried[index] = high
        upper[index] = -torch.inf
        self.scored += len(index)
        return float(score.max()), high

    def remove(
        self,
        atom: int,
        direction: Float[Tensor, " d"],
        written: Float[Tensor, " r"],
        residual: Float[Tensor, "r d"],
    ) -> None:
        """Take a direction away from all parts."""
        self.taken.append(atom)
        along = self._products(direction[:, None])[:, 0]
        most = float((self.basis @ written).abs().sum())
        most *= 1 + 8 * self.unit
        self.carried.add_(along.abs(), alpha=most).add_(self.sizes, alpha=most * self.rounding)
        self.parts.addr_(along, written.float().to(self.device), alpha=-1)
        self.error += self.rounding * float(torch.linalg.vector_norm(written)) + 4 * self.unit * self.size
        if float(torch.linalg.matrix_norm(residual)) < 0.25 * self.size:
            self._begin(residual)
