"""The families with Mamba 2 layers or short convolutions, most of them beside attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.common.errors import InputError
from llmkit.model.family_fields import FamilyFunction, activation, experts
from llmkit.model.moe_families import granite_moe, sigmoid_router, with_experts
from llmkit.model.parameter import MODULES
from llmkit.model.spec import LayerSpec, Mamba2Spec, MoeSpec, ShortConvSpec

MAMBA = LayerSpec(rope=None, mixer="mamba2")
SHORT_CONV = LayerSpec(rope=None, mixer="short_conv")
ATTENTION = LayerSpec()
# The layers of Nemotron-H have one block each.
NEMOTRON_H_LAYERS = {
    "linear_attention": LayerSpec(rope=None, mixer="mamba2", has_mlp=False),
    "full_attention": LayerSpec(rope=None, has_mlp=False),
    "mlp": LayerSpec(rope=None, mixer="none"),
    "moe": LayerSpec(rope=None, mixer="none", is_moe=True),
}
# The modules of Mamba 2 layers where the block of a layer is named "mixer".
MIXER_NAMES = {
    module: name.replace("mamba.", "mixer.", 1)
    for module, name in MODULES.items()
    if module.startswith("mamba.")
}
PATTERN_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLD_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


def _mamba2(config: Any) -> dict[str, Any]:
    num_heads, head_dim = _heads_of(config, config.num_heads, config.expand, config.head_dim)
    layer = replace(MAMBA, has_mlp=False)
    return {
        "layers": (layer,) * config.num_hidden_layers,
        "ropes": {},
        "rms_norm_eps": config.layer_norm_epsilon,
        # Those of the recurrent layers: there are no others.
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "intermediate_size": 0,
        "recurrent": _mamba2_spec(
            config,
            num_heads,
            head_dim,
            n_groups=config.n_groups,
            state_size=config.state_size,
            conv_kernel_size=config.conv_kernel,
            conv_bias=config.use_conv_bias,
            proj_bias=config.use_bias,
        ),
        "tensor_prefix": "backbone",
        "module_names": {
            "embed": "embeddings",
            "norm": "norm_f",
            "attn_norm": "norm",
            **MIXER_NAMES,
        },
    }


def _nemotron_h(config: Any) -> dict[str, Any]:
    layers = tuple(NEMOTRON_H_LAYERS[name] for name in _nemotron_h_layer_types(config))
    recurrent = _mamba2_spec(
        config,
        config.mamba_num_heads,
        config.mamba_head_dim,
        n_groups=config.n_groups,
        state_size=config.ssm_state_size,
        conv_kernel_size=config.conv_kernel,
        conv_bias=config.use_conv_bias,
        proj_bias=config.use_bias,
    )
    return {
        "layers": layers,
        "ropes": {},
        "rms_norm_eps": config.layer_norm_epsilon,
        "activation": activation(config.mlp_hidden_act),
        "gated_mlp": False,
        "mlp_bias": config.mlp_bias,
        "moe": _nemotron_h_moe(config) if any(layer.is_moe for layer in layers) else None,
        "recurrent": recurrent,
        "tensor_prefix": "backbone",
        "module_names": {
            "embed": "embeddings",
            "norm": "norm_f",
            "attn_norm": "norm",
            "mlp_norm": "norm",
            **MIXER_NAMES,
            "mlp.up": "mixer.up_proj",
            "mlp.down": "mixer.down_proj",
            **{f"attn.{name}": f"mixer.{name}_proj" for name in "qkvo"},
        },
    }


def _nemotron_h_layer_types(config: Any) -> list[str]:
    """The block of each layer; the first releases have a text with a letter for each."""
    types = config.layer_types if config.layers_block_type is None else config.layers_block_type
    if types is None:
        pattern = config.hybrid_override_pattern
        types = list(pattern if pattern is not None else "ME*-")  # the default of transformers
        types = [PATTERN_LETTERS.get(letter, letter) for letter in types]
    types = [OLD_LAYER_TYPES.get(name, name) for name in types]
    unknown = [name for name in types if name not in NEMOTRON_H_LAYERS]
    if unknown or not types:
        raise InputError(
            f"config.json has layers of the type {unknown[0]!r}"
            if unknown
            else "config.json has no layers",
            f"One of {', '.join(NEMOTRON_H_LAYERS)}, or a pattern of {' '.join(PATTERN_LETTERS)}",
        )
    return types


def _nemotron_h_moe(config: Any) -> MoeSpec:
    return replace(
        sigmoid_router(config, num_shared_experts=0),
        module="mixer",
        shared_intermediate_size=config.moe_shared_expert_intermediate_size,
        latent_size=config.moe_latent_size or 0,
    )


def _bamba(config: Any) -> dict[str, Any]:
    indices = config.attn_layer_indices or ()
    layers = [ATTENTION if i in indices else MAMBA for i in range(config.num_hidden_layers)]
    return {
        "layers": tuple(layers),
        "qkv_bias": config.attention_bias,
        "o_proj_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "recurrent": _layers_mamba2_spec(config),
        "module_names": {
            "norm": "final_layernorm",
            "mlp_norm": "pre_ff_layernorm",
            **{f"mlp.{name}": f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
        },
    }


def _granite_moe_hybrid(config: Any) -> dict[str, Any]:
    has_rope = config.position_embedding_type == "rope"
    attention = ATTENTION if has_rope else replace(ATTENTION, rope=None)
    layers = _layers_of_types(
        config, {"linear_attention": MAMBA, "full_attention": attention}, OLD_LAYER_TYPES
    )
    if config.num_local_experts is None:
        config.num_local_experts = 8
    if config.num_experts_per_tok is None:
        config.num_experts_per_tok = 2
    differences = granite_moe(config)
    if config.num_local_experts > 0:
        layers = with_experts(layers, [True] * len(layers))
    else:
        differences |= {
            "moe": None,
            "intermediate_size": config.shared_intermediate_size,
            "module_names": {
                "mlp.gate_up": "shared_mlp.input_linear",
                "mlp.down": "shared_mlp.output_linear",
            },
        }
    if not has_rope:
        differences["ropes"] = {}
    return differences | {"layers": layers, "recurrent": _layers_mamba2_spec(config)}


def _lfm2(config: Any) -> dict[str, Any]:
    size = config.block_ff_dim or config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        size = int(config.block_ffn_dim_multiplier * int(2 * size / 3))
        size = -(-size // config.block_multiple_of) * config.block_multiple_of
    tied = config.tie_word_embeddings if config.tie_embedding is None else config.tie_embedding
    return {
        "layers": _lfm2_layers(config),
        "qk_norm": "head",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": tied,
        "intermediate_size": size,
        "recurrent": ShortConvSpec(config.hidden_size, config.conv_L_cache, config.conv_bias),
        "module_names": {
            "norm": "embedding_norm",
            "attn_norm": "operator_norm",
            "mlp_norm": "ffn_norm",
            "attn.q_norm": "self_attn.q_layernorm",
            "attn.k_norm": "self_attn.k_layernorm",
            "attn.o": "self_attn.out_proj",
            "mlp.gate": "feed_forward.w1",
            "mlp.up": "feed_forward.w3",
            "mlp.down": "feed_forward.w2",
        },
    }


def _lfm2_layers(config: Any) -> tuple[LayerSpec, ...]:
    """The layers; the first releases say which have attention, and others have the types of all."""
    if config.layer_types is not None:
        return _layers_of_types(config, {"conv": SHORT_CONV, "full_attention": ATTENTION}, {})
    indices = config.full_attn_idxs
    if indices is None:
        indices = range(config.num_hidden_layers)
    return tuple(ATTENTION if i in indices else SHORT_CONV for i in range(config.num_hidden_layers))


def _lfm2_moe(config: Any) -> dict[str, Any]:
    # Its MLP has the size that the config says.
    config.block_ff_dim = None
    config.block_auto_adjust_ff_dim = False
    differences = _lfm2(config)
    layers = differences["layers"]
    moe = experts(
        config,
        config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        module="feed_forward",
        gate="w1",
        up="w3",
        down="w2",
        scoring="sigmoid",
        correction_bias="expert_bias" if config.use_expert_bias else None,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    is_moe = [index >= config.num_dense_layers for index in range(len(layers))]
    return differences | {"layers": with_experts(layers, is_moe), "moe": moe}


def _layers_of_types(
    config: Any, known: Mapping[str, LayerSpec], old_names: Mapping[str, str]
) -> tuple[LayerSpec, ...]:
    """The layers of a config's `layer_types`; without them, all are of the first known type."""
    types = config.layer_types
    if types is None:
        types = [next(iter(known))] * config.num_hidden_layers
    types = [old_names.get(name, name) for name in types]
    if len(types) != config.num_hidden_layers or not known.keys() >= set(types):
        distinct = ", ".join(map(str, dict.fromkeys(types)))
        raise InputError(
            f"config.json has the layer_types {distinct} for {len(types)} layers",
            f"{' or '.join(known)} for each of {config.num_hidden_layers} layers",
        )
    return tuple(known[name] for name in types)


