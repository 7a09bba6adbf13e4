"""Checkpoints of random bytes with the names, shapes and dtypes that the parameter table demands.

No model is built, so a test may have hundreds of them; weights mean nothing unless a test makes
them.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.quantized_weight import QuantizationConfig
from llmkit.checkpoint.safetensors_header import byte_count
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.families import model_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def synthetic_checkpoint(
    path: Path,
    quantization: QuantizationConfig | None = None,
    *,
    seed: int = 0,
    dtype: str = "BF16",
    **config: Any,
) -> Path:
    """Write model.safetensors and config.json; `config` overrides LLAMA. Return `path`."""
    path.mkdir(parents=True, exist_ok=True)
    values = LLAMA | config
    if quantization is not None:
        values["quantization_config"] = format_of(quantization).config_dict(quantization)
    generator = random.Random(seed)
    tensors = {}
    for name, (_, packed) in checkpoint_tensors(model_spec(values), quantization).items():
        stored_dtype = packed.dtype or dtype
        if packed.derived == "group_index":
            (columns,) = packed.shape
            group_size = columns if packed.group_size == -1 else packed.group_size
            tensor = (torch.arange(columns) // group_size).to(DTYPES[stored_dtype])
        elif packed.derived == "shape":
            tensor = torch.tensor(packed.source_shape, dtype=DTYPES[stored_dtype])
        elif packed.scale:  # random bytes of floats may be no numbers
            top = 254 if stored_dtype == "U8" else 1
            scales = [top * (1 - generator.random()) for _ in range(math.prod(packed.shape))]
            tensor = torch.tensor(scales).to(DTYPES[stored_dtype]).reshape(packed.shape)
        else:
            data = bytearray(generator.randbytes(byte_count(stored_dtype, packed.shape)))
            tensor = torch.frombuffer(data, dtype=DTYPES[stored_dtype]).reshape(packed.shape)
        tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(values))
    return path


def stored_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory's safetensors files, as dtype, shape and bytes (NaN compares
    equal).
    """
    from safetensors.torch import load_file

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in found, f"{name} is in two files"
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = (str(tensor.dtype), tuple(tensor.shape), data)
    return found
