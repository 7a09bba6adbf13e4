"""The families whose GGUF files are written, as tiny models, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from support.gguf_families import SHARED_FAMILIES, TWO
from support.tiny_families import family_oracle
from support.tiny_models import write_tokenizer

TINY_VOCAB = 320
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Rows of FAMILIES, and what a GGUF file can say of them.
FAMILIES: dict[str, dict[str, Any]] = SHARED_FAMILIES | {
    "llama3-rope": TWO | {"rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    "mistral": TWO | {"sliding_window": None},
    "qwen2": TWO,
    "qwen3": TWO,
    "gemma4": {"vocab_size_per_layer_input": TINY_VOCAB},
    "phi3": TWO,
    "cohere2": {},
    "hunyuan": TWO | {"attention_bias": False},
    "olmoe": TWO | {"num_key_value_heads": 4},
    # llama.cpp's delta nets have key heads and value heads of one size.
    "qwen3.5": {"attention_bias": False, "linear_value_head_dim": 8},
    "qwen3.5-moe": {"linear_value_head_dim": 8},
    "qwen3-next": {"mlp_only_layers": [], "norm_topk_prob": True, "linear_value_head_dim": 8},
    "internlm3": TWO,
    "iquestcoder": TWO,
    "nemotron": TWO | {"head_dim": 8},
    "dots1": TWO | {"sliding_window": None, "num_key_value_heads": 4},
    "exaone-moe": {},
    "solar-open": TWO,
    "apertus": TWO | {"attention_bias": True},
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
