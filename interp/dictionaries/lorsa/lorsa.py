"""`Lorsa`: an attention layer as a sum of many sparse heads of rank one.

Source: He, Wang, Lin, Ge, Shu, Tang, Zhang and Qiu 2025, "Towards Understanding the Nature of Attention with Low-Rank
Sparse Decomposition" (arXiv 2504.20938). A Lorsa is to attention what a transcoder is to an MLP: it reads what the
attention reads (x, behind the norm) and reconstructs what the heads write (y). OV head i has a scalar value and one
output direction, and shares the pattern A^g of QK head g(i) with its neighbours:

    q, k  = x W_Q + b_Q, x W_K + b_K                          of each QK head; normed, rotated as in the wrapped layer
    A^g   = softmax(scale q_g k_g, masked as in the wrapped layer)
    v_i   = w_v,i x + b_V,i
    pre_i[t] = sum over s of A^g(i)[t, s] v_i[s]
    y[t]  = sum over i of z_i[t] w_o,i + b_D,                 z = the active ones of pre (see `select`)

Departures from the authors' code (OpenMOSS, 2025 and 2026). Padding, packed sequences, windows, soft caps and layers
that look both ways are masked as in the model, whose rule is measured (see `rule`), not set by hand. Biases of queries
and keys are copied. Latents of top-k kinds and what they write touch active heads only; no [n_ov, pos, pos] is made.
The gain of the input's norm is not folded away: x is what the layer's projections are given.

What it does not see: heads that share a QK head cannot differ in where they look, and a rank of one splits what a head
does into many latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from interp.dictionaries.base import Loss
from interp.dictionaries.config import DTYPES
from interp.dictionaries.lorsa.attend import attend, positions_of, rotate, visible
from interp.dictionaries.lorsa.config import LorsaConfig
from interp.dictionaries.lorsa.rule import normed
from interp.dictionaries.lorsa.select import losses, select, written
from interp.dictionaries.sparse import Reduce, Sparse, low_precision
from interp.errors import InputError, NonFiniteError, SettingsError

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.lens import Lens


class Lorsa(nn.Module):
    """Low-rank sparse attention: `Lorsa(d_in=576, n_qk=72, n_ov=4608, d_qk=64, k=64)`, or `Lorsa(config)`.

    Parameters: `W_Q`, `W_K` [n_qk, d_in, d_qk], `b_Q`, `b_K` [n_qk, d_qk], `W_V` [n_ov, d_in], `b_V` [n_ov],
    `W_O` [n_ov, d_out], `b_D` [d_out]; `q_gain`, `k_gain` [n_qk, d_qk] with a q/k norm; `threshold` [n_ov] of JumpReLU.
    Buffers: `cos`, `sin` [context, rotary_dim / 2]; `topk_threshold` of batch-top-k.

    Args:
        config: settings, or None to give them one by one, under the names of `LorsaConfig`.
        metadata: what is written into files beside the settings (model, tower, layer, ...).
        settings: single settings.

    Raises:
        UnknownNameError: there is no such setting or architecture.
        SettingsError: a setting is missing or out of range.
    """

    transcodes = True
    sequences = True
    threshold: nn.Parameter
    topk_threshold: Tensor
    q_gain: nn.Parameter
    k_gain: nn.Parameter
    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: LorsaConfig | None = None, /, *, metadata: Mapping[str, Any] | None = None, **settings: Any
    ):
        if config is not None and settings:
            raise SettingsError(f"give a config or single settings, not both; found {', '.join(settings)} beside it.")
        super().__init__()
        self.cfg = cfg = LorsaConfig.of(settings) if config is None else config
        self.metadata = dict(metadata or {})
        random, dtype = torch.Generator().manual_seed(cfg.seed), DTYPES[cfg.dtype]

        def drawn(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(*shape, generator=random) * std).to(dtype))

        def flat(*shape: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, dtype=dtype))

        qk = (cfg.n_qk, cfg.d_in, cfg.d_qk)
        self.W_Q, self.W_K = (drawn(*qk, std=(2 / (cfg.d_in + cfg.d_qk)) ** 0.5) for _ in range(2))
        self.b_Q, self.b_K = flat(cfg.n_qk, cfg.d_qk), flat(cfg.n_qk, cfg.d_qk)
        self.W_V, self.b_V = drawn(cfg.n_ov, cfg.d_in, std=cfg.d_in**-0.5), flat(cfg.n_ov)
        self.W_O, self.b_D = drawn(cfg.n_ov, cfg.width_out, std=cfg.width_out**-0.5), flat(cfg.width_out)
        if cfg.qk_norm:
            self.q_gain, self.k_gain = (flat(cfg.n_qk, cfg.d_qk, value=1.0) for _ in range(2))
        wide = torch.promote_types(dtype, torch.float32)
        if cfg.architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.full((cfg.n_ov,), cfg.jumprelu_init_threshold, dtype=wide))
        if cfg.architecture == "batchtopk":
            self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64))
        turns = cfg.rotary_base ** -(torch.arange(0, cfg.rotary_dim, 2, dtype=torch.float64) / max(cfg.rotary_dim, 1))
        angles = torch.arange(cfg.context, dtype=torch.float64)[:, None] * turns
        self.register_buffer("cos", angles.cos().to(wide))
        self.register_buffer("sin", angles.sin().to(wide))

    @staticmethod
    def exact_copy(
        lens: Lens,
        layer: int,
        batch: Batch | None = None,
        *,
        tower: str | None = None,
        architecture: str = "identity",
        context: int = 128,
        tolerance: float = 1e-5,
    ) -> Lorsa:
        """A Lorsa that does what an attention layer does, proved against it; see `start.exact_copy`."""
        from interp.dictionaries.lorsa.start import exact_copy

        options: dict[str, Any] = {"tower": tower, "architecture": architecture, "context": context}
        return exact_copy(lens, layer, batch, **options, tolerance=tolerance)

    @property
    def W_dec(self) -> nn.Parameter:
        """The output directions."""
        return self.W_O

    @property
    def W_enc(self) -> Tensor:
        """The value vectors [d_in, n_ov]."""
        return self.W_V.t()

    @property
    def b_dec(self) -> nn.Parameter:
        """The decoder's bias."""
        return self.b_D

    def freeze_qk(self, frozen: bool = True) -> Lorsa:
        """Leave queries and keys as they are in training (or no longer); returns itself."""
        for name, parameter in self.named_parameters():
            if name in ("W_Q", "W_K", "b_Q", "b_K", "q_gain", "k_gain"):
                parameter.requires_grad_(not frozen)
        return self

    @property
    def scale(self) -> float:
        """What q k is multiplied with."""
        return self.cfg.d_qk**-0.5 if self.cfg.scale is None else self.cfg.scale

    def queries_keys(
        self, x: Float[Tensor, "batch pos d_in"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "batch pos n_qk d_qk"], Float[Tensor, "batch pos n_qk d_qk"]]:
        """Queries and keys, normed and rotated.

        Args:
            x: what the attention reads.
            positions: of each token; None where columns are positions.
        """
        angles = self._angles(x, positions)
        q, k = (self._looks(x, angles, *self._parts(name, self.cfg.n_qk)[0]) for name in "QK")
        return q, k

    def _angles(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.shape[1] > self.cfg.context:
            raise InputError(
                f"{x.shape[1]} positions are more than the context of {self.cfg.context} that this Lorsa knows."
            )
        where = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
        return self.cos[where], self.sin[where]

    def _parts(self, name: str, step: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Weights, biases and gains of some queries' or keys' heads at a time."""
        weights, biases = (getattr(self, f"{kind}_{name}").split(step) for kind in "Wb")
        gains = getattr(self, f"{name.lower()}_gain").split(step) if self.cfg.qk_norm else [None] * len(weights)
        return list(zip(weights, biases, gains, strict=True))

    def _looks(
        self, x: Tensor, angles: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, gain: Tensor | None
    ) -> Tensor:
        """Queries or keys of some heads."""
        flat = _linear(x, weight.transpose(1, 2).reshape(-1, self.cfg.d_in), bias.flatten())
        flat = flat.view(*x.shape[:2], -1, self.cfg.d_qk)
        flat = flat if gain is None else normed(flat, gain, self.cfg.qk_norm_eps)
        return rotate(flat, *angles, self.cfg.rotary_pairing)

    def values(self, x: Float[Tensor, "*pos d_in"]) -> Float[Tensor, "*pos n_ov"]:
        """The scalar value of each OV head."""
        return _linear(x, self.W_V, self.b_V)

    def seen(
        self,
        x: Float[Tensor, "batch pos d_in"],
        real: Bool[Tensor, "batch pos"] | None = None,
        segments: Int[Tensor, "batch pos"] | None = None,
    ) -> Bool[Tensor, "batch query key"]:
        """Which keys each query sees; padding sees itself."""
        found = visible(x.shape[1], real=real, segments=segments, explicit=True, **self._sight(x))
        assert found is not None
        return found.expand(len(x), -1, -1)

    def _sight(self, x: Tensor) -> dict[str, Any]:
        return {"causal": self.cfg.causal, "window": self.cfg.window, "device": x.device}

    def pre_activations(
        self,
        x: Float[Tensor, "batch pos d_in"],
        *,
        real: Bool[Tensor, "batch pos"] | None = None,
        segments: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos n_ov"]:
        """Each OV head's value, averaged over the sources by its pattern.

        Args:
            x: what the attention reads.
            real: which positions are no padding; None for all.
            segments: number of the sequence that each position belongs to, where a row holds several that do not see
                each other; None for one.

        Raises:
            InputError: shapes do not fit, or there are more positions than the context.
            NonFiniteError: NaN or infinity in x at a real position.
        """
        x, real = self.checked(x, real, segments)
        angles = self._angles(x, positions_of(real, segments, x.shape[:2]))
        seen = visible(x.shape[1], real=real, segments=segments, **self._sight(x))
        n, group = self.cfg.n_qk, self.cfg.group
        # Half of the QK heads at a time, so that no more gradients of queries, keys and values are there at once.
        step = -(-n // 2) if torch.is_grad_enabled() else n
        queries, keys = (self._parts(name, step) for name in "QK")
        values = zip(self.W_V.split(step * group), self.b_V.split(step * group), strict=True)
        low = low_precision(x.device) or x.dtype
        options: dict[str, Any] = {"causal": self.cfg.causal, "scale": self.scale, "softcap": self.cfg.softcap}
        parts = []
        for query, key, value in zip(queries, keys, values, strict=True):
            q, k = (self._looks(x, angles, *one) for one in (query, key))
            v = _linear(x, *value).view(*x.shape[:2], -1, group)
            with torch.autocast(x.device.type, enabled=False):
                parts.append(attend(q.to(low), k.to(low), v.to(low), seen, **options).flatten(2).to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def encode(
        self,
        x: Float[Tensor, "batch pos d_in"],
        *,
        real: Bool[Tensor, "batch pos"] | None = None,
        segments: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos n_ov"]:
        """The latents; zero at padding. Arguments and errors as in `pre_activations`."""
        pre = self.pre_activations(x, real=real, segments=segments)
        used = torch.ones(pre.shape[:2], dtype=torch.bool, device=pre.device) if real is None else real
        found = select(self, pre[used])
        dense = found.dense() if isinstance(found, Sparse) else found
        return torch.zeros_like(pre).masked_scatter(used[..., None], dense)

    def decode(self, latents: Float[Tensor, "*pos n_ov"] | Sparse) -> Float[Tensor, "*pos d_out"]:
        """What latents write, with the bias."""
        return written(self, latents)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_in"],
        *,
        real: Bool[Tensor, "batch pos"] | None = None,
        segments: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_out"]:
        """What the heads write, reconstructed; zero at padding. Arguments and errors as in `pre_activations`."""
        pre = self.pre_activations(x, real=real, segments=segments)
        used = torch.ones(pre.shape[:2], dtype=torch.bool, device=pre.device) if real is None else real
        y = written(self, select(self, pre[used]))
        return y.new_zeros(*pre.shape[:2], y.shape[-1]).masked_scatter(used[..., None], y)

    def loss(
        self,
        x: Float[Tensor, "batch pos d_in"],
        target: Float[Tensor, "batch pos d_out"],
        *,
        mask: Bool[Tensor, "batch pos"] | None = None,
        real: Bool[Tensor, "batch pos"] | None = None,
        segments: Int[Tensor, "batch pos"] | None = None,
        dead: Bool[Tensor, " n_ov"] | None = None,
        sparsity: float = 1.0,
        reduce: Reduce | None = None,
    ) -> Loss:
        """The loss of whole sequences.

        Args:
            x: what the attention reads.
            target: what its heads write.
            mask: the positions that count; None for the real ones. Others are looked at, but not reconstructed.
            real: which positions are no padding; None for all.
            segments: see `pre_activations`.
            dead: heads that have long not been active; the same on all processes.
            sparsity: factor of the sparsity penalties, for their warm-up.
            reduce: brings tensors of all processes together, for the threshold of `batchtopk`.

        Returns:
            Total and parts; latents and reconstruction of the positions that count, context by context.

        Raises:
            InputError: a shape is wrong, or no position counts.
            NonFiniteError: NaN or infinity in x or target at a real position.
        """
        if dead is not None and (dead.shape != (self.cfg.n_ov,) or dead.dtype != torch.bool):
            raise InputError(f"dead is {self.cfg.n_ov} bools, found {dead.dtype} of shape {list(dead.shape)}.")
        if target.shape != (*x.shape[:2], self.cfg.width_out):
            raise InputError(f"target is [batch, pos, {self.cfg.width_out}] as x, found shape {list(target.shape)}.")
        pre = self.pre_activations(x, real=real, segments=segments)
        used = torch.ones(pre.shape[:2], dtype=torch.bool, device=pre.device) if real is None else real
        used = used if mask is None else used & mask
        aim = target[used].to(pre.dtype)
        if not len(aim):
            raise InputError("no position counts: mask and real leave none.")
        if not bool(aim.isfinite().all()):
            raise NonFiniteError("target holds NaN or infinity at a position that counts.")
        flat = pre.flatten(0, 1) if bool(used.all()) else pre[used]
        with torch.autocast(x.device.type, enabled=False):
            parts, latents, y = losses(self, flat, aim, dead=dead, sparsity=sparsity, reduce=reduce)
        total = torch.stack([part.to(parts["mse_loss"].dtype) for part in parts.values()]).sum()
        return Loss(total, parts, latents, y, aim)

    def before_step(self) -> None:
        """Call between backward and the optimiser: nothing is constrained."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after the optimiser: thresholds are not negative."""
        if self.cfg.architecture == "jumprelu":
            self.threshold.clamp_(min=0)

    def checked(
        self, x: Tensor, real: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch pos d_in"], Bool[Tensor, "batch pos"] | None]:
        """x in the dtype of the weights, padding emptied; and `real` where there is padding at all.

        Raises:
            InputError, NonFiniteError: as in `pre_activations`.
        """
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_in or not x.dtype.is_floating_point:
            raise InputError(f"x is floats [batch, pos, {self.cfg.d_in}], found {x.dtype} of shape {list(x.shape)}.")
        if x.shape[1] < 2:
            raise InputError(
                "a Lorsa reads sequences of at least two positions: single tokens have nothing to attend to."
            )
        for name, given in (("real", real), ("segments", segments)):
            if given is not None and given.shape != x.shape[:2]:
                raise InputError(f"{name} is [batch, pos] = {list(x.shape[:2])}, found shape {list(given.shape)}.")
        if real is not None and bool(real.all()):
            real = None
        if real is not None:
            x = torch.where(real[..., None], x, 0)
        if not bool(x.detach().sum(dtype=torch.float32).isfinite()) and not bool((fine := x.detach().isfinite()).all()):
            raise NonFiniteError(f"x holds NaN or infinity, first at index {(~fine).nonzero()[0].tolist()}.")
        return x.to(self.W_V.dtype), real

    def extra_repr(self) -> str:
        """The main settings."""
        cfg = self.cfg
        return f"{cfg.architecture}, d_in={cfg.d_in}, n_qk={cfg.n_qk}, n_ov={cfg.n_ov}, d_qk={cfg.d_qk}, k={cfg.k}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias in the dtype of x; under autocast the product alone is of lower precision."""
    low = low_precision(x.device)
    if low is None:
        return linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(low), weight.to(low)).to(x.dtype) + bias
