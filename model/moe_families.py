"""The families with a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.dense_families import exaone_layers, granite, granite_swa, hunyuan
from llmkit.model.family_fields import (
    FamilyFunction,
    equal_layers,
    experts,
    mixed_layers,
    rope,
    rope_parameters,
    ropes_by_layer_type,
    windows_of_pattern,
    without_global_rope,
)
from llmkit.model.spec import ExpertStack, LayerSpec, MoeSpec


def _mixtral(config: Any) -> dict[str, Any]:
    moe = experts(
        config,
        config.intermediate_size,
        module="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
    )
    return {"layers": equal_layers(config, config.sliding_window, is_moe=True), "moe": moe}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    window = config.sliding_window if config.use_sliding_window else None
    moe = experts(
        config,
        config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
    )
    return {
        "qk_norm": "head",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "layers": qwen_layers(config, equal_layers(config, window)),
        "moe": moe,
    }


def qwen_layers(config: Any, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    is_moe = [
        (index + 1) % config.decoder_sparse_step == 0
        and index not in (config.mlp_only_layers or ())
        and config.num_local_experts > 0
        for index in range(len(layers))
    ]
    return with_experts(layers, is_moe)


def _qwen2_moe(config: Any) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    has_window = [
        config.use_sliding_window and (index + 1) % 2 != 0 and index < config.max_window_layers
        for index in range(num_layers)
    ]
    moe = experts(
        config,
        config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        shared_expert="shared_expert",
        shared_expert_gate="shared_expert_gate",
    )
    layers = mixed_layers(config, has_window, config.sliding_window)
    return {
        "qkv_bias": config.qkv_bias,
        "layers": qwen_layers(config, layers),
        "moe": moe,
    }


def _olmoe(config: Any) -> dict[str, Any]:
    if config.clip_qkv is not None:
        raise InputError("OLMoE with clip_qkv", "A model that does not clip queries and keys")
    moe = experts(
        config,
        config.intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
    )
    return {
        "qk_norm": "full",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "layers": equal_layers(config, None, is_moe=True),
        "moe": moe,
    }


def _flex_olmo(config: Any) -> dict[str, Any]:
    return _olmoe(config) | {"pre_norm": False, "post_norm": True}


def _mellum(config: Any) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    layers = mixed_layers(config, [False] * num_layers, config.sliding_window)
    layers = with_experts(layers, sparse_layers(config, [True] * num_layers))
    rope_theta = {"full_attention": 5e5, "sliding_attention": 1e4}
    moe = experts(
        config,
        config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
    )
    return {
        "qk_norm": "head",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "moe": moe,
        **ropes_by_layer_type(config, layers, rope_theta),
    }


def _glm4_moe(config: Any) -> dict[str, Any]:
    return {
        "qk_norm": "head" if config.use_qk_norm else "none",
        "qkv_bias": config.attention_bias,
        "layers": _dense_first(config, equal_layers(config, None)),
        "moe": sigmoid_router(config),
    }


def _dots1(config: Any) -> dict[str, Any]:
    has_window = [
        config.sliding_window is not None and index >= config.max_window_layers
        for index in range(config.num_hidden_layers)
    ]
    layers = mixed_layers(config, has_window, config.sliding_window)
    return {
        "qk_norm": "head",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "layers": _dense_first(config, layers),
        "moe": sigmoid_router(config),
    }


def _solar_open(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "layers": equal_layers(config, None, is_moe=True),
        "moe": sigmoid_router(config),
    }


def _exaone_moe(config: Any) -> dict[str, Any]:
    layers = exaone_layers(config)
    is_moe = [index >= config.first_k_dense_replace for index in range(len(layers))]
    moe = sigmoid_router(config, config.num_shared_experts)
    return {
        "qk_norm": "head",
        "layers": with_experts(layers, sparse_layers(config, is_moe)),
        "moe": replace(moe, correction_bias="e_score_correction_bias"),
    }


def _minimax_m2(config: Any) -> dict[str, Any]:
    parameters = rope_parameters(config)
    if config.rotary_dim is not None and config.partial_rotary_factor is None:
        parameters = {"partial_rotary_factor": config.rotary_dim / config.head_dim} | {
            name: value
            for name, value in parameters.items()
            if name != "partial_rotary_factor" or value != 1.0
        }
    _check_sigmoid(config)
    moe = experts(
        config,
        config.intermediate_size,
        module="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        scoring="sigmoid",
        correction_bias="e_score_correction_bias",
    )
    return {
        "qk_norm": "full",
        "layers": equal_layers(config, None, is_moe=True),
        "ropes": {"global": rope(config, parameters)},
        "moe": moe,
    }


def _ernie4_5_moe(config: Any) -> dict[str, Any]:
    first = config.moe_layer_start_index
    last = config.moe_layer_end_index
    if last == -1:
        last = config.num_hidden_layers - 1
    is_moe = [
        (index + 1) % config.moe_layer_interval == 0 and first <= index <= last
        for index in range(config.num_hidden_layers)
    ]
    moe = experts(
        config,
        config.moe_intermediate_size,
        correction_bias="moe_statics.e_score_correction_bias",
        correction_bias_shape=(1, config.num_local_experts),
        float32_router=True,
        shared_intermediate_size=config.moe_intermediate_size * config.moe_num_shared_experts,
    )
    return {
        "qkv_bias": config.use_bias,
        "o_proj_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "rope_interleaved": True,
        "layers": with_experts(equal_layers(config, None), is_moe),
        "moe": moe,
    }


def _hunyuan_moe(config: Any) -> dict[str, Any]:
    expert_size = config.moe_intermediate_size or config.intermediate_size
    if expert_size != config.intermediate_size or config.num_shared_expert not in (None, 1):
        raise InputError(
            f"config.json has moe_intermediate_size {expert_size}, intermediate_size"
            f" {config.intermediate_size} and num_shared_expert {config.num_shared_expert}",
            "Equal sizes, and one shared expert",
        )
    moe = experts(
        config,
        config.intermediate_size,
        router="gate.wg",
        float32_router=True,
        shared_intermediate_size=config.intermediate_size,
        shared_expert="shared_mlp",
    )
    return hunyuan(config) | {"layers": equal_layers(config, None, is_moe=True), "moe": moe}


def _hy_v3(config: Any) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    is_moe = sparse_layers(config, [index > 0 for index in range(num_layers)])
    moe = replace(
        sigmoid_router(config, config.num_shared_experts),
        norm_topk_prob=True,
        router="router.gate",
        correction_bias="expert_bias",
        routed_scaling_factor=config.router_scaling_factor,
        shared_expert="shared_mlp",
    )
    return {
        "qk_norm": "head",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "layers": with_experts(equal_layers(config, None), is_moe),
        "moe": moe,
    }


def _afmoe(config: Any) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    has_window = windows_of_pattern(config.global_attn_every_n_layers, num_layers)
    layers = without_global_rope(mixed_layers(config, has_window, config.sliding_window))
    is_moe = [index >= config.num_dense_layers for index in range(num_layers)]
    moe = replace(
        sigmoid_router(config, config.num_shared_experts),
        norm_topk_prob=True,
        router="router.gate",
        correction_bias="expert_bias",
        routed_scaling_factor=config.route_scale,
        float32_router=False,
    )
    return {
        "qk_norm": "head",
        "post_norm": True,
        "attention_gate": "element",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "embedding_multiplier": config.hidden_size**0.5 if config.mup_enabled else 1.0,
        "layers": with_experts(layers, is_moe),
        "moe": moe,
        "module_names": {
            "mlp_norm": "pre_mlp_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
    }


def _gpt_oss(config: Any) -> dict[str, Any]:
    has_window = [index % 2 == 0 for index in range(config.num_hidden_layers)]
    layers = mixed_layers(config, has_window, config.sliding_window)
    if config.swiglu_limit <= 0:
        raise InputError(
            f"config.json has swiglu_limit {config.swiglu_limit}", "A positive number was expected"
        )
    moe = experts(
        config,
        config.intermediate_size,
        expert_stack=ExpertStack(interleaved=True, transposed=True),
        expert_bias=True,
        router="router",
        router_bias=True,
    )
    return {
        "layers": tuple(replace(layer, is_moe=True) for layer in layers),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "attention_sinks": True,
        "activation": "swiglu_clamped",
        "swiglu_limit": config.swiglu_limit,
        "swiglu_alpha": config.swiglu_alpha,
        "moe": moe,
    }


def granite_moe(config: Any) -> dict[str, Any]:
    """Granite with experts in all layers. A `shared_intermediate_size` adds a shared expert."""
    moe = experts(
        config,
        config.intermediate_size,
        module="",
        router="block_sparse_moe.router.layer",
        experts="block_sparse_moe.experts",
        expert_stack=ExpertStack(
            gate_up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
        ),
        shared_intermediate_size=config.shared_intermediate_size,
        shared_expert="shared_mlp",
        shared_gate_up="input_linear",
        shared_down="output_linear",
    )
    return granite(config) | {
        "fused_gate_up": True,  # of the shared expert
        "layers": equal_layers(config, None, is_moe=True),
        "moe": moe,
    }


def _granite_moe_swa(config: Any) -> dict[str, Any]:
    attention = granite_swa(config)
    differences = granite_moe(config)
    moe = replace(
        differences["moe"],
        router="block_sparse_moe.router",
        expert_stack=ExpertStack(
            gate_up="block_sparse_moe.experts.gate_up_proj",
            down="block_sparse_moe.experts.down_proj",
        ),
    )
    layers = tuple(replace(layer, is_moe=True) for layer in attention["layers"])
    return differences | attention | {"layers": layers, "moe": moe}


def _laguna(config: Any) -> dict[str, Any]:
    if config.moe_apply_router_weight_on_input:
        raise InputError(
            "Laguna with moe_apply_router_weight_on_input", "A router that weights outputs"
        )
    num_layers = config.num_hidden_layers
    layers = mixed_layers(config, [False] * num_layers, config.sliding_window)
    is_moe = sparse_layers(config, [index > 0 for index in range(num_layers)])
    heads = config.num_attention_heads_per_layer or [config.num_attention_heads] * num_layers
    if len(heads) != num_layers or any(count % config.num_key_value_heads for count in heads):
        raise InputError(
            f"config.json has the num_attention_heads_per_layer {heads}",
            f"A multiple of {config.num_key_value_heads} for each of {num_layers} layers",
        )
    layers = tuple(
        replace(layer, num_heads=count)
        for layer, count in zip(with_experts(layers, is_moe), heads, strict=True)
    )
    # Full attention rotates half of a head unless the config says otherwise.
    config = copy(config)
    if config.rope_parameters is None:
        config.rope_parameters = {"full_attention": {"partial_rotary_factor": 0.5}}
    rope_theta = {"full_attention": 5e5, "sliding_attention": 1e4}
    moe = experts(
        config,
        config.moe_intermediate_size,
        scoring="sigmoid",
        router_logit_softcapping=config.moe_router_logit_softcapping or None,
        correction_bias="experts.e_score_correction_bias",
        routed_scaling_factor=config.moe_routed_scaling_factor,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        shared_expert="shared_expert",
    )
    return {
        "qk_norm": "head",
        "attention_gate": "head" if config.gating in (True, "per-head") else "element",
        "attention_gate_activation": "softplus",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "moe": moe,
        "module_names": {"attn.gate": "self_attn.g_proj"},
        **ropes_by_layer_type(config, layers, rope_theta),
    }


def sigmoid_router(config: Any, num_shared_experts: int | None = None) -> MoeSpec:
    """The mixture of DeepSeek-V3, which several families have taken over.

    num_shared_experts: None: the config's `n_shared_experts`.
    """
    if num_shared_experts is None:
        num_shared_experts = config.n_shared_experts
    _check_sigmoid(config)
    if config.num_local_experts % config.n_group or config.topk_group > config.n_group:
        raise InputError(
            f"config.json has {config.num_local_experts} experts, n_group {config.n_group}"
            f" and topk_group {config.topk_group}",
            "Groups of equal size, and no more chosen groups than there are",
        )
    return experts(
        config,
        config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        scoring="sigmoid",
        correction_bias="gate.e_score_correction_bias",
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        routed_scaling_factor=config.routed_scaling_factor,
        shared_intermediate_size=config.moe_intermediate_size * num_shared_experts,
        float32_router=True,
    )


def _check_sigmoid(config: Any) -> None:
    """Raises InputError when a config names another router than that of its family.

    "noaux_tc" is DeepSeek-V3's: sigmoid scores and a correction bias.
    """
    for name, allowed in (
        ("scoring_func", ("sigmoid", "noaux_tc")),
        ("topk_method", ("noaux_tc",)),
    ):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise InputError(f"config.json has {name} {value!r}", f"One of {', '.join(allowed)}")


def with_experts(layers: Sequence[LayerSpec], is_moe: Sequence[bool]) -> tuple[LayerSpec, ...]:
    """The layers, some of which have experts in place of one MLP."""
    return tuple(
        replace(layer, is_moe=has_experts)
        for layer, has_experts in zip(layers, is_moe, strict=True)
    )


def _dense_first(config: Any, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Layers of which the first `first_k_dense_replace` have no experts."""
    first = config.first_k_dense_replace
    return with_experts(layers, [index >= first for index in range(len(layers))])


