"""The metadata of a model's GGUF file, without the tokenizer: the reverse of the reader's configs.

What a file cannot say about a model shows when the metadata is read back: see gguf_export.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.checkpoint.gguf_architectures import (
    ATTENTION_FACTOR,
    LOG_MULTIPLIER,
    ROPE_FACTORS_LONG,
    ROPE_FACTORS_SHORT,
    ROPE_FREQS,
    ROTATED_ROWS,
    SIGMOID,
    SOFTMAX,
    GgufArchitecture,
    yarn_attention_factor,
)
from llmkit.model.family_fields import rope_parameters
from llmkit.model.spec import (
    GatedDeltaNetSpec,
    LayerSpec,
    Mamba2Spec,
    MlaSpec,
    ModelSpec,
    MoeSpec,
    RecurrentSpec,
)

# Fields of config.json, and the keys that hold the same number. llama.cpp wants floats as floats,
# where config.json may have 12 for 12.0.
_SAME_FLOATS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_SAME_INTEGERS = {
    "conv_L_cache": "shortconv.l_cache",
    "moe_layer_interval": "interleave_moe_layer_step",
}
# What files say 0 KV heads of. Other layers without attention are listed in a key of their own.
_WITHOUT_KV_HEADS = ("mamba2", "short_conv", "none")
# The frequency of pairs of dimensions that do not rotate, as a divisor.
_NEVER = 1e30


@dataclass(frozen=True)
class GgufKeys:
    """Metadata by key, without the architecture's name, and the tensors that belong to it."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]  # float32, of one dimension


def gguf_keys(row: GgufArchitecture, spec: ModelSpec, config: Any) -> GgufKeys:
    """The metadata of a model. config: completed (`complete_config`)."""
    of_layers = [spec.for_layer(index) for index in range(len(spec.layers))]
    kv_heads = [
        0 if layer.mixer in _WITHOUT_KV_HEADS else each.num_kv_heads
        for each, layer in zip(of_layers, spec.layers, strict=True)
    ]
    mlp_sizes = [_mlp_size(each, layer) for each, layer in zip(of_layers, spec.layers, strict=True)]
    full = [
        each.head_dim
        for each, layer in zip(of_layers, spec.layers, strict=True)
        if layer.sliding_window is None
    ]
    head_dim = full[0] if full else spec.head_dim
    epsilon = "layer_norm_rms_epsilon" if spec.norm == "rms" else "layer_norm_epsilon"
    values: dict[str, Any] = {
        "block_count": len(spec.layers),
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "feed_forward_length": _one_or_all(mlp_sizes),
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": _one_or_all(kv_heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        f"attention.{epsilon}": float(spec.rms_norm_eps),
    }
    for kind, table in ((float, _SAME_FLOATS), (int, _SAME_INTEGERS)):
        for field, key in table.items():
            if getattr(config, field, None) is not None:
                values[key] = kind(getattr(config, field))
    windows = [layer.sliding_window for layer in spec.layers]
    used_windows = {window for window in windows if window is not None}
    if used_windows:
        values["attention.sliding_window"] = max(used_windows)
        if None in windows:
            pattern = [window is not None for window in windows]
            values["attention.sliding_window_pattern"] = pattern
    elif row.model_type == "phi3":
        values["attention.sliding_window"] = 0  # required
    if spec.moe is not None:
        values |= _moe_keys(spec, spec.moe)
    if spec.recurrent is not None:
        values |= _recurrent_keys(spec, spec.recurrent)
    if spec.mla is not None:
        values |= _latent_keys(spec.mla)
    if row.model_type == "gemma4_text":
        values |= _gemma4_keys(spec, head_dim)
    if row.model_type == "stablelm":
        values["use_parallel_residual"] = spec.parallel_block
    if row.model_type == "granitemoehybrid":
        values["rope.scaling.finetuned"] = bool(spec.ropes)
    if row.model_type == "bamba":
        values[ROTATED_ROWS] = True
    if row.model_type == "laguna":
        values |= _laguna_keys([each.num_heads for each in of_layers], windows)
    if row.model_type in ("granite_swa", "granitemoe_swa"):
        values["attention.rope_pattern"] = [layer.rope is not None for layer in spec.layers]
    if not row.has_attention:
        values |= {"attention.head_count": 0, "attention.head_count_kv": 0}
        del values["attention.key_length"], values["attention.value_length"]
    if row.model_type == "nemotron_h":
        values["attention.layer_norm_epsilon"] = float(spec.rms_norm_eps)  # required
    rope_values, tensors = _rope_keys(row, spec, config, head_dim)
    return GgufKeys(values | rope_values, tensors)


