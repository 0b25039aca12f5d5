"""The settings of `interp train lorsa`."""

import math
from dataclasses import dataclass, make_dataclass
from typing import Any

from interp.cli.fields import setting
from interp.cli.training.documented import settings_of
from interp.cli.training.settings import OF_TRAINING, Shared, numbers
from interp.dictionaries.lorsa.config import LorsaConfig
from interp.errors import SettingsError, unknown

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "relu")
INITS = ("random", "heads", "subspace-values", "subspace-outputs")

# What is not here is the layer's own, measured on the model.
_OF_LORSA = settings_of(
    LorsaConfig,
    without=(
        *("architecture", "k", "d_out", "dtype", "seed", "causal", "window", "context", "scale", "softcap"),
        *("qk_norm", "qk_norm_eps", "rotary_dim", "rotary_pairing", "rotary_base"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class LorsaRun(Shared):
    """What is chosen for a run of `interp train lorsa` beside the settings of training and of the Lorsa."""

    tokens: int = setting(
        1_000_000, "tokens to train on, as whole contexts; data that have fewer are gone through again", least=1
    )
    contexts: int = setting(16, "contexts in one step, over all processes", least=1)
    architecture: str = setting("topk", f"one or several of {', '.join(ARCHITECTURES)}")
    k: str = setting("64", "active heads of a token, or several numbers with commas between (topk, batchtopk)")
    init: str = setting(
        "subspace-outputs",
        "first weights, one or several: random; heads (queries and keys of the layer's heads); subspace-values or "
        "subspace-outputs (besides, OV heads from the subspace in which each head's values or outputs vary)",
    )
    expansion: int = setting(8, "OV heads for each dimension that is read, and QK heads for each of the layer", least=1)
    n_ov: int | None = setting(None, "OV heads of rank one; null for expansion times the width", kind=int, least=1)
    n_qk: int | None = setting(
        None, "QK heads; null for expansion times the layer's heads (freeze_qk: for these)", kind=int, least=1
    )
    freeze_qk: bool = setting(False, "leave queries and keys as the layer has them: the cheapest on a CPU")
    dtype: str | None = setting("float32", "of the model, in which its layer is measured: float32 or float64")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("architecture", ARCHITECTURES), ("init", INITS)):
            found = _parts(getattr(self, name))
            for one in found:
                if one not in known:
                    raise unknown(name, one, known)
            if len(set(found)) < len(found):
                raise SettingsError(f"{name} names one twice: {getattr(self, name)!r}.")
        if self.freeze_qk and "random" in _parts(self.init):
            raise SettingsError("freeze_qk leaves queries and keys as the layer has them, and init=random has others.")
        many = 10**6  # the real widths are known when the model is there
        n_qk = self.n_qk or 1
        for settings in self.lorsas():
            LorsaConfig.of({**settings, "d_in": 1, "d_qk": 1, "n_qk": n_qk, "n_ov": self.n_ov or n_qk * many})

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return math.ceil(self.tokens / (self.contexts * self.context))

    @property
    def per_step(self) -> str:
        """What is trained on in one step, in words."""
        return f"{self.contexts:,} contexts"

    def inits(self) -> list[str]:
        """The kinds of first weights."""
        return _parts(self.init)

    def lorsas(self) -> list[dict[str, Any]]:
        """The settings of each Lorsa of a layer, without its widths."""
        shared = {name: getattr(self, name) for name, _, _ in _OF_LORSA} | {"seed": self.seed}
        out = []
        for architecture in _parts(self.architecture):
            ks = numbers("k", self.k, float) if architecture in ("topk", "batchtopk") else [None]
            out += [{**shared, "architecture": architecture, **({} if k is None else {"k": k})} for k in ks]
        return out

    def heads(self, width: int, heads: int) -> dict[str, int]:
        """How many QK and OV heads there are.

        Args:
            width: of what the layer reads.
            heads: of the layer.
        """
        n_qk = self.n_qk or (heads if self.freeze_qk else self.expansion * heads)
        return {"n_qk": n_qk, "n_ov": self.n_ov or max(self.expansion * width // n_qk, 1) * n_qk}


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


LorsaRunSettings: Any = make_dataclass(
    "LorsaRunSettings", [*OF_TRAINING, *_OF_LORSA], bases=(LorsaRun,), frozen=True, kw_only=True
)
"""Everything that is chosen for a run of `interp train lorsa`."""
