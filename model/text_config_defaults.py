"""What transformers assumes for sizes that the `text_config` of a multimodal model leaves out.

A text model's own config.json has them all; a nested one may have only what differs from the
defaults of its config class. A test compares them with transformers.
"""

from __future__ import annotations

from typing import Any

from llmkit.checkpoint.config_defaults import REQUIRED_SIZES


def _sizes(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, positions: int
) -> dict[str, Any]:
    values = (vocab, hidden, intermediate, layers, heads, positions)
    return dict(zip(REQUIRED_SIZES, values, strict=True))


_QWEN_VL = _sizes(152064, 8192, 29568, 80, 64, 32768) | {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rope_theta": 1e6,
}
_DEEPSEEK_V3 = _sizes(129280, 7168, 18432, 61, 128, 4096) | {"n_routed_experts": 256}
# By the model_type of the text_config. The other fields have their family's defaults.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _sizes(32000, 4096, 11008, 32, 32, 2048),
    "mistral": _sizes(32000, 4096, 14336, 32, 32, 131072),
    "ministral3": _sizes(131072, 4096, 14336, 34, 32, 262144),
    "mistral4": _sizes(131072, 4096, 12288, 36, 32, 1048576) | {"n_routed_experts": 128},
    "deepseek_v3": _DEEPSEEK_V3,
    "qwen2": _sizes(151936, 4096, 22016, 32, 32, 32768),
    "qwen3": _sizes(151936, 4096, 22016, 32, 32, 32768),
    "qwen3_moe": _sizes(151936, 2048, 6144, 24, 32, 32768)
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "qwen3_vl_moe_text": _sizes(151936, 2048, 5632, 24, 16, 128000)
    | {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": True,  # no field of this config: its router always does so
        "rope_theta": 5e5,
    },
    "qwen3_5_text": _sizes(248320, 4096, 12288, 32, 16, 32768),
    "qwen3_5_moe_text": _sizes(248320, 2048, 512, 40, 16, 32768),
    "gemma3_text": _sizes(262208, 2304, 9216, 26, 8, 131072),
    "gemma4_text": _sizes(262144, 2304, 9216, 30, 8, 131072),
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_vl_text": _sizes(151936, 4096, 22016, 32, 32, 128000) | {"rope_theta": 5e5},
}
