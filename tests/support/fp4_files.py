"""Tiny checkpoints in NVFP4, MXFP4, MXFP8 and Model-Optimizer's FP8, and the same values dense.

Packing and unpacking are written here once more, value by value in plain Python, to compare llmkit
with. Values of bytes follow from the fields of their bits.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.quantized_weight import Scheme
from support.fp8_files import FP8_MAX, LINEARS, edit_config

NVFP4 = Scheme(4, 16, kind="float", inputs="group", scale_format="e4m3")
NVFP4A16 = Scheme(4, 16, kind="float", scale_format="e4m3")
MXFP4 = Scheme(4, 32, kind="float", inputs="group", scale_format="e8m0")
MXFP4A16 = Scheme(4, 32, kind="float", scale_format="e8m0")
# Of Model-Optimizer and TensorRT-LLM: W4A8_MXFP4_FP8 and W4A8_MXFP4_MXFP8.
MXFP4AFP8 = Scheme(4, 32, kind="float", inputs="tensor", scale_format="e8m0", input_type="fp8")
MXFP4AMXFP8 = Scheme(4, 32, kind="float", inputs="group", scale_format="e8m0", input_type="fp8")
MXFP8 = Scheme(8, 32, kind="float", inputs="group", scale_format="e8m0")
FP8_STATIC = Scheme(8, kind="float", inputs="tensor", block_rows=-1)
INPUT_SCALE = 0.03125  # of all layers, where inputs have one


def float_value(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a float with a sign, exponent and mantissa; exponent 0 is subnormal."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    size = (
        fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2 ** (exponent - bias)
    )
    return -size if code >> (exponent_bits + mantissa_bits) & 1 else size


E2M1 = [float_value(code, 2, 1, 1) for code in range(16)]
E4M3 = [float_value(code, 4, 3, 7) for code in range(256)]
E4M3[127] = E4M3[255] = float("nan")


def e8m0(code: int) -> float:
    """The value of a power of two."""
    return 2.0 ** (code - 127)


def nearest(value: float, grid: list[float]) -> int:
    """The code of the nearest magnitude of an ascending grid; those of negative values follow."""
    magnitude = abs(value)
    upper = min(bisect_left(grid, magnitude), len(grid) - 1)
    lower = max(upper - 1, 0)
    code = lower if magnitude - grid[lower] < grid[upper] - magnitude else upper
    return code + len(grid) * (value < 0)


@dataclass(frozen=True)
class PlainWeight:
    """The stored tensors of [out, in] by suffix, and the values that they stand for."""

    stored: dict[str, torch.Tensor]
    dense: torch.Tensor


def pack_plain(weight: torch.Tensor, scheme: Scheme, form: str) -> PlainWeight:
    """Round [out, in] to the grid. form: compressed-tensors or modelopt."""
    rows = weight.double().numpy()
    out, in_ = rows.shape
    size = scheme.group_size
    largest = 6.0 if scheme.bits == 4 else FP8_MAX
    grid = E2M1[:8] if scheme.bits == 4 else E4M3[:127]
    # The global scale is a power of two, so that it and its inverse are exact.
    global_scale = 2.0 ** np.ceil(np.log2(np.abs(rows).max() / (largest * FP8_MAX)))
    scale_codes = np.zeros((out, in_ // size), np.uint8)
    codes = np.zeros((out, in_), np.uint8)
    for row in range(out):
        for group in range(in_ // size):
            part = rows[row, group * size : (group + 1) * size]
            wanted = np.abs(part).max() / largest
            if scheme.scale_format == "e4m3":
                scale_codes[row, group] = max(nearest(wanted / global_scale, E4M3[:127]), 1)
                scale = E4M3[scale_codes[row, group]] * global_scale
            else:
                scale_codes[row, group] = int(np.ceil(np.log2(wanted))) + 127
                scale = e8m0(int(scale_codes[row, group]))
            for column, value in enumerate(part, start=group * size):
                codes[row, column] = nearest(value / scale, grid)
    scale_bytes = torch.from_numpy(scale_codes)
    if scheme.scale_format == "e4m3":
        scale_bytes = scale_bytes.view(torch.float8_e4m3fn)
    stored = {"weight_scale": scale_bytes}
    if scheme.bits == 4:
        name = "weight_packed" if form == "compressed-tensors" else "weight"
        stored[name] = torch.from_numpy(codes[:, 0::2] + 16 * codes[:, 1::2])
    else:
        codes[codes >= 127] += 1  # the grid leaves out NaN, the sign is bit 7
        stored["weight"] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    scalars = {"weight": float(global_scale)} if scheme.scale_format == "e4m3" else {}
    if scheme.has_input_scale:
        scalars["input"] = INPUT_SCALE
    for kind, scale in scalars.items():
        if form == "compressed-tensors":
            stored[f"{kind}_global_scale"] = torch.tensor([1 / scale])
        else:
            stored["weight_scale_2" if kind == "weight" else "input_scale"] = torch.tensor(scale)
    return PlainWeight(stored, unpack_plain(stored, scheme))


def unpack_plain(stored: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The dense weight, float32 [out, in], of tensors of either format."""
    scale_codes = stored["weight_scale"].view(torch.uint8).tolist()
    global_scale = 1.0
    if "weight_global_scale" in stored:
        global_scale = 1 / stored["weight_global_scale"].item()
    elif "weight_scale_2" in stored:
        global_scale = stored["weight_scale_2"].item()
    name = "weight_packed" if "weight_packed" in stored else "weight"
    dense = []
    for row, data in enumerate(stored[name].view(torch.uint8).tolist()):
        if scheme.bits == 4:
            values = [E2M1[code] for byte in data for code in (byte % 16, byte // 16)]
        else:
            values = [E4M3[byte] for byte in data]
        scales = [
            E4M3[code] * global_scale if scheme.scale_format == "e4m3" else e8m0(code)
            for code in scale_codes[row]
        ]
        dense.append([value * scales[i // scheme.group_size] for i, value in enumerate(values)])
    return torch.tensor(dense, dtype=torch.float64).float()


def pack_plain_fp8(weight: torch.Tensor) -> PlainWeight:
    """Round [out, in] to FP8 with one scale, as Model-Optimizer stores it."""
    scale = weight.abs().max() / FP8_MAX
    q = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": q, "weight_scale": scale, "input_scale": torch.tensor(INPUT_SCALE)}
    return PlainWeight(stored, q.float() * scale)


def write_fp4(
    dense: Path,
    packed: Path,
    scheme: Scheme,
    config: dict[str, Any],
    form: str = "compressed-tensors",
    linears: str = LINEARS,
    scaled: str = "$^",
) -> None:
    """Write a checkpoint again with quantized weights, and round the values of the dense one.

    config: the `quantization_config`. linears: the tensors that are quantized. scaled: a pattern of
    the modules that have a pre_quant_scale.
    """
    shutil.copytree(dense, packed)
    stored: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if re.search(linears, name) is None:
            stored[name] = rounded[name] = tensor
            continue
        is_fp8 = scheme.scale_format == "float"
        plain = pack_plain_fp8(tensor) if is_fp8 else pack_plain(tensor, scheme, form)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{suffix}": value for suffix, value in plain.stored.items()}
        rounded[name] = plain.dense
        if re.search(scaled, module):
            draw = torch.Generator().manual_seed(zlib.crc32(module.encode()))
            pre_quant_scale = (torch.rand(tensor.shape[1], generator=draw) + 0.5).to(torch.bfloat16)
            stored[f"{module}.pre_quant_scale"] = pre_quant_scale
            rounded[name] = plain.dense * pre_quant_scale.float()
    save_file(rounded, dense / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    edit_config(packed, quantization_config=config)


def as_bytes(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).tolist()


def write_hf_quant_config(path: Path, **quantization: Any) -> None:
    """Write a hf_quant_config.json as Model-Optimizer does."""
    document = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        | quantization,
    }
    (path / "hf_quant_config.json").write_text(json.dumps(document), encoding="utf-8")
