"""Makes a `ModelSpec` from a Hugging Face config: a table of families, with a function for each.

A family's function returns only what differs from Llama. To add a family: a function in
dense_families.py or moe_families.py, its defaults in checkpoint/config_defaults.py, and a parity
test against transformers.
"""

from __future__ import annotations

from typing import Any

from llmkit.checkpoint.config_defaults import FAMILIES
from llmkit.checkpoint.hf_config import complete_config
from llmkit.common.errors import InputError
from llmkit.model.dense_families import DENSE_FAMILIES
from llmkit.model.family_fields import (
    FamilyFunction,
    activation,
    equal_layers,
    rope,
    rope_parameters,
)
from llmkit.model.moe_families import MOE_FAMILIES
from llmkit.model.spec import ModelSpec

# By architecture: its model_type and its function.
SUPPORTED: dict[str, tuple[str, FamilyFunction]] = DENSE_FAMILIES | MOE_FAMILIES


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
        values["layers"] = equal_layers(completed, None)
    if "ropes" not in differences:
        values["ropes"] = {"global": rope(completed, rope_parameters(completed))}
    if "activation" not in differences:
        values["activation"] = activation(completed.hidden_act)
    spec = ModelSpec(architecture=architecture, **(values | differences))
    if spec.num_heads % spec.num_kv_heads:
        raise InputError(
            f"{spec.num_heads} heads and {spec.num_kv_heads} KV heads",
            "Heads are a multiple of KV heads",
        )
    return spec
