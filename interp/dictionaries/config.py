"""Settings of a dictionary, with the names that SAELens gives them, checked in one place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

import torch

from interp.errors import SettingsError, unknown

Normalization = Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "normalize_activations": ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"),
    "reshape_activations": ("none", "hook_z"),
    "dtype": tuple(DTYPES),
    "aux_loss": ("paper", "saelens"),
    "jumprelu_sparsity_loss_mode": ("step", "tanh", "quadratic"),
}
_POSITIVE = ("decoder_init_norm", "jumprelu_bandwidth", "jumprelu_tanh_scale", "lp_norm", "target_l0")
_NOT_NEGATIVE = (
    "l1_coefficient",
    "l0_coefficient",
    "aux_loss_coefficient",
    "jumprelu_init_threshold",
    "pre_act_loss_coefficient",
)

_MAY_BE_NONE = ("decoder_init_norm", "target_l0", "aux_loss_coefficient", "pre_act_loss_coefficient")


@dataclass(frozen=True, slots=True, kw_only=True)
class DictionaryConfig:
    """What a dictionary is and what it is trained for; settings that its architecture does not use are left alone.

    Attributes:
        d_in: width of the activations that are read.
        d_sae: number of latents.
        architecture: name of a registered architecture (`standard`, `gated`, `topk`, `abstopk`, `batchtopk`,
            `jumprelu`, `matryoshka_batchtopk`, or a third party's).
        d_out: width of what is written; None for `d_in`. Only transcoders may have another.
        dtype: of the weights: float32, float64, float16 or bfloat16.
        seed: of the first weights.
        apply_b_dec_to_input: subtract the decoder's bias from the input; None for yes in an SAE, no in a transcoder.
        normalize_activations: `none`; `expected_average_only_in` (whoever trains multiplies the activations by one
            number, see `fold_activation_scale`); `constant_norm_rescale` (each token to the length sqrt(d_in) and
            back); `layer_norm` (each token to mean 0 and standard deviation 1 and back).
        reshape_activations: `hook_z` says that d_in is the heads of `z` side by side; activations are given flat.
        decoder_init_norm: length of the decoder's rows at first; None leaves them as drawn.
        k: active latents of a token (the mean over a batch for the batch kinds).
        rescale_acts_by_decoder_norm: top-k kinds rank and report latents times the length of their decoder row.
        unit_norm_decoder: top-k kinds that do not rescale: rows of length one, kept so by `before_step`, `after_step`.
        topk_threshold_lr: weight of the newest batch in the running threshold of the batch kinds.
        matryoshka_widths: nested widths, rising; the last one is d_sae and is added when left out.
        aux_loss: form of the second reconstruction, `paper` or `saelens`. Of dead latents in top-k kinds: after a ReLU
            and divided by the variance of the residual, or neither. Of the gate in `gated`: the decoder left alone by
            it and its rows kept at length one, or neither.
        aux_loss_coefficient: weight of the dead latents' loss; None for 1/32 (`paper`) or 1 (`saelens`).
        l1_coefficient: weight of the penalty of `standard` and `gated`; losses are sums over d_in, means over tokens.
        lp_norm: which norm of the latents `standard` penalises.
        l0_coefficient: weight of the penalty of `jumprelu`.
        jumprelu_init_threshold: thresholds at first.
        jumprelu_bandwidth: width of the window in which thresholds have a gradient.
        jumprelu_sparsity_loss_mode: `step`, `tanh` or `quadratic` (around `target_l0`).
        jumprelu_tanh_scale: c in tanh(c f |row|).
        jumprelu_ste_to_input: let the window's gradient reach the encoder too.
        target_l0: active latents that `quadratic` aims at.
        pre_act_loss_coefficient: weight of the pull on dead JumpReLU latents; None for none.
        skip: add a linear map of the input (transcoders).
    """

    d_in: int
    d_sae: int
    architecture: str = "topk"
    d_out: int | None = None
    dtype: str = "float32"
    seed: int = 0
    apply_b_dec_to_input: bool | None = None
    normalize_activations: Normalization = "none"
    reshape_activations: Literal["none", "hook_z"] = "none"
    decoder_init_norm: float | None = 0.1
    k: float = 100
    rescale_acts_by_decoder_norm: bool = True
    unit_norm_decoder: bool = False
    topk_threshold_lr: float = 0.01
    matryoshka_widths: tuple[int, ...] = ()
    aux_loss: Literal["paper", "saelens"] = "paper"
    aux_loss_coefficient: float | None = None
    l1_coefficient: float = 1.0
    lp_norm: float = 1.0
    l0_coefficient: float = 1.0
    jumprelu_init_threshold: float = 0.01
    jumprelu_bandwidth: float = 0.05
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    jumprelu_tanh_scale: float = 4.0
    jumprelu_ste_to_input: bool = False
    target_l0: float | None = None
    pre_act_loss_coefficient: float | None = None
    skip: bool = False

    def __post_init__(self):
        for name in ("d_in", "d_sae", "d_out"):
            size = getattr(self, name)
            if not (size is None and name == "d_out") and (not isinstance(size, int) or size < 1):
                raise SettingsError(f"{name} is a whole number of at least 1, not {size!r}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise SettingsError(f"{name} is a finite number of at least 0, not {value!r}.")
            if name in _POSITIVE and value == 0:
                raise SettingsError(f"{name} must be greater than 0.")
        if not 0 < self.topk_threshold_lr <= 1:
            raise SettingsError(f"topk_threshold_lr lies above 0 and at most at 1, not at {self.topk_threshold_lr}.")
        if self.jumprelu_sparsity_loss_mode == "quadratic" and not 0 < (self.target_l0 or 0) <= self.d_sae:
            raise SettingsError(f"the quadratic loss needs a target_l0 in (0, {self.d_sae}], not {self.target_l0}.")
        if self.unit_norm_decoder and self.rescale_acts_by_decoder_norm:
            raise SettingsError("unit_norm_decoder needs rescale_acts_by_decoder_norm=False: rows have length one.")
        object.__setattr__(self, "matryoshka_widths", self._widths())
        from interp.dictionaries.registry import architecture

        architecture(self.architecture).check(self)

    def _widths(self) -> tuple[int, ...]:
        widths = tuple(self.matryoshka_widths)
        if widths and widths[-1] != self.d_sae:
            widths = (*widths, self.d_sae)
        if any(not isinstance(w, int) or w < 1 for w in widths) or any(a >= b for a, b in itertools.pairwise(widths)):
            raise SettingsError(
                f"matryoshka_widths are whole numbers that rise to d_sae={self.d_sae}, not {list(widths)}."
            )
        return widths

    @property
    def width_out(self) -> int:
        """Width of what is written."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def aux_weight(self) -> float:
        """Weight of the loss of dead latents."""
        if self.aux_loss_coefficient is not None:
            return self.aux_loss_coefficient
        return 1.0 if self.aux_loss == "saelens" else 1 / 32

    def to_dict(self) -> dict[str, Any]:
        """The settings as json can hold them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "matryoshka_widths": list(self.matryoshka_widths)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> DictionaryConfig:
        """Settings from a mapping.

        Raises:
            UnknownNameError: there is no setting of such a name.
            SettingsError: d_in or d_sae is missing, or a value is out of range.
        """
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("setting", name, names, "the settings of a dictionary")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]
        if missing:
            raise SettingsError(f"a dictionary needs {' and '.join(missing)}.")
        return cls(**settings)

    def changed(self, **settings: Any) -> DictionaryConfig:
        """The same settings but for those that are given."""
        return replace(self, **settings)
