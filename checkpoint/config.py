"""A config.json by attribute, with what it leaves out filled in as transformers fills it in.

transformers itself would do this too, but importing it takes longer than loading a small model. A test compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llmkit.checkpoint.errors import InputError


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding: radians per position of each rotated pair of dimensions.

    Only the first 2 * len(frequencies) dimensions of a head are rotated. LongRoPE (arXiv 2402.13753) has a
    second set of frequencies for requests longer than `original_positions` tokens.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0  # multiplies cos and sin
    long_frequencies: tuple[float, ...] = ()
    original_positions: int = 0


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
_NULLABLE: dict[str, type] = {
    "num_key_value_heads": int, "head_dim": int, "sliding_window": int, "layer_types": list,
    "rope_scaling": dict, "rope_parameters": dict, "partial_rotary_factor": float,
    "original_max_position_embeddings": int, "attn_logit_softcapping": float, "final_logit_softcapping": float,
    "no_rope_layers": list, "mlp_only_layers": list, "use_bidirectional_attention": bool, "rope_local_base_freq": float,
}  # fmt: skip
_WINDOWED = {"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 32, "max_window_layers": 28}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# What a family's model_type adds to _COMMON and _NULLABLE, or has another default for; a type: there is none.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _WINDOWED,
    "qwen3": _WINDOWED | {"head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
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


def complete(config: dict[str, Any], kind: str) -> Any:
    """The config of a family of FAMILIES by attribute; `head_dim` and `num_key_value_heads` are derived where absent.

    Raises InputError for values of the wrong kind and for missing sizes.
    """
    defaults = dict.fromkeys(_SIZES, int) | _COMMON | dict.fromkeys(_NULLABLE) | FAMILIES[kind]
    given = dict(config)
    if "num_local_experts" in defaults and "num_experts" in given:  # two names of one thing
        given.setdefault("num_local_experts", given["num_experts"])
    values = {name: _checked(given, name, default, kind) for name, default in defaults.items()}
    found = SimpleNamespace(**values)
    for name in (*_SIZES, "head_dim", "num_key_value_heads"):
        if values[name] is not None and values[name] < 1:
            raise InputError(f"config.json has {name} {values[name]}", "A positive number was expected")
    if found.head_dim is None:
        if found.hidden_size % found.num_attention_heads:
            raise InputError(
                f"config.json has hidden_size {found.hidden_size} and {found.num_attention_heads} attention heads",
                "A multiple, or a head_dim, was expected",
            )
        found.head_dim = found.hidden_size // found.num_attention_heads
    found.num_key_value_heads = found.num_key_value_heads or found.num_attention_heads
    return found


def _checked(config: dict[str, Any], name: str, default: Any, kind: str) -> Any:
    required = isinstance(default, type)
    wanted = default if required else _NULLABLE.get(name) or type(default)
    if name not in config:
        if required:
            raise InputError(f"config.json has no {name}", f"A complete {kind} config was expected")
        return default
    value = config[name]
    if value is None and name in _NULLABLE:
        return None
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise InputError(f"config.json has {name} {str(value)[:40]!r}", f"A valid {kind} config was expected")
    return value
