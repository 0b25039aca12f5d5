"""Visual attention redistribution (VAR): give the attention that lies on sinks to the rest of the image.

Source: Kang, Kim, Kim, Hwang 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR,
arXiv 2503.03321, and its code. For each layer, head and query behind the image, with a the attention, V the image's
columns and S the sinks (`interp.steering.sinks`) of the stream that enters the layer:

    image-centric:  m = sum over V of a >= mass      and      sum over V without S of a >= rho m
    then            a on S <- p a        a on V without S <- a (1 + (1 - p) sum over S of a / sum over V without S of a)

so that rows still sum to one. Sinks of text (the first token) lose attention as those of the image do. The same can be
written as numbers added to the logits, log p and log of the bracket (`form="bias"`).

Departures. Sink dimensions are found, not listed; tau scales with the width. `rho` is the paper's (the share that is
*not* on sinks; the code's parameter of that name is one minus it). Sinks are those of the prompt, as in the code: of
generated tokens none becomes one. As in the code, a layer in which no image token is a sink is left alone, in each
sample by itself. Only the queries behind the image are computed anew; for the others the model's own kernel stays.

What it does not see: whether sinks carry something that is needed. Later work says that they hold what the scene is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, Where
from interp.errors import EditError, InputError, SettingsError, unknown
from interp.lens import Lens
from interp.reads import Read
from interp.steering.sinks import default_tau, sink_dimensions, sink_size

Form = Literal["pattern", "bias"]
FIRST = 2  # the code leaves the first two layers alone: sinks form later


def attention_redistribution(
    lens: Lens,
    batch: Batch,
    *,
    dimensions: Sequence[int] | None = None,
    tau: float | None = None,
    rho: float = 0.5,
    mass: float = 0.2,
    p: float = 0.6,
    layers: Sequence[int] | None = None,
    form: Form = "pattern",
) -> list[Edit]:
    """Move attention from sinks to the other image tokens, in heads that look at the image.

    Args:
        lens: a vision-language model whose patterns can be read.
        batch: prompts with images, padded on the left; the edits are for this batch.
        dimensions: the sink dimensions of the stream; None finds them on this batch. Where batches have to agree, find
            them once with `sink_dimensions` and give them.
        tau: from which phi on a token is a sink; None for 20 sqrt(d_model / 4096).
        rho: share of a head's attention on the image that must not be on sinks, from 0 to 1.
        mass: share of a head's attention that must be on the image, from 0 to 1.
        p: what is left of the attention on sinks, from 0 (not included for `bias`) to 1, which changes nothing.
        layers: which layers; None for all from the third to the last but one, as in the paper.
        form: change the probabilities (`pattern`), or add to their logits (`bias`): the same numbers.

    Returns:
        Edits for `lens.run` and `lens.generate`; none where the model has no sink dimensions, or p is 1.

    Raises:
        SettingsError: an option lies outside its range, or there are no layers.
        UnknownNameError: a layer, a dimension or the form does not exist.
        InputError: the batch holds no images, or is padded on the right.
        UnsupportedError: the model's patterns cannot be edited.
    """
    if form not in ("pattern", "bias"):
        raise unknown("form", form, ("pattern", "bias"))
    if not (0 <= rho <= 1 and 0 <= mass <= 1 and 0 <= p <= 1 and (p or form == "pattern")):
        raise SettingsError(f"rho, mass and p lie between 0 and 1 (p above 0 for a bias), got {rho}, {mass}, {p}.")
    if tau is not None and not 0 < tau < math.inf:
        raise SettingsError(f"tau is a finite number above 0, got {tau}.")
    if batch.padding in ("right", "mixed"):
        raise InputError("generation goes on behind the last column: prepare the batch with padding_side='left'.")
    tower = lens.anatomy.towers[lens.anatomy.main]
    depth, width = len(tower.layers), tower.d_model
    usual = range(min(FIRST, depth - 1), max(depth - 1, min(FIRST, depth - 1) + 1))
    chosen = sorted({tower.layer(i).index for i in (usual if layers is None else layers)})
    if not chosen:
        raise SettingsError("attention_redistribution: no layer was named; None takes the paper's.")
    image = batch.span("image")
    if not bool(image.any(1).all()):
        raise InputError(f"sample {int((~image.any(1)).nonzero()[0])} holds no image tokens.")
    found = sink_dimensions(lens, batch, tau=tau) if dimensions is None else tuple(dimensions)
    for dimension in found:
        if not 0 <= dimension < width:
            raise unknown("dimension", dimension, (f"0 to {width - 1}",))
    if not found or p == 1:
        return []
    limit = default_tau(width) if tau is None else tau
    columns = torch.arange(image.shape[1], device=image.device)
    behind = batch.mask & (columns > (image.long() * columns).amax(1, keepdim=True))
    if not bool(behind.any(1).all()):
        raise InputError(f"nothing stands behind the image of sample {int((~behind.any(1)).nonzero()[0])}.")
    rule = _Rule(rho, mass, p, form)
    state = _Sinks(image, found, limit, batch.mask, rule)

    def change(value: Tensor, where: Where) -> Tensor:
        return rule(value, state.at(where.layer, value.shape[-1]))

    edits: list[Edit] = []
    for layer in chosen:
        edits.append(Edit(Read("resid_pre", layers=(layer,)), state.notice, "attention_redistribution"))
        for positions in (behind, "generated"):
            read = Read("pattern" if form == "pattern" else "scores", layers=(layer,), positions=positions)
            edits.append(Edit(read, change, "attention_redistribution"))
    return edits


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which heads and queries are changed, and how."""

    rho: float
    mass: float
    p: float
    form: Form

    def kinds(self, image: Bool[Tensor, "batch key"], sinks: Bool[Tensor, "batch key"], dtype: torch.dtype) -> _Kinds:
        """What the rule has to know of the keys of the prompt, in one layer."""
        able = (image & sinks).any(1, keepdim=True)
        seen, free = image & able, image & ~sinks & able
        shares = torch.stack([seen, free, free, sinks], -1).to(dtype)
        shares[..., 1] -= self.rho * shares[..., 0]
        shares[..., 3] *= 1 - self.p
        base = 1 - shares[..., 3]
        least = shares.new_tensor([self.mass, 0, torch.finfo(dtype).tiny])
        return _Kinds(shares, base[:, None, None], free[:, None, None].to(dtype), least)

    def __call__(
        self, value: Float[Tensor, "batch head query key"], kinds: _Kinds
    ) -> Float[Tensor, "batch head query key"]:
        """The changed probabilities, or their logits; keys behind the prompt keep theirs."""
        prompt = kinds.base.shape[-1]
        pattern = value if self.form == "pattern" else torch.softmax(value, -1)
        sums = (pattern[..., :prompt].flatten(1, 2) @ kinds.shares).view(*pattern.shape[:3], -1)
        centric = (sums[..., :3] >= kinds.least).all(-1, keepdim=True)
        if not bool(centric.any()):
            return value
        ratio = sums[..., 3:] / sums[..., 2:3].clamp_min(1e-30)
        factor = torch.where(centric, torch.addcmul(kinds.base, ratio, kinds.free), 1.0)
        new = value.clone()
        if self.form == "pattern":
            new[..., :prompt].mul_(factor)
        else:
            new[..., :prompt].add_(factor.log())
        return new


