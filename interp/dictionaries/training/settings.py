"""Settings of a training run, with SAELens's names where it has them, and the schedules that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from interp.errors import SettingsError, unknown

_WHOLE = {"steps": 1, "lr_warm_up_steps": 0, "lr_decay_steps": 0, "sparsity_warm_up_steps": 0}
_WHOLE |= {"dead_feature_window": 1, "scale_rows": 1, "log_every": 1, "checkpoint_every": 1, "keep": 1, "seed": 0}
_CHOICES = {"autocast": (None, "bfloat16", "float16"), "b_dec_init": ("zeros", "mean")}
UNHASHED = ("log_every", "checkpoint_every", "keep")
"""What may differ when a run is taken up again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How dictionaries are trained; the same for all that are trained on one source.

    Attributes:
        steps: how many batches.
        lr: learning rate of Adam.
        lr_warm_up_steps: steps in which it rises linearly from 0.
        lr_decay_steps: last steps, in which it falls linearly to 0.
        adam_beta1: decay of the running mean of gradients.
        adam_beta2: decay of the running mean of their squares.
        grad_clip_norm: largest norm of the gradient of all parameters; None for no limit.
        sparsity_warm_up_steps: steps in which the weight of sparsity penalties rises linearly from 0.
        dead_feature_window: a latent that was active in no token of so many steps is dead.
        autocast: precision of the dense products, None, `bfloat16` or `float16`; weights, losses and statistics stay
            float32.
        b_dec_init: the decoder's bias at first: `zeros`, or `mean`, that of the activations that it reconstructs.
        scale_rows: tokens of which mean norms (`expected_average_only_in`) and means are taken.
        log_every: steps between rows of the log.
        checkpoint_every: steps between checkpoints.
        keep: how many checkpoints are kept.
        sharded: each of several processes keeps only its part of weights, gradients and Adam's means (FSDP2); give
            dictionaries that are too large for one device on the CPU.
        seed: of torch's random numbers.

    Raises:
        SettingsError: a value is of the wrong type or outside its range.
        UnknownNameError: a choice does not exist.
    """

    steps: int
    lr: float = 3e-4
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    grad_clip_norm: float | None = 1.0
    sparsity_warm_up_steps: int = 0
    dead_feature_window: int = 1000
    autocast: Literal["bfloat16", "float16"] | None = None
    b_dec_init: Literal["zeros", "mean"] = "zeros"
    scale_rows: int = 100_000
    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2
    sharded: bool = False
    seed: int = 0

    def __post_init__(self):
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SettingsError(f"{name} is a whole number of at least {least}, not {value!r}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), [str(a) for a in allowed])
        if self.sharded and self.autocast == "float16":
            raise SettingsError(
                "sharded=True takes autocast bfloat16 or none: float16 needs one scale of all gradients."
            )
        for name in ("lr", "grad_clip_norm"):
            value = getattr(self, name)
            if value is None and name == "grad_clip_norm":
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise SettingsError(f"{name} is a finite number above 0, not {value!r}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} lies from 0 to below 1, not at {getattr(self, name)!r}.")
        if self.lr_warm_up_steps + self.lr_decay_steps > self.steps:
            raise SettingsError(
                f"warm-up ({self.lr_warm_up_steps}) and decay ({self.lr_decay_steps}) take more than the {self.steps} "
                "steps that there are."
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainSettings:
        """Settings from a mapping.

        Raises:
            UnknownNameError: there is no setting of such a name.
            SettingsError: `steps` is missing, or a value is out of range.
        """
        names = [f.name for f in fields(cls)]
        for name in settings:
            if name not in names:
                raise unknown("setting", name, names, "the settings of training")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in settings]
        if missing:
            raise SettingsError(f"training needs {' and '.join(missing)}.")
        return cls(**settings)

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return {name: value for name, value in asdict(self).items() if name not in UNHASHED}

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.lr_warm_up_steps) if self.lr_warm_up_steps else 1.0
        falling = min(1.0, (self.steps - step) / self.lr_decay_steps) if self.lr_decay_steps else 1.0
        return self.lr * rising * falling

    def sparsity_at(self, step: int) -> float:
        """The factor of the sparsity penalties in a step, counted from 0."""
        return min(1.0, (step + 1) / self.sparsity_warm_up_steps) if self.sparsity_warm_up_steps else 1.0
