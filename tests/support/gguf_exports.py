"""The families whose GGUF files are written, as tiny models, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from support.tiny_families import family_oracle
from support.tiny_models import write_tokenizer

TINY_VOCAB = 320
TWO = {"num_hidden_layers": 2}
WINDOWS = TWO | {"layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Rows of FAMILIES, and what a GGUF file can say of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-yarn": TWO,
    "llama3-rope": TWO | {"rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    "llama-mha-bias-tied": TWO,
    "mistral": TWO | {"sliding_window": None},
    "qwen2": TWO,
    "qwen3": TWO,
    "mixtral": TWO | {"sliding_window": None},
    "gemma": TWO,
    "gemma2": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma3": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma4": {"vocab_size_per_layer_input": TINY_VOCAB},
    "gemma4-dense": {},
    "glm4": TWO,
    "gpt-oss": TWO | {"swiglu_limit": 7.0},
    "granite": TWO,
    "olmo2": TWO,
    "olmo3": {},
    "phi3": TWO,
    "phi3-longrope": TWO,
    "starcoder2": TWO | {"sliding_window": None},
    "cohere": TWO,
    "cohere2": {},
    "exaone4-global": TWO | {"layer_types": ["full_attention"] * 2},
    "ernie4.5": TWO,
    "hunyuan": TWO | {"attention_bias": False},
    "seed-oss": TWO,
    "smollm3": {},
    "arcee": TWO,
    "qwen3-moe-normalized": TWO,
    "qwen2-moe": TWO | {"mlp_only_layers": []},
    "olmoe": TWO | {"num_key_value_heads": 4},
    "glm4-moe": TWO | {"num_nextn_predict_layers": 0},
    "minimax-m2": TWO,
    "ernie4.5-moe": TWO,
    "hunyuan-moe": TWO,
    "lfm2": {},
    "lfm2-moe": {"routed_scaling_factor": 1.0},
    # llama.cpp's delta nets have key heads and value heads of one size.
    "qwen3.5": {"attention_bias": False, "linear_value_head_dim": 8},
    "qwen3.5-moe": {"linear_value_head_dim": 8},
    "qwen3-next": {"mlp_only_layers": [], "norm_topk_prob": True, "linear_value_head_dim": 8},
    "nemotron-h": {},
    "nemotron-3": {},
    "nemotron-3-latent": {},
    "granite-moe": TWO,
    "granite-moe-shared": TWO,
    "granite-hybrid": {},
    "granite-hybrid-moe": {},
    "mamba2": TWO,
    "deepseek-v2-lite": TWO,
    "deepseek-v3": TWO,
    "kimi-k2": TWO,
    "internlm3": TWO,
    "iquestcoder": TWO,
    "ministral3": TWO,
    "gemma4-moe": {},
    "glm": TWO | {"head_dim": 8},
    "nemotron": TWO | {"head_dim": 8},
    "stablelm": TWO,
    "stablelm-parallel": TWO,
    "dots1": TWO | {"sliding_window": None, "num_key_value_heads": 4},
    "exaone-moe": {},
    "solar-open": TWO,
    "glm4-moe-lite": TWO | {"attention_bias": False},
}


def export(source: Path, out: Path, method: str = "bf16", **options: Any) -> Path:
    """The GGUF file of a checkpoint."""
    chosen = QuantizeOptions(method, format="gguf", evaluate=False, device="cpu", **options)
    quantize(str(source), str(out), chosen, SilentProgress())
    (path,) = out.glob("*.gguf")
    return path


def family(name: str, path: Path, **changes: Any) -> Checkpoint:
    """A tiny model of a family, with a tokenizer."""
    family_oracle(name, path, **(FAMILIES.get(name, {}) | {"vocab_size": TINY_VOCAB} | changes))
    write_tokenizer(path, vocab=TINY_VOCAB)
    return open_checkpoint(path)