@dataclass(frozen=True, slots=True, eq=False)
class _Kinds:
    """What the keys of the prompt are, in one layer.

    Attributes:
        shares: what the four sums of a row give each key: attention on the image, how far that on free image tokens is
            above `rho` of it, on free ones (both zero in a sample without a sink in its image), and what sinks lose.
        base: the factor of each key before free ones are given what sinks lose.
        free: which keys are free image tokens.
        least: the first three sums of a row that is changed.
    """

    shares: Float[Tensor, "batch key 4"]
    base: Float[Tensor, "batch 1 1 key"]
    free: Float[Tensor, "batch 1 1 key"]
    least: Float[Tensor, " 3"]


class _Sinks:
    """The sinks of every layer, noticed while the prompt goes through."""

    def __init__(
        self,
        image: Bool[Tensor, "batch pos"],
        dimensions: Sequence[int],
        tau: float,
        mask: Bool[Tensor, "batch pos"],
        rule: _Rule,
    ) -> None:
        self.image, self.dimensions, self.tau, self.mask, self.rule = image, dimensions, tau, mask, rule
        self.found: dict[int, _Kinds] = {}

    def notice(self, stream: Float[Tensor, "batch pos d_model"], where: Where) -> Tensor:
        """Look at what enters a layer; only the whole prompt counts, not what is generated."""
        if stream.shape[1] == self.mask.shape[1]:
            mask, image = (x.to(stream.device) for x in (self.mask, self.image))
            sinks = (sink_size(stream, self.dimensions) > self.tau) & mask
            dtype = torch.promote_types(stream.dtype, torch.float32)
            self.found[where.layer] = self.rule.kinds(image, sinks, dtype)
        return stream

    def at(self, layer: int, keys: int) -> _Kinds:
        """What the prompt's keys are in a layer that has so many keys by now."""
        if layer not in self.found:
            raise EditError(
                f"attention_redistribution: the sinks of layer {layer} are known from a run of the whole prompt; this "
                "one was entered behind it."
            )
        if keys < self.mask.shape[1]:
            raise EditError("attention_redistribution: keys of the prompt were dropped by a sliding cache.")
        return self.found[layer]
