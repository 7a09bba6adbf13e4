"""GGUF's blocks as they are written, against the gguf package's own unpacker."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llmkit.checkpoint.gguf_blocks import GGUF_TYPES, GgufBlocks, GgufType, concatenate
from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.gguf_writer import ALIGNMENT, write_gguf_header
from llmkit.checkpoint.safetensors_header import TensorInfo

ROWS = 5
BLOCKS = 3


def random_blocks(kind: GgufType) -> GgufBlocks:
    """Blocks of all values, and scales of both signs and of zero."""
    generator = torch.Generator().manual_seed(3)
    columns = BLOCKS * kind.block
    groups = columns // kind.group
    q = torch.randint(kind.min_q, kind.max_q + 1, (ROWS, columns), generator=generator)
    d = (torch.randn(ROWS, BLOCKS, generator=generator) * 0.01).half().float()
    d[0, 0] = 0.0
    d_min = scales = minima = None
    if kind.has_min:
        d_min = (torch.randn(ROWS, BLOCKS, generator=generator) * 0.01).half().float()
    if kind.max_scale:
        lowest = 0 if kind.has_min else -kind.max_scale
        scales = torch.randint(lowest, kind.max_scale + 1, (ROWS, groups), generator=generator)
        scales = scales.short()
    if kind.max_scale and kind.has_min:
        minima = torch.randint(0, kind.max_scale + 1, (ROWS, groups), generator=generator).short()
    return GgufBlocks(kind, q.to(torch.uint8), d, d_min, scales, minima)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_gguf_blocks_are_unpacked_to_the_same_bits(name: str) -> None:
    blocks = random_blocks(GGUF_TYPES[name])
    stored = blocks.to_bytes().numpy()
    found = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    expected = blocks.dequantize().numpy()
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("name", ["Q5_1", "Q6_K", "Q5_K"])
def test_gguf_blocks_are_split_and_joined_by_rows(name: str) -> None:
    blocks = random_blocks(GGUF_TYPES[name])
    parts = blocks.split([2, 3])
    assert [len(part.q) for part in parts] == [2, 3]
    assert torch.equal(parts[1].to_bytes(), blocks.to_bytes()[2:])
    assert torch.equal(concatenate(parts).to_bytes(), blocks.to_bytes())


def test_gguf_header_is_read_back(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "llama",
        "a.bool": True,
        "a.int": 2**32 - 1,
        "a.long": 2**40,
        "a.float": 0.1,
        "a.text": "\u00e9\n",
        "a.strings": ["x", ""],
        "a.ints": [1, -2],
        "a.floats": [0.5, -1.0],
        "a.bools": [True, False],
        "a.none": [],
    }
    infos = [
        TensorInfo("vector", "F32", (3,), ggml_type="F32"),
        TensorInfo("matrix", "F32", (2, 512), ggml_type="Q4_K"),
        TensorInfo("experts", "F32", (4, 2, 32), ggml_type="Q8_0"),
    ]
    header, placed = write_gguf_header(metadata, infos)
    assert len(header) % ALIGNMENT == 0
    path = tmp_path / "a.gguf"
    path.write_bytes(header + bytes(sum(info.nbytes for info in placed.values())))
    values, tensors = read_gguf_header(path)
    assert values == metadata
    assert [(info.name, info.shape, info.ggml_type) for info in tensors.values()] == [
        (info.name, info.shape, info.ggml_type) for info in infos
    ]
    assert [info.start for info in tensors.values()] == [info.start for info in placed.values()]
    package = gguf.GGUFReader(path)
    assert [tensor.name for tensor in package.tensors] == ["vector", "matrix", "experts"]
    assert package.tensors[1].data_offset == placed["matrix"].start
