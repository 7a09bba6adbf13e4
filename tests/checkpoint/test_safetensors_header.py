"""Safetensors headers: what is right is read like the reference library reads it, what is wrong is
named.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint import safetensors_header
from llmkit.checkpoint.dtypes import DTYPE_NAMES, DTYPES
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header, write_header
from llmkit.checkpoint.tensor_reader import SafetensorsRows
from llmkit.common.errors import InputError


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_header_reads_every_dtype_as_safetensors_does(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    infos = read_header(tmp_path / "a.safetensors")
    rows = SafetensorsRows(tmp_path)
    assert infos.keys() == tensors.keys()
    for name, expected in load_file(tmp_path / "a.safetensors").items():
        info = infos[name]
        assert (info.dtype, info.shape) == (DTYPE_NAMES[expected.dtype], tuple(expected.shape))
        assert info.nbytes == info.end - info.start == expected.nbytes
        if info.shape:
            found = rows.rows(info, 0, info.shape[0])
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_header_written_is_padded_and_read_back(tmp_path: Path) -> None:
    data, infos = write_header([TensorInfo("é", "BF16", (2, 2)), TensorInfo("b", "U8", (3,))])
    (tmp_path / "a.safetensors").write_bytes(data + bytes(11))
    assert len(data) % 8 == 0
    assert json.loads(data[8:])["__metadata__"] == {"format": "pt"}
    found = read_header(tmp_path / "a.safetensors")
    assert [(i.name, i.shape, i.start, i.end) for i in found.values()] == [
        (i.name, i.shape, i.start, i.end) for i in infos.values()
    ]
    assert load_file(tmp_path / "a.safetensors")["é"].shape == (2, 2)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (
            {"a": entry("F32", [2], 0, 8)},
            7,
            "tensor a ends at data byte 8, but the file has 7 data bytes",
        ),
        ({"a": entry("F32", [2], 0, 8)}, 9, "its tensors end at byte .* but the file has"),
        (
            {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
            12,
            "tensor b begins at byte .* overlaps",
        ),
        (
            {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)},
            8,
            "overlaps the tensor before it",
        ),
        (
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)},
            12,
            "tensor b .* leaves a gap",
        ),
        (
            {"a": entry("F32", [3], 0, 8)},
            8,
            r"tensor a is F32 \[3\], which is 12 bytes, but its range has 8",
        ),
        (
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [2], 4, 8)},
            8,
            r"tensor b is F32 \[2\], which is 8 bytes, but its range has 4",
        ),
        ({"a": entry("F4", [2], 0, 8)}, 8, "tensor a has the unknown dtype 'F4'"),
        ({"a": entry("F" * 50, [2], 0, 8)}, 8, "the unknown dtype 'F{40}'"),
        ({"a": entry("F32", [10**90, -1], 0, 8)}, 8, r"impossible shape \[10{78}\."),
        ({"a": entry("F32", [2], 10**90, 0)}, 8, r"impossible byte range \[10{78}\."),
        ({"a": entry("F32", [-1], 0, 8)}, 8, r"impossible shape \[-1\]"),
        ({"a": entry("F32", [2], -1, 7)}, 8, r"impossible byte range \[-1, 7\]"),
        ({"a": entry("F32", [-1, -2], 0, 8)}, 8, "impossible shape"),
        ({"a": entry("F32", [True, 2], 0, 8)}, 8, "impossible shape"),
        ({"a": entry("F32", [2**70, 2], 0, 8)}, 8, "which is .* bytes, but its range has 8"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "impossible byte range"),
        ({"a": entry("F32", [2], -8, 0)}, 8, "impossible byte range"),
        (
            {"a": {"dtype": "F32", "shape": [2]}},
            8,
            "not described by dtype, shape and data_offsets",
        ),
        ({"a": []}, 8, "not described by dtype, shape and data_offsets"),
        ([], 0, "not a JSON object"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe{}", 0, "not valid JSON"),
        (b"[" * 200_000, 0, "not valid JSON"),
        (b'{"b": 1, "a": 1, "a": 2}', 0, "a occurs twice"),
    ],
)
def test_header_errors_are_named(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(InputError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [3, 100, 2**32, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "bad.safetensors", {}, length=length)
    with pytest.raises(InputError, match=f"claims {length} bytes, but the file has 10"):
        read_header(path)


def test_header_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the safetensors library."""
    path = write(tmp_path / "a.safetensors", {}, length=100_000_001)
    with path.open("r+b") as file:
        file.truncate(2**27)
    with pytest.raises(InputError, match="claims 100000001 bytes, more than the 100000000 allowed"):
        read_header(path)
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 10)
    assert read_header(write(path, b"{}" + b" " * 8)) == {}
    with pytest.raises(InputError, match="claims 11 bytes, more than the 10 allowed"):
        read_header(write(path, b"{}" + b" " * 9))


@pytest.mark.parametrize("length", range(8))
def test_header_written_is_padded_for_every_length(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    planned = TensorInfo("é" + "x" * length, "U8", (1,))
    assert (planned.file, planned.start, planned.end) == ("", 0, 0)  # not written yet
    data, infos = write_header([planned])
    assert len(data) % 8 == 0
    assert f'"{planned.name}"'.encode() in data
    assert data.removesuffix(b" " * 8) == data
    path.write_bytes(data + b"!")
    (found,) = read_header(path).values()
    assert (found.start, found.end) == (len(data), len(data) + 1)
    assert infos[planned.name].start == len(data)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_header_refuses_a_file_without_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"it has {len(content)} bytes"):
        read_header(tmp_path / "bad.safetensors")


def test_header_truncation_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_header(path)


def test_header_random_damage_is_an_input_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    source = random.Random(0)
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            damaged[source.randrange(header_end)] = source.randrange(256)
        path.write_bytes(damaged)
        try:
            infos = read_header(path)
        except InputError:
            continue
        for info in infos.values():
            assert info.nbytes == info.end - info.start
            assert header_end <= info.start <= info.end <= len(whole)


def test_header_of_a_file_that_shrinks_later(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 4)}, path)
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=rf"ends at byte {info.end - 1}, but {info.end} were expected"
    ):
        SafetensorsRows(tmp_path).rows(info, 0, 4)