def _mlp_size(spec: ModelSpec, layer: LayerSpec) -> int:
    """The size of a layer's MLP; 0: it has none."""
    if not layer.has_mlp:
        return 0
    if layer.mixer == "none" and layer.is_moe and spec.moe is not None:
        return spec.moe.intermediate_size  # the layer has nothing but experts
    return spec.intermediate_size


def _one_or_all(numbers: Sequence[int]) -> int | list[int]:
    """One number when all are equal."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _moe_keys(spec: ModelSpec, moe: MoeSpec) -> dict[str, Any]:
    is_moe = [layer.is_moe for layer in spec.layers]
    values: dict[str, Any] = {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_feed_forward_length": moe.intermediate_size,
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": SIGMOID if moe.scoring == "sigmoid" else SOFTMAX,
        "leading_dense_block_count": is_moe.index(True) if True in is_moe else len(is_moe),
    }
    if moe.scoring == "sigmoid" or moe.routed_scaling_factor != 1:
        values["expert_weights_scale"] = float(moe.routed_scaling_factor)
    if moe.shared_intermediate_size:
        values["expert_shared_feed_forward_length"] = moe.shared_intermediate_size
        values["expert_shared_count"] = max(
            1, moe.shared_intermediate_size // moe.intermediate_size
        )
    elif spec.mla is not None:
        values["expert_shared_count"] = 0  # required
    if moe.latent_size:
        values["moe_latent_size"] = moe.latent_size
    if moe.num_groups > 1:
        values["expert_group_count"] = moe.num_groups
        values["expert_group_used_count"] = moe.topk_groups
    return values


def _recurrent_keys(spec: ModelSpec, recurrent: RecurrentSpec) -> dict[str, Any]:
    """The sizes of layers that keep a state. Short convolutions have one, in `_SAME_INTEGERS`."""
    if isinstance(recurrent, GatedDeltaNetSpec):
        return {
            "ssm.conv_kernel": recurrent.conv_kernel_size,
            "ssm.state_size": recurrent.head_k_dim,
            "ssm.group_count": recurrent.num_k_heads,
            "ssm.time_step_rank": recurrent.num_v_heads,
            "ssm.inner_size": recurrent.num_v_heads * recurrent.head_v_dim,
            "attention.recurrent_layers": [layer.is_recurrent for layer in spec.layers],
        }
    if isinstance(recurrent, Mamba2Spec):
        return {
            "ssm.conv_kernel": recurrent.conv_kernel_size,
            "ssm.state_size": recurrent.state_size,
            "ssm.group_count": recurrent.n_groups,
            "ssm.time_step_rank": recurrent.num_heads,
            "ssm.inner_size": recurrent.intermediate_size,
        }
    return {}


def _latent_keys(mla: MlaSpec) -> dict[str, Any]:
    """The sizes of latent attention. llama.cpp caches latents as the keys of one head."""
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": mla.latent_dim,
        "attention.value_length": mla.kv_lora_rank,
        "attention.key_length_mla": mla.qk_head_dim,
        "attention.value_length_mla": mla.v_head_dim,
        "attention.q_lora_rank": mla.q_lora_rank or 0,
        "attention.kv_lora_rank": mla.kv_lora_rank,
    }


def _gemma4_keys(spec: ModelSpec, head_dim: int) -> dict[str, Any]:
    return {
        "attention.shared_kv_layers": sum(
            bool(layer.kv_shared_layer_offset) for layer in spec.layers
        ),
        "embedding_length_per_layer_input": spec.per_layer_input_size,
        "attention.key_length_swa": spec.head_dim,
        "attention.value_length_swa": spec.head_dim,
        "rope.dimension_count": head_dim,
        "rope.dimension_count_swa": spec.head_dim,
    }


def _laguna_keys(heads: list[int], windows: list[int | None]) -> dict[str, Any]:
    """What differs from other families: all numbers of heads, and the period of full layers.

    The first llama.cpp that had the family ignores a list of the layers with windows. So it is
    written only where no period says the same.
    """
    values: dict[str, Any] = {"attention.head_count": heads, "expert_shared_count": 1}
    has_window = [window is not None for window in windows]
    if any(has_window):
        layers = range(len(has_window))
        periods = (4, *range(2, len(has_window) + 1))
        found = [each for each in periods if [bool(i % each) for i in layers] == has_window]
        values["attention.sliding_window_pattern"] = found[0] if found else has_window
    return values


def _rope_keys(
    row: GgufArchitecture, spec: ModelSpec, config: Any, head_dim: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not spec.ropes:
        return {}, {}
    if {"full_attention", "sliding_attention"} & spec.ropes.keys():
        by_type = config.rope_parameters or {}
        full = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
        parameters = full | by_type.get("full_attention", {})
        sliding = by_type.get("sliding_attention", {})
        local = getattr(config, "rope_local_base_freq", None)
        values: dict[str, Any] = {
            "rope.freq_base_swa": float(sliding.get("rope_theta", local or 1e4))
        }
        rope = spec.ropes.get("full_attention") or next(iter(spec.ropes.values()))
        if row.partial_rotary and "sliding_attention" in spec.ropes:
            num_pairs = len(spec.ropes["sliding_attention"].inv_freq)
            values["rope.dimension_count_swa"] = 2 * num_pairs
    else:
        parameters = rope_parameters(config)
        rope = next(iter(spec.ropes.values()))
        values = {}
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    # A layer without position encoding has 0 here.
    thetas = [theta for theta in getattr(config, "layer_rope_theta", None) or [] if theta]
    theta = float(thetas[0] if thetas else parameters["rope_theta"])
    tensors: dict[str, torch.Tensor] = {}
    if row.partial_rotary or not row.differs_by_layer:
        values["rope.dimension_count"] = 2 * len(rope.inv_freq)
    if rope_type == "dynamic" and parameters.get("alpha"):
        theta *= parameters["alpha"] ** (head_dim / (head_dim - 2))
    values["rope.freq_base"] = theta
    original = parameters.get("original_max_position_embeddings")
    if rope_type in ("linear", "yarn"):
        values["rope.scaling.type"] = rope_type
        values["rope.scaling.factor"] = float(parameters["factor"])
    if rope_type in ("yarn", "longrope") or row.model_type == "phi3":
        values["rope.scaling.original_context_length"] = original or spec.max_position_embeddings
    if rope_type == "yarn":
        for field, key in (
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
            ("attention_factor", "yarn_attn_factor"),
        ):
            if parameters.get(field) is not None:
                values[f"rope.scaling.{key}"] = float(parameters[field])
        log_multiplier = 0.0
        if parameters.get("mscale_all_dim") and (spec.mla or row.has_log_multiplier):
            # By llama.cpp's converter a tenth of it for DeepSeek's families, all of it for others.
            part = 0.1 if spec.mla is not None else 1.0
            log_multiplier = part * float(parameters["mscale_all_dim"])
            values[LOG_MULTIPLIER] = log_multiplier
        computed = yarn_attention_factor(float(parameters["factor"]), log_multiplier)
        share = rope.attention_scaling / computed
        if spec.mla is None and not math.isclose(share, 1.0, rel_tol=1e-5):
            values[ATTENTION_FACTOR] = share
        if rope.query_scale_beta:
            values["attention.temperature_scale"] = float(rope.query_scale_beta)
            if spec.mla is not None:  # required with the scale; others take the original context
                values["attention.temperature_length"] = original
    if rope_type == "llama3":
        rotary_dim = 2 * len(rope.inv_freq)
        plain = theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
        tensors[ROPE_FREQS] = 1 / (plain * torch.tensor(rope.inv_freq))
    if rope_type == "proportional":
        divisors = [1.0 if frequency else _NEVER for frequency in rope.inv_freq]
        tensors[ROPE_FREQS] = torch.tensor(divisors)
    if rope_type == "longrope":
        tensors[ROPE_FACTORS_LONG] = torch.tensor(parameters["long_factor"]).float()
        tensors[ROPE_FACTORS_SHORT] = torch.tensor(parameters["short_factor"]).float()
        values["rope.scaling.type"] = "longrope"
        values[ATTENTION_FACTOR] = float(rope.attention_scaling)
    if row.has_mrope_sections:
        # Texts have the same positions in all sections. By default these are thirds, as Qwen's are.
        pairs = len(rope.inv_freq)
        sections = parameters.get("mrope_section") or [(pairs + 2 - i) // 3 for i in range(3)]
        values["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
    if row.model_type == "lfm2" or row.model_type == "lfm2_moe":
        values.pop("rope.dimension_count", None)
    return values, tensors
