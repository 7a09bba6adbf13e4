"""Completes a config.json with the default values that transformers has.

transformers could do the same, but importing it takes longer than loading a small model. A test
compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llmkit.common.errors import InputError


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding.

    Only the first 2 * len(inv_freq) dimensions of a head are rotated. LongRoPE (arXiv 2402.13753)
    has a second set of frequencies, for requests of more than `original_max_position_embeddings`
    tokens.
    """

    inv_freq: tuple[float, ...]  # radians per position, for each rotated pair of dimensions
    attention_scaling: float = 1.0  # multiplies cos and sin
    long_inv_freq: tuple[float, ...] = ()
    original_max_position_embeddings: int = 0


# Required fields of every config.
_REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Defaults of every family.
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
# Optional fields of every family: the default is null.
_NULLABLE: dict[str, type] = {
    "num_key_value_heads": int,
    "head_dim": int,
    "sliding_window": int,
    "layer_types": list,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "partial_rotary_factor": float,
    "original_max_position_embeddings": int,
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "no_rope_layers": list,
    "mlp_only_layers": list,
    "use_bidirectional_attention": bool,
    "rope_local_base_freq": float,
}
_QWEN_SLIDING_WINDOW = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_key_value_heads": 32,
    "max_window_layers": 28,
}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# The defaults of each model_type. They extend or override the defaults above. A field whose value
# here is a type (int) is required.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN_SLIDING_WINDOW,
    "qwen3": _QWEN_SLIDING_WINDOW | {"head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "granite": {
        "mlp_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
    },
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": int,
        "num_experts_per_tok": int,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_local_experts": int,
        "num_experts_per_tok": int,
        "moe_intermediate_size": int,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
}


def complete_config(config: dict[str, Any], model_type: str) -> Any:
    """A config with all fields of its family as attributes. `model_type`: a key of FAMILIES.

    Missing `head_dim` and `num_key_value_heads` are derived.
    Raises InputError for values of the wrong type and for missing sizes.
    """
    defaults = (
        dict.fromkeys(_REQUIRED_SIZES, int)
        | _COMMON
        | dict.fromkeys(_NULLABLE)
        | FAMILIES[model_type]
    )
    config = dict(config)
    if "num_local_experts" in defaults and "num_experts" in config:  # two names of one field
        config.setdefault("num_local_experts", config["num_experts"])
    values = {
        name: _checked_value(config, name, default, model_type)
        for name, default in defaults.items()
    }
    completed = SimpleNamespace(**values)
    for name in (*_REQUIRED_SIZES, "head_dim", "num_key_value_heads"):
        if values[name] is not None and values[name] < 1:
            raise InputError(
                f"config.json has {name} {values[name]}", "A positive number was expected"
            )
    num_heads = completed.num_attention_heads
    if completed.head_dim is None:
        if completed.hidden_size % num_heads:
            raise InputError(
                f"config.json has hidden_size {completed.hidden_size}"
                f" and {num_heads} attention heads",
                "A multiple, or a head_dim, was expected",
            )
        completed.head_dim = completed.hidden_size // num_heads
    completed.num_key_value_heads = completed.num_key_value_heads or num_heads
    return completed


def _checked_value(config: dict[str, Any], name: str, default: Any, model_type: str) -> Any:
    is_required = isinstance(default, type)
    if is_required:
        type_ = default
    elif name in _NULLABLE:
        type_ = _NULLABLE[name]
    else:
        type_ = type(default)
    if name not in config:
        if is_required:
            raise InputError(
                f"config.json has no {name}", f"A complete {model_type} config was expected"
            )
        return default
    value = config[name]
    if value is None and name in _NULLABLE:
        return None
    has_type = isinstance(value, (int, float) if type_ is float else type_)
    is_stray_bool = isinstance(value, bool) and type_ is not bool
    if not has_type or is_stray_bool:
        raise InputError(
            f"config.json has {name} {str(value)[:40]!r}",
            f"A valid {model_type} config was expected",
        )
    return value
