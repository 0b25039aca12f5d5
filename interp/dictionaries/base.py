"""What all dictionaries share: weights, normalisation of activations, encode, decode and loss.

Source: Bricken et al. 2023 (Towards Monosemanticity) and Templeton et al. 2024 (Scaling Monosemanticity); names, first
weights and losses are those of SAELens 6. For activations x [token, d_in]

    pre = (x - b_dec) W_enc + b_enc        f = activation(pre)        y = f W_dec + b_dec
    mse_loss = mean over tokens of the sum over d of (y - target)^2

A transcoder has another target than its input, subtracts no bias from the input and may add x W_skip^T.

Departures from SAELens. Normalisation belongs to a call, not to the module: `decode` of a dictionary that normalises
each token needs the activations again. Losses are computed in float32 or wider under autocast; only the dense products
take autocast's precision. Losses of dead latents and gates respect normalisation, where SAELens refuses or forgets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.dictionaries.config import DTYPES, DictionaryConfig
from interp.dictionaries.registry import architecture
from interp.dictionaries.sparse import Reduce, Sparse, affine, decode, low_precision, product
from interp.errors import InputError, NonFiniteError, SettingsError


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """The loss of one batch.

    Attributes:
        total: sum of the parts; call `backward` on it.
        parts: each part by name, weights and warm-up within: `mse_loss`, `l1_loss`, `l0_loss`, `pre_act_loss`,
            `auxiliary_reconstruction_loss`, `inner_mse_loss_<width>`.
        latents: of the batch, dense or sparse; times the decoder's norms where the settings say so.
        reconstruction: of the target [token, d_out].
        target: what was to be reconstructed, of the tokens that count [token, d_out].
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]]
    latents: Float[Tensor, "tokens d_sae"] | Sparse
    reconstruction: Float[Tensor, "tokens d_out"]
    target: Float[Tensor, "tokens d_out"]

    def counts(self) -> Int[Tensor, " d_sae"]:
        """In how many tokens of the batch each latent is active."""
        if isinstance(self.latents, Sparse):
            return self.latents.counts()
        return (self.latents.detach() != 0).sum(0)

    def dense(self) -> Float[Tensor, "tokens d_sae"]:
        """The latents, zeros too."""
        return self.latents.dense() if isinstance(self.latents, Sparse) else self.latents


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """A batch on its way through a dictionary, for an architecture.

    Attributes:
        raw: the activations [token, d_in].
        x: the same, normalised.
        scale: what a reconstruction of x is multiplied by [token, 1], or None.
        shift: what is added to it then [token, 1], or None.
        low: precision of dense products under autocast, or None.
        target: what is to be reconstructed [token, d_out].
        dead: which latents are dead, or None.
        sparsity: factor of penalties, for warm-up.
        reduce: brings the tensors of all processes together, or None.
    """

    raw: Tensor
    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    low: torch.dtype | None
    target: Tensor = field(default_factory=lambda: torch.empty(0))
    dead: Tensor | None = None
    sparsity: float = 1.0
    reduce: Reduce | None = None


