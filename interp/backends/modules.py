"""The parts of a HookedTransformer as modules that transformers' attention table and the engine can see.

Each module here stands for one of the HookedTransformer's and holds that module's own dictionary of parameters: nothing
is copied, and a weight that is changed or replaced there is changed here. The formulas are those of TransformerLens;
its hook points are not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Angles = tuple[Tensor, Tensor]


class Twin(nn.Module):
    """A module that has the parameters of another."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._parameters = source._parameters


class Conv1D(nn.Module):
    """`x @ W + b` with parameters that another module holds; W is seen as [d_in, d_out].

    It bears the name of transformers' own module of this layout, by which the layout is known.
    """

    def __init__(self, source: nn.Module, weight: str, bias: str) -> None:
        super().__init__()
        self._source, self._names = (source,), (weight, bias)  # in a tuple: no second registration

    @property
    def weight(self) -> nn.Parameter:
        """The matrix: the parameter, or one that lies on its memory."""
        found = getattr(self._source[0], self._names[0])
        return found if found.ndim == 2 else nn.Parameter(found.detach().flatten(0, -2), found.requires_grad)

    @property
    def bias(self) -> nn.Parameter:
        """The bias [d_out]."""
        return getattr(self._source[0], self._names[1])

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Apply the map."""
        matrix = getattr(self._source[0], self._names[0]).flatten(0, -2)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], -1)


class Embedding(Twin):
    """The token embedding, with a norm behind it where there is one."""

    W_E: nn.Parameter

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.ln = Norm(source.ln) if source.cfg.post_embedding_ln else None

    @property
    def weight(self) -> nn.Parameter:
        """The table [d_vocab, d_model]."""
        return self.W_E

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Look tokens up."""
        found = nn.functional.embedding(tokens, self.W_E)
        return found if self.ln is None else self.ln(found)


