"""Converts a tiny checkpoint of any family to GGUF, by the rules of llama.cpp's converter.

Tensor names come from the `gguf` package's own map.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from support.gguf_files import add_vocabulary, converters_permutation

Arch = gguf.MODEL_ARCH
Qtype = gguf.GGMLQuantizationType
# Rows of `tiny_families.FAMILIES`, and what a GGUF file cannot say otherwise, in tests of reading
# and of writing: two layers are enough, Gemma's queries are scaled by the size of a head, gpt-oss
# clamps at 7.
TWO = {"num_hidden_layers": 2}
WINDOWS = TWO | {"layer_types": ["sliding_attention", "full_attention"]}
# llama.cpp has one base for all layers, and scales RoPE in those without a window.
MELLUM_ROPE = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}
# llama.cpp scales RoPE in layers without a window, by YaRN's own factor of attention.
LAGUNA = {
    "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
    "num_attention_heads_per_layer": [4, 8, 8, 8],
    "moe_router_logit_softcapping": 0.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 64.0,
            "beta_slow": 1.0,
            "attention_factor": 1.138629436111989,
            "partial_rotary_factor": 0.5,
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
        },
    },
}
SHARED_FAMILIES: dict[str, dict[str, Any]] = {
    "llama-yarn": TWO,
    "llama-mha-bias-tied": TWO,
    "mixtral": TWO | {"sliding_window": None},
    "gemma": TWO,
    "gemma2": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma3": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma4-dense": {},
    "glm4": TWO,
    "gpt-oss": TWO | {"swiglu_limit": 7.0},
    "granite": TWO,
    "olmo2": TWO,
    "olmo3": {},
    "phi3-longrope": TWO,
    "starcoder2": TWO | {"sliding_window": None},
    "cohere": TWO,
    "exaone4-global": TWO | {"layer_types": ["full_attention"] * 2},
    "ernie4.5": TWO,
    "seed-oss": TWO,
    "smollm3": {},
    "arcee": TWO,
    "qwen3-moe-normalized": TWO,
    "qwen2-moe": TWO | {"mlp_only_layers": []},
    "glm4-moe": TWO | {"num_nextn_predict_layers": 0},
    "minimax-m2": TWO,
    "ernie4.5-moe": TWO,
    "hunyuan-moe": TWO,
    "lfm2": {},
    "lfm2-moe": {"routed_scaling_factor": 1.0},
    "nemotron-h": {},
    "nemotron-3": {},
    "nemotron-3-latent": {},
    "granite-moe": TWO,
    "granite-moe-shared": TWO,
    "granite-hybrid": {},
    "granite-hybrid-moe": {},
    "bamba": {},
    "mamba2": TWO,
    "deepseek-v2-lite": TWO,
    "deepseek-v3": TWO,
    "kimi-k2": TWO,
    "glm": TWO | {"head_dim": 8},
    "ministral3": TWO,
    "afmoe": {"global_attn_every_n_layers": 4},
    "granite-swa": {"layer_rope_theta": [0, 10000.0, 10000.0, 10000.0]},
    "granite-moe-swa": {},
    "hy3": TWO,
    "mistral4": TWO,
    "jais2": TWO,
    "mellum": {"rope_parameters": MELLUM_ROPE},
    "stablelm": TWO,
    "stablelm-parallel": TWO,
    "gemma4-moe": {},
    "apertus": TWO,
    "laguna": LAGUNA,
    "laguna-elements": TWO | {"sliding_window": 0, "tie_word_embeddings": True},
}
# By model_type. Mixtral is a llama with experts, OLMo 3 an OLMo 2 with sliding windows.
ARCHITECTURES = {
    "llama": Arch.LLAMA,
    "mixtral": Arch.LLAMA,
    "qwen2_moe": Arch.QWEN2MOE,
    "qwen3_moe": Arch.QWEN3MOE,
    "olmoe": Arch.OLMOE,
    "gemma": Arch.GEMMA,
    "gemma2": Arch.GEMMA2,
    "gemma3_text": Arch.GEMMA3,
    "gemma4_text": Arch.GEMMA4,
    "glm4": Arch.GLM4,
    "gpt_oss": Arch.GPT_OSS,
    "granite": Arch.GRANITE,
    "olmo2": Arch.OLMO2,
    "olmo3": Arch.OLMO2,
    "phi3": Arch.PHI3,
    "starcoder2": Arch.STARCODER2,
    "cohere": Arch.COMMAND_R,
    "cohere2": Arch.COHERE2,
    "exaone4": Arch.EXAONE4,
    "ernie4_5": Arch.ERNIE4_5,
    "hunyuan_v1_dense": Arch.HUNYUAN_DENSE,
    "seed_oss": Arch.SEED_OSS,
    "smollm3": Arch.SMOLLM3,
    "arcee": Arch.ARCEE,
    "apertus": Arch.APERTUS,
    "glm4_moe": Arch.GLM4_MOE,
    "minimax_m2": Arch.MINIMAXM2,
    "ernie4_5_moe": Arch.ERNIE4_5_MOE,
    "hunyuan_v1_moe": Arch.HUNYUAN_MOE,
    "lfm2": Arch.LFM2,
    "lfm2_moe": Arch.LFM2MOE,
    "nemotron_h": Arch.NEMOTRON_H,
    "nemotron_h_moe": Arch.NEMOTRON_H_MOE,
    "qwen3_5_text": Arch.QWEN35,
    "qwen3_5_moe_text": Arch.QWEN35MOE,
    "qwen3_next": Arch.QWEN3NEXT,
    "granitemoe": Arch.GRANITE_MOE,
    "granitemoeshared": Arch.GRANITE_MOE,
    "granitemoehybrid": Arch.GRANITE_HYBRID,
    "bamba": Arch.GRANITE_HYBRID,
    "mamba2": Arch.MAMBA2,
    "deepseek_v2": Arch.DEEPSEEK2,
    "deepseek_v3": Arch.DEEPSEEK2,
    "glm": Arch.CHATGLM,
    "ministral3": Arch.MISTRAL3,
    "nemotron": Arch.NEMOTRON,
    "afmoe": Arch.AFMOE,
    "granite_swa": Arch.GRANITE,
    "granitemoe_swa": Arch.GRANITE_MOE,
    "hy_v3": Arch.DOTS1,
    "mistral4": Arch.MISTRAL4,
    "jais2": Arch.JAIS2,
    "mellum": Arch.QWEN3MOE,
    "stablelm": Arch.STABLELM,
    "dots1": Arch.DOTS1,
    "exaone_moe": Arch.EXAONE_MOE,
    "laguna": Arch.STEP35,
}
# Architectures that the gguf package does not know. They have the tensors of those above.
OTHER_NAMES = {
    "mellum": "mellum",
    "hy_v3": "hy_v3",
    "granite_swa": "granite_swa",
    "granitemoe_swa": "granite_swa",
    "laguna": "laguna",
}
GRANITE_MOE = {"granitemoe", "granitemoeshared", "granitemoehybrid"}
DELTA_NETS = {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"}
DEEPSEEK = {"deepseek_v2", "deepseek_v3", "mistral4"}
PERMUTED = {"llama", "mixtral", "bamba", "granite", "smollm3", "arcee", "ministral3"} | GRANITE_MOE
GRANITE_SWA = {"granite_swa", "granitemoe_swa"}
PERMUTED |= GRANITE_SWA
NORM_PLUS_ONE = {"gemma", "gemma2", "gemma3_text", "nemotron"} | DELTA_NETS
PARTIAL_ROTARY = {"glm", "glm4", "phi3", "glm4_moe", "minimax_m2", "nemotron", "stablelm"}
PARTIAL_ROTARY |= DELTA_NETS
# Where the converter writes which layers have a window.
WINDOW_PATTERN = {"olmo3", "exaone4", "exaone_moe", "gemma3_text", "gemma4_text", "mellum"}
WINDOW_PATTERN |= GRANITE_SWA

Array = np.ndarray[Any, Any]


def convert_family(
    source: Path,
    path: Path,
    qtype: Qtype = Qtype.F32,
    experts_qtype: Qtype | None = None,
    without: tuple[str, ...] = (),
    tensors_per_file: int = 0,
    extra: dict[str, Array] | None = None,
    **keys: Any,
) -> Path:
    """Write the checkpoint in the folder `source` as GGUF.

    qtype: of the matrices; experts_qtype: of experts, if that is another. without: tensors and
    keys (without the architecture) that are left out. tensors_per_file: of a model in several
    files. extra: more tensors, under Hugging Face's names. keys: more keys, "__" for a dot.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    if kind == "nemotron_h" and "moe" in config["layers_block_type"]:
        kind = config["model_type"] = "nemotron_h_moe"
    arch = ARCHITECTURES[kind]
    if kind.startswith("nemotron_h"):
        config["num_hidden_layers"] = len(config["layers_block_type"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"] + 1)
    arch_name = OTHER_NAMES.get(kind, gguf.MODEL_ARCH_NAMES[arch])
    writer = gguf.GGUFWriter(path, arch_name, split_max_tensors=tensors_per_file)
    weights = {
        name: t.float().numpy() for name, t in load_file(source / "model.safetensors").items()
    }
    weights |= extra or {}
    metadata = family_metadata(config) | _xielu_metadata(weights)
    metadata |= {key.replace("__", "."): keys[key] for key in keys}
    for key, value in metadata.items():
        if key not in without:
            prefix = "" if key.startswith("xielu.") else f"{arch_name}."
            _add_value(writer, f"{prefix}{key}", value)
    add_vocabulary(writer, config["vocab_size"], "gpt-2")
    for name, values in [*_tensors(weights, config), *_rope_tensors(config)]:
        stored_as = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if values.size > 1 and not stored_as.endswith(("ssm_a", "ssm_d")):
            values = np.squeeze(values)
        if stored_as in without:
            continue
        stored_type = (experts_qtype or qtype) if "_exps" in stored_as else qtype
        if values.ndim < 2 or stored_type == Qtype.F32 or stored_as.endswith(".bias"):
            writer.add_tensor(stored_as, np.ascontiguousarray(values, np.float32))
        else:
            flat = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
            packed = gguf.quants.quantize(flat, stored_type)
            writer.add_tensor(
                stored_as, packed.reshape(*values.shape[:-1], -1), raw_dtype=stored_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def round_like(oracle: torch.nn.Module, qtype: Qtype) -> None:
    """Round the weights of a model as `convert_family` does. Each expert is a slice of a tensor."""
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if parameter.ndim > 1 and "bias" not in name:
                flat = parameter.numpy().reshape(-1, parameter.shape[-1])
                values = gguf.quants.dequantize(gguf.quants.quantize(flat, qtype), qtype)
                parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))


def family_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint without the name of the architecture."""
    kind = config["model_type"]
    if kind == "mamba2":
        return _mamba2_metadata(config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"rope_theta": 1e4, "rope_type": "default"}
    full = rope.get("full_attention", rope)
    metadata = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads", heads),
        "rope.freq_base": float(full["rope_theta"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    for field, key in (
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ("norm_eps", "attention.layer_norm_rms_epsilon"),
        ("conv_L_cache", "shortconv.l_cache"),
        ("num_dense_layers", "leading_dense_block_count"),
        ("layer_norm_eps", "attention.layer_norm_epsilon"),
        ("norm_epsilon", "attention.layer_norm_epsilon"),
        ("num_shared_experts", "expert_shared_count"),
        ("top_k_experts", "expert_used_count"),
        ("use_parallel_residual", "use_parallel_residual"),
        ("sliding_window", "attention.sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
        ("logit_scale", "logit_scale"),
        ("num_experts", "expert_count"),
        ("num_local_experts", "expert_count"),
        ("n_routed_experts", "expert_count"),
        ("moe_num_experts", "expert_count"),
        ("moe_k", "expert_used_count"),
        ("moe_topk", "expert_used_count"),
        ("n_shared_experts", "expert_shared_count"),
        ("moe_num_shared_experts", "expert_shared_count"),
        ("first_k_dense_replace", "leading_dense_block_count"),
        ("moe_layer_start_index", "leading_dense_block_count"),
        ("moe_layer_interval", "interleave_moe_layer_step"),
        ("n_group", "expert_group_count"),
        ("topk_group", "expert_group_used_count"),
        ("routed_scaling_factor", "expert_weights_scale"),
        ("num_experts_per_tok", "expert_used_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ("linear_conv_kernel_dim", "ssm.conv_kernel"),
        ("linear_key_head_dim", "ssm.state_size"),
        ("linear_num_key_heads", "ssm.group_count"),
        ("linear_num_value_heads", "ssm.time_step_rank"),
        ("num_mtp_layers", "nextn_predict_layers"),
    ):
        if config.get(field) is not None:
            metadata[key] = config[field]
    if kind in ("qwen2_moe", "qwen3_moe", "starcoder2"):  # their converters write no window
        metadata.pop("attention.sliding_window", None)
    if kind == "nemotron":
        metadata["attention.layer_norm_epsilon"] = config["norm_eps"]
        del metadata["attention.layer_norm_rms_epsilon"]
    if kind == "ministral3":
        metadata["rope.scaling.yarn_log_multiplier"] = full["mscale_all_dim"]
        metadata["attention.temperature_scale"] = full["llama_4_scaling_beta"]
    if kind == "dots1":
        metadata.pop("attention.sliding_window", None)
    if kind in ("glm4_moe", "dots1", "exaone_moe"):
        metadata["expert_weights_norm"] = config["norm_topk_prob"]
        metadata["expert_gating_func"] = 2  # sigmoid
    if kind == "hy_v3":
        metadata["expert_weights_norm"] = True
        metadata["expert_weights_scale"] = config["router_scaling_factor"]
        metadata["expert_gating_func"] = 2  # sigmoid
        shared_size = config["moe_intermediate_size"] * config["num_shared_experts"]
        metadata["expert_shared_feed_forward_length"] = shared_size
    if kind == "afmoe":
        metadata["expert_weights_norm"] = True
        metadata["expert_weights_scale"] = config["route_scale"]
        metadata["expert_gating_func"] = 2  # sigmoid
    if kind == "laguna":
        metadata |= _laguna_metadata(config, head_dim)
        if not config["sliding_window"]:
            del metadata["attention.sliding_window"]
    if kind in ("gpt_oss", "minimax_m2", "hunyuan_v1_moe"):
        metadata["expert_feed_forward_length"] = config["intermediate_size"]
    if kind == "phi3" and not config.get("sliding_window"):
        metadata["attention.sliding_window"] = 0
    if kind == "phi3":
        original = full.get("original_max_position_embeddings")
        metadata["rope.scaling.original_context_length"] = (
            original or config["original_max_position_embeddings"]
        )
    if kind in PARTIAL_ROTARY:
        rotary = int(head_dim * full.get("partial_rotary_factor", 1.0))
        metadata["rope.dimension_count"] = rotary
    if kind in WINDOW_PATTERN and config.get("sliding_window"):
        metadata["attention.sliding_window_pattern"] = [
            layer == "sliding_attention" for layer in config["layer_types"]
        ]
    if kind in GRANITE_SWA:
        thetas = config["layer_rope_theta"] or [1e4] * config["num_hidden_layers"]
        metadata["attention.rope_pattern"] = [theta > 0 for theta in thetas]
        metadata["expert_shared_feed_forward_length"] = config.get("shared_intermediate_size", 0)
    if kind == "gemma4_text":
        metadata |= _gemma4_metadata(config)
    if kind in ("lfm2", "lfm2_moe"):
        metadata["attention.head_count_kv"] = [
            config["num_key_value_heads"] if layer == "full_attention" else 0
            for layer in config["layer_types"]
        ]
        del metadata["attention.key_length"], metadata["attention.value_length"]
    if config.get("block_auto_adjust_ff_dim"):
        multiple = config["block_multiple_of"]
        metadata["feed_forward_length"] = -(-(2 * config["intermediate_size"] // 3) // multiple)
        metadata["feed_forward_length"] *= multiple
    if kind.startswith("nemotron_h"):
        metadata |= _nemotron_h_metadata(config)
    if kind == "nemotron_h":  # of dense models the config has experts, too
        metadata = {key: metadata[key] for key in metadata if not key.startswith("expert_")}
    if "linear_value_head_dim" in config:
        value_size = config["linear_value_head_dim"] * config["linear_num_value_heads"]
        metadata["ssm.inner_size"] = value_size
        metadata["attention.recurrent_layers"] = [
            layer == "linear_attention" for layer in config["layer_types"]
        ]
    if kind == "qwen3_next":
        metadata["expert_weights_norm"] = config["norm_topk_prob"]
    if kind in GRANITE_MOE and config.get("shared_intermediate_size"):
        key = "expert_shared_feed_forward_length"
        metadata[key] = config["shared_intermediate_size"]
    if kind in ("granitemoehybrid", "bamba"):
        metadata |= _hybrid_mamba2_metadata(config)
    if kind in DEEPSEEK:
        metadata |= _deepseek_metadata(config, full)
    if kind == "lfm2_moe":
        metadata["expert_gating_func"] = 2  # sigmoid
        metadata.pop("expert_weights_scale")  # the converter does not write it
    if "sliding_attention" in rope:
        metadata["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if full["rope_type"] in ("linear", "yarn"):
        metadata["rope.scaling.type"] = full["rope_type"]
        metadata["rope.scaling.factor"] = float(full["factor"])
    if full["rope_type"] == "yarn":
        original = full["original_max_position_embeddings"]
        metadata["rope.scaling.original_context_length"] = original
        for field, key in (
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
            ("attention_factor", "yarn_attn_factor"),
        ):
            if full.get(field):
                metadata[f"rope.scaling.{key}"] = float(full[field])
    if full["rope_type"] == "dynamic":
        exponent = head_dim / (head_dim - 2)
        metadata["rope.freq_base"] = full["rope_theta"] * full["alpha"] ** exponent
        metadata["rope.scaling.type"] = "none"
        metadata["rope.scaling.factor"] = 1.0
    return metadata


def _laguna_metadata(config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """What the converter writes of Laguna. The windows have no pattern: llama.cpp has its own."""
    ropes = config["rope_parameters"]
    rotated = {kind: int(head_dim * ropes[kind]["partial_rotary_factor"]) for kind in ropes}
    is_dense = [kind == "dense" for kind in config["mlp_layer_types"]]
    return {
        "attention.head_count": config["num_attention_heads_per_layer"],
        "expert_weights_norm": True,
        "expert_weights_scale": config["moe_routed_scaling_factor"],
        "expert_gating_func": 2,  # sigmoid
        "leading_dense_block_count": [*is_dense, False].index(False),
        "rope.dimension_count": rotated["full_attention"],
        "rope.dimension_count_swa": rotated["sliding_attention"],
    }


def _xielu_metadata(weights: dict[str, Array]) -> dict[str, list[float]]:
    """The numbers of Apertus' activation, of all layers together."""
    metadata: dict[str, list[float]] = {}
    for name in sorted(weights, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        if ".act_fn." in name:
            key = f"xielu.{name.rpartition('.')[2]}"
            metadata.setdefault(key, []).append(float(weights[name].item()))
    return metadata


def _mamba2_metadata(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "context_length": 2**20,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": config["num_hidden_layers"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": config["num_heads"] * config["head_dim"],
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": config["num_heads"],
        "ssm.group_count": config["n_groups"],
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
    }


def _hybrid_mamba2_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of Granite 4.0-H and Bamba: layers have attention or Mamba 2."""
    heads = config["num_key_value_heads"]
    if config["model_type"] == "bamba":
        in_attention = config["attn_layer_indices"]
        has_rope = True
    else:
        types = config["layer_types"]
        in_attention = [i for i, kind in enumerate(types) if kind == "full_attention"]
        has_rope = config["position_embedding_type"] == "rope"
    metadata = {
        "attention.head_count_kv": [
            heads if layer in in_attention else 0 for layer in range(config["num_hidden_layers"])
        ],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.time_step_rank": config["mamba_n_heads"],
        "rope.scaling.finetuned": has_rope,
    }
    if config.get("num_local_experts") == 0:
        metadata["feed_forward_length"] = config["shared_intermediate_size"]
    return metadata


def _deepseek_metadata(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of DeepSeek: latents are the keys and values of one head."""
    latent = config["kv_lora_rank"]
    rotary = config["qk_rope_head_dim"]
    metadata = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotary,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotary,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotary,
        "expert_weights_norm": config["model_type"] == "deepseek_v3",
        "expert_gating_func": 2 if config["model_type"] == "deepseek_v3" else 1,
    }
    if config["q_lora_rank"]:
        metadata["attention.q_lora_rank"] = config["q_lora_rank"]
    if rope.get("llama_4_scaling_beta"):
        original = rope["original_max_position_embeddings"]
        metadata["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        metadata["attention.temperature_length"] = original
    if config["model_type"] == "mistral4":
        metadata["expert_weights_norm"] = config["norm_topk_prob"]
    if rope.get("mscale_all_dim"):
        metadata["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return metadata


def _nemotron_h_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of Nemotron-H, whose layers have one block each."""
    types = config["layers_block_type"]
    size = config["moe_intermediate_size" if "moe" in types else "intermediate_size"]
    metadata: dict[str, Any] = {
        "attention.head_count_kv": [
            config["num_key_value_heads"] if kind == "full_attention" else 0 for kind in types
        ],
        "feed_forward_length": [size if kind in ("mlp", "moe") else 0 for kind in types],
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.time_step_rank": config["mamba_num_heads"],
        "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        "rope.dimension_count": config["head_dim"] // 2,
    }
    if "moe" in types:
        metadata["expert_weights_norm"] = config["norm_topk_prob"]
        shared = config["moe_shared_expert_intermediate_size"]
        metadata["expert_shared_feed_forward_length"] = shared
        if config["moe_latent_size"]:
            metadata["moe_latent_size"] = config["moe_latent_size"]
    return metadata


def _gemma4_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What the converter writes of Gemma 4, whose layers differ."""
    num_layers = config["num_hidden_layers"]
    num_shared = config["num_kv_shared_layers"]
    of_full_layers = next(iter(config["per_layer_config"].values()))
    full_dim = of_full_layers["head_dim"]
    metadata: dict[str, Any] = {
        "attention.shared_kv_layers": num_shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "attention.key_length": full_dim,
        "attention.value_length": full_dim,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.dimension_count": full_dim,
        "rope.dimension_count_swa": config["head_dim"],
    }
    if config["use_double_wide_mlp"]:
        size = config["intermediate_size"]
        metadata["feed_forward_length"] = [
            size if layer < num_layers - num_shared else 2 * size for layer in range(num_layers)
        ]
    if "num_key_value_heads" in of_full_layers:
        metadata["attention.head_count_kv"] = [
            (config if kind == "sliding_attention" else of_full_layers)["num_key_value_heads"]
            for kind in config["layer_types"]
        ]
    return metadata


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds: dict[type, Callable[..., None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    kinds[type(value)](key, value)


def _tensors(weights: dict[str, Array], config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """The tensors that the converter names and stores, under names that its map knows."""
    kind = config["model_type"]
    heads = config.get("num_attention_heads", 0)
    kv_heads = config.get("num_key_value_heads", heads)
    groups = config.get("n_groups") or config.get("mamba_n_groups")
    experts: dict[str, list[Array]] = {}
    for name, values in weights.items():
        is_tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
        if is_tied or ".act_fn." in name:  # these are in the metadata
            continue
        if kind in PERMUTED and ".q_proj." in name:
            values = converters_permutation(values, heads)
        if kind in PERMUTED and ".k_proj." in name:
            values = converters_permutation(values, kv_heads)
        if kind in NORM_PLUS_ONE and name.endswith("norm.weight"):
            values = values if "linear_attn." in name else values + 1
        if ".linear_attn." in name and kind != "qwen3_next":
            values = _tiled(name, values, config)
        if name.endswith((".A_log", ".D")) and "linear_attn" not in name:
            values = values[:, None]
        if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
            values = values.reshape(groups, -1)
        if name.endswith(".A_log"):
            values = -np.exp(values)
        if name.endswith(".dt_bias"):
            name = name.replace(".dt_bias", ".dt_proj.bias")
        expert = re.fullmatch(
            r"(?:model|backbone)\.(layers\.\d+\.)(\w+)\.experts\.(\d+)\.(\w+)\.weight", name
        )
        if kind in GRANITE_SWA and re.search(r"\.(sinks|block_sparse_moe|shared_mlp)\b", name):
            yield from _granite_swa_tensors(name, values)
        elif kind == "mistral4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            part = "ffn_gate_up_exps" if "gate_up" in name else "ffn_down_exps"
            yield f"blk.{_layer(name)}.{part}.weight", values
        elif ".in_proj_qkvz." in name or ".kv_b_proj." in name or ".input_linear." in name:
            yield from _split_tensors(name, values, config)
        elif name.endswith("block_sparse_moe.output_linear.weight"):
            yield f"blk.{_layer(name)}.ffn_down_exps.weight", values
        elif name.endswith("shared_mlp.output_linear.weight"):
            shared = "_shexp" if config["num_local_experts"] else ""
            yield f"blk.{_layer(name)}.ffn_down{shared}.weight", values
        elif kind == "gemma4_text" and ".experts." in name:
            yield from _gemma4_experts(name, values)
        elif name.endswith((".router.scale", ".router.per_expert_scale")):
            part = "ffn_gate_inp" if name.endswith(".router.scale") else "ffn_down_exps"
            yield f"blk.{_layer(name)}.{part}.scale", values
        elif kind == "gpt_oss" and ".experts." in name:
            yield from _gpt_oss_experts(name, values)
        elif name.endswith("e_score_correction_bias"):
            name = name.replace(".experts.e_score", ".e_score")  # Laguna's
            yield name.removesuffix("_bias") + ".bias", values
        elif name.endswith(".expert_bias") and kind != "hy_v3":
            yield f"{name}.bias", values
        elif name.endswith((".sinks", ".layer_scalar")):
            yield f"{name}.weight", values
        elif expert:
            layer, _, index, part = expert.groups()
            merged = f"model.{layer}mlp.experts.{part}.weight"
            if kind == "minimax_m2":
                merged = f"model.{layer}block_sparse_moe.experts.{part}.weight"
            if kind in ("mixtral", "lfm2_moe"):
                merged = f"{layer}feed_forward.experts.{part}.weight"
            stack = experts.setdefault(merged, [])
            assert len(stack) == int(index), "experts come in order"
            stack.append(values)
        else:
            yield name, values
    for name, stack in experts.items():
        yield name, np.stack(stack)


def _layer(name: str) -> str:
    return name.split(".layers.")[1].partition(".")[0]


def _split_tensors(name: str, values: Array, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """The parts of a tensor that files have in two."""
    layer = f"blk.{_layer(name)}"
    if ".in_proj_qkvz." in name:
        keys = config["linear_key_head_dim"]
        heads = config["linear_num_key_heads"]
        per_head = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
        by_head = values.reshape(heads, -1, values.shape[-1])
        ends = np.cumsum([keys, keys, per_head])
        parts = [part.reshape(-1, values.shape[-1]) for part in np.split(by_head, ends, axis=1)]
        yield f"{layer}.attn_qkv.weight", np.concatenate(parts[:3])
        yield f"{layer}.attn_gate.weight", parts[3]
    elif ".kv_b_proj." in name:
        keys = config["qk_nope_head_dim"]
        by_head = values.reshape(config["num_attention_heads"], -1, values.shape[-1])
        yield f"{layer}.attn_k_b.weight", by_head[:, :keys].swapaxes(1, 2)
        yield f"{layer}.attn_v_b.weight", by_head[:, keys:]
    else:
        ending = "_exps" if "block_sparse_moe" in name else "_shexp"
        if not config["num_local_experts"]:
            ending = ""
        gate, up = np.split(values, 2, axis=-2)
        yield f"{layer}.ffn_gate{ending}.weight", gate
        yield f"{layer}.ffn_up{ending}.weight", up


def _gemma4_experts(name: str, values: Array) -> Iterator[tuple[str, Array]]:
    layer = f"blk.{_layer(name)}"
    if name.endswith("down_proj"):
        yield f"{layer}.ffn_down_exps.weight", values
        return
    gate, up = np.split(values, 2, axis=1)
    yield f"{layer}.ffn_gate_exps.weight", gate
    yield f"{layer}.ffn_up_exps.weight", up


def _tiled(name: str, values: Array, config: dict[str, Any]) -> Array:
    """The value heads of a gated delta net, the first one of each key head first."""
    num_key_heads = config["linear_num_key_heads"]
    size = config["linear_value_head_dim"]
    num_first = 0  # rows of queries and keys
    if ".norm." in name:
        return values
    if ".out_proj." in name:
        return _tiled("", values.T, config).T
    if ".in_proj_qkv." in name or ".conv1d." in name:
        num_first = 2 * num_key_heads * config["linear_key_head_dim"]
    elif name and ".in_proj_z." not in name:
        size = 1
    grouped = values[num_first:].reshape(num_key_heads, -1, size, *values.shape[1:])
    tiled = grouped.swapaxes(0, 1).reshape(-1, *values.shape[1:])
    return np.concatenate((values[:num_first], tiled))


def _granite_swa_tensors(name: str, values: Array) -> Iterator[tuple[str, Array]]:
    """Gate and up of experts, and those of the shared expert, stay together."""
    layer = f"blk.{_layer(name)}"
    names = {
        "self_attn.sinks": "attn_sinks",
        "experts.gate_up_proj": "ffn_gate_up_exps",
        "experts.down_proj": "ffn_down_exps",
        "block_sparse_moe.router.weight": "ffn_gate_inp",
        "shared_mlp.input_linear.weight": "ffn_up_shexp",
        "shared_mlp.output_linear.weight": "ffn_down_shexp",
    }
    stored_as = next(names[ending] for ending in names if name.endswith(ending))
    yield f"{layer}.{stored_as}.weight", values


def _gpt_oss_experts(name: str, values: Array) -> Iterator[tuple[str, Array]]:
    """gate and up are stored in turn, and weights are transposed."""
    if name.endswith("_bias"):
        name = name.removesuffix("_bias") + ".bias"
    else:
        name = name + ".weight"
        values = values.swapaxes(1, 2)
    if "gate_up_proj" not in name:
        yield name, values
        return
    yield name.replace("gate_up_proj", "gate_proj"), values[:, 0::2]
    yield name.replace("gate_up_proj", "up_proj"), values[:, 1::2]


def _rope_tensors(config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    rope = config.get("rope_parameters") or {}
    if config["model_type"] == "gemma4_text":
        num_pairs = next(iter(config["per_layer_config"].values()))["head_dim"] // 2
        num_rotated = int(num_pairs * rope["full_attention"]["partial_rotary_factor"])
        divisors = [1.0] * num_rotated + [1e30] * (num_pairs - num_rotated)
        yield "rope_freqs.weight", np.array(divisors, np.float32)
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelengths
        low = rope["low_freq_factor"]
        smooth = ((turns - low) / (rope["high_freq_factor"] - low)).clip(0, 1)
        divisors = 1 / ((1 - smooth) / rope["factor"] + smooth)
        yield "rope_freqs.weight", divisors.astype(np.float32)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.array(rope["short_factor"], np.float32)
