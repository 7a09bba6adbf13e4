"""Tiny random multimodal models, each with a tower, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from support.tiny_models import write_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 64,
}
GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
GATED_DELTA_NET = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED_EXPERT = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
CLIP = VISION | {"model_type": "clip_vision_model"}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# name: model_type, text_config, vision_config
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", GEMMA3, VISION),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
        VISION | {"model_type": "pixtral", "head_dim": 8},
    ),
    "mistral4": (
        "mistral3",
        LATENT_ATTENTION
        | {
            "model_type": "mistral4",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        VISION | {"model_type": "pixtral", "head_dim": 8},
    ),
    "kimi-k2.5": (
        "kimi_k25",
        LATENT_ATTENTION
        | {
            "model_type": "deepseek_v3",
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": False,
        },
        VISION | {"model_type": "kimi_k25_vision"},
    ),
    "ministral3": (
        "mistral3",
        {
            "model_type": "ministral3",
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        VISION | {"model_type": "pixtral", "head_dim": 8},
    ),
    "gemma4": (
        "gemma4",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 0,
        },
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
    ),
    "llava": ("llava", {"model_type": "llama"}, CLIP),
    "llava-mistral": ("llava", {"model_type": "mistral", "sliding_window": 12}, CLIP),
    "llava-qwen2": ("llava", {"model_type": "qwen2"}, CLIP),
    "llava-next": ("llava_next", {"model_type": "llama"}, CLIP),
    "llava-onevision": (
        "llava_onevision",
        {"model_type": "qwen2"},
        VISION | {"model_type": "siglip_vision_model"},
    ),
    "internvl": (
        "internvl",
        {"model_type": "qwen3", "head_dim": 16},
        VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "qwen2-vl": (
        "qwen2_vl",
        {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2},
    ),
    "qwen2.5-vl": (
        "qwen2_5_vl",
        {"rope_parameters": MROPE},
        QWEN_VISION | {"fullatt_block_indexes": [0]},
    ),
    "qwen3-vl": (
        "qwen3_vl",
        {"head_dim": 16, "rope_parameters": MROPE | {"mrope_interleaved": True}},
        QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen3-vl-moe": (
        "qwen3_vl_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen3.5": (
        "qwen3_5",
        GATED_DELTA_NET | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5}},
        QWEN_VISION | {"num_position_embeddings": 16},
    ),
    "qwen3.5-moe": (
        "qwen3_5_moe",
        GATED_DELTA_NET | SHARED_EXPERT,
        QWEN_VISION | {"num_position_embeddings": 16},
    ),
    "idefics3": ("idefics3", {"model_type": "llama"}, VISION),
    "smolvlm": ("smolvlm", {"model_type": "llama"}, VISION),
}


def tiny_wrapper(name: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """The model of a row of WRAPPERS, with random values also where models start with ones.

    sizes: fields of the text_config that differ from the row.
    """
    model_type, text, vision = WRAPPERS[name]
    if "out_hidden_size" in vision and "hidden_size" in sizes:
        vision = vision | {"out_hidden_size": sizes["hidden_size"]}
    text = TEXT | text | sizes
    config = transformers.CONFIG_MAPPING[model_type](text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def save_wrapper(model: Any, path: Path, hub_names: bool) -> Path:
    """Save a model with a tokenizer and its processor's files.

    hub_names: with the names that files of the hub have, rather than those of transformers 5.
    """
    model.save_pretrained(path, save_original_format=hub_names)
    if hub_names and model.config.model_type == "kimi_k25":
        # transformers gives the text model's layers the name that the tower's have in such files.
        file = path / "model.safetensors"
        tensors = {
            name.replace("model.blocks.", "model.layers."): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    write_tokenizer(path)
    (path / "preprocessor_config.json").write_text('{"size": 28}')
    (path / "processor_config.json").write_text('{"image_seq_length": 4}')
    return path


def wrapper_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocab] of one sequence of token ids [n]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
        return logits.float()
