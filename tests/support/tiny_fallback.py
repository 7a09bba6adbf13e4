"""Tiny random models of transformers for the tests of the fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from support.tiny_families import COMMON

# By model_type: what differs from COMMON. They run by the fallback here even where the table of
# native families knows them.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},  # learned positions
    "gpt_neox": {},  # QKV in one linear, parallel residual
    "opt": {"ffn_dim": 48},  # learned positions with an offset, tied embeddings
    "phi": {},  # partial rotary embedding, biases everywhere
    "stablelm": {},
    "persimmon": {},
    "cwm": {"head_dim": 8, "sliding_window": 12},
    "nanochat": {},  # no weights in its norms, a soft cap of the logits
    "gemma2": {"head_dim": 16, "sliding_window": 12},  # soft caps, windows, scaled embedding
    "gpt_oss": {  # sinks, windows, experts
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
    },
    "aria_text": {"moe_num_experts": 4},  # experts in one tensor of [experts, in, out]
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},  # experts that transformers stacks
    "gemma3n_text": {  # several hidden states side by side, low-rank and per-layer inputs
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "cohere2_moe": {  # parallel block, layers without positions, shared experts
        "head_dim": 16,
        "sliding_window": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {  # latent attention; its keys and values have one size
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def make_oracle(kind: str, path: Path, **differences: Any) -> torch.nn.Module:
    """Save a random model of transformers at `path` and return it."""
    config = transformers.AutoConfig.for_model(kind, **(COMMON | MODELS[kind] | differences))
    torch.manual_seed(0)
    oracle = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    oracle = oracle.float().eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    oracle.save_pretrained(path)
    return oracle
