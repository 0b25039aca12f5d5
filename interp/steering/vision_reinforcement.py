"""Vision-aware head reinforcement (VHR): make the heads louder whose output depends most on the image.

Source: He et al. 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv
2412.13949. With VHD[i] the divergence of head i at the last position of the prompt, with and without the image
(`interp.heads.vision_divergence`), layer by layer from below, in each reinforced layer:

    VHD[i] = 0 where VHD[i] and the squared norm of the output without the image both exceed mean + std over the heads
    chosen heads: VHD[i] > median over the heads        their outputs times `scale`, there and at every later position

The divergence of a layer is measured with the layers below reinforced already, in both branches. Heads are chosen once,
at the last position of the prompt, and stay.

Departures. The paper reinforces the second layer and the last 14 of 32 (LLaVA-1.5); other depths take the same share.
Its std is `biased` here (not stated there), its median the mean of the two middle values. What stands before the last
position is not changed by the reinforcement, so that both branches are run once, and then only their last position goes
up, layer by layer; no attention weights are needed.

What it does not see: louder heads also make attention as a whole louder beside the MLPs; with `scale` from 3 on the
paper's own text breaks. Compare with random heads of the same layers (`VisionHeads.shuffled`), and look at recall and
length beside CHAIR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, scale_heads, splice
from interp.errors import EditError, InputError, SettingsError, UnsupportedError
from interp.heads.common import head_grid
from interp.heads.vision_divergence import Form, Outliers, check_options, ruled
from interp.lens import Lens, Prefix
from interp.reads import Read
from interp.without_image import Mode, without_image

ROUNDING = 64  # units of the last place
LAST = 14 / 32  # share of the layers, from the last one down, beside the second


@dataclass(frozen=True, slots=True, eq=False)
class VisionHeads:
    """Which heads of each sample are reinforced.

    Attributes:
        chosen: the heads [batch, layer, head].
        layers: the reinforced layers.
        divergence: what they were chosen by [batch, layer, head]; zero in other layers.
        model: the model's name.
        prefix: the keys and values of the prompt, for `lens.generate(batch, heads.edits(), prefix=heads.prefix)`, which
            then need not read the prompt again; None where the model cannot go on behind them.
    """

    chosen: Bool[Tensor, "batch layer head"]
    layers: tuple[int, ...]
    divergence: Float[Tensor, "batch layer head"]
    model: str
    prefix: Prefix | None = None

    def edits(self, scale: float = 2.0) -> list[Edit]:
        """The chosen heads' outputs times `scale`, at the last position of the prompt and every later one.

        Raises:
            EditError: the scale is not finite.
        """
        if not math.isfinite(scale):
            raise EditError(f"vision_reinforcement: the scale must be finite, got {scale}.")
        if scale == 1:
            return []
        return [
            edit
            for layer in self.layers
            for edit in scale_heads(
                torch.where(self.chosen[:, layer], float(scale), 1.0), layers=layer, positions="last"
            )
        ]

    def shuffled(self, lens: Lens, seed: int = 0) -> VisionHeads:
        """As many random heads in every layer of every sample: the control.

        Raises:
            EditError: the heads are of another model.
        """
        if lens.name != self.model:
            raise EditError(f"these heads are of {self.model}, not of {lens.name}.")
        _, counts, _ = head_grid(lens)
        random = torch.Generator().manual_seed(seed)
        chosen = torch.zeros_like(self.chosen)
        for layer in self.layers:
            noise = torch.rand(len(chosen), counts[layer], generator=random)
            rank = noise.argsort(1).argsort(1)
            many = self.chosen[:, layer].sum(1, keepdim=True)
            chosen[:, layer, : counts[layer]] = (rank < many.cpu()).to(chosen.device)
        return replace(self, chosen=chosen)


def reinforced_layers(depth: int) -> tuple[int, ...]:
    """The paper's layers, by their share: the second one, and the last 14 of 32."""
    last = max(1, round(depth * LAST))
    return tuple(sorted({min(1, depth - 1), *range(depth - last, depth)}))


