"""The families with multi-head latent attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import FamilyFunction, experts, rope_parameters
from llmkit.model.moe_families import sigmoid_router, sparse_layers
from llmkit.model.spec import LayerSpec, MlaSpec, MoeSpec


def _deepseek_v2(config: Any) -> dict[str, Any]:
    for name, expected in (("moe_layer_freq", 1), ("norm_topk_prob", False)):
        value = getattr(config, name)
        if value != expected:
            raise InputError(
                f"config.json has {name} {value} for DeepSeek V2", f"{expected} was expected"
            )
    if config.scoring_func not in (None, "softmax"):
        raise InputError(f"config.json has scoring_func {config.scoring_func!r}", "softmax")
    is_limited = config.topk_method == "group_limited_greedy"
    if not is_limited and config.topk_method not in ("greedy", None):
        raise InputError(
            f"config.json has topk_method {config.topk_method!r}",
            "greedy or group_limited_greedy",
        )
    moe = replace(
        _softmax_router(config, (config.n_group or 1) if is_limited else 1, config.topk_group or 1),
        norm_topk_prob=False,
        group_score="max",
        float32_router=True,
    )
    return _mla(config) | {
        "rope_interleaved": True,
        "layers": _layers(config, config.first_k_dense_replace),
        "moe": moe,
    }


def _deepseek_v3(config: Any) -> dict[str, Any]:
    return _mla(config) | {
        "rope_interleaved": config.rope_interleave,
        "layers": _layers(config, config.first_k_dense_replace),
        "moe": _sigmoid_router(config),
    }


def _glm4_moe_lite(config: Any) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    is_moe = sparse_layers(config, [index > 0 for index in range(num_layers)])
    return _mla(config) | {
        "rope_interleaved": config.rope_interleave,
        "layers": tuple(LayerSpec(mixer="mla", is_moe=has_experts) for has_experts in is_moe),
        "moe": _sigmoid_router(config),
    }


def _mistral4(config: Any) -> dict[str, Any]:
    moe = replace(
        _softmax_router(config, config.n_group or 1, config.topk_group or 1),
        norm_topk_prob=config.norm_topk_prob,
    )
    return _mla(config) | {
        "rope_interleaved": config.rope_interleave,
        "layers": _layers(config, config.first_k_dense_replace),
        "moe": moe,
    }


def _mla(config: Any) -> dict[str, Any]:
    """The fields that all of these families have."""
    # rope_frequencies imports torch. Importing this module must not.
    from llmkit.checkpoint.rope_frequencies import rope_spec

    mla = MlaSpec(
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
    )
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(mla, name) < 1:
            raise InputError(
                f"config.json has {name} {getattr(mla, name)}", "A positive number was expected"
            )
    if config.attention_bias and mla.q_lora_rank is None:
        raise InputError(
            "config.json has attention_bias true and q_lora_rank null",
            "Biases only where queries have a compressed form, too",
        )
    parameters = rope_parameters(config) | {"partial_rotary_factor": 1.0}
    ropes = {"global": rope_spec(parameters, mla.qk_rope_head_dim, config.max_position_embeddings)}
    return {
        "mla": mla,
        "head_dim": mla.qk_head_dim,
        "num_kv_heads": config.num_attention_heads,
        "ropes": ropes,
        "attention_scale": mla.qk_head_dim**-0.5 * _mscale(parameters) ** 2,
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
    }


def _mscale(parameters: Mapping[str, Any]) -> float:
    """YaRN's factor of queries and keys (`mscale_all_dim`). It multiplies all their dimensions."""
    all_dim = parameters.get("mscale_all_dim")
    factor = parameters.get("factor") or 1.0
    if parameters["rope_type"] == "default" or not all_dim or factor <= 1:
        return 1.0
    scale: float = 0.1 * all_dim * math.log(factor) + 1.0
    return scale


def _layers(config: Any, num_dense: int) -> tuple[LayerSpec, ...]:
    """Layers of which the first `num_dense` have no experts."""
    return tuple(
        LayerSpec(mixer="mla", is_moe=index >= num_dense)
        for index in range(config.num_hidden_layers)
    )


def _sigmoid_router(config: Any) -> MoeSpec:
    """DeepSeek V3's router."""
    config = copy(config)
    config.n_group = config.n_group or 1
    config.topk_group = config.topk_group or 1
    return sigmoid_router(config)


def _softmax_router(config: Any, num_groups: int, topk_groups: int) -> MoeSpec:
    if num_groups < 1 or config.num_local_experts % num_groups or topk_groups > num_groups:
        raise InputError(
            f"config.json has {config.num_local_experts} experts, n_group {num_groups}"
            f" and topk_group {topk_groups}",
            "Groups of equal size, and no more chosen groups than there are",
        )
    return experts(
        config,
        config.moe_intermediate_size,
        num_groups=num_groups,
        topk_groups=topk_groups,
        routed_scaling_factor=config.routed_scaling_factor,
        shared_intermediate_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
    )


# By architecture: its model_type and its function.
MLA_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "DeepseekV2ForCausalLM": ("deepseek_v2", _deepseek_v2),
    "DeepseekV3ForCausalLM": ("deepseek_v3", _deepseek_v3),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", _glm4_moe_lite),
    "Mistral4ForCausalLM": ("mistral4", _mistral4),
}
