"""`PlacedLorsa`: a Lorsa at the layer of a model, from the stream that enters the layer to what attention adds to it.

A Lorsa reads what stands behind the norm, and writes what the output projection gives. Here the norm in front and what
lies behind the projection (a norm of Gemma 2, a factor of Granite) are the model's own, so that `resid_pre` goes in and
`attn_out` comes out, and everything that is made for dictionaries of sites (`evaluate`, `top_contexts`,
`logit_effects`, `neighbours`) takes a Lorsa, too.

Lorsas of llamascopium read the stream behind the norm without its gain g and bias b, (norm(x) - b) / g. Both are probed
on the model's norm: b is what it makes of zero, g what it makes of a long random vector, over that vector normalised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.dictionaries.base import Architecture
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.rule import AttentionRule, attention_rule
from interp.dictionaries.lorsa.select import written
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.lens import Lens
from interp.reads import Read

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.data.corpora import Corpus

_POSITIONS = 32  # the rule is measured for the norm in front alone


class PlacedLorsa:
    """A Lorsa at its layer.

    Args:
        lorsa: in evaluation mode it is used as it is; trained on activations as they are, or with scales folded in.
        lens: the model.
        layer: its layer; None for what its metadata say.
        tower: likewise; None for what the metadata say, or the main one.
        rule: of the layer, from `attention_rule`; None to measure it, which a model in half precision does not allow.
        corpus: where the layer is of a tower of images: what to measure it on.

    Attributes:
        lorsa: the Lorsa.
        lens: the model.
        layer: the layer.
        tower: its tower.
        read: name of the stream that it reads, such as `resid_pre.8`.
        target: name of what it reconstructs, such as `attn_out.8`.

    Raises:
        SettingsError: nothing says which layer it is for, or it is of another one; it is for scaled activations.
        InputError: the layer has another width than the Lorsa.
        UnsupportedError: the layer has no attention whose output can be read.
    """

    transcodes = True
    sequences = True

    def __init__(
        self,
        lorsa: Lorsa,
        lens: Lens,
        *,
        layer: int | None = None,
        tower: str | None = None,
        rule: AttentionRule | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        held = lorsa.metadata
        self._without_gain = held.get("imported") == "llamascopium"
        if lorsa.cfg.normalize_activations != "none":
            raise SettingsError("this Lorsa is for scaled activations: fold_scales(lorsa, scale, target_scale) first.")
        known = [value for value in (layer, None if rule is None else rule.layer, _layer(held)) if value is not None]
        if not known:
            raise SettingsError("nothing says which layer this Lorsa is for: give read='resid_pre.8'.")
        if len(set(known)) > 1:
            raise SettingsError(f"this Lorsa is of layer {known[-1]}, not of layer {known[0]}.")
        self.lorsa, self.lens, self._given, self._corpus = lorsa, lens, rule, corpus
        self.tower = tower or (rule.tower if rule is not None else held.get("tower")) or lens.anatomy.main
        self.layer = lens.anatomy.tower(self.tower)[0].layer(known[0]).index
        self._chain: Sequence[Any] = lens.anatomy.attention(self.tower, self.layer, "z").chain
        own = None if self.tower == lens.anatomy.main else self.tower
        self.read, self.target = (str(Read(s, layers=(self.layer,), tower=own)) for s in ("resid_pre", "attn_out"))
        self.metadata = {**held, "read": self.read, "target": self.target}
        self.kind = Architecture()
        width = lens.anatomy.towers[self.tower].d_model
        if width != lorsa.cfg.d_in or width != lorsa.cfg.width_out:
            raise InputError(
                f"{self.read} of {lens.name} is {width} wide, but the Lorsa reads {lorsa.cfg.d_in} and writes "
                f"{lorsa.cfg.width_out}."
            )

    @cached_property
    def rule(self) -> AttentionRule:
        """The rule of the layer.

        Raises:
            UnsupportedError, SettingsError, InputError: see `attention_rule`.
        """
        if self._given is not None:
            return self._given
        batch: Batch | None = None
        if self.tower != self.lens.anatomy.main:
            from interp.dictionaries.activations import ActivationStream

            if self._corpus is None:
                raise InputError(f"the layers of {self.tower!r} are measured on pictures: give a corpus, or a rule.")
            stream = ActivationStream(self.lens, self._corpus, self.read, batch=1)
            next(stream)
            batch = stream.inputs
        return attention_rule(self.lens, self.layer, batch, tower=self.tower, context=_POSITIONS)

    @property
    def cfg(self) -> Any:
        """The Lorsa's settings."""
        return self.lorsa.cfg

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return self.lorsa.training

    def train(self, mode: bool = True) -> PlacedLorsa:
        """Into training mode, or out of it."""
        self.lorsa.train(mode)
        return self

    def eval(self) -> PlacedLorsa:
        """Out of training mode."""
        return self.train(False)

    @property
    def topk_threshold(self) -> Tensor | None:
        """The threshold of a batch kind; None for others."""
        return self.lorsa.topk_threshold if self.cfg.architecture == "batchtopk" else None

    @property
    def b_dec(self) -> Tensor:
        """The decoder's bias, in front of what lies behind the projection."""
        return self.lorsa.b_D

    @property
    def W_enc(self) -> Tensor:
        """The value vectors [d_in, n_ov]."""
        return self.lorsa.W_enc

    @property
    def W_dec(self) -> Tensor:
        """The output directions in the stream [n_ov, d]; behind a norm, up to one factor for each position."""
        rows = self.lorsa.W_O
        for step in self._chain:
            rows = step.linear(rows, rows.new_ones(1, 1)) if hasattr(step, "gain") else rows * _factor(step)
        return rows

    def inputs(self, stream: Float[Tensor, "*pos d_in"]) -> Float[Tensor, "*pos d_in"]:
        """What the Lorsa reads, from the stream that enters the layer, on the Lorsa's device."""
        x = self.rule.inputs(stream).to(self.lorsa.W_V)
        if not self._without_gain:
            return x
        gain, bias = (t.to(x) for t in self._affine)
        return (x - bias) / gain

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """Gain and bias of the norm in front."""
        norm = self.rule.norm
        if norm is None:
            raise UnsupportedError(f"{self.read}: no norm stands in front of the attention, as llamascopium has it.")
        probe = torch.randn(1, 1, self.cfg.d_in, generator=torch.Generator().manual_seed(0)) * 1e4
        with torch.no_grad():
            parameter = next(norm.parameters(), probe)
            probe = probe.to(parameter)
            bias, seen, shifted = (norm(v)[0, 0].float() for v in (probe * 0, probe, probe + 1e5))
        centred = probe[0, 0].float()
        if torch.allclose(seen, shifted, rtol=1e-2, atol=1e-2 * float(seen.abs().max())):
            centred = centred - centred.mean()
        gain = (seen - bias) / (centred / centred.square().mean().sqrt())
        if not bool((gain.abs() > 1e-6).all()):
            raise UnsupportedError(f"{self.read}: the norm in front takes coordinates away, which cannot be undone.")
        return gain, bias

    def encode_contexts(
        self,
        stream: Float[Tensor, "batch pos d_in"],
        where: Bool[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "token n_ov"]:
        """The latents of some tokens, from the whole contexts that they stand in.

        Args:
            stream: that enters the layer.
            where: the tokens whose latents are wanted.
            real: everything that is no padding.
        """
        if not bool(where.any()):  # a context of one token has nothing to attend to
            return self.lorsa.W_V.new_zeros(0, self.cfg.n_ov)
        device = self.lorsa.W_V.device
        return self.lorsa.encode(self.inputs(stream), real=real.to(device))[where.to(device)]

    def decode(self, latents: Float[Tensor, "token n_ov"], x: Tensor | None = None) -> Float[Tensor, "token d_out"]:
        """What attention adds to the stream, reconstructed from latents; x is not needed."""
        return self.to_stream(written(self.lorsa, latents))

    def to_stream(self, y: Float[Tensor, "*pos d_out"]) -> Float[Tensor, "*pos d_out"]:
        """What the output projection gives, through what lies between it and the stream."""
        for step in self._chain:
            if hasattr(step, "gain"):
                y = (step.linear(y, step.scale(y)) + step.bias.to(y.device)).to(y)
            else:
                y = y * _factor(step)
        return y


def _layer(metadata: Mapping[str, Any]) -> int | None:
    """The layer that metadata name, by number or in the name of a TransformerLens hook."""
    hook = re.match(r"blocks\.(\d+)\.", str(metadata.get("hook_point_in")))
    return metadata.get("layer", None if hook is None else int(hook[1]))


def _factor(step: Any) -> Any:
    try:
        return step({})
    except (KeyError, TypeError) as error:
        raise UnsupportedError("what attention writes is multiplied by a factor that depends on the input.") from error
