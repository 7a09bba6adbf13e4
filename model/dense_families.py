"""The families whose layers have one MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import (
    LAYER_TYPES,
    FamilyFunction,
    activation,
    equal_layers,
    mixed_layers,
    rope,
    rope_parameters,
    ropes_by_layer_type,
    windows_of_pattern,
    without_global_rope,
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
    if rope_type == "su":  # its name in the first releases
        rope_type = "longrope"
        parameters = parameters | {"rope_type": rope_type}
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
    if config.use_bidirectional_attention:
        raise InputError("Gemma with use_bidirectional_attention", "A causal language model")
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
        "rounds_embedding_multiplier": True,
        "layers": mixed_layers(config, has_window, config.sliding_window),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    has_window = windows_of_pattern(config.sliding_window_pattern, config.num_hidden_layers)
    rope_theta = {
        "full_attention": config.rope_theta,
        "sliding_attention": config.rope_local_base_freq,
    }
    layers = mixed_layers(config, has_window, config.sliding_window)
    differences = _gemma2(config) | ropes_by_layer_type(config, layers, rope_theta)
    return differences | {"qk_norm": "head"}


def granite(config: Any) -> dict[str, Any]:
    """Granite, dense; the mixture of experts has the same scaling factors."""
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


def _gemma(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise InputError("Gemma with use_bidirectional_attention", "A causal language model")
    # Old configs say "gelu" and mean the approximation.
    hidden_act = "gelu_pytorch_tanh" if config.hidden_act == "gelu" else config.hidden_act
    return {
        "norm_offset": 1.0,
        "activation": activation(hidden_act),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "embedding_multiplier": config.hidden_size**0.5,
        "rounds_embedding_multiplier": True,
    }


def _vaultgemma(config: Any) -> dict[str, Any]:
    return _gemma2(config) | {
        "post_norm": False,
        "module_names": {"mlp_norm": "pre_feedforward_layernorm"},
    }


def _ministral(config: Any) -> dict[str, Any]:
    has_window = [config.sliding_window is not None] * config.num_hidden_layers
    return {"layers": mixed_layers(config, has_window, config.sliding_window)}


def _ministral3(config: Any) -> dict[str, Any]:
    parameters = rope_parameters(config)
    if config.rope_scaling is None and config.rope_parameters is None:
        parameters = parameters | {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    return _mistral(config) | {"ropes": {"global": rope(config, parameters)}}


def _olmo3(config: Any) -> dict[str, Any]:
    layers = mixed_layers(
        config, windows_of_pattern(4, config.num_hidden_layers), config.sliding_window
    )
    rope_theta = dict.fromkeys(LAYER_TYPES, config.rope_theta)
    return _olmo2(config) | ropes_by_layer_type(config, layers, rope_theta)


def _glm(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "fused_gate_up": True, "rope_interleaved": True}


def _glm4(config: Any) -> dict[str, Any]:
    return _glm(config) | {
        "post_norm": True,
        "module_names": {
            "attn_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
    }


def _ernie4_5(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.use_bias,
        "o_proj_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "rope_interleaved": True,
    }


def _helium(config: Any) -> dict[str, Any]:
    return _llama(config) | {"o_proj_bias": False, "rope_interleaved": True}


def _seed_oss(config: Any) -> dict[str, Any]:
    return _llama(config) | {"o_proj_bias": config.attention_out_bias}


def hunyuan(config: Any) -> dict[str, Any]:
    """Hunyuan, dense; the mixture of experts has the same attention."""
    parameters = rope_parameters(config)
    alpha = parameters.get("alpha")
    if parameters["rope_type"] == "dynamic" and alpha:
        # Frequencies that `alpha` changes once and for all, whatever the length.
        exponent = config.head_dim / (config.head_dim - 2)
        theta = parameters["rope_theta"] * alpha**exponent
        parameters = parameters | {"rope_type": "default", "rope_theta": theta}
    return _llama(config) | {
        "qk_norm": "head",
        "norm_after_rope": True,
        "ropes": {"global": rope(config, parameters)},
        "module_names": {
            "attn.q_norm": "self_attn.query_layernorm",
            "attn.k_norm": "self_attn.key_layernorm",
        },
    }


def exaone_layers(config: Any) -> tuple[LayerSpec, ...]:
    """Layers of which those with full attention have no position encoding."""
    has_window = windows_of_pattern(config.sliding_window_pattern or 4, config.num_hidden_layers)
    layers = mixed_layers(config, has_window, config.sliding_window)
    return layers if config.sliding_window is None else without_global_rope(layers)


def _exaone4(config: Any) -> dict[str, Any]:
    layers = exaone_layers(config)
    return {"qk_norm": "head", "pre_norm": False, "post_norm": True, "layers": layers}


def _cohere(config: Any) -> dict[str, Any]:
    return {
        "norm": "layer",
        "qk_norm": "each_head" if config.use_qk_norm else "none",
        "rms_norm_eps": config.layer_norm_eps,
        "parallel_block": True,
        "rope_interleaved": True,
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "logit_scale": config.logit_scale,
    }


def granite_swa(config: Any) -> dict[str, Any]:
    """Granite with sliding windows and sinks; the mixture of experts has the same attention."""
    num_layers = config.num_hidden_layers
    has_window = [index % 4 != 0 for index in range(num_layers)]
    layers = mixed_layers(config, has_window, config.sliding_window)
    parameters = rope_parameters(config)
    thetas = config.layer_rope_theta or [parameters["rope_theta"]] * num_layers
    if len(thetas) != num_layers:
        raise InputError(
            f"config.json has {len(thetas)} layer_rope_theta",
            f"One for each of {num_layers} layers",
        )
    # A theta of 0 stands for a layer without position encoding.
    return granite(config) | {
        "attention_sinks": True,
        "layers": tuple(
            replace(layer, rope=str(theta) if theta else None)
            for layer, theta in zip(layers, thetas, strict=True)
        ),
        "ropes": {
            str(theta): rope(config, parameters | {"rope_theta": theta})
            for theta in dict.fromkeys(thetas)
            if theta
        },
    }


def _cohere2(config: Any) -> dict[str, Any]:
    has_window = windows_of_pattern(config.sliding_window_pattern, config.num_hidden_layers)
    layers = mixed_layers(config, has_window, config.sliding_window)
    return _cohere(config) | {"layers": without_global_rope(layers)}


def _hyperclovax(config: Any) -> dict[str, Any]:
    differences = granite(config) | {
        "attention_scale": config.attention_multiplier or config.head_dim**-0.5,
    }
    if config.use_post_norm:
        differences |= {
            "post_norm": True,
            "module_names": {
                "attn_post_norm": "post_norm1",
                "mlp_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_norm2",
            },
        }
    return differences


def _starcoder2(config: Any) -> dict[str, Any]:
    return {
        "norm": "layer",
        "norm_bias": True,
        "rms_norm_eps": config.norm_epsilon,
        "gated_mlp": False,
        "qkv_bias": config.use_bias,
        "o_proj_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "layers": equal_layers(config, config.sliding_window),
        "module_names": {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    }


def _arcee(config: Any) -> dict[str, Any]:
    return _llama(config) | {"gated_mlp": False}


def _jais2(config: Any) -> dict[str, Any]:
    return _arcee(config) | {
        "norm": "layer",
        "norm_bias": True,
        "rms_norm_eps": config.layer_norm_eps,
    }


def _nemotron(config: Any) -> dict[str, Any]:
    return _arcee(config) | {
        "norm": "layer",
        "norm_bias": True,
        "norm_offset": 1.0,
        "rms_norm_eps": config.norm_eps,
    }


def _stablelm(config: Any) -> dict[str, Any]:
    if config.qk_layernorm:
        raise InputError("StableLM with qk_layernorm", "A model without query and key norms")
    return {
        "norm": "layer",
        "norm_bias": True,
        "rms_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.use_qkv_bias,
        "parallel_block": config.use_parallel_residual,
    }


def _apertus(config: Any) -> dict[str, Any]:
    parameters = rope_parameters(config)
    if config.rope_scaling is None and config.rope_parameters is None:
        parameters = parameters | {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    return {
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "qk_norm": "head",
        "gated_mlp": False,
        "ropes": {"global": rope(config, parameters)},
        "module_names": {"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
    }


# By architecture: its model_type and its function.
DENSE_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "MistralForCausalLM": ("mistral", _mistral),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Phi3ForCausalLM": ("phi3", _phi3),
    "Gemma2ForCausalLM": ("gemma2", _gemma2),
    "Gemma3ForCausalLM": ("gemma3_text", _gemma3),
    "GraniteForCausalLM": ("granite", granite),
    "GraniteSWAForCausalLM": ("granite_swa", granite_swa),
    "Olmo2ForCausalLM": ("olmo2", _olmo2),
    "SmolLM3ForCausalLM": ("smollm3", _smollm3),
    "GemmaForCausalLM": ("gemma", _gemma),
    "VaultGemmaForCausalLM": ("vaultgemma", _vaultgemma),
    "MinistralForCausalLM": ("ministral", _ministral),
    "Ministral3ForCausalLM": ("ministral3", _ministral3),
    "Olmo3ForCausalLM": ("olmo3", _olmo3),
    "GlmForCausalLM": ("glm", _glm),
    "Glm4ForCausalLM": ("glm4", _glm4),
    "Ernie4_5ForCausalLM": ("ernie4_5", _ernie4_5),
    "HeliumForCausalLM": ("helium", _helium),
    "SeedOssForCausalLM": ("seed_oss", _seed_oss),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", hunyuan),
    "Exaone4ForCausalLM": ("exaone4", _exaone4),
    "CohereForCausalLM": ("cohere", _cohere),
    "Cohere2ForCausalLM": ("cohere2", _cohere2),
    "HyperCLOVAXForCausalLM": ("hyperclovax", _hyperclovax),
    "Starcoder2ForCausalLM": ("starcoder2", _starcoder2),
    "ArceeForCausalLM": ("arcee", _arcee),
    "Jais2ForCausalLM": ("jais2", _jais2),
    "NemotronForCausalLM": ("nemotron", _nemotron),
    "StableLmForCausalLM": ("stablelm", _stablelm),
    "ApertusForCausalLM": ("apertus", _apertus),
    "InternLM3ForCausalLM": ("internlm3", _llama),
    "IQuestCoderForCausalLM": ("iquestcoder", _llama),
}
