"""Tiny checkpoints in Model-Optimizer's W4A16_AWQ, and the same values dense.

Packing is written here once more, in NumPy, to compare llmkit with.
"""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.fp4_files import write_hf_quant_config
from support.fp8_files import LINEARS, edit_config


def unpack_plain(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [out/2, in] to codes from -8 to 7, float32 [out, in]."""
    data = packed.numpy()
    codes = np.empty((2 * data.shape[0], data.shape[1]), np.int16)
    codes[0::2] = data % 16
    codes[1::2] = data // 16
    codes[codes > 7] -= 16
    return torch.from_numpy(codes.astype(np.float32))


def dequantize_plain(
    packed: torch.Tensor, scales: torch.Tensor, pre_quant_scale: torch.Tensor | None
) -> torch.Tensor:
    """The dense weight, float32 [out, in], with what its inputs are multiplied by."""
    codes = unpack_plain(packed)
    dense = codes * scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    return dense if pre_quant_scale is None else dense * pre_quant_scale.float()


def write_int4_awq(
    dense: Path, packed: Path, group_size: int, scaled: str, scale_of: str = r".*"
) -> None:
    """Write a checkpoint again in INT4, and round the values of the dense one.

    scaled: a pattern of the modules that have a pre_quant_scale.
    scale_of: the part of a module's name that its pre_quant_scale depends on.
    """
    shutil.copytree(dense, packed)
    stored: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if re.search(LINEARS, name) is None:
            stored[name] = rounded[name] = tensor
            continue
        module = name.removesuffix(".weight")
        rows, columns = tensor.shape
        groups = tensor.float().view(rows, -1, group_size)
        scales = (groups.abs().amax(2) / 7).to(torch.bfloat16)
        codes = (groups / scales.float()[:, :, None]).round().clamp(-8, 7)
        nibbles = codes.view(rows, columns).numpy().astype(np.int16) % 16
        data = (nibbles[0::2] + 16 * nibbles[1::2]).astype(np.uint8)
        stored[name] = torch.from_numpy(data)
        stored[f"{module}.weight_scale"] = scales
        pre_quant_scale = None
        if re.search(scaled, module):
            key = re.search(scale_of, module)
            assert key is not None
            draw = torch.Generator().manual_seed(zlib.crc32(key[0].encode()))
            pre_quant_scale = (torch.rand(columns, generator=draw) + 0.5).to(torch.bfloat16)
            stored[f"{module}.pre_quant_scale"] = pre_quant_scale
        rounded[name] = dequantize_plain(stored[name], scales, pre_quant_scale)
    save_file(rounded, dense / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    # As Model-Optimizer 0.47 writes config.json: the size of groups is in the other file only.
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"]}
    edit_config(packed, quantization_config=config)
    algorithm = {"quant_algo": "W4A16_AWQ", "group_size": group_size}
    write_hf_quant_config(packed, **algorithm, has_zero_point=False, pre_quant_scale=True)
