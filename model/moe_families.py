"""The families with a mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import FamilyFunction, equal_layers, mixed_layers
from llmkit.model.spec import ExpertStack, LayerSpec, MoeSpec


def _mixtral(config: Any) -> dict[str, Any]:
    moe = MoeSpec(
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        norm_topk_prob=True,
        module="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )
    return {"layers": equal_layers(config, config.sliding_window, is_moe=True), "moe": moe}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    window = config.sliding_window if config.use_sliding_window else None
    layers = []
    for index in range(config.num_hidden_layers):
        is_sparse_step = (index + 1) % config.decoder_sparse_step == 0
        is_mlp_only = index in (config.mlp_only_layers or ())
        is_moe = is_sparse_step and not is_mlp_only and config.num_local_experts > 0
        layers.append(LayerSpec(window, is_moe=is_moe))
    moe = MoeSpec(
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
    )
    return {
        "qk_norm": "head",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "layers": tuple(layers),
        "moe": moe,
    }


def _gpt_oss(config: Any) -> dict[str, Any]:
    has_window = [index % 2 == 0 for index in range(config.num_hidden_layers)]
    layers = mixed_layers(config, has_window, config.sliding_window)
    if config.swiglu_limit <= 0:
        raise InputError(
            f"config.json has swiglu_limit {config.swiglu_limit}", "A positive number was expected"
        )
    moe = MoeSpec(
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        norm_topk_prob=True,
        expert_stack=ExpertStack(interleaved=True, transposed=True),
        router="router",
        router_bias=True,
    )
    return {
        "layers": tuple(replace(layer, is_moe=True) for layer in layers),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "mlp_bias": True,
        "attention_sinks": True,
        "activation": "swiglu_clamped",
        "swiglu_limit": config.swiglu_limit,
        "swiglu_alpha": config.swiglu_alpha,
        "moe": moe,
    }


# By architecture: its model_type and its function.
MOE_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "GptOssForCausalLM": ("gpt_oss", _gpt_oss),
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
}
