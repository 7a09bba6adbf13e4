"""The fields of config.json that are read, with transformers' default values."""

from __future__ import annotations

from typing import Any

# Required fields of every config.
REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Defaults of every family.
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
# Optional fields of every family: the default is null.
NULLABLE: dict[str, type] = {
    "num_key_value_heads": int,
    "head_dim": int,
    "sliding_window": int,
    "layer_types": list,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "partial_rotary_factor": float,
    "original_max_position_embeddings": int,
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "no_rope_layers": list,
    "mlp_only_layers": list,
    "use_bidirectional_attention": bool,
    "rope_local_base_freq": float,
}
_QWEN_SLIDING_WINDOW = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# The defaults of each model_type. They extend or override the defaults above. A field whose value
# here is a type (int) is required.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN_SLIDING_WINDOW,
    "qwen3": _QWEN_SLIDING_WINDOW | {"head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "granite": {
        "mlp_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
    },
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": int,
        "num_experts_per_tok": int,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_local_experts": int,
        "num_experts_per_tok": int,
        "moe_intermediate_size": int,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
}
