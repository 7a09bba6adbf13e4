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
NULLABLE: dict[str, type | tuple[type, ...]] = {
    "sliding_window_pattern": (int, str),
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
    "attention_multiplier": float,
    "mlp_layer_types": list,
    "clip_qkv": float,
    "rotary_dim": int,
    "num_global_key_value_heads": int,
    "num_shared_expert": int,
    "scoring_func": str,
    "topk_method": str,
    "num_local_experts": int,
    "num_experts_per_tok": int,
    "moe_intermediate_size": int,
    "per_layer_config": dict,
    "layer_rope_theta": list,
    "num_attention_heads_per_layer": list,
    "n_group": int,
    "topk_group": int,
    "q_lora_rank": int,
    "layers_block_type": list,
    "hybrid_override_pattern": str,
    "attn_layer_indices": list,
    "full_attn_idxs": list,
    "position_embedding_type": str,
    "mamba_d_head": (int, str),
    "time_step_limit": list,
    "moe_latent_size": int,
    "block_ff_dim": int,
    "tie_embedding": bool,
}
# Numbers that configs may have as a list, with one for each layer. Only equal ones are allowed.
MAYBE_LISTS = (
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_expert",
)
# Fields that must be positive in families that have a default for them.
POSITIVE = (
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "global_attn_every_n_layers",
    "decoder_sparse_step",
    "full_attention_interval",
    "moe_layer_interval",
    "n_group",
    "topk_group",
    "num_experts_per_tok",
    "logits_scaling",
    "logit_scale",
    "rms_norm_eps",
)
# Other names of a field.
ALIASES = {
    "num_local_experts": ("num_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_k", "moe_topk", "top_k_experts"),
}
# Those that only one family has: elsewhere the same names are other fields.
FAMILY_ALIASES = {
    "internlm3": {"attention_bias": ("qkv_bias",), "mlp_bias": ("bias",)},
    "nemotron_h": {"head_dim": ("attention_head_dim",)},
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
_HUNYUAN = {
    "rms_norm_eps": 1e-5,
    "mlp_bias": False,
    "use_qk_norm": (True,),
    "use_cla": (False,),
}
_GLM = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_COHERE = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "use_qk_norm": False,
}
_EXPERTS = {"num_local_experts": int, "num_experts_per_tok": int}
_SIGMOID_ROUTER = _EXPERTS | {
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
_MLA = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "head_dim": 64,
}
_DEEPSEEK_V3 = (
    _SIGMOID_ROUTER
    | _MLA
    | {
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "rope_interleave": True,
    }
)
_GRANITE = {
    "mlp_bias": False,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_GRANITE_SWA = _GRANITE | {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "sliding_window": 128,
}
_GRANITE_MOE = _EXPERTS | _GRANITE | {"shared_intermediate_size": 0}
_GATED_DELTA_NET = {
    "hidden_act": ("silu",),  # of the convolution, too
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "attn_output_gate": (True,),
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_MAMBA2_LAYERS = {
    "hidden_act": ("silu",),  # of the convolution, too
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_LFM2 = {
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "conv_L_cache": 3,
    "conv_bias": False,
}
# The defaults of each model_type. They extend or override the defaults above. A field whose value
# here is a type (int) is required. One whose value here is a tuple has one of these values; the
# first is the default.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN_SLIDING_WINDOW,
    "qwen3": _QWEN_SLIDING_WINDOW | {"head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "granite": _GRANITE,
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
    },
    "gpt_oss": {
        "rms_norm_eps": 1e-5,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
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
    "gemma": {
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": 256,
        "num_key_value_heads": 16,
        "tie_word_embeddings": True,
    },
    "vaultgemma": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    "olmo3": {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    "glm": _GLM,
    "glm4": _GLM,
    "ernie4_5": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "use_bias": False,
    },
    "helium": {
        "num_key_value_heads": 20,
        "head_dim": 128,
        "rms_norm_eps": 1e-8,
        "rope_theta": 1e5,
        "mlp_bias": False,
    },
    "seed_oss": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    "hunyuan_v1_dense": _HUNYUAN,
    "exaone4": {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": None,
    },
    "cohere": _COHERE | {"rope_theta": 5e5},
    "cohere2": _COHERE | {"sliding_window": 4096, "sliding_window_pattern": 4},
    "hyperclovax": {
        "mlp_bias": False,
        "attention_multiplier": None,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "use_post_norm": True,
    },
    "starcoder2": {
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": True,
    },
    "arcee": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "mlp_bias": False},
    "jais2": {
        "hidden_act": "relu2",
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "nemotron": {
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "mlp_bias": False,
        "partial_rotary_factor": 0.5,
    },
    "stablelm": {
        "num_key_value_heads": 32,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    "apertus": {
        "hidden_act": ("xielu",),
        "rms_norm_eps": 1e-5,
        "rope_theta": 12e6,
        "qk_norm": (True,),
        "post_norm": (False,),
    },
    "internlm3": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "mlp_bias": False,
    },
    "iquestcoder": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "mlp_bias": False,
    },
    "qwen2_moe": _QWEN_SLIDING_WINDOW
    | _EXPERTS
    | {
        "num_key_value_heads": 16,
        "shared_expert_intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
    },
    "olmoe": _EXPERTS | {"rms_norm_eps": 1e-5, "norm_topk_prob": False},
    "flex_olmo": _EXPERTS | {"rope_theta": 5e5, "norm_topk_prob": False},
    "mellum": _EXPERTS
    | {
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 1024,
        "moe_intermediate_size": 896,
        "norm_topk_prob": True,
    },
    "glm4_moe": _SIGMOID_ROUTER
    | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,
    },
    "dots1": _SIGMOID_ROUTER
    | {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "n_shared_experts": int,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    "solar_open": _SIGMOID_ROUTER
    | {
        "intermediate_size": 10240,  # no layer uses it
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "moe_intermediate_size": 1280,
        "n_shared_experts": 1,
    },
    "exaone_moe": _SIGMOID_ROUTER
    | {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": None,
        "moe_intermediate_size": 1024,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
    },
    "minimax_m2": _EXPERTS
    | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5e6,
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
    },
    "ernie4_5_moe": _EXPERTS
    | {
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    "hunyuan_v1_moe": _EXPERTS | _HUNYUAN,
    "hy_v3": _SIGMOID_ROUTER
    | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11158840.0,
        "mlp_bias": False,
        "moe_intermediate_size": 1536,
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
    },
    "afmoe": _SIGMOID_ROUTER
    | {
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": 1024,
        "num_dense_layers": 1,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "global_attn_every_n_layers": 4,
        "mup_enabled": False,
        "score_func": ("sigmoid",),
        "route_norm": (True,),
    },
    "gemma4_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": 512,
        "use_bidirectional_attention": "",  # "vision": between the tokens of an image
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    },
    "granite_swa": _GRANITE_SWA,
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "granitemoe_swa": _GRANITE_MOE | {"sliding_window": 128},
    "laguna": _EXPERTS
    | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5e5,  # of full attention
        "sliding_window": 512,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "gating": (True, "per-head", "per-element"),
        "moe_routed_scaling_factor": 1.0,
        "moe_apply_router_weight_on_input": False,
        "moe_router_logit_softcapping": 0.0,
    },
    "qwen3_next": _GATED_DELTA_NET
    | _EXPERTS
    | {
        "num_key_value_heads": 2,
        "num_local_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "qwen3_5_text": _GATED_DELTA_NET | {"num_key_value_heads": 4},
    "qwen3_5_moe_text": _GATED_DELTA_NET
    | _EXPERTS
    | {
        "intermediate_size": 512,  # no layer uses it
        "num_key_value_heads": 2,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    "deepseek_v2": _EXPERTS
    | _MLA
    | {
        "moe_intermediate_size": 1407,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "topk_method": "greedy",
        "mlp_bias": (False,),
    },
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe_lite": _SIGMOID_ROUTER
    | _MLA
    | {
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1536,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "n_shared_experts": 1,
        "rope_interleave": True,
    },
    "mistral4": _EXPERTS
    | _MLA
    | {
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 256,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "head_dim": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "rope_interleave": True,
    },
    "mamba2": {
        # It has no such sizes. Its memory does not depend on the number of tokens.
        "intermediate_size": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 2**18,
        "head_dim": 64,
        "num_heads": 128,
        "state_size": 128,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "n_groups": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": ("silu",),
    },
    "nemotron_h": {
        "num_hidden_layers": 4,  # the list of layers says how many there are
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "mamba_hidden_act": ("silu",),
        "n_groups": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": (1,),
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    "bamba": _MAMBA2_LAYERS
    | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "mlp_bias": False,
        "partial_rotary_factor": 0.5,
    },
    "granitemoehybrid": _MAMBA2_LAYERS | _GRANITE | {"shared_intermediate_size": 1024},
    "lfm2": _LFM2
    | {
        "intermediate_size": 12288,  # `block_ff_dim` of the first releases has its place
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": _LFM2
    | {
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    },
}