def _layers_mamba2_spec(config: Any) -> Mamba2Spec:
    """The Mamba 2 layers of a config whose fields about them begin with `mamba_`."""
    head_dim = None if config.mamba_d_head == "auto" else config.mamba_d_head
    return _mamba2_spec(
        config,
        *_heads_of(config, config.mamba_n_heads, config.mamba_expand, head_dim),
        n_groups=config.mamba_n_groups,
        state_size=config.mamba_d_state,
        conv_kernel_size=config.mamba_d_conv,
        conv_bias=config.mamba_conv_bias,
        proj_bias=config.mamba_proj_bias,
    )


def _heads_of(config: Any, num_heads: int, expand: int, head_dim: int | None) -> tuple[int, int]:
    """The number of heads and their size, which are `expand` times the hidden size together."""
    size = expand * config.hidden_size
    if head_dim is None and num_heads > 0:
        head_dim = size // num_heads
    if head_dim is None or num_heads * head_dim != size:
        raise InputError(
            f"config.json has {num_heads} Mamba heads of {head_dim}, and expand {expand} with"
            f" hidden_size {config.hidden_size}",
            "Heads that are as wide together as hidden_size times expand",
        )
    return num_heads, head_dim


def _mamba2_spec(config: Any, num_heads: int, head_dim: int, **fields: Any) -> Mamba2Spec:
    """The spec of Mamba 2 layers; fields: the other fields of `Mamba2Spec`."""
    spec = Mamba2Spec(
        num_heads=num_heads,
        head_dim=head_dim,
        norm_groups=fields["n_groups"],
        time_step_limit=_time_step_limit(config.time_step_limit),
        **fields,
    )
    sizes = (num_heads, head_dim, spec.n_groups, spec.state_size, spec.conv_kernel_size)
    if min(sizes) < 1 or num_heads % spec.n_groups:
        raise InputError(
            f"config.json has {num_heads} Mamba heads of {head_dim} in {spec.n_groups} groups, with"
            f" states of {spec.state_size} and convolutions of {spec.conv_kernel_size}",
            "Positive numbers, and groups of equal size",
        )
    return spec


def _time_step_limit(limits: list[Any] | None) -> tuple[float, float]:
    """The least and the largest time step. JSON has no infinity: transformers writes an object."""
    values = [
        math.inf if isinstance(limit, dict) and limit.get("__float__") == "Infinity" else limit
        for limit in ((0.0, math.inf) if limits is None else limits)
    ]
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) != 2 or len(values) != 2 or numbers[0] > numbers[1]:
        raise InputError(
            f"config.json has time_step_limit {str(limits)[:60]}",
            "The least and the largest time step",
        )
    return float(numbers[0]), float(numbers[1])


# By architecture: its model_type and its function.
HYBRID_FAMILIES: dict[str, tuple[str, FamilyFunction]] = {
    "Mamba2ForCausalLM": ("mamba2", _mamba2),
    "NemotronHForCausalLM": ("nemotron_h", _nemotron_h),
    "BambaForCausalLM": ("bamba", _bamba),
    "GraniteMoeHybridForCausalLM": ("granitemoehybrid", _granite_moe_hybrid),
    "Lfm2ForCausalLM": ("lfm2", _lfm2),
    "Lfm2MoeForCausalLM": ("lfm2_moe", _lfm2_moe),
}
