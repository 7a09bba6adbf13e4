"""Qwen3-Next and Qwen3.5: gated delta net layers, and full attention every few layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import FamilyFunction, experts
from llmkit.model.moe_families import qwen_layers
from llmkit.model.spec import GatedDeltaNetSpec, LayerSpec, MoeSpec

LAYERS = {
    "linear_attention": LayerSpec(rope=None, mixer="gated_delta_net"),
    "full_attention": LayerSpec(),
}


def _qwen3_next(config: Any) -> dict[str, Any]:
    differences = _qwen3_5(config)
    layers = qwen_layers(config, differences["layers"])
    moe = None
    if any(layer.is_moe for layer in layers):
        moe = _experts(config, config.norm_topk_prob)
    recurrent = replace(differences["recurrent"], fused_projections=True)
    return differences | {"layers": layers, "moe": moe, "recurrent": recurrent}


def _qwen3_5(config: Any) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "qk_norm": "head",
        "attention_gate": "element",
        "fused_q_gate": True,
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "layers": _layers(config),
        "recurrent": _gated_delta_net_spec(config),
    }


def _qwen3_5_moe(config: Any) -> dict[str, Any]:
    differences = _qwen3_5(config)
    layers = tuple(replace(layer, is_moe=True) for layer in differences["layers"])
    return differences | {"layers": layers, "moe": _experts(config, norm_topk_prob=True)}


def _experts(config: Any, norm_topk_prob: bool) -> MoeSpec:
    return experts(
        config,
        config.moe_intermediate_size,
        norm_topk_prob=norm_topk_prob,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        shared_expert="shared_expert",
        shared_expert_gate="shared_expert_gate",
    )


def _layers(config: Any) -> tuple[LayerSpec, ...]:
    types = config.layer_types
    if types is None:
        interval = config.full_attention_interval
        types = [
            "linear_attention" if (index + 1) % interval else "full_attention"
            for index in range(config.num_hidden_layers)
        ]
    if len(types) != config.num_hidden_layers or not LAYERS.keys() >= set(types):
        distinct = ", ".join(map(str, dict.fromkeys(types)))
        raise InputError(
            f"config.json has the layer_types {distinct} for {len(types)} layers",
            f"{' or '.join(LAYERS)} for each of {config.num_hidden_layers} layers",
        )
    return tuple(LAYERS[name] for name in types)


def _gated_delta_net_spec(config: Any) -> GatedDeltaNetSpec:
    spec = GatedDeltaNetSpec(
        num_k_heads=config.linear_num_key_heads,
        num_v_heads=config.linear_num_value_heads,
        head_k_dim=config.linear_key_head_dim,
        head_v_dim=config.linear_value_head_dim,
        conv_kernel_size=config.linear_conv_kernel_dim,
    )
    sizes = (spec.num_k_heads, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim)
    if min(*sizes, spec.conv_kernel_size) < 1 or spec.num_v_heads % spec.num_k_heads:
        raise InputError(
            f"config.json has linear attention with {spec.num_k_heads} key heads of"
            f" {spec.head_k_dim}, {spec.num_v_heads} value heads of {spec.head_v_dim} and"
            f" convolutions of {spec.conv_kernel_size}",
            "Positive numbers, and as many value heads for each key head",
        )
    return spec


# By architecture: its model_type and its function.
QWEN3_NEXT_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "Qwen3NextForCausalLM": ("qwen3_next", _qwen3_next),
    "Qwen3_5ForCausalLM": ("qwen3_5_text", _qwen3_5),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", _qwen3_5_moe),
}