def vision_heads(
    lens: Lens,
    batch: Batch,
    *,
    layers: Sequence[int] | None = None,
    scale: float = 2.0,
    without: Mode = "drop",
    form: Form = "absolute",
    outliers: Outliers = "biased",
    seed: int = 0,
) -> VisionHeads:
    """The heads that vision-aware reinforcement chooses, of every sample.

    Args:
        lens: a vision-language model.
        batch: prompts with images, padded on the left.
        layers: which layers are reinforced; None for the paper's share.
        scale: the reinforcement that is active below, while a layer's divergence is measured.
        without: how the images are taken away: `drop drop_keep_positions mask zero mean noise`.
        form: how two outputs are compared: `absolute`, `relative` or `cosine`.
        outliers: the paper's rule with the `biased` or `unbiased` standard deviation, or `keep` for no rule.
        seed: for `without="noise"`.

    Raises:
        UnknownNameError: an option's value, or a layer, does not exist.
        SettingsError: no layers, or `form="projected"`, which would need another site.
        EditError: the scale is not finite.
        InputError: the batch holds no images, or is padded on the right.
        UnsupportedError: the model takes no images, cannot do without them in this way, or its layers cannot be called
            one at a time.
    """
    check_options(form, outliers)
    if form == "projected":
        raise SettingsError("vision_reinforcement compares head outputs: form is absolute, relative or cosine.")
    if not math.isfinite(scale):
        raise EditError(f"vision_reinforcement: the scale must be finite, got {scale}.")
    if batch.padding in ("right", "mixed"):
        raise InputError("heads are chosen at the last column: prepare the batch with padding_side='left'.")
    tower = lens.anatomy.towers[lens.anatomy.main]
    wanted = reinforced_layers(len(tower.layers)) if layers is None else _checked(lens, layers)
    _, counts, valid = head_grid(lens)
    blind = without_image(lens, batch, without, seed=seed)
    seen = _Last(lens, batch, (), wanted[0])
    unseen = _Last(lens, blind.batch, blind.edits, wanted[0])
    shape = (len(batch), *valid.shape)
    chosen, divergence = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    factors: dict[int, Tensor] = {}

    def pick(layer: int, one: Tensor, two: Tensor) -> None:
        """Choose heads of a layer by their outputs with and without the image."""
        found = _divergence(one, two, form, outliers)
        picked = found > found.quantile(0.5, dim=1, keepdim=True)
        factors[layer] = torch.where(picked, float(scale), 1.0)
        at = (slice(None), layer, slice(counts[layer]))
        chosen[at], divergence[at] = picked.cpu(), found.float().cpu()

    def louder(layer: int, one: Tensor, z: Tensor) -> Tensor:
        pick(layer, one, z[:, 0])
        return z * factors[layer][:, None, :, None].to(z.dtype)

    for layer in range(wanted[0], wanted[-1]):
        if layer not in wanted:
            unseen.up(layer)
            seen.up(layer)
            continue
        # The branch without the image chooses on its way up; the other one follows.
        one = seen.heads(layer)
        unseen.up(layer, splice(partial(louder, layer, one), site="z", layers=layer))
        seen.up(layer, scale_heads(factors[layer], layers=layer))
    pick(wanted[-1], seen.heads(wanted[-1]), unseen.heads(wanted[-1]))
    device = batch.mask.device
    prefix = seen.prefix if lens.prefix_refusal is None else None
    return VisionHeads(chosen.to(device), wanted, divergence.to(device), lens.name, prefix)


def vision_reinforcement(
    lens: Lens,
    batch: Batch,
    *,
    layers: Sequence[int] | None = None,
    scale: float = 2.0,
    without: Mode = "drop",
    form: Form = "absolute",
    outliers: Outliers = "biased",
    seed: int = 0,
) -> list[Edit]:
    """Reinforce the heads whose output depends most on the image, from the last position of the prompt on.

    Args:
        lens: a vision-language model.
        batch: prompts with images, padded on the left; the edits are for this batch.
        layers: which layers; None for the paper's: the second one and the last 14 of 32.
        scale: what the heads' outputs are multiplied with; 1 changes nothing.
        without: how the images are taken away to choose the heads.
        form: how outputs are compared.
        outliers: the paper's rule on outlying heads.
        seed: for `without="noise"`.

    Returns:
        Edits for `lens.run(batch, ...)` and `lens.generate(batch, ...)`, with each sample's own heads. Where time
        matters, use `vision_heads`, whose `prefix` spares `lens.generate` a second pass over the prompt.

    Raises:
        InterpError: as `vision_heads`.
    """
    options = {"layers": layers, "scale": scale, "without": without, "form": form, "outliers": outliers, "seed": seed}
    return vision_heads(lens, batch, **options).edits(scale)  # pyright: ignore[reportArgumentType]


def _checked(lens: Lens, layers: Sequence[int]) -> tuple[int, ...]:
    tower = lens.anatomy.towers[lens.anatomy.main]
    found = tuple(sorted({tower.layer(layer).index for layer in layers}))
    if not found:
        raise SettingsError("vision_reinforcement: no layer was named; None takes the paper's.")
    able = lens.layers_with("z")
    for layer in found:
        if layer not in able:
            raise UnsupportedError(f"the heads of layer {layer} cannot be scaled: {lens.refusal('z', layer)}")
    return found


def _divergence(
    one: Float[Tensor, "batch head d_head"], two: Float[Tensor, "batch head d_head"], form: Form, outliers: Outliers
) -> Float[Tensor, "batch head"]:
    """How far the heads' outputs with and without the image are apart, the outlying ones at zero."""
    found, _ = ruled(one, two, form, outliers)
    # Where a layer's window does not reach the image, nothing but rounding is left: no head is chosen by that.
    rounding = ROUNDING * torch.finfo(one.dtype).eps
    return found.masked_fill((one - two).norm(dim=-1) <= rounding * one.norm(dim=-1), 0)


class _Last:
    """The last position of a batch on its way up, layer by layer, behind the keys and values of the prompt."""

    def __init__(self, lens: Lens, batch: Batch, edits: Sequence[Edit], first: int) -> None:
        read = Read("resid_pre", layers=(first,), positions="last")
        with torch.no_grad():
            trace = lens.run(batch, read, edits, cache=True)
        self.stream = trace[read, first]
        self.edits = edits
        samples = torch.arange(len(batch), device=batch.mask.device)
        self.prefix = trace.cache
        self.rows = lens.stepper(batch, trace.cache).rows(samples, start=batch.mask.shape[1] - 1)

    def heads(self, layer: int) -> Float[Tensor, "batch head d_head"]:
        """The outputs of a layer's heads as they are."""
        return self.rows.read(layer, self.stream, "z", self._own(layer))[:, 0]

    def up(self, layer: int, edits: Sequence[Edit] = ()) -> None:
        """Through a layer, with edits."""
        self.stream = self.rows.step(layer, self.stream, [*self._own(layer), *edits])

    def _own(self, layer: int) -> list[Edit]:
        """What hides the image in this layer, if that is how it is taken away."""
        return [
            replace(edit, read=replace(edit.read, positions="last"))
            for edit in self.edits
            if edit.read.layers is None or layer in edit.read.layers
        ]