class Architecture:
    """How latents are computed and trained. Stateless: parameters belong to the dictionary.

    A third party's kind overrides `latents` and `losses`, and the others where it has parameters or settings of its
    own; `register(name, kind)` makes it known.
    """

    encoder_biases: tuple[str, ...] = ("b_enc",)
    """Parameters [d_sae] that are in the units of pre-activations; folding multiplies them."""

    def check(self, cfg: DictionaryConfig) -> None:
        """Raise SettingsError where settings do not fit this kind."""

    def build(self, sae: Dictionary) -> None:
        """Add parameters and buffers beyond `W_enc`, `W_dec` and `b_dec`."""
        sae.b_enc = nn.Parameter(sae.W_enc.new_zeros(sae.cfg.d_sae))

    def latents(self, sae: Dictionary, batch: Pass) -> Float[Tensor, "tokens d_sae"] | Sparse:
        """Latents of a batch."""
        raise NotImplementedError

    def losses(self, sae: Dictionary, batch: Pass) -> tuple[dict[str, Tensor], Tensor | Sparse, Tensor]:
        """Parts of the loss by name, the latents, and the reconstruction (as `Dictionary.finish` gives it)."""
        raise NotImplementedError

    def decoder(self, sae: Dictionary) -> Float[Tensor, "d_sae d_out"]:
        """The rows that latents multiply."""
        return sae.W_dec

    def fold_norms(self, sae: Dictionary, norms: Float[Tensor, " d_sae"]) -> DictionaryConfig:
        """Multiply what else is in the units of pre-activations by the norms; the settings from then on."""
        for name in self.encoder_biases:
            getattr(sae, name).mul_(norms)
        return sae.cfg

    def fold_scale(self, sae: Dictionary, target_scale: float) -> None:
        """Change what depends on the decoder's units, which were divided by `target_scale`."""

    def unit_norm(self, cfg: DictionaryConfig) -> bool:
        """Whether the decoder's rows are kept at length one."""
        return False

    @torch.no_grad()
    def before_step(self, sae: Dictionary) -> None:
        """Between backward and the optimiser: without the gradient along rows that are kept at length one."""
        if self.unit_norm(sae.cfg) and sae.W_dec.grad is not None:
            rows = nn.functional.normalize(sae.W_dec, dim=1)
            sae.W_dec.grad -= (sae.W_dec.grad * rows).sum(1, keepdim=True) * rows

    @torch.no_grad()
    def after_step(self, sae: Dictionary) -> None:
        """After the optimiser: such rows back to length one."""
        if self.unit_norm(sae.cfg):
            sae.W_dec.copy_(nn.functional.normalize(sae.W_dec, dim=1))


