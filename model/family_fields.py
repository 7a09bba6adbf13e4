"""Fields of a `ModelSpec` that several families compute from a config in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.checkpoint.hf_config import RopeSpec
from llmkit.common.errors import InputError
from llmkit.model.spec import LayerSpec, MoeSpec

# From a completed config to the keyword arguments of ModelSpec that differ from Llama.
FamilyFunction = Callable[[Any], dict[str, Any]]

LAYER_TYPES = ("full_attention", "sliding_attention")


def activation(hidden_act: str) -> str:
    """The activation of the MLP by its name in a config."""
    activations = {
        "silu": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu": "gelu",
        "relu2": "relu2",
        "xielu": "xielu",
    }
    if hidden_act not in activations:
        raise InputError(
            f"unsupported activation ({hidden_act})", f"One of {', '.join(activations)}"
        )
    return activations[hidden_act]


def equal_layers(config: Any, window: int | None, is_moe: bool = False) -> tuple[LayerSpec, ...]:
    """Layers that all have the same sliding window."""
    return tuple(LayerSpec(window, is_moe=is_moe) for _ in range(config.num_hidden_layers))


def mixed_layers(
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


def experts(
    config: Any, intermediate_size: int, *, norm_topk_prob: bool = True, **differences: Any
) -> MoeSpec:
    """The mixture of experts of a config. differences: the other fields of `MoeSpec`."""
    return MoeSpec(
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        intermediate_size=intermediate_size,
        norm_topk_prob=norm_topk_prob,
        **differences,
    )


def windows_of_pattern(pattern: int | str, num_layers: int) -> list[bool]:
    """Which layers have a sliding window.

    pattern: the period of the layers without one, which end it; or a text such as "LLLG" that is
    repeated, L for a layer with a window. The last layer of a text's model has none.
    """
    if isinstance(pattern, int):
        return [(index + 1) % pattern != 0 for index in range(num_layers)]
    windows = [pattern[index % len(pattern)] == "L" for index in range(num_layers)]
    return [*windows[:-1], False]


def without_global_rope(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers, of which only those with a sliding window have RoPE."""
    return tuple(
        layer if layer.sliding_window is not None else replace(layer, rope=None) for layer in layers
    )


def ropes_by_layer_type(
    config: Any, layers: Sequence[LayerSpec], rope_theta: Mapping[str, float]
) -> dict[str, Any]:
    """The `layers` and `ropes` of a model whose layer types have rotary embeddings of their own.

    The config has the parameters of each type in `rope_parameters`. Older ones have
    `rope_scaling`, which applies to full attention only. rope_theta: the default of each type.
    """
    scaling = {"full_attention": config.rope_scaling or {}}
    by_layer_type = config.rope_parameters or {}
    if by_layer_type and not by_layer_type.keys() & set(LAYER_TYPES):
        raise InputError(
            f"config.json has rope_parameters for all layers ({', '.join(by_layer_type)})",
            f"Parameters for {' and '.join(LAYER_TYPES)}",
        )
    named = []
    ropes = {}
    for layer in layers:
        name = "full_attention" if layer.sliding_window is None else "sliding_attention"
        named.append(replace(layer, rope=name))
        parameters = (by_layer_type.get(name) or {}) | scaling.get(name, {})
        ropes[name] = rope(config, with_rope_defaults(parameters, rope_theta[name], config))
    return {"layers": tuple(named), "ropes": ropes}


def rope_parameters(config: Any) -> dict[str, Any]:
    """The RoPE parameters of a config that has one rotary embedding.

    They are in `rope_scaling` (older configs) or `rope_parameters`.
    """
    parameters = dict(config.rope_scaling or config.rope_parameters or {})
    return with_rope_defaults(parameters, config.rope_theta, config)


def with_rope_defaults(parameters: dict[str, Any], theta: float, config: Any) -> dict[str, Any]:
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


def rope(config: Any, parameters: dict[str, Any]) -> RopeSpec:
    # rope_frequencies imports torch. Importing this module must not.
    from llmkit.checkpoint.rope_frequencies import rope_spec

    return rope_spec(parameters, config.head_dim, config.max_position_embeddings)
