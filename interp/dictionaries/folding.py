"""The same function with other weights: norms and scales folded in. Nothing is changed in place.

    decoder norms      W_dec / n, W_enc n, b_enc n (b_gate, b_mag, threshold too), n the lengths of the rows of W_dec
    activation scale   trained on s x: W_enc s, W_dec / s, b_dec / s   (a transcoder of t target: W_dec / t, b_dec / t)
    batch-top-k        norms folded, then JumpReLU with the running threshold for every latent

Reconstructions stay what they were. Latents of `standard`, `gated` and `jumprelu` are multiplied by n; where they were
reported times n already (`rescale_acts_by_decoder_norm`) they stay.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch

from interp.dictionaries.base import Dictionary
from interp.errors import SettingsError

D = TypeVar("D", bound=Dictionary)


@torch.no_grad()
def fold_decoder_norms(sae: D) -> D:
    """A dictionary whose decoder's rows have length one, and whose reconstructions are the same.

    Rows of length zero are left as they are.

    Raises:
        SettingsError: a top-k dictionary that does not rank with the norms; folding would change its ranking.
    """
    folded = copy.deepcopy(sae)
    norms = folded.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1)
    folded.cfg = folded.kind.fold_norms(folded, norms)
    folded.W_dec.div_(norms[:, None])
    folded.W_enc.mul_(norms)
    return folded


@torch.no_grad()
def fold_activation_scale(sae: D, scale: float, target_scale: float | None = None) -> D:
    """A dictionary for activations as they are, from one that was trained on activations times `scale`.

    Args:
        sae: trained on scaled activations (`normalize_activations="expected_average_only_in"`, or scaled by hand).
        scale: what the activations were multiplied by, usually sqrt(d_in) / mean |x|.
        target_scale: for a transcoder, what its targets were multiplied by; None for `scale`.

    Returns:
        The dictionary, with `normalize_activations="none"`.

    Raises:
        SettingsError: a scale is not a finite number above 0, or each token is normalised by the dictionary itself.
    """
    out = scale if target_scale is None else target_scale
    if not all(math.isfinite(s) and s > 0 for s in (scale, out)):
        raise SettingsError(f"scales are finite numbers above 0, not {scale} and {out}.")
    if not sae.transcodes and out != scale:
        raise SettingsError("an SAE has one scale; target_scale is for transcoders.")
    if sae.cfg.normalize_activations not in ("none", "expected_average_only_in"):
        raise SettingsError(f"{sae.cfg.normalize_activations} depends on the token and cannot be folded.")
    folded = copy.deepcopy(sae)
    folded.W_enc.mul_(scale)
    folded.W_dec.div_(out)
    folded.b_dec.div_(out)
    if folded.cfg.skip:
        folded.W_skip.mul_(scale / out)
    folded.kind.fold_scale(folded, out)
    folded.cfg = folded.cfg.changed(normalize_activations="none")
    return folded


@torch.no_grad()
def fold_batchtopk(sae: D) -> D:
    """A JumpReLU dictionary that does what a batch-top-k one does in evaluation.

    Raises:
        SettingsError: there is no threshold, or it is zero because no step was made.
    """
    threshold = getattr(sae, "topk_threshold", None)
    if threshold is None:
        raise SettingsError(
            f"{sae.cfg.architecture} has no running threshold; only batch-top-k kinds fold into JumpReLU."
        )
    if not threshold > 0:
        raise SettingsError("the threshold is zero, for no training step was made; train the dictionary first.")
    folded = fold_decoder_norms(sae) if sae.cfg.rescale_acts_by_decoder_norm else copy.deepcopy(sae)
    cfg = folded.cfg.changed(architecture="jumprelu", unit_norm_decoder=False, matryoshka_widths=())
    weights = {name: tensor for name, tensor in folded.state_dict().items() if name != "topk_threshold"}
    jump = type(sae)(cfg, metadata=sae.metadata).to(sae.W_dec.device)
    jump.load_state_dict(weights | {"threshold": torch.full_like(jump.threshold, float(threshold))})
    return jump.train(sae.training)