def sparse_layers(config: Any, default: list[bool]) -> list[bool]:
    """Which layers have experts: the config's `mlp_layer_types`, or `default`."""
    layer_types = config.mlp_layer_types
    if layer_types is None:
        return default
    if len(layer_types) != len(default) or not set(layer_types) <= {"dense", "sparse"}:
        distinct = ", ".join(map(str, dict.fromkeys(layer_types)))
        raise InputError(
            f"config.json has the mlp_layer_types {distinct} for {len(layer_types)} layers",
            f"dense or sparse for each of {len(default)} layers",
        )
    return [layer_type == "sparse" for layer_type in layer_types]


# By architecture: its model_type and its function.
MOE_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "GptOssForCausalLM": ("gpt_oss", _gpt_oss),
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
    "Qwen2MoeForCausalLM": ("qwen2_moe", _qwen2_moe),
    "OlmoeForCausalLM": ("olmoe", _olmoe),
    "FlexOlmoForCausalLM": ("flex_olmo", _flex_olmo),
    "MellumForCausalLM": ("mellum", _mellum),
    "Glm4MoeForCausalLM": ("glm4_moe", _glm4_moe),
    "Dots1ForCausalLM": ("dots1", _dots1),
    "SolarOpenForCausalLM": ("solar_open", _solar_open),
    "ExaoneMoEForCausalLM": ("exaone_moe", _exaone_moe),  # in files of the hub
    "ExaoneMoeForCausalLM": ("exaone_moe", _exaone_moe),
    "MiniMaxM2ForCausalLM": ("minimax_m2", _minimax_m2),
    "Ernie4_5_MoeForCausalLM": ("ernie4_5_moe", _ernie4_5_moe),
    "HunYuanMoEV1ForCausalLM": ("hunyuan_v1_moe", _hunyuan_moe),
    "HYV3ForCausalLM": ("hy_v3", _hy_v3),
    "AfmoeForCausalLM": ("afmoe", _afmoe),
    "GraniteMoeForCausalLM": ("granitemoe", granite_moe),
    "GraniteMoeSharedForCausalLM": ("granitemoeshared", granite_moe),
    "GraniteMoeSWAForCausalLM": ("granitemoe_swa", _granite_moe_swa),
    "LagunaForCausalLM": ("laguna", _laguna),
}
