"""Tiny models whose sizes groups of weights divide, and quantized ones with dense weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_parameter
from support.tiny_models import VOCAB, tiny_checkpoint

WINDOWS = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# By what is particular about it: (model_type, what differs from tiny_models).
PIECES: dict[str, tuple[str, dict[str, Any]]] = {
    "layer norms with bias, ungated MLP": ("starcoder2", {}),
    "norms with offset and bias": ("nemotron", {}),
    "parallel block": (
        "cohere2",
        {"sliding_window": 12, "layer_types": WINDOWS, "tie_word_embeddings": True},
    ),
    "norms before and after, fused gate_up": ("glm4", {}),
    "xIELU": ("apertus", {}),
    "norms after, no positions": ("exaone4", {"sliding_window": 12, "sliding_window_pattern": 2}),
    "attention gate": (
        "afmoe",
        EXPERTS | {"num_dense_layers": 1, "sliding_window": 12, "global_attn_every_n_layers": 2},
    ),
    "groups of experts, shared expert": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "gate of the shared expert": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "bias that chooses experts": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
        },
    ),
    "gated delta net, gate beside each query": (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "projections by key head": (
        "qwen3_next",
        EXPERTS
        | {
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [0],
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "latent attention": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "one block each layer, experts without gate": (
        "nemotron_h",
        {
            "hybrid_override_pattern": "M*E-",
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "short convolutions": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "sizes by layer": (
        "gemma4_text",
        {
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "sliding_window": 12,
            "layer_types": WINDOWS,
        },
    ),
    "shared keys, input of each layer": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 12,
            "layer_types": WINDOWS * 2,
        },
    ),
}


def piece_checkpoint(name: str, path: Path, **config: Any) -> Path:
    """Write the tiny model of a row of PIECES; `config` overrides its fields."""
    kind, differences = PIECES[name]
    return tiny_checkpoint(path, kind, **(differences | config))


def dense_checkpoint(checkpoint: Checkpoint, path: Path) -> Path:
    """Write the dense weights of a quantized checkpoint under the names of its source."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for row in parameters(checkpoint_spec(checkpoint)):
        value = read_parameter(checkpoint, row, torch.float32)
        end = 0
        for source in row.sources:
            start = end
            end += source.shape[0] if source.shape else 1
            part = value[start:end] if value.dim() else value
            if source.shape:
                for first_row, num_rows in source.blocks:
                    pieces.setdefault(source.name, []).append((first_row, part[:num_rows]))
                    part = part[num_rows:]
            else:
                pieces[source.name] = [(0, part)]
    dense = {}
    for name, parts in pieces.items():
        rows = [part for _, part in sorted(parts, key=lambda found: found[0])]
        dense[name] = torch.cat(rows) if rows[0].dim() else rows[0].clone()
    path.mkdir()
    save_file(dense, path / "model.safetensors", {"format": "pt"})
    config = {name: value for name, value in checkpoint.config.items() if "quantiz" not in name}
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return path


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with one file."""
    return load_file(path / "model.safetensors")
