"""A HookedTransformer (TransformerLens) as a transformers model on the same parameters.

A HookedTransformer writes its attention out and has its own cache, so that nothing of transformers' applies to it. Here
its parameters, which stay where they are, get the forward pass that transformers models have: attention through the
table of attention functions, masks, key/value caches and `generate`. What its configuration asks for and this pass does
not do is refused by name; what is left is run beside the HookedTransformer and compared.

The HookedTransformer's hook points are not run: hooks that change what it computes make the comparison fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from interp.backends.modules import Angles, Block, Embedding, Head, Norm, Positions
from interp.backends.same import check_same
from interp.engine.probe import tokens
from interp.engine.run import device_of
from interp.errors import UnsupportedError

POSITIONS = ("standard", "rotary", "alibi")
_FIRST_ANGLES = 2048
_LONGEST_PROOF = 512


class HookedConfig(PretrainedConfig):
    """A HookedTransformer's sizes under transformers' names."""

    model_type = "hooked_transformer"


def refusal(cfg: Any) -> str | None:
    """What in a HookedTransformer's configuration this back end does not do; None if nothing."""
    wrong = {
        f"positional_embedding_type={cfg.positional_embedding_type!r}": cfg.positional_embedding_type not in POSITIONS,
        f"attention_dir={cfg.attention_dir!r}": cfg.attention_dir != "causal",
        "load_in_4bit=True": cfg.load_in_4bit,
        f"n_devices={cfg.n_devices}": cfg.n_devices > 1,
        "use_logn_attn=True": cfg.use_logn_attn,
        "use_dynamic_ntk_rope=True": cfg.use_dynamic_ntk_rope,
    }
    return next((what for what, is_so in wrong.items() if is_so), None)


def as_transformers(model: Any) -> HookedModel:
    """A transformers model on a HookedTransformer's parameters.

    Args:
        model: a `transformer_lens.HookedTransformer`.

    Raises:
        UnsupportedError: its configuration asks for something that is not done here, or its own logits are others.
    """
    found = refusal(model.cfg)
    if found is not None:
        raise UnsupportedError(
            f"a HookedTransformer with {found} is refused: this back end does not do that. Wrap the transformers model "
            "that it was made from, if there is one."
        )
    twin = HookedModel(config_of(model), model)
    twin.train(model.training)
    window = (model.cfg.window_size or 0) if model.cfg.use_local_attn else 0
    length = min(max(8, window + 2), model.cfg.n_ctx, _LONGEST_PROOF)
    ids = tokens(twin.config, 2, length).to(device_of(twin))
    mask = torch.ones_like(ids)
    mask[0, : min(2, length - 1)] = 0
    check_same(
        lambda: model(ids, attention_mask=mask, prepend_bos=False),
        twin,
        {"input_ids": ids, "attention_mask": mask},
        real=mask.bool(),
        what="HookedTransformer",
        hooks=sum(len(h.fwd_hooks) for h in model.hook_points()),
    )
    return twin


def config_of(model: Any) -> HookedConfig:
    """A HookedTransformer's configuration as transformers has it."""
    cfg, tokenizer = model.cfg, model.tokenizer
    written = cfg.attn_scores_soft_cap > 0 or cfg.use_attention_sinks or cfg.positional_embedding_type == "alibi"
    found: dict[str, Any] = {
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "head_dim": cfg.d_head,
        "max_position_embeddings": cfg.n_ctx,
        "is_decoder": True,
        "tie_word_embeddings": False,
        "name_or_path": cfg.model_name,
        "attn_implementation": "eager" if written else "sdpa",
    }
    if cfg.use_local_attn:
        kinds = {"local": "sliding_attention", "global": "full_attention"}
        found |= {"sliding_window": cfg.window_size, "layer_types": [kinds[k] for k in cfg.attn_types]}
    found |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "pad")}
    return HookedConfig(**found)


