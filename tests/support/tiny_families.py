"""A tiny random model of every family, as transformers makes and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
GEMMA_LAYERS = ["sliding_attention", "full_attention"] * 2
MAMBA2_LAYERS = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2}
NEMOTRON_H = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
}
GATED_DELTA_NET = {
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
MLA_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
# name: (model_type, what differs from COMMON)
FAMILIES = {
    "llama": ("llama", {}),
    "llama-mha-bias-tied": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 12, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": 50},
    ),
    "phi3-partial": (
        "phi3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "gemma": ("gemma", {"head_dim": 16}),
    "vaultgemma": (
        "vaultgemma",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
        },
    ),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 12, "layer_types": GEMMA_LAYERS}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": 12,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "ernie4.5": ("ernie4_5", {"head_dim": 16}),
    "ernie4.5-bias": ("ernie4_5", {"head_dim": 8, "use_bias": True}),
    "helium": ("helium", {"head_dim": 8}),
    "seed-oss": ("seed_oss", {"head_dim": 16}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "alpha": 100.0,
                "factor": 1.0,
            },
        },
    ),
    "exaone4": ("exaone4", {"sliding_window": 12, "sliding_window_pattern": 2}),
    "exaone4-global": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {"sliding_window": 12, "layer_types": GEMMA_LAYERS}),
    "hyperclovax": (
        "hyperclovax",
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4},
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 12}),
    "arcee": ("arcee", {}),
    "jais2": ("jais2", {}),
    "nemotron": ("nemotron", {"head_dim": 16}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "apertus": ("apertus", {}),
    "internlm3": ("internlm3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("iquestcoder", {"head_dim": 16}),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "swiglu_limit": 0.7,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-normalized": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "flex-olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "mellum": (
        "mellum",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "head_dim": 16,
        },
    ),
    "dots1": (
        "dots1",
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "sliding_window": 12,
            "max_window_layers": 2,
            "head_dim": 16,
        },
    ),
    "solar-open": (
        "solar_open",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
        },
    ),
    "exaone-moe": (
        "exaone_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "sliding_window": 12,
            "sliding_window_pattern": 2,
        },
    ),
    "minimax-m2": (
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "rotary_dim": 8,
        },
    ),
    "ernie4.5-moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
        },
    ),
    "hunyuan-moe": (
        "hunyuan_v1_moe",
        {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    ),
    "hy3": (
        "hy_v3",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
        },
    ),
    "afmoe": (
        "afmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "sliding_window": 12,
            "global_attn_every_n_layers": 2,
            "route_scale": 1.5,
            "mup_enabled": True,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma4-moe": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "gemma4-dense": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        MLA
        | {
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "rope_parameters": MLA_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        MLA
        | {
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        MLA
        | {
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": MLA_YARN,
        },
    ),
    "kimi-k2": (
        "deepseek_v3",
        MLA
        | {
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.827,
            "rope_parameters": MLA_YARN,
        },
    ),
    "glm4-moe-lite": ("glm4_moe_lite", MLA | {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "mistral4": (
        "mistral4",
        MLA | {"rope_parameters": MLA_YARN | {"llama_4_scaling_beta": 0.1}},
    ),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "granite-swa": (
        "granite_swa",
        {
            "sliding_window": 12,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "layer_rope_theta": [0, 10000.0, 500.0, 10000.0],
        },
    ),
    "granite-moe": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2},
    ),
    "granite-moe-shared": (
        "granitemoeshared",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    ),
    "granite-moe-swa": (
        "granitemoe_swa",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    ),
    "laguna": (
        "laguna",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": GEMMA_LAYERS,
            "num_attention_heads_per_layer": [4, 8, 4, 4],
            "moe_routed_scaling_factor": 1.5,
            "moe_router_logit_softcapping": 3.0,
        },
    ),
    "laguna-elements": (
        "laguna",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "head_dim": 16,
            "gating": "per-element",
        },
    ),
    "qwen3-next": ("qwen3_next", GATED_DELTA_NET | SHARED_EXPERT | {"mlp_only_layers": [1]}),
    "qwen3.5": ("qwen3_5_text", GATED_DELTA_NET | {"attention_bias": True}),
    "qwen3.5-moe": ("qwen3_5_moe_text", GATED_DELTA_NET | SHARED_EXPERT),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2}),
    "mamba2-tied": (
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 12,
            "n_groups": 1,
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_limit": (0.01, 0.5),
            "tie_word_embeddings": True,
        },
    ),
    "nemotron-h": ("nemotron_h", NEMOTRON_H | {"hybrid_override_pattern": "M-*M-"}),
    "nemotron-3": (
        "nemotron_h",
        NEMOTRON_H
        | {
            "hybrid_override_pattern": "MEM*EM",
            "n_groups": 1,  # that ranks share
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 1.5,
        },
    ),
    "nemotron-3-latent": (
        "nemotron_h",
        NEMOTRON_H
        | {
            "hybrid_override_pattern": "ME*E",
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 16,
        },
    ),
    "bamba": ("bamba", MAMBA2_LAYERS | {"attn_layer_indices": [1, 3]}),
    "granite-hybrid": (
        "granitemoehybrid",
        MAMBA2_LAYERS
        | {
            "mamba_n_groups": 1,
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite-hybrid-moe": (
        "granitemoehybrid",
        MAMBA2_LAYERS
        | {
            "mamba_n_groups": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "position_embedding_type": "rope",
        },
    ),
    "lfm2": (
        "lfm2",
        {
            "layer_types": ["conv", "full_attention", "conv", "conv"],
            "block_multiple_of": 16,
        },
    ),
    "lfm2-bias": (
        "lfm2",
        {
            "full_attn_idxs": [1, 3],
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2-moe": (
        "lfm2_moe",
        {
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
        },
    ),
}

# Families that show everything the engine does: each kind of attention, position, norm, embedding,
# MLP and router at least once. `make test` runs the others in fewer modes than these.
REPRESENTATIVES = (
    "llama",
    "llama-mha-bias-tied",
    "qwen2-window",
    "phi3-longrope",
    "gemma3",
    "granite",
    "olmo2",
    "smollm3",
    "mixtral",
    "ministral3",
    "glm4",
    "hunyuan",
    "cohere2",
    "starcoder2",
    "apertus",
    "glm4-moe",
    "qwen2-moe",
    "ernie4.5-moe",
    "afmoe",
    "gemma4",
    "gemma4-moe",
    "gpt-oss",
    "laguna",
    "deepseek-v3",
    "mamba2",
    "nemotron-3",
    "lfm2-moe",
    "qwen3-next",
)
# Those whose layers keep recurrent states, and those with latent attention.
STATE_FAMILIES = (
    "qwen3-next",
    "qwen3.5",
    "qwen3.5-moe",
    "mamba2",
    "mamba2-tied",
    "nemotron-h",
    "nemotron-3",
    "nemotron-3-latent",
    "granite-hybrid",
    "granite-hybrid-moe",
    "bamba",
    "lfm2",
    "lfm2-bias",
    "lfm2-moe",
)
LATENT_FAMILIES = (
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v3",
    "kimi-k2",
    "glm4-moe-lite",
    "mistral4",
)


def family_oracle(name: str, path: Path, **changes: Any) -> torch.nn.Module:
    """Make the model of a row of FAMILIES, save it as a checkpoint at `path` and return it.

    changes: values of its config that differ from the row.
    """
    kind, differences = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **(COMMON | differences | changes))
    if kind == "mistral4":  # it is only known as the text model of multimodal models
        own = transformers.models.mistral4.modeling_mistral4.Mistral4ForCausalLM
        transformers.AutoModelForCausalLM.register(type(config), own, exist_ok=True)
    torch.manual_seed(0)
    oracle = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .float()
        .eval()
    )
    if kind == "nemotron_h":  # transformers 5.23 reads `time_step_min` in its place
        for module in oracle.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = tuple(config.time_step_limit)
    with torch.no_grad():
        for parameter in oracle.parameters():  # norms and biases too, which start as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
        names = dict(oracle.named_parameters())
        for name, buffer in oracle.state_dict().items():  # the biases that choose experts
            if name not in names:
                buffer.add_(torch.randn_like(buffer) * 0.1)
    oracle.save_pretrained(path)
    return oracle


def oracle_logits(oracle: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocab] of one sequence of token ids [n]."""
    with torch.inference_mode():
        return oracle(tokens[None], use_cache=False).logits[0].float()
