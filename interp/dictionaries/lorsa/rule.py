"""How an attention layer of a wrapped model reads its input and where it looks, measured on the model itself.

Nothing is taken from names or from the configuration: the layer's own modules are called, and what they give is
compared with what the layer's attention was seen to use (sites `q`, `k`, `v`, `scores`).

    input      the module in front of the attention (or none) behind which all values v are linear in the stream
    W_Q, W_K   the columns of the layer's projections that equal q and k at the first position, where rotation is none;
               where none do, blocks of them divided by their root mean square, times a gain (q/k norm)
    rotation   of each pair of coordinates at each position: cos = sum(q q'), sin = sum(q x q') / sum |q|^2
    scores     scale q k, or cap tanh(scale q k / cap), fitted on queries as they are and enlarged
    mask       causal or not, and the window, from the scores that are minus infinity

The rule is proved on other tokens (or on the batch that is given): patterns made by it are the layer's to 1e-5. It
holds for sequences of up to `context` positions, on which it was measured. Rules of other forms (biases by distance,
sinks, chunks, norms across heads, latent attention) are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp import edits
from interp.batch import Batch
from interp.dictionaries.lorsa import measured
from interp.dictionaries.lorsa.attend import pattern_of, positions_of, rotate, visible
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.lens import Lens
from interp.patches import picture_ids
from interp.reads import Read
from interp.trace import Trace

_PRODUCTS = 2**20  # of queries and keys, on which the form of the scores is fitted
_TOLERANCE = 1e-5  # of patterns


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRule:
    """The weights of an attention layer and the rule of its positions.

    Attributes:
        model: name of the model.
        tower: of the layer.
        layer: its index.
        norm: what stands between the stream and the projections; None where they read the stream.
        W_Q: [head, d_in, d_qk].
        b_Q: [head, d_qk].
        W_K: for each query head, that of the key head that it uses [head, d_in, d_qk].
        b_K: [head, d_qk].
        W_V: likewise [head, d_in, d_value].
        b_V: [head, d_value].
        W_O: [head, d_value, d_out].
        b_O: [d_out].
        q_gain: gain of the norm of queries [head, d_qk]; None without q/k norm.
        k_gain: the same for keys.
        eps: of these norms.
        cos: of the angle of each rotated pair at each position [context, pair].
        sin: likewise.
        pairing: `half` or `interleaved`.
        scale: what q k is multiplied with.
        softcap: of the scores, or None.
        causal: whether a position sees itself and earlier ones only.
        window: a position sees those less than so many columns away; None for all up to `context`.
        context: longest sequence that it was measured on.
        plain: whether nothing follows the output projection, so that `target` gives `attn_out`.
        error: largest difference between patterns made by this rule and the layer's own.
    """

    model: str
    tower: str
    layer: int
    norm: nn.Module | None
    W_Q: Float[Tensor, "head d_in d_qk"]
    b_Q: Float[Tensor, "head d_qk"]
    W_K: Float[Tensor, "head d_in d_qk"]
    b_K: Float[Tensor, "head d_qk"]
    W_V: Float[Tensor, "head d_in d_value"]
    b_V: Float[Tensor, "head d_value"]
    W_O: Float[Tensor, "head d_value d_out"]
    b_O: Float[Tensor, " d_out"]
    q_gain: Float[Tensor, "head d_qk"] | None
    k_gain: Float[Tensor, "head d_qk"] | None
    eps: float
    cos: Float[Tensor, "context pair"]
    sin: Float[Tensor, "context pair"]
    pairing: str
    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    context: int
    plain: bool
    error: float

    @property
    def reads(self) -> tuple[str, str]:
        """The two reads that a stream of activations needs: what goes to `inputs`, and what goes to `target`."""
        return tuple(str(Read(site, layers=(self.layer,), tower=self.tower)) for site in ("resid_pre", "z"))  # type: ignore[return-value]

    @torch.no_grad()
    def inputs(self, resid_pre: Float[Tensor, "*pos d_in"]) -> Float[Tensor, "*pos d_in"]:
        """What the layer's attention reads, from the stream that enters the layer."""
        if self.norm is None:
            return resid_pre
        parameter = next(self.norm.parameters(), resid_pre)
        return self.norm(resid_pre.to(parameter)).to(resid_pre.device)

    @torch.no_grad()
    def target(self, z: Float[Tensor, "*pos head_value"]) -> Float[Tensor, "*pos d_out"]:
        """What the heads write with the projection's bias, from `z` with its heads side by side.

        This is `attn_out` where nothing follows the projection; norms and factors behind it are left out.
        """
        return z @ self.W_O.flatten(0, 1).to(z) + self.b_O.to(z)

    def settings(self) -> dict[str, Any]:
        """Settings of a Lorsa that has this layer's positions (see `LorsaConfig`)."""
        return {
            "d_in": self.W_Q.shape[1],
            "d_out": self.W_O.shape[-1],
            "d_qk": self.W_Q.shape[-1],
            "causal": self.causal,
            "window": self.window,
            "context": self.context,
            "scale": self.scale,
            "softcap": self.softcap,
            "qk_norm": self.q_gain is not None,
            "qk_norm_eps": self.eps,
            "rotary_dim": 2 * self.cos.shape[1],
            "rotary_pairing": self.pairing,
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """What a run showed, at its real positions [token, ...]."""

    resid: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor


@torch.no_grad()
def attention_rule(
    lens: Lens, layer: int, batch: Batch | None = None, *, tower: str | None = None, context: int = 128, seed: int = 0
) -> AttentionRule:
    """Measure the rule of an attention layer.

    Args:
        lens: a model in float32 or float64.
        layer: its index.
        batch: inputs to measure on; None for random tokens of the main tower. Needed for towers of images or sound.
        tower: of the layer; None for the main one.
        context: length of the random sequences, the longest that the rule then holds for.
        seed: of the random tokens.

    Returns:
        The layer's weights and its rule.

    Raises:
        UnsupportedError: the layer has no self-attention whose parts can be read, its rule is of another form, or
            patterns made by the rule are not the layer's.
        SettingsError: the model is in half precision, or context is below 2.
        InputError: a batch is needed.
    """
    if lens.dtype not in (torch.float32, torch.float64):
        raise SettingsError(f"a rule is measured in float32, but {lens.name} is in {lens.dtype}: load it in float32.")
    if context < 2:
        raise SettingsError(f"context is at least 2, not {context}.")
    found, name = lens.anatomy.tower(tower)[0], tower or lens.anatomy.main
    index = found.layer(layer).index
    part = lens.anatomy.attention(tower, index, "scores")
    if part.cross or found.packed:
        raise UnsupportedError(f"layer {index} of {name!r} attends to another stream, or packs its samples.")
    main = name == lens.anatomy.main and lens.anatomy.embed is not None
    if batch is None and not main:
        raise InputError(f"tower {name!r} reads no plain tokens: give a batch to measure its layers on.")
    if main and (batch is None or "decoder_input_ids" not in batch.inputs):
        start = _seen(lens, lens.prepare(input_ids=random_tokens(lens, 64, 2, seed)), index, tower)
        start = _only(start, start.positions == 0)
    else:
        assert batch is not None
        start = _seen(lens, batch, index, tower)
    fresh = batch is None
    if batch is None:
        batch = lens.prepare(input_ids=random_tokens(lens, 2, context, seed + 1))
    seen = _seen(lens, batch, index, tower)
    where = f"layer {index} of {name!r} in {lens.name}"
    norm, columns = measured.input_of(found.layer(index).module, part.module, start.resid, start.v, where)
    x = start.resid if norm is None else norm(start.resid)
    y, weight, bias = columns(x)
    rep = part.n_heads // part.n_kv_heads
    w_v, b_v = measured.linear(start.v, y, weight, bias, "values", where)
    w_q, b_q, q_gain, eps_q = measured.projected(start.q, y, weight, bias, part.module, "queries", where)
    w_k, b_k, k_gain, eps_k = measured.projected(start.k, y, weight, bias, part.module, "keys", where)
    if (q_gain is None) != (k_gain is None) or eps_q != eps_k:
        raise UnsupportedError(f"{where}: queries and keys are normed in different ways.")
    w_k, b_k, w_v, b_v = (t.repeat_interleave(rep, 0) for t in (w_k, b_k, w_v, b_v))
    k_gain = None if k_gain is None else k_gain.repeat_interleave(rep, 0)
    x = seen.resid if norm is None else norm(seen.resid)
    q, k = (
        normed(torch.einsum("td,hde->the", x, w) + b, gain, eps_q)
        for w, b, gain in ((w_q, b_q, q_gain), (w_k, b_k, k_gain))
    )
    length = int(seen.positions.max()) + 1
    both = torch.cat([q, k], 1), torch.cat([seen.q, seen.k.repeat_interleave(rep, 1)], 1)
    cos, sin, pairing = measured.rotation(*both, seen.positions, length, where)
    scale, softcap, causal, window = _scores(lens, batch, index, tower, where)
    bias_o = part.bias()
    w_o = part.weight().detach()
    rule = AttentionRule(
        model=lens.name, tower=name, layer=index, norm=norm, W_Q=w_q, b_Q=b_q, W_K=w_k, b_K=b_k, W_V=w_v, b_V=b_v,
        W_O=w_o.clone(), b_O=w_o.new_zeros(w_o.shape[-1]) if bias_o is None else bias_o.detach().clone(),
        q_gain=q_gain, k_gain=k_gain, eps=eps_q, cos=cos, sin=sin, pairing=pairing, scale=scale, softcap=softcap,
        causal=causal, window=window, context=length, plain=not part.chain,
        error=float("nan"),
    )  # fmt: skip
    other = random_tokens(lens, 2, length, seed + 2) if fresh else None
    return _proved(rule, lens, batch if other is None else lens.prepare(input_ids=other), tower, where)


def random_tokens(lens: Lens, rows: int, length: int, seed: int) -> Int[Tensor, "rows length"]:
    """Random token ids without special ones, such as those that stand for an image."""
    config: Any = lens.model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = [v for c in (config, text) for n, v in vars(c).items() if n.endswith(("token_id", "token_index"))]
    special = {i for v in named for i in (v if isinstance(v, list) else [v])} | set(picture_ids(config))
    allowed = torch.tensor([i for i in range(lens.vocabulary) if i not in special])
    return allowed[torch.randint(len(allowed), (rows, length), generator=torch.Generator().manual_seed(seed))]


def normed(
    x: Float[Tensor, "*pos head d"], gain: Float[Tensor, "head d"] | None, eps: float
) -> Float[Tensor, "*pos head d"]:
    """Queries or keys over their root mean square, times the gain; as they are without one."""
    return x if gain is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _seen(lens: Lens, batch: Batch, layer: int, tower: str | None) -> _Seen:
    reads = [Read(site, layers=(layer,), tower=tower) for site in ("resid_pre", "q", "k", "v")]
    trace = lens.run(batch, reads)
    resid, q, k, v = (trace[read, layer] for read in reads)
    if q.shape[:2] != resid.shape[:2]:
        raise UnsupportedError(f"layer {layer} rearranges its positions before it attends (windows of an image).")
    real = _real(trace.mask(tower), resid)
    positions = positions_of(real, None, real.shape)
    assert positions is not None
    return _Seen(resid[real], q[real], k[real], v[real], positions[real])


def _real(mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None or mask.shape != x.shape[:2]:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return mask.to(x.device)


def _only(seen: _Seen, rows: Tensor) -> _Seen:
    return _Seen(*(getattr(seen, name)[rows] for name in ("resid", "q", "k", "v", "positions")))


def _scores(
    lens: Lens, batch: Batch, layer: int, tower: str | None, where: str
) -> tuple[float, float | None, bool, int | None]:
    """Scale, soft cap, causality and window."""
    reads = [Read(site, layers=(layer,), tower=tower) for site in ("q", "k", "scores", "pattern")]
    trace = lens.run(batch, reads)
    first = _products(trace, reads, layer)
    s, pattern = trace[reads[2], layer], trace[reads[3], layer]
    real = _real(trace.mask(tower), pattern[:, 0])
    shape = measured.mask(s.isfinite(), (real[:, :, None] & real[:, None, :])[:, None].expand_as(s), where)
    total = pattern.sum(-1).transpose(1, 2)[real]
    if not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise UnsupportedError(f"{where}: its patterns do not sum to one (a sink beside the keys).")
    # A soft cap shows where scores are large.
    factor = max(60 / float(first[1].abs().max()), 1.0)
    larger = edits.splice(lambda q: q * factor, site="q", layers=(layer,), tower=tower)
    rounds = first, _products(lens.run(batch, reads[:3], larger), reads, layer)
    r, s = (torch.cat(t) for t in zip(*rounds, strict=True))
    scale, cap = float((r * s).sum() / r.square().sum()), None
    error = max(float((r * scale - s).abs().max() / s.abs().max()) for r, s in rounds)
    if not error < measured.CLOSE:
        scale, cap = measured.capped(r, s)
        error = max(float((cap * torch.tanh(r * scale / cap) - s).abs().max() / s.abs().max()) for r, s in rounds)
    if not error < measured.CLOSE:
        raise UnsupportedError(
            f"{where}: its scores are neither scale q k nor capped ({error:.1e} away): they have a bias by "
            "distance, or another form."
        )
    return scale, cap, *shape


def _products(trace: Trace, reads: list[Read], layer: int) -> tuple[Tensor, Tensor]:
    """Products of queries and keys and the scores that they make, where these are open, in the first sample."""
    q, k, s = (trace[read, layer][0] for read in reads[:3])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = s.isfinite()
    products = torch.einsum("qhd,khd->hqk", q.double(), k.double())[seen]
    step = -(-len(products) // _PRODUCTS)
    return products[::step], s[seen].double()[::step]


def _proved(rule: AttentionRule, lens: Lens, batch: Batch, tower: str | None, where: str) -> AttentionRule:
    """The rule, if patterns that are made by it are those of the layer."""
    reads = [Read(site, layers=(rule.layer,), tower=tower) for site in ("resid_pre", "pattern")]
    trace = lens.run(batch, reads)
    stream, pattern = (trace[read, rule.layer] for read in reads)
    real = _real(trace.mask(tower), stream)
    x, positions = rule.inputs(stream), positions_of(real, None, real.shape)
    q, k = (
        rotate(
            normed(torch.einsum("bsd,hde->bshe", x, w) + b, gain, rule.eps),
            rule.cos[positions],
            rule.sin[positions],
            rule.pairing,
        ).transpose(1, 2)
        for w, b, gain in ((rule.W_Q, rule.b_Q, rule.q_gain), (rule.W_K, rule.b_K, rule.k_gain))
    )
    options: dict[str, Any] = {"causal": rule.causal, "window": rule.window, "device": x.device, "explicit": True}
    seen = visible(x.shape[1], real=real, **options)
    assert seen is not None
    error = float((pattern_of(q, k, seen, rule.scale, rule.softcap) - pattern).transpose(1, 2)[real].abs().max())
    if not error <= _TOLERANCE:
        raise UnsupportedError(
            f"{where}: patterns made by the rule that was found differ from the layer's by {error:.1e} (tolerance "
            f"{_TOLERANCE:.0e}), so its rule is not one that a Lorsa has."
        )
    return replace(rule, error=error)