class HookedModel(PreTrainedModel, GenerationMixin):
    """The transformers model; its modules hold the HookedTransformer's parameters."""

    config_class = HookedConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: HookedConfig, source: Any) -> None:
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

        super().__init__(config)
        cfg = source.cfg
        behind = cfg.original_architecture in POST_NORM_ARCHITECTURES
        self.embed = Embedding(source.embed)
        self.pos_embed = Positions(source.pos_embed) if cfg.positional_embedding_type == "standard" else None
        blocks = [Block(block, config, i, behind) for i, block in enumerate(source.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = None if cfg.normalization_type is None else Norm(source.ln_final)
        self.unembed = Head(source.unembed)
        self.soft_cap = cfg.output_logits_soft_cap if cfg.output_logits_soft_cap > 0 else None
        self._kinds = [block.attn.kind for block in blocks]
        attention = {kind: source.blocks[i].attn for i, kind in enumerate(self._kinds)}
        rotary = cfg.positional_embedding_type == "rotary"
        self._angles = {kind: _Angles(attn) for kind, attn in attention.items()} if rotary else {}
        alibi = cfg.positional_embedding_type == "alibi"
        self._slopes = source.blocks[0].attn.create_alibi_multipliers(cfg.n_heads) if alibi else None

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.unembed

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits of tokens; padding is counted out of the positions, as TransformerLens does."""
        stream = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        size, length = stream.shape[:2]
        if position_ids is not None:
            positions = position_ids
        elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        else:
            positions = (torch.arange(length, device=stream.device) + seen)[None]
        positions = positions.expand(size, -1)
        masks = self._masks(stream, attention_mask, past_key_values, positions, seen)
        angles = {kind: table(positions, stream) for kind, table in self._angles.items()}
        if self.pos_embed is not None:
            stream = stream + self.pos_embed(positions)
        for block, kind in zip(self.blocks, self._kinds, strict=True):
            stream = block(
                stream,
                attention_mask=masks[kind],
                position_embeddings=angles.get(kind),
                position_ids=positions,
                past_key_values=past_key_values,
            )
        stream = stream[:, -logits_to_keep:] if logits_to_keep else stream
        logits = self.unembed(stream if self.ln_final is None else self.ln_final(stream))
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]

    def _masks(
        self, stream: Tensor, mask: Tensor | None, past: Any, position_ids: Tensor, seen: int
    ) -> Mapping[str, Tensor | None]:
        given = {
            "config": self.config,
            "inputs_embeds": stream,
            "attention_mask": mask,
            "past_key_values": past,
            "position_ids": position_ids,
        }
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks: dict[str, Any] = {kind: make[kind](**given) for kind in set(self._kinds)}
        if self._slopes is None:
            return masks
        keys = torch.arange(seen + stream.shape[1], device=stream.device)
        bias = self._slopes.to(stream)[:, None, None] * (keys - keys[seen:, None]).clamp_max(0)
        return {kind: found + bias.to(found) for kind, found in masks.items()}


class _Angles:
    """Cosines and sines of positions, from TransformerLens's own function; the table grows when it has to."""

    def __init__(self, attn: Any) -> None:
        self.attn, self.table = attn, torch.empty(0)

    def __call__(self, ids: Int[Tensor, "batch pos"], stream: Tensor) -> Angles:
        """[batch, pos, d_rotary] each."""
        needed = int(ids.max()) + 1
        if len(self.table) < needed:
            length = max(needed, min(_FIRST_ANGLES, self.attn.cfg.n_ctx))
            base = self.attn._rotary_base()
            sin, cos = self.attn.calculate_sin_cos_rotary(
                self.attn.cfg.rotary_dim,
                length,
                base=base,
                dtype=torch.promote_types(self.attn.cfg.dtype, torch.float32),
            )
            self.table = torch.stack([cos, sin], 1)
        if self.table.device != ids.device:
            self.table = self.table.to(ids.device)
        cos, sin = self.table[ids].to(stream.dtype).unbind(-2)
        return cos, sin
