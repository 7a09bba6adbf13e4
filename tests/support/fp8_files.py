"""Tiny checkpoints in FP8, and the same values as dense tensors.

Quantizing and unpacking are written here once more, block by block, to compare llmkit with.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEARS = r"\.(self_attn|mlp|block_sparse_moe|experts).*\.(\w+_proj|w[123])\.weight$"
FP8_MAX = 448.0


@dataclass(frozen=True)
class Fp8Weight:
    """The stored tensors of [out, in], and the values that they stand for."""

    q: torch.Tensor
    scales: torch.Tensor
    dense: torch.Tensor


def unpack_fp8(q: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The dense weight, float32 [out, in]."""
    dense = torch.empty(q.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows = slice(i * block[0], (i + 1) * block[0])
            columns = slice(j * block[1], (j + 1) * block[1])
            dense[rows, columns] = q[rows, columns].float() * scales[i, j]
    return dense


def pack_fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> Fp8Weight:
    """Round [out, in] to FP8 in blocks, or with one scale for None."""
    out, in_ = weight.shape
    rows, columns = block or (out, in_)
    scales = torch.empty(-(-out // rows), -(-in_ // columns))
    q = torch.empty(out, in_, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = (
                slice(i * rows, (i + 1) * rows),
                slice(j * columns, (j + 1) * columns),
            )
            scales[i, j] = weight[tile].abs().max() / FP8_MAX
            q[tile] = (weight[tile] / scales[i, j]).to(torch.float8_e4m3fn)
    return Fp8Weight(q, scales, unpack_fp8(q, scales, (rows, columns)))


def round_inputs(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [..., C] with the groups of `size` channels of each token rounded to FP8."""
    rounded = torch.empty_like(x)
    for start in range(0, x.shape[-1], size):
        group = x[..., start : start + size]
        scale = (group.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
        steps = (group / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        rounded[..., start : start + size] = steps.float() * scale
    return rounded


def write_fp8(
    dense: Path,
    packed: Path,
    block: tuple[int, int] | None = (128, 128),
    *,
    static: bool = False,
    compressed_tensors: bool = False,
    autofp8: bool = False,
    linears: str = LINEARS,
    **config: Any,
) -> None:
    """Write a checkpoint again in FP8, and round the values of the dense one to the same.

    static: inputs have one stored scale. compressed_tensors: in that format. autofp8: as AutoFP8
    wrote them, with one scale for each weight. linears: the tensors that become FP8. config:
    further values of the `quantization_config`.
    """
    shutil.copytree(dense, packed)
    stored: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if re.search(linears, name) is None:
            stored[name] = rounded[name] = tensor
            continue
        weight = pack_fp8(tensor.float(), block)
        module = name.removesuffix(".weight")
        scales = weight.scales if block else weight.scales.reshape(())
        stored[name] = weight.q
        has_short_name = compressed_tensors or autofp8
        stored[f"{module}.weight_scale{'' if has_short_name else '_inv'}"] = scales
        if static:
            stored[f"{module}.{'input' if has_short_name else 'activation'}_scale"] = torch.tensor(
                0.05
            )
        rounded[name] = weight.dense
    save_file(rounded, dense / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    quantization: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": list(block) if block else None,
        "modules_to_not_convert": ["lm_head", "gate", "model.vision_tower"],
    }
    if autofp8:
        assert block is None
        quantization = {
            "quant_method": "fp8",
            "activation_scheme": "static" if static else "dynamic",
            "ignored_layers": ["lm_head"],
        }
    if compressed_tensors:
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": block_group(*block) if block else tensor_group(static)},
        }
    edit_config(packed, quantization_config=quantization | config)


def block_group(rows: int, columns: int) -> dict[str, Any]:
    """The group of compressed-tensors' preset FP8_BLOCK."""
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "targets": ["Linear"],
        "weights": eight_bits
        | {"strategy": "block", "block_structure": [rows, columns], "dynamic": False},
        "input_activations": eight_bits
        | {"strategy": "group", "group_size": columns, "dynamic": True},
    }


def tensor_group(static: bool) -> dict[str, Any]:
    """A group of compressed-tensors with one scale for each weight; static: for inputs, too."""
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "tensor", "dynamic": False},
        "input_activations": eight_bits
        | {"strategy": "tensor" if static else "token", "dynamic": not static},
    }


def edit_config(path: Path, **values: Any) -> None:
    """Set values of a config.json."""
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | values), encoding="utf-8")
