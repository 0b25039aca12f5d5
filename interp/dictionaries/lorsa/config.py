"""Settings of a Lorsa, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

from interp.dictionaries.config import DTYPES
from interp.errors import SettingsError, unknown

Kind = Literal["relu", "jumprelu", "topk", "batchtopk", "identity"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "architecture": ("relu", "jumprelu", "topk", "batchtopk", "identity"),
    "dtype": tuple(DTYPES),
    "rotary_pairing": ("half", "interleaved"),
    "normalize_activations": ("none", "expected_average_only_in"),
}
_COUNTS = {"d_in": 1, "d_out": 1, "n_qk": 1, "n_ov": 1, "d_qk": 1, "context": 2, "rotary_dim": 0, "seed": 0}
_NUMBERS = {"scale": True, "softcap": True, "rotary_base": True, "qk_norm_eps": False, "l1_coefficient": False}
_NUMBERS |= {"l0_coefficient": False, "aux_loss_coefficient": False, "jumprelu_init_threshold": False}
_NUMBERS |= {"jumprelu_bandwidth": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class LorsaConfig:
    """What a Lorsa is and what it is trained for; settings that its architecture does not use are left alone.

    Attributes:
        d_in: width of what the attention reads.
        d_out: width of what it writes.
        n_qk: QK heads; each is shared by the same number of OV heads, consecutive ones.
        n_ov: OV heads of rank one, which are the latents.
        d_qk: width of a query or key.
        architecture: which OV heads are active. Of the contributions pre |w_o|: `topk` (the k largest of a token, after
            a ReLU), `batchtopk` (the k n largest of n tokens; in evaluation those above a running threshold),
            `jumprelu` (those above a trained threshold), `relu`; or `identity`, all of them with their signs.
        k: active heads of a token (the mean over a batch for `batchtopk`).
        causal: whether a position sees only itself and earlier ones.
        window: a position sees those less than so many columns away; None for all.
        context: longest sequence.
        scale: what q k is multiplied with; None for 1/sqrt(d_qk).
        softcap: scores go through cap tanh(score / cap); None for none.
        qk_norm: divide each query and key by its root mean square and multiply it with a gain, before the rotation.
        qk_norm_eps: is added to the mean square.
        rotary_dim: how many of the first d_qk coordinates are rotated by position; 0 for none.
        rotary_pairing: coordinates i and i + rotary_dim/2 (`half`), or 2i and 2i + 1 (`interleaved`), turn together.
        rotary_base: of the angles at first; those of a wrapped layer take their place.
        dtype: of the weights: float32, float64, float16 or bfloat16.
        seed: of the first weights.
        normalize_activations: `expected_average_only_in`: input and target are multiplied by one number each in
            training (see `fold_scales`), and the first weights, which are for activations as they are, accordingly; or
            `none`.
        aux_loss_coefficient: weight of the loss by which dead heads reconstruct the residual (top-k kinds).
        topk_threshold_lr: weight of the newest batch in the running threshold of `batchtopk`.
        l1_coefficient: weight of the penalty of `relu`, the mean over tokens of the summed contributions.
        l0_coefficient: weight of the penalty of `jumprelu`, the mean number of active heads.
        jumprelu_init_threshold: thresholds at first.
        jumprelu_bandwidth: width of the window in which thresholds have a gradient.
    """

    d_in: int
    n_qk: int
    n_ov: int
    d_qk: int
    d_out: int | None = None
    architecture: Kind = "topk"
    k: float = 64
    causal: bool = True
    window: int | None = None
    context: int = 1024
    scale: float | None = None
    softcap: float | None = None
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    rotary_dim: int = 0
    rotary_pairing: Literal["half", "interleaved"] = "half"
    rotary_base: float = 10_000.0
    dtype: str = "float32"
    seed: int = 0
    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    aux_loss_coefficient: float = 1 / 32
    topk_threshold_lr: float = 0.01
    l1_coefficient: float = 1.0
    l0_coefficient: float = 1.0
    jumprelu_init_threshold: float = 0.01
    jumprelu_bandwidth: float = 0.05

    def __post_init__(self):
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name == "d_out":
                continue
            if type(value) is not int or value < least:
                raise SettingsError(f"{name} is a whole number of at least {least}, not {value!r}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        for name, above in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in ("scale", "softcap"):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0 or (above and value == 0):
                raise SettingsError(
                    f"{name} is a finite number {'above' if above else 'of at least'} 0, not {value!r}."
                )
        if self.n_ov % self.n_qk:
            near = max(self.n_ov // self.n_qk, 1) * self.n_qk
            raise SettingsError(
                f"n_ov={self.n_ov} OV heads cannot be shared out evenly among n_qk={self.n_qk} QK heads; take "
                f"n_ov={near}."
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.d_qk:
            raise SettingsError(f"rotary_dim is even and at most d_qk={self.d_qk}, not {self.rotary_dim}.")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise SettingsError(f"window is a whole number of at least 1, or None, not {self.window!r}.")
        whole = self.architecture != "topk" or self.k == int(self.k)
        if self.architecture in ("topk", "batchtopk") and not (whole and 0 < self.k <= self.n_ov):
            raise SettingsError(f"k lies above 0 and at most at n_ov={self.n_ov} (topk: whole), not at {self.k}.")
        if not 0 < self.topk_threshold_lr <= 1:
            raise SettingsError(f"topk_threshold_lr lies above 0 and at most at 1, not at {self.topk_threshold_lr}.")

    @property
    def width_out(self) -> int:
        """Width of what is written."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def d_sae(self) -> int:
        """Number of latents, as other dictionaries call it."""
        return self.n_ov

    @property
    def group(self) -> int:
        """How many OV heads share a QK head."""
        return self.n_ov // self.n_qk

    def to_dict(self) -> dict[str, Any]:
        """The settings as json can hold them."""
        return asdict(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LorsaConfig:
        """Settings from a mapping.

        Raises:
            UnknownNameError: there is no setting of such a name.
            SettingsError: a needed one is missing, or a value is out of range.
        """
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("setting", name, names, "the settings of a Lorsa")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]
        if missing:
            raise SettingsError(f"a Lorsa needs {' and '.join(missing)}.")
        return cls(**settings)

    def changed(self, **settings: Any) -> LorsaConfig:
        """The same settings but for those that are given."""
        return replace(self, **settings)
