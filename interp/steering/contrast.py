"""Contrastive decoding as logits processors: what the model says with its image, less what it says without seeing it.

With l the log-probabilities of the next token and n those behind another prompt (`interp.steering.negative`):

    l' = l + w (l - n)        w = 0 changes nothing; tokens with l < log(cutoff) + max l are never said

    VisualContrast      Leng et al. 2024, "Mitigating Object Hallucinations in Large Vision-Language Models through
                        Visual Contrastive Decoding", CVPR, arXiv 2311.16922. n: the image under noise; w = strength
    M3ID                Favero et al. 2024, "Multi-Modal Hallucination Control by Visual Information Grounding", CVPR,
                        arXiv 2403.14003. n: no image; w = exp(rate (t + start)) - 1 at the t-th new token, but only
                        where the model is not sure: max l < log(confidence)
    BlindTokenContrast  Woo et al. 2025, "Don't Miss the Forest for the Trees", ACL Findings, arXiv 2405.17820 (AvisC).
                        n: only the image tokens that attract attention by themselves are left; w = strength

They go into `lens.generate(batch, logits_processor=[...])` and into any `model.generate(logits_processor=...)` on the
same inputs: greedy, sampled, and in beam search. Each is made for one batch and can be used again for it.

Departures. All work on log-probabilities, and give some (the papers' formulas on logits differ by a constant, which
matters to beam search alone). With w = 0 the scores are those that came in, bit for bit, without a cut-off. M3ID's w is
exp(-log gamma_t) - 1 = (1 - gamma_t) / gamma_t of the paper; it grows without bound, so that `ceiling` can hold it.
AvisC sets embeddings to zero where they enter the language model's first layer. Earlier processors of a generation act
on l, but not on n (temperature, top_p and top_k come behind); edits of `lens.generate` do not act on n either.

What they do not see: published gains are mostly over sampled text. M3ID changes nothing in the first token with
`start=0`, so not in answers of one word. An embedding of zero still has a position and is looked at. Each step costs a
second forward of one token.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from interp.batch import Batch
from interp.edits import ablate
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.lens import Lens
from interp.reads import Read
from interp.steering.negative import NegativeBranch
from interp.without_image import MODES, Mode, without_image

NOISE_STEPS = 1000


class Contrast(LogitsProcessor):
    """What the contrasts share. Made as one of them.

    Attributes:
        branch: the other prompt.
        cutoff: tokens less likely than this times the likeliest are never said.
    """

    def __init__(self, branch: NegativeBranch, cutoff: float) -> None:
        self.branch, self.cutoff = branch, cutoff

    def __call__(
        self, input_ids: Int[Tensor, "row all"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """Log-probabilities of the next token; rows that are not contrasted as they came.

        Raises:
            InputError: the texts are not those of the batch, or do not go on from the last step's.
        """
        return self._contrasted(input_ids, scores, self.cutoff)

    def uncut(
        self, input_ids: Int[Tensor, "row all"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """The same without the cut-off, so that every token keeps a probability."""
        return self._contrasted(input_ids, scores, 0.0)

    def _contrasted(self, input_ids: Tensor, scores: Tensor, cutoff: float) -> Tensor:
        if self.idle:
            return scores
        wide = torch.promote_types(scores.dtype, torch.float32)
        plain = scores.to(wide).log_softmax(-1)
        other = self.branch.logits(input_ids).to(plain).log_softmax(-1)
        weight = self._weight(plain, input_ids.shape[1] - self.branch.prompt.shape[1])[:, None]
        barred = plain == -torch.inf
        new = plain + weight * (plain - other).masked_fill(barred, 0.0)
        if cutoff:
            barred = barred | (plain < plain.amax(-1, keepdim=True) + math.log(cutoff))
        new = new.masked_fill(barred, -torch.inf).log_softmax(-1)
        return torch.where(weight != 0, new.to(scores), scores)

    @property
    def idle(self) -> bool:
        """Whether nothing is ever changed."""
        raise NotImplementedError

    def _weight(self, plain: Float[Tensor, "row vocab"], step: int) -> Float[Tensor, " row"]:
        """How much each row is contrasted at the step-th new token."""
        raise NotImplementedError


class _Steady(Contrast):
    """The same weight at all times."""

    def __init__(self, branch: NegativeBranch, cutoff: float, strength: float) -> None:
        super().__init__(branch, cutoff)
        self.strength = strength

    @property
    def idle(self) -> bool:
        return self.strength == 0

    def _weight(self, plain: Tensor, step: int) -> Tensor:
        return plain.new_full((len(plain),), self.strength)


class VisualContrast(_Steady):
    """Contrast with the image distorted (visual contrastive decoding).

    Args:
        lens: a vision-language model.
        batch: prompts with images, padded on the left: what is generated from.
        strength: the weight of the contrast (the paper's alpha); 0 changes nothing.
        cutoff: the adaptive plausibility cut-off (beta), from 0 (none) to 1.
        distort: `diffused` (the paper's: the image after some steps of a diffusion), or a way to leave the image out,
            `drop drop_keep_positions zero mean noise`.
        steps: how many of the 1000 steps of the diffusion.
        seed: of the noise; every picture of a size gets the same, whatever it is batched with.

    Raises:
        SettingsError: a number lies outside its range.
        UnknownNameError: no such distortion.
        InputError: the batch holds no images, or is padded on the right.
        UnsupportedError: the model takes no images, or no second prompt can be carried on beside the first.
    """

    def __init__(
        self,
        lens: Lens,
        batch: Batch,
        *,
        strength: float = 1.0,
        cutoff: float = 0.1,
        distort: str = "diffused",
        steps: int = 500,
        seed: int = 0,
    ) -> None:
        _check("VisualContrast", strength, cutoff)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < NOISE_STEPS:
            raise SettingsError(f"steps is a whole number from 0 to {NOISE_STEPS - 1}, got {steps!r}.")
        other = _diffused(lens, batch, steps, seed) if distort == "diffused" else _without(lens, batch, distort, seed)
        super().__init__(NegativeBranch(lens, batch, other), cutoff, strength)


class M3ID(Contrast):
    """Contrast with no image, the more the longer the text has become, where the model is not sure.

    Args:
        lens: a vision-language model.
        batch: prompts with images, padded on the left: what is generated from.
        rate: how fast the weight grows with every token (lambda); 0 changes nothing.
        confidence: no contrast where the likeliest token has at least this probability (alpha), from 0 to 1.
        start: the number that the first new token has; 0 for captions, about the question's length for short answers.
        ceiling: the largest weight; None for no bound.
        cutoff: a plausibility cut-off as in `VisualContrast`; the method has none.
        without: how the image is left out: `drop drop_keep_positions zero mean noise`.
        seed: for `noise`.

    Raises:
        SettingsError: a number lies outside its range.
        UnknownNameError, InputError, UnsupportedError: as `VisualContrast`.
    """

    def __init__(
        self,
        lens: Lens,
        batch: Batch,
        *,
        rate: float = 0.02,
        confidence: float = 0.3,
        start: int = 0,
        ceiling: float | None = None,
        cutoff: float = 0.0,
        without: Mode = "drop",
        seed: int = 0,
    ) -> None:
        _check("M3ID", rate, cutoff)
        if not (rate >= 0 and 0 < confidence <= 1 and start >= 0 and (ceiling is None or ceiling >= 0)):
            raise SettingsError(
                "rate, start and ceiling are at least 0 and confidence lies between 0 (not included) and 1, got "
                f"{rate}, {start}, {ceiling}, {confidence}."
            )
        super().__init__(NegativeBranch(lens, batch, _without(lens, batch, without, seed)), cutoff)
        self.rate, self.confidence, self.start, self.ceiling = rate, confidence, start, ceiling

    @property
    def idle(self) -> bool:
        """Whether nothing is ever changed."""
        return self.rate == 0 or self.ceiling == 0

    def _weight(self, plain: Tensor, step: int) -> Tensor:
        weight = math.expm1(min(self.rate * (step + self.start), 80.0))
        weight = weight if self.ceiling is None else min(weight, self.ceiling)
        return torch.where(plain.amax(-1) < math.log(self.confidence), weight, 0.0)


class BlindTokenContrast(_Steady):
    """Contrast with an image of which only the blind tokens are left: those that are looked at whatever is asked.

    Args:
        lens: a vision-language model whose patterns can be read.
        batch: prompts with images, padded on the left: what is generated from.
        strength: the weight of the contrast (alpha); 0 changes nothing.
        cutoff: the adaptive plausibility cut-off (beta), from 0 (none) to 1.
        share: which layers decide: the fewest that together hold this share of the attention on images (gamma).
        deviations: a token is blind from so many standard deviations above the mean on (lambda).
        blind: the blind tokens instead [batch, pos], such as random ones for a control.

    Attributes:
        blind: the blind tokens [batch, pos]; where a sample has none, its whole image is hidden.

    Raises:
        SettingsError: a number lies outside its range.
        InputError: the batch holds no images, is padded on the right, or `blind` does not mark image tokens of it.
        UnsupportedError: the model takes no images, or gives no patterns, or no second prompt can be carried on.
    """

    def __init__(
        self,
        lens: Lens,
        batch: Batch,
        *,
        strength: float = 1.0,
        cutoff: float = 0.1,
        share: float = 0.5,
        deviations: float = 1.0,
        blind: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        _check("BlindTokenContrast", strength, cutoff)
        if not (0 < share <= 1 and math.isfinite(deviations)):
            raise SettingsError(f"share lies between 0 and 1 and deviations is finite, got {share} and {deviations}.")
        if batch.image_mask is None or not bool(batch.span("image").any(1).all()):
            raise InputError("BlindTokenContrast needs image tokens in every prompt of the batch.")
        image = batch.span("image")
        if blind is None:
            blind = blind_tokens(lens, batch, share=share, deviations=deviations)
        elif blind.dtype != torch.bool or blind.shape != image.shape or bool((blind.to(image.device) & ~image).any()):
            raise InputError(f"blind marks image tokens, as bools {list(image.shape)} [batch, pos].")
        self.blind: Bool[Tensor, "batch pos"] = blind.to(image.device)
        gone = image & ~self.blind
        hidden = ablate(site="resid_pre", layers=0, positions=gone) if bool(gone.any()) else []
        super().__init__(NegativeBranch(lens, batch, batch, hidden), cutoff, strength)


def blind_tokens(lens: Lens, batch: Batch, *, share: float = 0.5, deviations: float = 1.0) -> Bool[Tensor, "batch pos"]:
    """The image tokens that the last position of the prompt looks at far more than at the others.

    With a[l] the attention of the last position, averaged over heads: the layers with the largest sums over the image
    are taken until they hold `share` of all of it; a token is blind if its mean over these layers is at least mean +
    deviations x std (of all image tokens, not of a sample of them) of the sample's image tokens.

    Args:
        lens: a vision-language model.
        batch: prompts with images, padded on the left.
        share: from 0 (not included) to 1.
        deviations: how many standard deviations.

    Raises:
        InputError: the batch holds no images.
        UnsupportedError: no layer gives its pattern.
    """
    layers = tuple(lens.layers_with("pattern"))
    read = Read("pattern", layers=layers, positions="last", reduce="head_mean")
    trace = lens.run(batch, read)
    image = batch.span("image")
    seen = (
        torch.stack([trace[read, layer][:, 0].float() for layer in layers], 1) * image[:, None]
    )  # [batch, layer, key]
    mass = seen.sum(-1)
    order = mass.argsort(dim=1, descending=True, stable=True)
    held = (mass / mass.sum(1, keepdim=True).clamp_min(1e-30)).gather(1, order).cumsum(1)
    many = ((held < share).sum(1, keepdim=True) + 1).clamp_max(len(layers))
    taken = torch.zeros_like(mass).scatter_(1, order, (torch.arange(len(layers), device=mass.device) < many).to(mass))
    mean = (seen * taken[..., None]).sum(1) / many
    count = image.sum(1, keepdim=True)
    centre = mean.sum(1, keepdim=True) / count
    spread = (((mean - centre) * image).square().sum(1, keepdim=True) / count).sqrt()
    return image & (mean >= centre + deviations * spread)


def _check(name: str, strength: float, cutoff: float) -> None:
    if not math.isfinite(strength):
        raise SettingsError(f"{name}: the strength must be finite, got {strength}.")
    if not 0 <= cutoff <= 1:
        raise SettingsError(f"{name}: cutoff lies between 0 and 1, got {cutoff}.")


def _without(lens: Lens, batch: Batch, mode: str, seed: int) -> Batch:
    if mode == "mask":
        raise UnsupportedError("'mask' hides columns by edits of every step; 'drop_keep_positions' is the same.")
    if mode not in MODES:
        raise unknown("way to distort the image", mode, ("diffused", *(one for one in MODES if one != "mask")))
    return without_image(lens, batch, mode, seed=seed).batch  # pyright: ignore[reportArgumentType]


def _diffused(lens: Lens, batch: Batch, steps: int, seed: int) -> Batch:
    """The pixels after some steps of a diffusion whose betas follow a sigmoid from 1e-5 to 5e-3, as in VCD's code."""
    noise = without_image(lens, batch, "noise", seed=seed).batch
    betas = torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[steps])
    pixels = math.sqrt(kept) * batch.inputs["pixel_values"] + math.sqrt(1 - kept) * noise.inputs["pixel_values"]
    return replace(noise, inputs={**noise.inputs, "pixel_values": pixels})
