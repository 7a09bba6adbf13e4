"""Quantized checkpoints of random values that every format holds exactly, in any format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.quantized_formats import format_of
from llmkit.checkpoint.quantized_weight import QuantizationConfig, QuantizedWeight, Scheme
from llmkit.kernels.activation_quant import FP8
from llmkit.model.checkpoint_tensors import checkpoint_tensors, packed_name, scheme_of
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_quantized
from support.synthetic_checkpoint import LLAMA

# Sizes that words of 3 bits and groups of 32 divide.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
}
Change = Callable[[str, QuantizedWeight], QuantizedWeight]


def random_weight(scheme: Scheme, shape: tuple[int, int], seed: int) -> QuantizedWeight:
    """Random values whose scales have few bits, and whose zero points are at least 1."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = scheme.groups(columns)
    top = 1 << scheme.bits
    blocks = rows if scheme.block_rows == -1 else scheme.block_rows
    num_blocks = -(-rows // blocks)
    scales = torch.randint(64, 128, (num_blocks, groups), generator=generator) / 4096
    scales = scales.repeat_interleave(blocks, dim=0)[:rows].contiguous()
    zeros = torch.full((rows, groups), scheme.half, dtype=torch.uint8)
    global_scale = input_scale = None
    if scheme.is_fp8:
        q = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(FP8)
    else:
        q = torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)
    if not scheme.symmetric:
        zeros = torch.randint(1, top, zeros.shape, generator=generator, dtype=torch.uint8)
    if scheme.scale_format == "e4m3":
        global_scale = torch.tensor([2.0**-9])
        scales = scales.mul(4096).to(FP8).float() * global_scale
    elif scheme.scale_format == "e8m0":
        scales = scales.log2().floor().exp2()
    if scheme.has_input_scale:
        input_scale = torch.tensor([2.0**-5])
    return QuantizedWeight(q, scales, zeros, scheme, input_scale, global_scale)


def quantized_checkpoint(
    path: Path,
    quantization: QuantizationConfig,
    change: Change | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write model.safetensors and config.json. change: of the weight with a name."""
    path.mkdir(parents=True)
    values = LLAMA | SIZES | (config or {})
    values["quantization_config"] = format_of(quantization).config_dict(quantization)
    spec = model_spec(values)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (_, packed) in checkpoint_tensors(spec, quantization).items():
        if not packed.source_name:  # a scale of keys or values
            tensors[name] = torch.tensor([0.125])
        elif not packed.is_quantized:
            tensors[name] = torch.randn(packed.shape, generator=generator).to(torch.bfloat16)
    for index, parameter in enumerate(parameters(spec)):
        for name in parameter.source_names:
            scheme = scheme_of(parameter, name, quantization)
            if scheme is None:
                continue
            rows = sum(source.shape[0] for source in parameter.sources_in(name))
            weight = random_weight(scheme, (rows, parameter.shape[1]), index)
            if change is not None:
                weight = change(name, weight)
            for suffix, tensor in format_of(quantization).pack(scheme, weight).items():
                tensors[packed_name(name, suffix)] = tensor
            if quantization.has_pre_quant_scale(name.removesuffix(".weight")):
                ones = torch.ones(parameter.shape[1], dtype=torch.bfloat16)
                tensors[packed_name(name, "pre_quant_scale")] = ones
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(values))
    for name, data in format_of(quantization).extra_files(quantization).items():
        (path / name).write_bytes(data)
    return path


def quantized_weights(path: Path) -> dict[str, QuantizedWeight]:
    """The quantized weights of a checkpoint by name."""
    checkpoint = open_checkpoint(path)
    found = {}
    for parameter in parameters(checkpoint_spec(checkpoint)):
        for name in parameter.source_names:
            weight = read_quantized(checkpoint, parameter, name, "cpu")
            if weight is not None:
                found[name] = weight
    return found
