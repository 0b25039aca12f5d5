"""Intermediate representation injection (IRI): carry what earlier layers wrote at the last token into later ones.

Source: Li et al. 2026, "Causal Tracing of Object Representations in Large Vision Language Models: Mechanistic
Interpretability and Hallucination Mitigation", AAAI 2026, arXiv 2511.05923. With a^(l) what attention (or the MLP) of
layer l adds to the stream at the newest token, RR[l] its recovery rate at the last token in causal tracing, S the
layers with the `sources` highest rates and T those with the `targets` highest:

    for l in T:    b = a^(l) + strength * sum over k in S, k < l, of RR[k] a^(k)        a^(l) <- b |a^(l)| / |b|

at the last position of the prompt and at every later one, for attention and for MLPs apart.

Departures. Whether a^(k) is what layer k wrote before or after an injection of its own is not said in the paper; here
it is what it wrote before (but in a run whose lower layers were injected). Rates come from the caller: the paper does
not say on which pictures it estimates them, and they should not be those that are judged.

What it does not see: the published gains are over sampled baselines, so compare greedy with greedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Edit, Where
from interp.errors import EditError, InputError, SettingsError
from interp.lens import Lens
from interp.reads import Read

Rates = Sequence[float] | Float[Tensor, " layer"]
SITES = {"attn": "attn_out", "mlp": "mlp_out"}


def representation_injection(
    lens: Lens,
    *,
    attn: Rates | None = None,
    mlp: Rates | None = None,
    attn_strength: float = 0.26,
    mlp_strength: float = 0.16,
    sources: int = 3,
    targets: int = 10,
) -> list[Edit]:
    """Add what earlier layers wrote at the newest token to what later ones write, the norm kept.

    Args:
        lens: a decoder (a vision-language model's language tower).
        attn: the recovery rate of every layer's attention at the last token; None injects nothing there.
        mlp: the same of the MLPs.
        attn_strength: of the injection into attention (0.26 is the paper's for LLaVA-1.5); 0 changes nothing.
        mlp_strength: of the injection into MLPs.
        sources: how many layers are carried on.
        targets: how many layers are added to.

    Returns:
        Edits for `lens.run` and `lens.generate`; one set serves any batch, but not two runs at the same time.

    Raises:
        InputError: not one finite rate for each layer, or none at all.
        SettingsError: fewer than one source or target.
        EditError: a strength is not finite.
        UnsupportedError: a layer cannot give the site.
    """
    if attn is None and mlp is None:
        raise InputError("representation_injection: give the recovery rates of attention, of the MLPs, or of both.")
    if sources < 1 or targets < 1:
        raise SettingsError(f"sources and targets are at least 1, got {sources} and {targets}.")
    edits: list[Edit] = []
    for kind, rates, strength in (("attn", attn, attn_strength), ("mlp", mlp, mlp_strength)):
        if not math.isfinite(strength):
            raise EditError(f"representation_injection: the strength of {kind} must be finite, got {strength}.")
        if rates is None:
            continue
        known = _rates(lens, kind, rates)
        if strength != 0:
            edits += _injection(lens, SITES[kind], known, strength, sources, targets)
    return edits


def plan(rates: Float[Tensor, " layer"], sources: int, targets: int) -> tuple[list[int], list[int]]:
    """The layers that are carried on, and those that are added to and have one of them below, both in order."""
    order = rates.argsort(descending=True, stable=True).tolist()
    taken = sorted(order[:sources])
    return taken, [layer for layer in sorted(order[:targets]) if layer > taken[0]]


def _rates(lens: Lens, kind: str, rates: Rates) -> Float[Tensor, " layer"]:
    depth = len(lens.anatomy.towers[lens.anatomy.main].layers)
    found = torch.as_tensor(rates, dtype=torch.float64).cpu()
    if found.shape != (depth,) or not bool(found.isfinite().all()):
        raise InputError(
            f"representation_injection: {kind} must be one finite rate for each of the {depth} layers of {lens.name}, "
            f"found {tuple(found.shape)}."
        )
    return found


def _injection(
    lens: Lens, site: str, rates: Float[Tensor, " layer"], strength: float, sources: int, targets: int
) -> list[Edit]:
    able = set(lens.layers_with(site))
    usable = rates.masked_fill(torch.tensor([i not in able for i in range(len(rates))]), -math.inf)
    if not able:
        return []
    taken, aimed = plan(usable, min(sources, len(able)), min(targets, len(able)))
    rate = {layer: float(rates[layer]) for layer in taken}
    below = {layer: max(k for k in taken if k < layer) for layer in {*aimed, *taken[1:]}}
    every: dict[int, tuple[int, Tensor]] = {}

    def change(value: Tensor, where: Where) -> Tensor:
        layer, carried = where.layer, every.get(where.copy)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        new, before = value, None
        if layer in below:
            if carried is None or carried[0] != below[layer] or carried[1].shape != value.shape:
                raise EditError(
                    f"representation_injection: layer {layer} needs what the layers below it wrote in the same run; a "
                    "run that is entered above them cannot be injected."
                )
            before = carried[1]
        if before is not None and layer in aimed:
            mixed = torch.add(wide, before, alpha=strength)
            kept = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            now = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True).clamp_min(1e-30)
            new = (mixed * (kept / now)).to(value.dtype)
        if layer in rate:
            own = rate[layer] * wide if before is None else torch.add(before, wide, alpha=rate[layer])
            every[where.copy] = layer, own
        return new

    return [
        Edit(Read(site, layers=(layer,), positions="last"), change, "representation_injection")
        for layer in sorted({*taken, *aimed})
    ]
