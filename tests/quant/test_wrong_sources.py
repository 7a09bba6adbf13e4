"""Quantized sources with wrong contents: one error of each command, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fp4_files import MXFP8, NVFP4, write_fp4, write_hf_quant_config
from support.fp8_files import edit_config
from support.refused_commands import check_refused, quantize_command
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.quantized_formats import FORMATS
from llmkit.checkpoint.quantized_weight import Format, QuantizationConfig, Scheme

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
LAST = "model.layers.1.mlp.down_proj"  # what comes before it could be written
Read = pytest.CaptureFixture[str]


def write_source(folder: Path, scheme: Scheme, form: Format) -> Path:
    """A quantized checkpoint."""
    tiny_checkpoint(folder / "dense", **SIZES)
    config = FORMATS[form].config_dict(QuantizationConfig(form, scheme))
    write_fp4(folder / "dense", folder / "source", scheme, config, form)
    return folder / "source"


def change_scale(path: Path, suffix: str, byte: int) -> None:
    """Give one scale of the last linear layer another byte."""
    tensors = load_file(path / "model.safetensors")
    tensors[f"{LAST}.{suffix}"].view(torch.uint8)[3, 1] = byte
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def with_e8m0_nan(folder: Path) -> Path:
    path = write_source(folder, MXFP8, "modelopt")
    change_scale(path, "weight_scale", 255)
    return path


def with_nan_scale(folder: Path) -> Path:
    path = write_source(folder, NVFP4, "modelopt")
    change_scale(path, "weight_scale", 0x7F)
    return path


def with_uneven_groups(folder: Path) -> Path:
    """A layer of 64 inputs with the scales of groups of 32 in NVFP4, whose groups have 16."""
    path = write_source(folder, NVFP4, "compressed-tensors")
    tensors = load_file(path / "model.safetensors")
    name = f"{LAST}.weight_scale"
    tensors[name] = tensors[name].view(torch.uint8)[:, ::2].contiguous().view(torch.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def with_undivided_groups(folder: Path) -> Path:
    """MXFP8, whose groups have 32, with a linear of 72 inputs."""
    path = folder / "source"
    tiny_checkpoint(path, **(SIZES | {"intermediate_size": 72}))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.full((rows, -(-columns // 32)), 127, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = FORMATS["compressed-tensors"].config_dict(
        QuantizationConfig("compressed-tensors", MXFP8)
    )
    edit_config(path, quantization_config=config)
    return path


def with_contradicting_files(folder: Path) -> Path:
    path = write_source(folder, NVFP4, "modelopt")
    write_hf_quant_config(path, quant_algo="FP8")
    return path


def with_blocks_of_another_size(folder: Path) -> Path:
    """FP8 whose scales are not those of blocks of 48 rows and columns."""
    path = folder / "source"
    tiny_checkpoint(path, **SIZES)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [48, 48]})
    return path


def with_unknown_gguf_type(folder: Path) -> Path:
    path = folder / "source.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (with_e8m0_nan, "compressed-tensors", r"1 of 128 values of \S*weight_scale are 255, not"),
        (with_nan_scale, "compressed-tensors", r"values of \S*weight_scale .* such as nan"),
        (
            with_uneven_groups,
            "modelopt",
            r"weight_scale has shape \[64, 2\]. Shape \[64, 4\] was expected",
        ),
        (with_undivided_groups, "modelopt", r"MXFP8 cannot store a \[64, 72\] weight. A mult"),
        (
            with_blocks_of_another_size,
            "compressed-tensors",
            r"weight_scale_inv has shape \[1, 1\]. Shape \[\d, 2\] was expected",
        ),
        (
            with_contradicting_files,
            "compressed-tensors",
            "hf_quant_config.json and config.json disagree about",
        ),
        (with_unknown_gguf_type, "gptq", "tensor token_embd.weight has the unknown type 99"),
    ],
)
def test_wrong_source_is_one_error_of_each_command_and_nothing_is_written(
    make: Callable[[Path], Path],
    target: str,
    message: str,
    tmp_path: Path,
    capsys: Read,
) -> None:
    source = make(tmp_path)
    out = tmp_path / "out"
    commands = [
        quantize_command(source, out),
        ["convert", str(source), "--format", target, "-o", str(out)],
        ["shard", str(source), "--tp", "2", "-o", str(out)],
    ]
    for command in commands:
        check_refused(command, message, tmp_path, capsys)
