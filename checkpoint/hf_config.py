"""Completes a config.json with the default values that transformers has.

transformers could do the same, but importing it takes longer than loading a small model. A test
compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from llmkit.checkpoint.config_defaults import (
    ALIASES,
    COMMON,
    FAMILIES,
    FAMILY_ALIASES,
    MAYBE_LISTS,
    NULLABLE,
    POSITIVE,
    REQUIRED_SIZES,
)
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
    # A query at position p is multiplied by 1 + beta * log(1 + floor(p / length)) (Llama 4,
    # Ministral 3), with length `original_max_position_embeddings`.
    query_scale_beta: float = 0.0


def complete_config(config: dict[str, Any], model_type: str) -> Any:
    """A config with all fields of its family as attributes. `model_type`: a key of FAMILIES.

    Missing `head_dim` and `num_key_value_heads` are derived.
    Raises InputError for values of the wrong type and for missing sizes.
    """
    defaults = (
        dict.fromkeys(REQUIRED_SIZES, int) | COMMON | dict.fromkeys(NULLABLE) | FAMILIES[model_type]
    )
    config = dict(config)
    for name, aliases in (ALIASES | FAMILY_ALIASES.get(model_type, {})).items():
        for alias in aliases:
            if name in defaults and alias in config:
                config.setdefault(name, config[alias])
    for name in MAYBE_LISTS:
        if isinstance(config.get(name), list):
            config[name] = _equal_number(name, config[name])
    values = {
        name: _checked_value(config, name, default, model_type)
        for name, default in defaults.items()
    }
    for name in POSITIVE:
        value = values.get(name)
        has_default = defaults.get(name) is not None
        if has_default and isinstance(value, (int, float)) and value <= 0:
            raise InputError(f"config.json has {name} {value}", "A positive number was expected")
    completed = SimpleNamespace(**values)
    for name in (*REQUIRED_SIZES, "head_dim", "num_key_value_heads"):
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


def _equal_number(name: str, numbers: list[Any]) -> Any:
    if not numbers or any(number != numbers[0] for number in numbers):
        raise InputError(
            f"config.json has different numbers for {name} ({str(numbers)[:40]})",
            "The same number for all layers",
        )
    return numbers[0]


def _checked_value(config: dict[str, Any], name: str, default: Any, model_type: str) -> Any:
    if isinstance(default, tuple):
        value = config.get(name, default[0])
        if value not in default:
            allowed = ", ".join(map(repr, default))
            raise InputError(f"config.json has {name} {str(value)[:40]!r}", f"One of {allowed}")
        return value
    is_required = isinstance(default, type)
    if is_required:
        type_ = default
    elif default is None:
        type_ = NULLABLE[name]
    else:
        type_ = type(default)
    if name not in config:
        if is_required:
            raise InputError(
                f"config.json has no {name}", f"A complete {model_type} config was expected"
            )
        return default
    value = config[name]
    if value is None and name in NULLABLE and not is_required:
        return None
    has_type = isinstance(value, (int, float) if type_ is float else type_)
    is_stray_bool = isinstance(value, bool) and type_ is not bool
    if not has_type or is_stray_bool:
        raise InputError(
            f"config.json has {name} {str(value)[:40]!r}",
            f"A valid {model_type} config was expected",
        )
    return value