class Dictionary(nn.Module):
    """Sparse latents that reconstruct a target from an activation; use `SAE` or `Transcoder`.

    Parameters have SAELens's names: `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_dec` [d_out], and those of the
    architecture. `metadata` is any mapping of what json can hold and goes into files.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    b_enc: nn.Parameter
    # Of some architectures only.
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter
    threshold: nn.Parameter
    topk_threshold: Tensor
    W_skip: nn.Parameter
    transcodes = False
    """Whether it reconstructs something else than what it reads."""
    sequences = False
    """Whether it reads whole sequences, not single tokens."""

    def __init__(
        self,
        config: DictionaryConfig | None = None,
        /,
        *,
        metadata: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        if config is not None and settings:
            raise SettingsError(f"give a config or single settings, not both; found {', '.join(settings)} beside it.")
        super().__init__()
        self.cfg = self._settled(DictionaryConfig.of(settings) if config is None else config)
        self.metadata = dict(metadata or {})
        self.kind = architecture(self.cfg.architecture)
        self._first_weights()
        self.kind.build(self)

    def _settled(self, cfg: DictionaryConfig) -> DictionaryConfig:
        raise NotImplementedError("use SAE or Transcoder.")

    def _first_weights(self) -> None:
        cfg, generator = self.cfg, torch.Generator().manual_seed(self.cfg.seed)
        rows = torch.empty(cfg.d_sae, cfg.width_out)
        nn.init.kaiming_uniform_(rows, generator=generator)
        tied = rows
        if self.transcodes:
            tied = torch.empty(cfg.d_sae, cfg.d_in)
            nn.init.kaiming_uniform_(tied, generator=generator)
        norm = 1.0 if self.kind.unit_norm(cfg) else cfg.decoder_init_norm
        if norm is not None:
            rows, tied = (w * (norm / w.norm(dim=1, keepdim=True)) for w in (rows, tied))
        dtype = DTYPES[cfg.dtype]
        self.W_enc = nn.Parameter(tied.t().contiguous().to(dtype))
        self.W_dec = nn.Parameter(rows.to(dtype))
        self.b_dec = nn.Parameter(torch.zeros(cfg.width_out, dtype=dtype))
        if cfg.skip:
            self.W_skip = nn.Parameter(torch.zeros(cfg.width_out, cfg.d_in, dtype=dtype))

    @property
    def input_bias(self) -> Tensor | None:
        """What is subtracted from the input, or None."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Latents of activations.

        Batch kinds use their threshold in evaluation mode, and the batch rule in training mode or where no threshold is
        known yet.

        Raises:
            InputError: the last axis is not d_in, or there are no floats.
            NonFiniteError: NaN or infinity in x; the message gives the first place.
        """
        batch = self._pass(x)
        with torch.autocast(x.device.type, enabled=False):
            found = self.kind.latents(self, batch)
        dense = found.dense() if isinstance(found, Sparse) else found
        return dense.view(*x.shape[:-1], self.cfg.d_sae)

    def decode(
        self, latents: Float[Tensor, "*tokens d_sae"] | Sparse, x: Float[Tensor, "*tokens d_in"] | None = None
    ) -> Float[Tensor, "*tokens d_out"]:
        """The reconstruction that latents give.

        Args:
            latents: as from `encode`.
            x: the activations that they came from; needed where each token is normalised, or with `skip`.

        Raises:
            InputError: the last axis is not d_sae.
            SettingsError: x is needed and missing.
        """
        needed = self.cfg.skip or self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        if x is None and needed:
            raise SettingsError("decode needs x here: it normalises each token or has a skip; use decode(latents, x).")
        if latents.shape[-1] != self.cfg.d_sae:
            raise InputError(f"latents are [..., {self.cfg.d_sae}], found shape {list(latents.shape)}.")
        leading, device = latents.shape[:-1], self.W_dec.device
        flat = latents if isinstance(latents, Sparse) else latents.reshape(-1, self.cfg.d_sae).to(self.W_dec.dtype)
        low = low_precision(device)
        with torch.autocast(device.type, enabled=False):
            y = self._rows(flat, low)
            y = y if x is None or not needed else self.finish(y, self._pass(x))
        return y.view(*leading, self.cfg.width_out)

    def _rows(self, latents: Tensor | Sparse, low: torch.dtype | None) -> Tensor:
        rows = self.kind.decoder(self)
        if isinstance(latents, Sparse):
            return decode(latents.values, rows, latents.pattern) + self.b_dec
        return product(latents, rows, low) + self.b_dec

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """The reconstruction of activations (for a transcoder: of what it stands for)."""
        batch = self._pass(x)
        with torch.autocast(x.device.type, enabled=False):
            y = self._rows(self.kind.latents(self, batch), batch.low)
            return self.finish(y, batch).view(*x.shape[:-1], self.cfg.width_out)

    def loss(
        self,
        x: Float[Tensor, "*tokens d_in"],
        target: Float[Tensor, "*tokens d_out"] | None = None,
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        sparsity: float = 1.0,
        reduce: Reduce | None = None,
    ) -> Loss:
        """The loss of a batch of activations.

        Args:
            x: activations.
            target: what is to be reconstructed; None for x itself in an SAE.
            dead: latents that have long not been active; the same on all processes.
            sparsity: factor of the sparsity penalties, for their warm-up.
            reduce: brings tensors of all processes together (`reduce(tensor, "sum" | "min" | "max")`), for the
                threshold of batch kinds.

        Returns:
            Total and parts; latents and reconstruction have one axis of tokens.

        Raises:
            InputError: a shape is wrong, or a transcoder got no target.
            NonFiniteError: NaN or infinity in x or target; the message gives the first place.
        """
        if target is None and self.transcodes:
            raise InputError("a transcoder's loss needs a target: loss(x, target).")
        if dead is not None and (dead.shape != (self.cfg.d_sae,) or dead.dtype != torch.bool):
            raise InputError(f"dead is {self.cfg.d_sae} bools, found {dead.dtype} of shape {list(dead.shape)}.")
        batch = self._pass(x, target, dead=dead, sparsity=sparsity, reduce=reduce)
        with torch.autocast(x.device.type, enabled=False):
            parts, latents, reconstruction = self.kind.losses(self, batch)
            total = torch.stack([part.to(parts["mse_loss"].dtype) for part in parts.values()]).sum()
        return Loss(total, parts, latents, reconstruction, batch.target)

    def before_step(self) -> None:
        """Call between backward and the optimiser: removes the gradient that a constraint forbids."""
        self.kind.before_step(self)

    def after_step(self) -> None:
        """Call after the optimiser: brings constrained parameters back."""
        self.kind.after_step(self)

    def _pass(self, x: Tensor, target: Tensor | None = None, **rest: Any) -> Pass:
        raw = self._checked(x, "x", self.cfg.d_in)
        if target is None:
            aim = raw
        else:
            aim = self._checked(target, "target", self.cfg.width_out)
            if target.shape[:-1] != x.shape[:-1]:
                raise InputError(f"target {list(target.shape)} has not the tokens of x {list(x.shape)}.")
        normal, scale, shift = raw, None, None
        mode = self.cfg.normalize_activations
        if mode == "constant_norm_rescale":
            scale = raw.norm(dim=-1, keepdim=True) / self.cfg.d_in**0.5
            normal = raw / scale
        elif mode == "layer_norm":
            shift = raw.mean(dim=-1, keepdim=True)
            scale = (raw - shift).std(dim=-1, keepdim=True)
            normal = (raw - shift) / (scale + 1e-5)
        if self.transcodes:
            scale = shift = None
        return Pass(raw, normal, scale, shift, low_precision(x.device), aim, **rest)

    def _checked(self, x: Tensor, name: str, width: int) -> Tensor:
        if not x.ndim or x.shape[-1] != width or not x.dtype.is_floating_point:
            raise InputError(f"{name} is floats [..., {width}], found {x.dtype} of shape {list(x.shape)}.")
        # A sum is finite only if every summand is, and costs a small part of looking at each.
        if not x.detach().sum(dtype=torch.float32).isfinite() and not (fine := x.detach().isfinite()).all():
            place = (~fine).nonzero()[0].tolist()
            raise NonFiniteError(f"{name} holds {x[tuple(place)].item()}, first at index {place}.")
        return x.reshape(-1, width).to(self.W_enc.dtype)

    def finish(self, y: Float[Tensor, "tokens d_out"], batch: Pass) -> Float[Tensor, "tokens d_out"]:
        """From normalised units back to those of the activations, with the skip added."""
        if batch.scale is not None:
            y = y * batch.scale
        if batch.shift is not None:
            y = y + batch.shift
        return y + product(batch.raw, self.W_skip.t(), batch.low) if self.cfg.skip else y

    def pre_activations(self, batch: Pass) -> Float[Tensor, "tokens d_sae"]:
        """All pre-activations of a batch."""
        return affine(batch.x, self.input_bias, self.W_enc, self.b_enc, batch.low)

    def extra_repr(self) -> str:
        """The main settings."""
        cfg = self.cfg
        return f"{cfg.architecture}, d_in={cfg.d_in}, d_sae={cfg.d_sae}, d_out={cfg.width_out}, dtype={cfg.dtype}"


class SAE(Dictionary):
    """A sparse autoencoder: `SAE(d_in=576, d_sae=9216, architecture="topk", k=32)`, or `SAE(config)`.

    Args:
        config: settings, or None to give them one by one, under the names of `DictionaryConfig`.
        metadata: what is written into files beside the settings (model, site, layer, ...).
        settings: single settings.

    Raises:
        UnknownNameError: there is no such setting or architecture.
        SettingsError: a setting is missing, out of range, or not for an SAE.
    """

    def _settled(self, cfg: DictionaryConfig) -> DictionaryConfig:
        if cfg.skip or cfg.width_out != cfg.d_in:
            raise SettingsError("an SAE writes what it reads: no skip and no other d_out; use Transcoder.")
        return cfg if cfg.apply_b_dec_to_input is not None else cfg.changed(apply_b_dec_to_input=True)


class Transcoder(Dictionary):
    """Sparse latents of one site that reconstruct another: `Transcoder(d_in=576, d_sae=9216, d_out=576, skip=True)`.

    Encoder and decoder are drawn apart from each other; the skip begins at zero.

    Args:
        config: settings, or None to give them one by one, under the names of `DictionaryConfig`.
        metadata: what is written into files beside the settings (model, sites, layers, ...).
        settings: single settings.

    Raises:
        UnknownNameError: there is no such setting or architecture.
        SettingsError: a setting is missing, out of range, or not for a transcoder.
    """

    transcodes = True

    def _settled(self, cfg: DictionaryConfig) -> DictionaryConfig:
        if cfg.apply_b_dec_to_input:
            raise SettingsError("a transcoder's b_dec belongs to its output: apply_b_dec_to_input must be False.")
        return cfg.changed(apply_b_dec_to_input=False)


def mse(reconstruction: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Mean over tokens of the sum over d of the squared error, in float32 or wider."""
    wide = torch.promote_types(reconstruction.dtype, torch.float32)
    error = reconstruction.to(wide) - target.to(wide)
    return error.square().sum() / max(len(error), 1)