class Positions(Twin):
    """Learned positions."""

    W_pos: nn.Parameter

    def forward(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Look positions up."""
        return nn.functional.embedding(ids, self.W_pos)


class Norm(Twin):
    """LayerNorm or RMSNorm, with gain and bias or (folded: `LNPre`, `RMSPre`) without."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.center = type(source).__name__.startswith("LayerNorm")
        self.eps = source.eps

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The normed stream."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.center:
            wide = wide - wide.mean(-1, keepdim=True)
        found = (wide / (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()).to(x.dtype)
        gain, bias = self._parameters.get("w"), self._parameters.get("b")
        found = found if gain is None else found * gain
        return found if bias is None else found + bias


class Head(Twin):
    """The unembedding, seen as an ordinary linear map."""

    W_U: nn.Parameter
    b_U: nn.Parameter

    @property
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """The matrix."""
        return self.W_U.T

    @property
    def bias(self) -> nn.Parameter:
        """The bias [d_vocab]."""
        return self.b_U

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits before a soft cap."""
        return nn.functional.linear(x, self.weight, self.bias)


class MLP(Twin):
    """A plain or gated MLP, with a norm behind its activation where there is one (`solu_ln`)."""

    W_in: nn.Parameter
    W_gate: nn.Parameter
    b_in: nn.Parameter

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.gated = source.cfg.gated_mlp
        self.act: Callable[[Tensor], Tensor] = source.act_fn
        self.ln = Norm(source.ln) if source.cfg.is_layer_norm_activation() else None
        self.out = Conv1D(source, "W_out", "b_out")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the stream."""
        found = self.act(x @ self.W_gate if self.gated else x @ self.W_in + self.b_in)
        if self.ln is not None:
            found = self.ln(found)
        elif self.gated:
            found = found * (x @ self.W_in) + self.b_in
        return self.out(found)


class Attention(Twin):
    """Self-attention through transformers' table of attention functions."""

    is_causal = True
    W_Q: nn.Parameter
    b_Q: nn.Parameter

    def __init__(self, source: Any, config: Any, layer: int) -> None:
        super().__init__(source)
        cfg = source.cfg
        self.config, self.layer_idx = config, layer
        self.grouped = cfg.n_key_value_heads is not None
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.kind = "sliding_attention" if source.attn_type == "local" else "full_attention"
        self.sliding_window = cfg.window_size if source.attn_type == "local" else None
        self.scaling = 1.0 / float(source.attn_scale)
        self.softcap = cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None
        self.clip = cfg.clip_qkv
        self.by_head = bool(cfg.use_qk_norm)  # elsewhere (OLMo 2) one norm goes over all heads together
        self.rotated = cfg.rotary_dim if cfg.positional_embedding_type == "rotary" else 0
        self.pairs = bool(cfg.rotary_adjacent_pairs)
        self.q_norm = None if source.q_norm is None else Norm(source.q_norm)
        self.k_norm = None if source.k_norm is None else Norm(source.k_norm)
        self.out = Conv1D(source, "W_O", "b_O")

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        position_embeddings: Angles | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the heads add to the stream."""
        own = "_" if self.grouped else ""
        q = _normed(_projected(x, self.W_Q, self.b_Q), self.q_norm, self.by_head)
        k = _projected(x, getattr(self, f"{own}W_K"), getattr(self, f"{own}b_K"))
        k = _normed(k, self.k_norm, self.by_head)
        v = _projected(x, getattr(self, f"{own}W_V"), getattr(self, f"{own}b_V"))
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        if position_embeddings is not None:
            q, k = (_rotated(t, *position_embeddings, self.rotated, self.pairs) for t in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"softcap": self.softcap, "s_aux": self._parameters.get("sinks"), **options}
        z, _ = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **{name: value for name, value in options.items() if value is not None},
        )
        return self.out(z.reshape(*x.shape[:-1], -1))


class Block(nn.Module):
    """One layer: norms, attention and MLP in the order that the configuration says."""

    def __init__(self, source: Any, config: Any, layer: int, behind: bool) -> None:
        super().__init__()
        cfg = source.cfg
        self.parallel = cfg.parallel_attn_mlp
        self.attn = Attention(source.attn, config, layer)
        first, second = _norm_of(source, "ln1"), _norm_of(source, "ln2")
        # OLMo 2 and 3 norm what a branch gives instead of what it is given, Gemma 2 both.
        self.before = nn.ModuleList([nn.Identity(), nn.Identity()] if behind else [first, second])
        both = cfg.use_normalization_before_and_after
        after = [first, second] if behind else [_norm_of(source, n if both else "") for n in ("ln1_post", "ln2_post")]
        self.after = nn.ModuleList(after)
        self.mlp: nn.Module | None = None
        if not cfg.attn_only:
            self.mlp = source.mlp if cfg.num_experts else MLP(source.mlp)

    def forward(
        self, hidden_states: Float[Tensor, "batch pos d_model"], **options: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream behind the layer."""
        stream = hidden_states
        attn = self.after[0](self.attn(self.before[0](stream), **options))
        if self.mlp is None:
            return stream + attn
        if self.parallel:
            return stream + attn + self.after[1](self.mlp(self.before[1](stream)))
        stream = stream + attn
        return stream + self.after[1](self.mlp(self.before[1](stream)))


def _norm_of(source: Any, name: str) -> nn.Module:
    found = getattr(source, name, None) if name else None
    return nn.Identity() if found is None or isinstance(found, nn.Identity) else Norm(found)


def _projected(
    x: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, "head d_model d_head"],
    bias: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch head pos d_head"]:
    """Queries, keys or values of every head."""
    flat = x.reshape(-1, x.shape[-1]).expand(len(weight), -1, -1)
    found = torch.baddbmm(bias[:, None], flat, weight)
    return found.unflatten(1, x.shape[:2]).transpose(0, 1)


def _normed(x: Tensor, norm: Norm | None, by_head: bool) -> Float[Tensor, "batch head pos d_head"]:
    if norm is None or by_head:
        return x if norm is None else norm(x)
    return norm(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _rotated(
    x: Float[Tensor, "batch head pos d_head"],
    cos: Float[Tensor, "batch pos d_rotary"],
    sin: Float[Tensor, "batch pos d_rotary"],
    width: int,
    pairs: bool,
) -> Float[Tensor, "batch head pos d_head"]:
    """The first `width` numbers of each head rotated, in adjacent pairs or in halves."""
    turned, rest = x[..., :width], x[..., width:]
    if pairs:
        flipped = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        flipped = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    turned = turned * cos[:, None] + flipped * sin[:, None]
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for soft caps and sinks, which the fused kernel does not know."""
    groups: Any = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink.to(scores)], -1)
    pattern = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    pattern = pattern if s_aux is None else pattern[..., :-1]
    return (pattern @ value).transpose(1, 2).contiguous(), pattern
