"""The families whose layers have one MLP."""

from __future__ import annotations

from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import (
    FamilyFunction,
    activation,
    equal_layers,
    mixed_layers,
    rope,
    rope_parameters,
    with_rope_defaults,
)
from llmkit.model.spec import LayerSpec


def _llama(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config: Any) -> dict[str, Any]:
    return {"layers": equal_layers(config, config.sliding_window)}


def _qwen2(config: Any) -> dict[str, Any]:
    has_window = [
        config.use_sliding_window and index >= config.max_window_layers
        for index in range(config.num_hidden_layers)
    ]
    window = config.sliding_window if config.use_sliding_window else None
    return {"qkv_bias": True, "layers": mixed_layers(config, has_window, window)}


def _qwen3(config: Any) -> dict[str, Any]:
    return _qwen2(config) | {
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "qk_norm": "head",
    }


def _phi3(config: Any) -> dict[str, Any]:
    parameters = rope_parameters(config)
    rope_type = parameters["rope_type"]
    if rope_type not in ("default", "longrope"):
        raise InputError(
            f"unsupported RoPE scaling of Phi-3 ({rope_type})", "One of default, longrope"
        )
    return {
        "fused_qkv": True,
        "fused_gate_up": True,
        "layers": equal_layers(config, config.sliding_window),
        "ropes": {"global": rope(config, parameters)},
    }


def _gemma2(config: Any) -> dict[str, Any]:
    has_window = [index % 2 == 0 for index in range(config.num_hidden_layers)]
    return {
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": activation(config.hidden_activation),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "embedding_multiplier": config.hidden_size**0.5,
        "layers": mixed_layers(config, has_window, config.sliding_window),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise InputError("Gemma 3 with use_bidirectional_attention", "A causal language model")
    pattern = config.sliding_window_pattern
    has_window = [(index + 1) % pattern != 0 for index in range(config.num_hidden_layers)]
    layers = []
    for layer in mixed_layers(config, has_window, config.sliding_window):
        layer_type = "full_attention" if layer.sliding_window is None else "sliding_attention"
        layers.append(LayerSpec(layer.sliding_window, rope=layer_type))
    # Each layer type has its own rotary embedding. Scaling applies to full attention only.
    rope_theta = {
        "full_attention": config.rope_theta,
        "sliding_attention": config.rope_local_base_freq,
    }
    rope_scaling = {"full_attention": config.rope_scaling or {}}
    by_layer_type = config.rope_parameters or {}
    ropes = {}
    for name in dict.fromkeys(layer.rope for layer in layers if layer.rope is not None):
        parameters = (by_layer_type.get(name) or {}) | rope_scaling.get(name, {})
        ropes[name] = rope(config, with_rope_defaults(parameters, rope_theta[name], config))
    return _gemma2(config) | {"qk_norm": "head", "layers": tuple(layers), "ropes": ropes}


def _granite(config: Any) -> dict[str, Any]:
    return _llama(config) | {
        "attention_scale": config.attention_multiplier,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    }


def _olmo2(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "qk_norm": "full",
        "pre_norm": False,
        "post_norm": True,
    }


def _smollm3(config: Any) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    # Despite its name, `no_rope_layers` is 1 for layers with RoPE.
    has_rope = config.no_rope_layers or [
        (index + 1) % config.no_rope_layer_interval for index in range(num_layers)
    ]
    if len(has_rope) < num_layers:
        raise InputError(
            f"config.json has {len(has_rope)} no_rope_layers",
            f"One for each of {num_layers} layers",
        )
    has_window = [config.use_sliding_window and not has_rope[index] for index in range(num_layers)]
    mixed = mixed_layers(config, has_window, config.sliding_window)
    layers = tuple(
        LayerSpec(layer.sliding_window, rope="global" if has_rope[index] else None)
        for index, layer in enumerate(mixed)
    )
    return _llama(config) | {"layers": layers}


# By architecture: its model_type and its function.
DENSE_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "MistralForCausalLM": ("mistral", _mistral),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Phi3ForCausalLM": ("phi3", _phi3),
    "Gemma2ForCausalLM": ("gemma2", _gemma2),
    "Gemma3ForCausalLM": ("gemma3_text", _gemma3),
    "GraniteForCausalLM": ("granite", _granite),
    "Olmo2ForCausalLM": ("olmo2", _olmo2),
    "SmolLM3ForCausalLM": ("smollm3", _smollm3),
}
