"""Which OV heads of a token are active, and what that costs in the loss.

With pre [token, n_ov] and the lengths n of the output directions w_o (held fixed), contributions are c = pre n, and

    identity   z = pre                           relu       z = ReLU(pre)
    topk       the k largest c > 0 of a token    batchtopk  the k n largest c > 0 of n tokens, or c > threshold
    jumprelu   c > threshold (trained)

so that heads are ranked by how far they move the output, whatever the split of the length between w_v and w_o.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.dictionaries.base import mse
from interp.dictionaries.jumprelu import _Jump
from interp.dictionaries.sparse import Pattern, Reduce, Sparse, decode, held, kth_largest
from interp.dictionaries.topk import _variance

if TYPE_CHECKING:
    from interp.dictionaries.lorsa.lorsa import Lorsa

_TINY = 1e-12


def norms_of(lorsa: Lorsa) -> Float[Tensor, " n_ov"]:
    """Lengths of the output directions, without a gradient."""
    return lorsa.W_O.detach().norm(dim=1).clamp_min(_TINY)


def select(
    lorsa: Lorsa, pre: Float[Tensor, "tokens n_ov"], reduce: Reduce | None = None
) -> Float[Tensor, "tokens n_ov"] | Sparse:
    """The latents z of pre-activations; sparse for top-k kinds."""
    kind = lorsa.cfg.architecture
    if kind == "identity":
        return pre
    if kind == "relu":
        return pre.relu()
    norms = norms_of(lorsa)
    if kind == "jumprelu":
        threshold = lorsa.threshold.to(pre.dtype)
        jumped: Tensor = _Jump.apply(pre.relu() * norms, threshold, lorsa.cfg.jumprelu_bandwidth, True, False)  # type: ignore[assignment]
        return jumped / norms
    with torch.no_grad():
        pattern = _topk(pre, norms, int(lorsa.cfg.k)) if kind == "topk" else _batch(lorsa, pre, norms, reduce)
    return Sparse(pre[pattern.tokens, pattern.latents].relu(), pattern)


def _topk(pre: Tensor, norms: Tensor, k: int) -> Pattern:
    # A part at a time: contributions are needed nowhere else.
    parts = pre.split(max(1, held(pre.device) // pre.shape[1]))
    index = torch.cat([(part * norms).topk(k, dim=1, sorted=False).indices for part in parts]).flatten()
    return Pattern(index, torch.arange(0, len(index) + 1, k, device=pre.device), pre.shape[1])


def _batch(lorsa: Lorsa, pre: Tensor, norms: Tensor, reduce: Reduce | None) -> Pattern:
    size, threshold = pre * norms, lorsa.topk_threshold
    if lorsa.training or not threshold > 0:
        total = torch.tensor(int(lorsa.cfg.k * len(pre)), device=pre.device)
        whole = int(total if reduce is None else reduce(total, "sum"))
        bound = max(kth_largest(size[size > 0], whole, reduce), torch.finfo(pre.dtype).smallest_normal)
        kept = size >= bound
    else:
        kept = size > threshold.to(size.dtype)
    tokens, latents = kept.nonzero(as_tuple=True)
    counts = torch.bincount(tokens, minlength=len(pre))
    return Pattern(latents, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), pre.shape[1])


def written(lorsa: Lorsa, latents: Float[Tensor, "tokens n_ov"] | Sparse) -> Float[Tensor, "tokens d_out"]:
    """What latents write, with the decoder's bias; of sparse ones only the active rows are touched."""
    if isinstance(latents, Sparse):
        return decode(latents.values, lorsa.W_O, latents.pattern) + lorsa.b_D
    return latents @ lorsa.W_O + lorsa.b_D


def losses(
    lorsa: Lorsa,
    pre: Float[Tensor, "tokens n_ov"],
    target: Float[Tensor, "tokens d_out"],
    *,
    dead: Bool[Tensor, " n_ov"] | None,
    sparsity: float,
    reduce: Reduce | None,
) -> tuple[dict[str, Tensor], Tensor | Sparse, Tensor]:
    """Parts of the loss by name, the latents, and the reconstruction."""
    cfg = lorsa.cfg
    latents = select(lorsa, pre, reduce)
    y = written(lorsa, latents)
    parts = {"mse_loss": mse(y, target)}
    if cfg.architecture == "relu":
        parts["l1_loss"] = cfg.l1_coefficient * sparsity * (latents.mean(0) @ lorsa.W_O.norm(dim=1))  # type: ignore[union-attr]
    elif cfg.architecture == "jumprelu":
        size, threshold = pre * norms_of(lorsa), lorsa.threshold.to(pre.dtype)
        active: Tensor = _Jump.apply(size, threshold, cfg.jumprelu_bandwidth, False, False)  # type: ignore[assignment]
        parts["l0_loss"] = cfg.l0_coefficient * sparsity * active.sum(1).mean()
    elif isinstance(latents, Sparse):
        parts["auxiliary_reconstruction_loss"] = _dead_loss(lorsa, pre, (target - y).detach(), dead, reduce)
        if cfg.architecture == "batchtopk" and lorsa.training:
            _move_threshold(lorsa, latents, reduce)
    return parts, latents, y


def _dead_loss(
    lorsa: Lorsa, pre: Tensor, residual: Tensor, dead: Tensor | None, reduce: Reduce | None
) -> Float[Tensor, ""]:
    """How badly the dead heads reconstruct the residual, as in `interp.dictionaries.topk` (form `paper`)."""
    index = None if dead is None else dead.nonzero()[:, 0]
    if index is None or not len(index):
        return residual.new_zeros(())
    enough = max(residual.shape[1] // 2, 1)
    values, rows = pre[:, index], lorsa.W_O[index]
    if len(index) <= enough:
        guess = values.relu() @ rows
    else:
        pattern = _topk(values.detach(), norms_of(lorsa)[index], enough)
        guess = decode(values[pattern.tokens, pattern.latents].relu(), rows, pattern)
    share = mse(guess, residual) / _variance(residual, reduce).clamp_min(_TINY)
    return lorsa.cfg.aux_loss_coefficient * min(len(index) / enough, 1.0) * share


@torch.no_grad()
def _move_threshold(lorsa: Lorsa, latents: Sparse, reduce: Reduce | None) -> None:
    size = latents.values * norms_of(lorsa)[latents.pattern.latents]
    least = size.min() if len(size) else size.new_tensor(torch.inf)
    if reduce is not None:
        least = reduce(least, "min")
    threshold = lorsa.topk_threshold
    moved = torch.lerp(threshold, least.double(), lorsa.cfg.topk_threshold_lr)
    threshold.copy_(torch.where(least.isfinite(), moved, threshold))
