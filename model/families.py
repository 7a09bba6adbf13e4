"""From a Hugging Face config to a `ModelSpec`: one small function per family, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit.checkpoint.errors import InputError
from llmkit.model.spec import ExpertSpec, LayerSpec, ModelSpec, RopeSpec

# What a family changes relative to Llama: keyword arguments of ModelSpec, from its complete config.
Family = Callable[[Any], dict[str, Any]]


def _llama(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": getattr(config, "mlp_bias", False),
    }


def _mistral(config: Any) -> dict[str, Any]:
    return {"layers": _uniform_layers(config, config.sliding_window)}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"qkv_bias": True, "layers": _typed_layers(config)}


def _qwen3(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head", "layers": _typed_layers(config)}


def _phi3(config: Any) -> dict[str, Any]:
    return {"fused_checkpoint": True, "layers": _uniform_layers(config, config.sliding_window)}


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "norm_after": True,
        "activation": _activation(config.hidden_activation),
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
        "embedding_scale": config.hidden_size**0.5,
        "layers": _typed_layers(config),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise InputError("Gemma 3 with use_bidirectional_attention", "A causal language model")
    ropes = {name: _rope(config, name) for name in dict.fromkeys(config.layer_types)}
    layers = tuple(
        LayerSpec(config.sliding_window if kind == "sliding_attention" else None, kind) for kind in config.layer_types
    )
    return _gemma2(config) | {"qk_norm": "head", "layers": layers, "ropes": ropes}


def _granite(config: Any) -> dict[str, Any]:
    return _llama(config) | {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    }


def _olmo2(config: Any) -> dict[str, Any]:
    return _llama(config) | {"qk_norm": "full", "norm_before": False, "norm_after": True}


def _smollm3(config: Any) -> dict[str, Any]:
    layers = tuple(
        LayerSpec(layer.window, "global" if rotary else None)
        for layer, rotary in zip(_typed_layers(config), config.no_rope_layers, strict=True)
    )
    return _llama(config) | {"layers": layers}


def _mixtral(config: Any) -> dict[str, Any]:
    return {
        "layers": _uniform_layers(config, config.sliding_window, moe=True),
        "experts": ExpertSpec(
            count=config.num_local_experts,
            per_token=config.num_experts_per_tok,
            intermediate=config.intermediate_size,
            normalize=True,
            block="block_sparse_moe",
            gate="w1",
            up="w3",
            down="w2",
        ),
    }


def _qwen3_moe(config: Any) -> dict[str, Any]:
    layers = tuple(
        LayerSpec(
            config.sliding_window,
            moe=index not in config.mlp_only_layers
            and config.num_local_experts > 0
            and (index + 1) % config.decoder_sparse_step == 0,
        )
        for index in range(config.num_hidden_layers)
    )
    experts = ExpertSpec(
        count=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        intermediate=config.moe_intermediate_size,
        normalize=config.norm_topk_prob,
        block="mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    )
    bias = config.attention_bias
    return {"qk_norm": "head", "qkv_bias": bias, "output_bias": bias, "layers": layers, "experts": experts}


SUPPORTED: dict[str, Family] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GraniteForCausalLM": _granite,
    "Olmo2ForCausalLM": _olmo2,
    "SmolLM3ForCausalLM": _smollm3,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}


def model_spec(config: dict[str, Any]) -> ModelSpec:
    """The spec of a checkpoint's config.json.

    Raises InputError for an unsupported architecture, for one that wants remote code, and for a config
    that its own family cannot read.
    """
    if "auto_map" in config:
        raise InputError(
            f"config.json has an auto_map ({', '.join(sorted(config['auto_map']))})",
            "A model that needs no code of its own: remote code is never run",
            "Remove auto_map if the architecture is one of " + ", ".join(SUPPORTED),
        )
    named = config.get("architectures") or ["(none)"]
    architecture = named[0]
    if architecture not in SUPPORTED:
        raise InputError(f"unsupported architecture ({architecture})", f"One of {', '.join(SUPPORTED)}")
    complete = _complete(config, architecture)
    heads = complete.num_attention_heads
    head_dim = getattr(complete, "head_dim", None) or complete.hidden_size // heads
    differences = SUPPORTED[architecture](complete)
    common: dict[str, Any] = {
        "hidden": complete.hidden_size,
        "heads": heads,
        "kv_heads": complete.num_key_value_heads or heads,
        "head_dim": head_dim,
        "intermediate": complete.intermediate_size,
        "vocab": complete.vocab_size,
        "max_positions": complete.max_position_embeddings,
        "norm_eps": complete.rms_norm_eps,
        "tied": bool(complete.tie_word_embeddings),
        "attention_scale": head_dim**-0.5,
    }
    if "layers" not in differences:
        common["layers"] = _uniform_layers(complete, None)
    if "ropes" not in differences:
        common["ropes"] = {"global": _rope(complete, None)}
    if "activation" not in differences:
        common["activation"] = _activation(complete.hidden_act)
    spec = ModelSpec(architecture=architecture, **(common | differences))
    if spec.heads % spec.kv_heads:
        raise InputError(f"{spec.heads} heads and {spec.kv_heads} KV heads", "Heads are a multiple of KV heads")
    return spec


def _complete(config: dict[str, Any], architecture: str) -> Any:
    """The family's own transformers config, with its defaults filled in and legacy keys brought up to date."""
    from transformers import CONFIG_MAPPING  # here: importing it takes a second

    kind = config.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        raise InputError(f"config.json has model_type {kind!r}", f"The model_type that goes with {architecture}")
    try:
        return CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # whatever its validation raises
        raise InputError(f"config.json is not a valid {kind} config ({error})") from error


def _activation(name: str) -> str:
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in names:
        raise InputError(f"unsupported activation ({name})", f"One of {', '.join(names)}")
    return names[name]


def _uniform_layers(config: Any, window: int | None, moe: bool = False) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(window, moe=moe) for _ in range(config.num_hidden_layers))


def _typed_layers(config: Any) -> tuple[LayerSpec, ...]:
    return tuple(
        LayerSpec(config.sliding_window if kind == "sliding_attention" else None) for kind in config.layer_types
    )


def _rope(config: Any, layer_type: str | None) -> RopeSpec:
    """The frequencies as transformers computes them, for one of the config's layer types (None: the only one)."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    kind = given.get("rope_type", "default")
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head_dim * given.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, dim, 2, dtype=torch.float) / dim
        return RopeSpec(tuple((1.0 / (given["rope_theta"] ** steps)).tolist()))
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise InputError(f"unsupported RoPE scaling ({kind})", "One of default, linear, llama3, yarn, longrope")
    compute = ROPE_INIT_FUNCTIONS[kind]
    extra = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scale = compute(config, torch.device("cpu"), **extra)
    if kind != "longrope":
        return RopeSpec(tuple(frequencies.tolist()), scale)
    long, _ = compute(config, torch.device("cpu"), seq_len=config.max_position_embeddings + 1, **extra)
    original = given["original_max_position_embeddings"]
    return RopeSpec(tuple(frequencies.tolist()), scale, tuple(long.tolist()), original)
