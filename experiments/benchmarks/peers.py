"""The model of a benchmark as TransformerLens has it."""

from __future__ import annotations

import copy
from typing import Any

import interp


def hooked_transformer(lens: interp.Lens, device: str = "cpu") -> Any:
    """A HookedTransformer with the weights of a Llama model."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    c: Any = lens.model.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=2048,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        eps=c.rms_norm_eps,
        original_architecture="LlamaForCausalLM",
        device=device,
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_llama_weights(lens.model, config), strict=False)
    model.set_tokenizer(copy.deepcopy(lens.processor))
    return model
