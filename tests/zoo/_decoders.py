"""Causal language models, attention-based, state-space and hybrid."""

from __future__ import annotations

from typing import Any

import transformers

from ._entry import GQA, TEXT, Entry, Kind, builder, text_inputs
from ._tokenizer import tokenizer

_SLIDE4 = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {
    "vocab_size": TEXT["vocab_size"], "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_WINDOW = GQA | {"num_hidden_layers": 4, "layer_types": _SLIDE4, "sliding_window": 4}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}

# name -> (config class, model class, config arguments)
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT2 | {"rotary_dim": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA),
    "mistral": ("MistralConfig", "MistralForCausalLM", GQA | {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GQA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GQA | {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", GQA | _MOE | {"num_experts": 4, "head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GQA | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _WINDOW | _GEMMA | {"attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _WINDOW | _GEMMA),
    "phi": ("PhiConfig", "PhiForCausalLM", TEXT),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GQA | {"sliding_window": 4}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", GQA | {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GQA),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", _WINDOW),
    "cohere": ("CohereConfig", "CohereForCausalLM", GQA | {"use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", _WINDOW | {"logit_scale": 0.5}),
    "stablelm": (
        "StableLmConfig", "StableLmForCausalLM",
        GQA | {"qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True},
    ),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", GQA | {"sliding_window": 4}),
    "granite": (
        "GraniteConfig", "GraniteForCausalLM",
        GQA | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
               "logits_scaling": 2.0},
    ),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", GQA | {"head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        TEXT | _MOE | {
            "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
            "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 12,
        },
    ),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        _WINDOW | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", "BloomForCausalLM", TEXT | {"n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", "FalconForCausalLM", TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama4": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        GQA | {
            "num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2,
            "attention_chunk_size": 4, "floor_scale": 4,
        },
    ),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", GQA | {"head_dim": 8}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GQA | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", _WINDOW),
    "mamba": (
        "MambaConfig", "MambaForCausalLM",
        {"vocab_size": TEXT["vocab_size"], "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    ),
    "mamba2": (
        "Mamba2Config", "Mamba2ForCausalLM",
        {"vocab_size": TEXT["vocab_size"], "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 4,
         "head_dim": 16, "n_groups": 2, "chunk_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen3_next": (
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        GQA | _MOE | {
            "num_hidden_layers": 4, "head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 24,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        },
    ),
    "jamba": (
        "JambaConfig", "JambaForCausalLM",
        GQA | {
            "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "falcon_h1": (
        "FalconH1Config", "FalconH1ForCausalLM",
        GQA | {
            "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
            "mamba_d_state": 8, "mamba_chunk_size": 4, "attention_out_multiplier": 0.7, "ssm_out_multiplier": 1.3,
        },
    ),
}  # fmt: skip
_SSM = {"mamba", "mamba2"}
_NO_SDPA = {"gptj", "gemma2", "gpt_oss", "bloom"} | _SSM
_NO_INTERFACE = {"gptj", "bloom", "falcon"} | _SSM


def _entry(name: str) -> Entry:
    config, model, kwargs = _TABLE[name]
    kind: Kind = "ssm" if name in _SSM else "decoder"
    return Entry(
        name=name,
        kind=kind,
        build=builder(model, lambda: getattr(transformers, config)(**kwargs)),
        inputs=text_inputs,
        processor=tokenizer,
        sdpa=name not in _NO_SDPA,
        interface=name not in _NO_INTERFACE,
    )


ENTRIES: list[Entry] = [_entry(name) for name in _TABLE]
