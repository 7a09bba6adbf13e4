"""From a Hugging Face config to a `ModelSpec`: one small function per family, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmkit.checkpoint.config import FAMILIES, RopeSpec, complete
from llmkit.checkpoint.errors import InputError
from llmkit.model.spec import ExpertSpec, LayerSpec, ModelSpec

# What a family changes relative to Llama: keyword arguments of ModelSpec, from its complete config.
Family = Callable[[Any], dict[str, Any]]


def _llama(config: Any) -> dict[str, Any]:
    return {"qkv_bias": config.attention_bias, "output_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: Any) -> dict[str, Any]:
    return {"layers": _uniform_layers(config, config.sliding_window)}


def _qwen2(config: Any) -> dict[str, Any]:
    sliding = [config.use_sliding_window and i >= config.max_window_layers for i in range(config.num_hidden_layers)]
    window = config.sliding_window if config.use_sliding_window else None
    return {"qkv_bias": True, "layers": _typed_layers(config, sliding, window)}


def _qwen3(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return _qwen2(config) | {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head"}


def _phi3(config: Any) -> dict[str, Any]:
    rope = _rope_parameters(config)
    if rope["rope_type"] not in ("default", "longrope"):
        raise InputError(f"unsupported RoPE scaling of Phi-3 ({rope['rope_type']})", "One of default, longrope")
    layers = _uniform_layers(config, config.sliding_window)
    return {"fused_checkpoint": True, "layers": layers, "ropes": {"global": _rope(config, rope)}}


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
        "layers": _typed_layers(config, [i % 2 == 0 for i in range(config.num_hidden_layers)], config.sliding_window),
    }


def _gemma3(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise InputError("Gemma 3 with use_bidirectional_attention", "A causal language model")
    pattern = config.sliding_window_pattern
    sliding = [(i + 1) % pattern != 0 for i in range(config.num_hidden_layers)]
    windows = [layer.window for layer in _typed_layers(config, sliding, config.sliding_window)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    layers = tuple(LayerSpec(window, kind) for window, kind in zip(windows, kinds, strict=True))
    nested = config.rope_parameters or {}
    scaling = {"full_attention": config.rope_scaling or {}}
    theta = {"full_attention": config.rope_theta, "sliding_attention": config.rope_local_base_freq}
    ropes = {
        kind: _rope(config, _standard({**(nested.get(kind) or {}), **scaling.get(kind, {})}, theta[kind], config))
        for kind in dict.fromkeys(kinds)
    }
    return _gemma2(config) | {"qk_norm": "head", "layers": layers, "ropes": ropes}


def _granite(config: Any) -> dict[str, Any]:
    return _llama(config) | {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    }


def _olmo2(config: Any) -> dict[str, Any]:
    bias = config.attention_bias
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": "full", "norm_before": False, "norm_after": True}


def _smollm3(config: Any) -> dict[str, Any]:
    count = config.num_hidden_layers
    rotary = config.no_rope_layers or [(i + 1) % config.no_rope_layer_interval for i in range(count)]
    if len(rotary) < count:
        raise InputError(f"config.json has {len(rotary)} no_rope_layers", f"One for each of {count} layers")
    sliding = [config.use_sliding_window and not rotary[i] for i in range(count)]
    typed = _typed_layers(config, sliding, config.sliding_window)
    layers = tuple(LayerSpec(layer.window, "global" if rotary[i] else None) for i, layer in enumerate(typed))
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
            config.sliding_window if config.use_sliding_window else None,
            moe=index not in (config.mlp_only_layers or ())
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


SUPPORTED: dict[str, tuple[str, Family]] = {  # by architecture: its model_type, and what differs
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
    kind, family = SUPPORTED[architecture]
    if config.get("model_type") not in FAMILIES:
        raise InputError(
            f"config.json has model_type {config.get('model_type')!r}", f"{kind}, as its architecture says"
        )
    found = complete(config, kind)
    differences = family(found)
    common: dict[str, Any] = {
        "hidden": found.hidden_size,
        "heads": found.num_attention_heads,
        "kv_heads": found.num_key_value_heads,
        "head_dim": found.head_dim,
        "intermediate": found.intermediate_size,
        "vocab": found.vocab_size,
        "max_positions": found.max_position_embeddings,
        "norm_eps": found.rms_norm_eps,
        "tied": found.tie_word_embeddings,
        "attention_scale": found.head_dim**-0.5,
    }
    if "layers" not in differences:
        common["layers"] = _uniform_layers(found, None)
    if "ropes" not in differences:
        common["ropes"] = {"global": _rope(found, _rope_parameters(found))}
    if "activation" not in differences:
        common["activation"] = _activation(found.hidden_act)
    spec = ModelSpec(architecture=architecture, **(common | differences))
    if spec.heads % spec.kv_heads:
        raise InputError(f"{spec.heads} heads and {spec.kv_heads} KV heads", "Heads are a multiple of KV heads")
    return spec


def _activation(name: str) -> str:
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in names:
        raise InputError(f"unsupported activation ({name})", f"One of {', '.join(names)}")
    return names[name]


def _uniform_layers(config: Any, window: int | None, moe: bool = False) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(window, moe=moe) for _ in range(config.num_hidden_layers))


def _typed_layers(config: Any, sliding: Sequence[bool], window: int | None) -> tuple[LayerSpec, ...]:
    """Layers with and without a window: as the config's `layer_types` say, else where `sliding` is true."""
    kinds = config.layer_types
    if kinds is not None:
        known = {"full_attention": False, "attention": False, "sliding_attention": True}
        if len(kinds) != len(sliding) or not known.keys() >= set(kinds):
            raise InputError(
                f"config.json has the layer_types {', '.join(map(str, dict.fromkeys(kinds)))} for {len(kinds)} layers",
                f"full_attention or sliding_attention for each of {len(sliding)} layers",
            )
        sliding = [known[kind] for kind in kinds]
    return tuple(LayerSpec(window if slides else None) for slides in sliding)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The one rotary embedding of a config, from where old and new ones have it."""
    return _standard(dict(config.rope_scaling or config.rope_parameters or {}), config.rope_theta, config)


def _standard(given: dict[str, Any], theta: float, config: Any) -> dict[str, Any]:
    """RoPE parameters with their defaults, which lie beside them in the config."""
    defaults = {
        "rope_type": given.get("type", "default"),
        "rope_theta": theta,
        "partial_rotary_factor": 1.0 if config.partial_rotary_factor is None else config.partial_rotary_factor,
    }
    original = config.original_max_position_embeddings
    return defaults | given | ({} if original is None else {"original_max_position_embeddings": original})


def _rope(config: Any, given: dict[str, Any]) -> RopeSpec:
    from llmkit.checkpoint.frequencies import rope_spec  # torch: the parameter table alone can do without

    return rope_spec(given, config.head_dim, config.max_position_embeddings)
