"""Gemma 4: two kinds of attention with sizes of their own, and more beside each layer's input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import activation, experts, mixed_layers, windows_of_pattern
from llmkit.model.spec import ExpertStack, LayerSpec

SLIDING_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
FULL_ROPE = {
    "rope_type": "proportional",
    "partial_rotary_factor": 0.25,
    "rope_theta": 1_000_000.0,
}


def gemma4(config: Any) -> dict[str, Any]:
    """What differs from Llama, from a completed config of a text model."""
    if config.use_bidirectional_attention == "all":
        raise InputError("Gemma 4 with use_bidirectional_attention", "A causal language model")
    layers = _layers(config)
    moe = None
    if config.enable_moe_block:
        for name in ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if getattr(config, name) is None:
                raise InputError(f"config.json has enable_moe_block and no {name}")
        moe = experts(
            config,
            config.moe_intermediate_size,
            module="",
            router="router.proj",
            expert_stack=ExpertStack(),
            parallel_mlp=True,
        )
        layers = tuple(replace(layer, is_moe=True) for layer in layers)
    if config.hidden_size_per_layer_input:
        per_layer_vocab = config.vocab_size_per_layer_input
        if per_layer_vocab != config.vocab_size:
            raise InputError(
                f"config.json has vocab_size {config.vocab_size} and"
                f" vocab_size_per_layer_input {per_layer_vocab}",
                "Equal sizes",
            )
    return {
        "qk_norm": "head",
        "v_norm": True,
        "post_norm": True,
        "activation": activation(config.hidden_activation),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "attention_scale": 1.0,
        "final_logit_softcapping": config.final_logit_softcapping,
        "embedding_multiplier": config.hidden_size**0.5,
        "rounds_embedding_multiplier": True,
        "per_layer_input_size": config.hidden_size_per_layer_input,
        "layer_scalar": True,
        "layers": layers,
        "ropes": _ropes(config),
        "moe": moe,
    }


def _layers(config: Any) -> tuple[LayerSpec, ...]:
    num_layers = config.num_hidden_layers
    has_window = windows_of_pattern(6, num_layers)
    layers = list(mixed_layers(config, has_window, config.sliding_window))
    layers[-1] = replace(layers[-1], sliding_window=None)
    num_kv_heads = config.num_global_key_value_heads if config.attention_k_eq_v else None
    for index, layer in enumerate(layers):
        if layer.sliding_window is None:
            own = (config.per_layer_config or {}).get(str(index), {})
            layers[index] = replace(
                layer,
                rope="full_attention",
                head_dim=own.get("head_dim", config.global_head_dim),
                num_kv_heads=own.get("num_key_value_heads", num_kv_heads),
                k_eq_v=config.attention_k_eq_v,
            )
        else:
            layers[index] = replace(layer, rope="sliding_attention")
    first_shared = num_layers - config.num_kv_shared_layers
    for index in range(first_shared, num_layers):
        window = layers[index].sliding_window
        sources = [i for i in range(first_shared) if layers[i].sliding_window == window]
        if not sources:
            raise InputError(
                f"config.json has {config.num_kv_shared_layers} num_kv_shared_layers, and no layer"
                f" before them is of the type of layer {index}",
                "A layer of each type that has keys and values",
            )
        wide = 2 * config.intermediate_size if config.use_double_wide_mlp else None
        layers[index] = replace(
            layers[index],
            kv_shared_layer_offset=index - sources[-1],
            k_eq_v=False,
            intermediate_size=wide,
        )
    return tuple(layers)


def _ropes(config: Any) -> dict[str, Any]:
    # rope_frequencies imports torch. Importing this module must not.
    from llmkit.checkpoint.rope_frequencies import rope_spec

    given = config.rope_parameters or {}
    full = FULL_ROPE | (given.get("full_attention") or {})
    sliding = SLIDING_ROPE | (given.get("sliding_attention") or {})
    length = config.max_position_embeddings
    heads = (config.per_layer_config or {}).values()
    full_head_dim = next((own["head_dim"] for own in heads if "head_dim" in own), None)
    return {
        "full_attention": rope_spec(full, full_head_dim or config.global_head_dim, length),
        "sliding_attention": rope_spec(sliding, config.head_dim, length),
    }
