"""A tripwire: configuration fields that could change attention, and how each is known to be covered.

The recomputed attention uses what the attention function is given (rotated queries and keys, mask, scaling, soft-cap,
sinks, bias). A field that could mean something else, a new scaling, cap or sink, must stand in this list; otherwise
`scores` and `pattern` are refused for the model until somebody has looked.
"""

from __future__ import annotations

import re
from typing import Any

_SUSPECT = re.compile(r"attn|attention|soft_?cap|sink|qk_|query_pre|temperature|logit_cap|alibi")

# Sizes, dropout and projections: done before the kernel is called, or not at all during evaluation.
_BEFORE = """
attention_bias attention_dropout attention_heads attention_in_multiplier attention_out_multiplier
attention_probs_dropout_prob attention_k_eq_v attention_hidden_size attn_layer_offset attn_layer_period attn_pdrop
attn_resolutions decoder_attention_heads decoder_num_attention_heads encoder_attention_heads encoder_num_attention_heads
add_cross_attention cross_attention_layers cross_attention_hidden_size cross_attention_frequency cross_attn_all_layers
num_attention_heads num_self_attention_heads self_attn_heads decoder_self_attention_heads decoder_cross_attention_heads
num_ln_in_parallel_attn parallel_attn post_attention_groups qk_head_dim qk_layernorm qk_layer_norms qk_nope_head_dim
qk_rope_head_dim qk_norm_type qk_ln qkv_bias use_attention_bias use_qk_norm use_qkv_bias attn_scale
attn_temperature_tuning attention_downsample_rate positional_encoding_temperature positional_embedding_temperature
speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads attn_config
perceiver_resampler_num_attention_heads perceiver_resampler_attention_head_dim perceiver_resampler_attention_dropout
"""
# In the mask, the scaling, the soft-cap, the sinks or the bias that the kernel is given.
_GIVEN = """
attention_chunk_size attention_multiplier attention_type attention_window attn_type attn_logit_softcapping
full_attn_layers global_attn_every_n_layers global_attn_indexes has_relative_attention_bias has_spatial_attention_bias
local_attention query_pre_attn_scalar relative_attention relative_attention_max_distance
relative_attention_num_buckets scale_attn_by_inverse_layer_idx scale_attn_weights reorder_and_upcast_attn
use_bidirectional_attention
"""
# Of the logits, not of attention.
_ELSEWHERE = """
final_logit_softcapping output_logit_soft_cap contrastive_logits_temperature temperature_init_value temperature
output_attentions
"""
KNOWN = frozenset(f"{_BEFORE} {_GIVEN} {_ELSEWHERE}".split())


def unknown_fields(config: Any) -> list[str]:
    """Fields of a configuration that are set, look like attention, and are not known."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
    return sorted(
        name
        for name, value in values.items()
        if value is not None and value is not False and _SUSPECT.search(name) and name.strip("_") not in KNOWN
    )
