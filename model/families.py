"""Makes a `ModelSpec` from a Hugging Face config: a table of families, with a function for each.

A family's function returns only what differs from Llama. To add a family: a function here, its
defaults in checkpoint/hf_config.py, and a parity test against transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmkit.checkpoint.hf_config import FAMILIES, RopeSpec, complete_config
from llmkit.common.errors import InputError
from llmkit.model.spec import LayerSpec, ModelSpec, MoeSpec

# From a completed config to the keyword arguments of ModelSpec that differ from Llama.
FamilyFunction = Callable[[Any], dict[str, Any]]


def model_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a checkpoint's config.json.

    Raises InputError for an unsupported architecture, for a config that needs remote code, and for
    one with values that its family does not allow.
    """
    if "auto_map" in config:
        raise InputError(
            f"config.json has an auto_map ({', '.join(sorted(config['auto_map']))})",
            "A model without remote code: remote code is never run",
            "Remove auto_map if the architecture is one of " + ", ".join(SUPPORTED),
        )
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in SUPPORTED:
        raise InputError(
            f"unsupported architecture ({architecture})", f"One of {', '.join(SUPPORTED)}"
        )
    model_type, family = SUPPORTED[architecture]
    if config.get("model_type") not in FAMILIES:
        raise InputError(
            f"config.json has model_type {config.get('model_type')!r}",
            f"{model_type}, as its architecture says",
        )
    completed = complete_config(config, model_type)
    differences = family(completed)
    values: dict[str, Any] = {
        "hidden_size": completed.hidden_size,
        "num_heads": completed.num_attention_heads,
        "num_kv_heads": completed.num_key_value_heads,
        "head_dim": completed.head_dim,
        "intermediate_size": completed.intermediate_size,
        "vocab_size": completed.vocab_size,
        "max_position_embeddings": completed.max_position_embeddings,
        "rms_norm_eps": completed.rms_norm_eps,
        "tie_word_embeddings": completed.tie_word_embeddings,
        "attention_scale": completed.head_dim**-0.5,
    }
    # These are computed only for families that use them: their config may lack the fields.
    if "layers" not in differences:
        values["layers"] = _equal_layers(completed, None)
    if "ropes" not in differences:
        values["ropes"] = {"global": _rope(completed, _rope_parameters(completed))}
    if "activation" not in differences:
        values["activation"] = _activation(completed.hidden_act)
    spec = ModelSpec(architecture=architecture, **(values | differences))
    if spec.num_heads % spec.num_kv_heads:
        raise InputError(
            f"{spec.num_heads} heads and {spec.num_kv_heads} KV heads",
            "Heads are a multiple of KV heads",
        )
    return spec


def _llama(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config: Any) -> dict[str, Any]:
    return {"layers": _equal_layers(config, config.sliding_window)}


def _qwen2(config: Any) -> dict[str, Any]:
    has_window = [
        config.use_sliding_window and index >= config.max_window_layers
        for index in range(config.num_hidden_layers)
    ]
    window = config.sliding_window if config.use_sliding_window else None
    return {"qkv_bias": True, "layers": _mixed_layers(config, has_window, window)}


def _qwen3(config: Any) -> dict[str, Any]:
    return _qwen2(config) | {
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "qk_norm": "head",
    }


def _phi3(config: Any) -> dict[str, Any]:
    rope_parameters = _rope_parameters(config)
    rope_type = rope_parameters["rope_type"]
    if rope_type not in ("default", "longrope"):
        raise InputError(
            f"unsupported RoPE scaling of Phi-3 ({rope_type})", "One of default, longrope"
        )
    return {
        "fused_checkpoint": True,
        "layers": _equal_layers(config, config.sliding_window),
        "ropes": {"global": _rope(config, rope_parameters)},
    }


def _gemma2(config: Any) -> dict[str, Any]:
    has_window = [index % 2 == 0 for index in range(config.num_hidden_layers)]
    return {
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": _activation(config.hidden_activation),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "embedding_multiplier": config.hidden_size**0.5,
        "layers": _mixed_layers(config, has_window, config.sliding_window),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise InputError("Gemma 3 with use_bidirectional_attention", "A causal language model")
    pattern = config.sliding_window_pattern
    has_window = [(index + 1) % pattern != 0 for index in range(config.num_hidden_layers)]
    layers = []
    for layer in _mixed_layers(config, has_window, config.sliding_window):
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
        ropes[name] = _rope(config, _with_rope_defaults(parameters, rope_theta[name], config))
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
    mixed = _mixed_layers(config, has_window, config.sliding_window)
    layers = tuple(
        LayerSpec(layer.sliding_window, rope="global" if has_rope[index] else None)
        for index, layer in enumerate(mixed)
    )
    return _llama(config) | {"layers": layers}


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
    return {"layers": _equal_layers(config, config.sliding_window, is_moe=True), "moe": moe}


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
        module="mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    )
    return {
        "qk_norm": "head",
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "layers": tuple(layers),
        "moe": moe,
    }


# By architecture: its model_type and its function.
SUPPORTED: dict[str, tuple[str, FamilyFunction]] = {
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
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
}


def _activation(hidden_act: str) -> str:
    activations = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if hidden_act not in activations:
        raise InputError(
            f"unsupported activation ({hidden_act})", f"One of {', '.join(activations)}"
        )
    return activations[hidden_act]


def _equal_layers(config: Any, window: int | None, is_moe: bool = False) -> tuple[LayerSpec, ...]:
    """Layers that all have the same sliding window."""
    return tuple(LayerSpec(window, is_moe=is_moe) for _ in range(config.num_hidden_layers))


def _mixed_layers(
    config: Any, has_window: Sequence[bool], window: int | None
) -> tuple[LayerSpec, ...]:
    """Layers with and without a sliding window.

    The config's `layer_types` decide, or `has_window` (one per layer) for configs without them.
    """
    layer_types = config.layer_types
    if layer_types is not None:
        known = {"full_attention": False, "attention": False, "sliding_attention": True}
        if len(layer_types) != len(has_window) or not known.keys() >= set(layer_types):
            distinct = ", ".join(map(str, dict.fromkeys(layer_types)))
            raise InputError(
                f"config.json has the layer_types {distinct} for {len(layer_types)} layers",
                f"full_attention or sliding_attention for each of {len(has_window)} layers",
            )
        has_window = [known[layer_type] for layer_type in layer_types]
    return tuple(LayerSpec(window if windowed else None) for windowed in has_window)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The RoPE parameters of a config that has one rotary embedding.

    They are in `rope_scaling` (older configs) or `rope_parameters`.
    """
    parameters = dict(config.rope_scaling or config.rope_parameters or {})
    return _with_rope_defaults(parameters, config.rope_theta, config)


def _with_rope_defaults(parameters: dict[str, Any], theta: float, config: Any) -> dict[str, Any]:
    """RoPE parameters, completed with other fields of the config."""
    partial_rotary_factor = config.partial_rotary_factor
    completed = {
        "rope_type": parameters.get("type", "default"),
        "rope_theta": theta,
        "partial_rotary_factor": 1.0 if partial_rotary_factor is None else partial_rotary_factor,
        **parameters,
    }
    if config.original_max_position_embeddings is not None:
        original = config.original_max_position_embeddings
        completed["original_max_position_embeddings"] = original
    return completed


def _rope(config: Any, parameters: dict[str, Any]) -> RopeSpec:
    # rope_frequencies imports torch. Importing this module must not.
    from llmkit.checkpoint.rope_frequencies import rope_spec

    return rope_spec(parameters, config.head_dim, config.max_position_embeddings)
