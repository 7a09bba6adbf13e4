"""Reads and writes the header of a safetensors file. No tensor is read.

Format: 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors' bytes. Every
number of the header is checked against the file before it is used.
(https://huggingface.co/docs/safetensors/index#format)
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.common.errors import InputError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file. Its bytes are [start, end) of the file.

    A tensor that is not written yet has only a name, a dtype and a shape.
    """

    name: str
    dtype: str  # a key of ITEM_BYTES; for GGUF, the dtype after dequantization
    shape: tuple[int, ...]
    file: str = ""  # the file's name within the checkpoint
    start: int = 0
    end: int = 0
    ggml_type: str = ""  # only for GGUF: the type of the stored blocks, "Q4_K"

    @property
    def nbytes(self) -> int:
        """The size of the tensor in memory; for safetensors also on disk."""
        return byte_count(self.dtype, self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of `dtype`."""
        from llmkit.checkpoint.dtypes import DTYPES  # keeps torch off the path that reads headers

        return DTYPES[self.dtype]


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """The size in bytes of a tensor whose dtype is named as in a safetensors header."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises InputError, with the file and the numbers, when the file is truncated, when its header is
    longer than the file, is not JSON or names a tensor twice, and when dtypes, shapes and byte
    ranges disagree, overlap, leave gaps or end outside the file.
    """
    header, data_start, size = _read_json(path)
    header.pop("__metadata__", None)
    tensors = sorted(
        (_parse_tensor(path, name, entry, data_start, size) for name, entry in header.items()),
        key=lambda info: (info.start, info.end),
    )
    expected = data_start
    for info in tensors:
        if info.start != expected:
            overlaps = info.start < expected
            problem = "overlaps the tensor before it" if overlaps else "leaves a gap before it"
            raise _header_error(
                path,
                f"tensor {info.name} begins at byte {info.start} and {problem},"
                f" which ends at {expected}",
            )
        expected = info.end
    if expected != size:
        raise _header_error(
            path, f"its tensors end at byte {expected}, but the file has {size} bytes"
        )
    return {info.name: info for info in tensors}


def write_header(
    tensors: Sequence[TensorInfo],
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a file with `tensors` in this order, and the tensors with their byte ranges.

    The header is padded with spaces to a multiple of 8 bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        assert tensor.name not in entries, f"{tensor.name} is planned twice in one file"
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    placed = {}
    for tensor in tensors:
        start, end = entries[tensor.name]["data_offsets"]
        placed[tensor.name] = replace(tensor, start=data_start + start, end=data_start + end)
    return struct.pack("<Q", len(text)) + text, placed


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's entries, the first byte of the data, and the file's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if len(first) < 8:
                raise _header_error(
                    path, f"it has {size} bytes, fewer than the 8 of a header length"
                )
            (length,) = struct.unpack("<Q", first)
            if length > size - 8:
                raise _header_error(
                    path, f"its header claims {length} bytes, but the file has {size}"
                )
            if length > MAX_HEADER_BYTES:
                raise _header_error(
                    path,
                    f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed",
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _header_error(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _header_error(path, "its header is not a JSON object")
    return header, 8 + length, size


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name} occurs twice")
            seen.add(name)
    return entries


def _parse_tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _header_error(
            path, f"tensor {name} is not described by dtype, shape and data_offsets"
        )
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _header_error(path, f"tensor {name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_natural_list(shape):
        raise _header_error(path, f"tensor {name} has the impossible shape {str(shape)[:80]}")
    if not _is_natural_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _header_error(
            path, f"tensor {name} has the impossible byte range {str(offsets)[:80]}"
        )
    start, end = offsets
    if end > size - data_start:
        raise _header_error(
            path,
            f"tensor {name} ends at data byte {end},"
            f" but the file has {size - data_start} data bytes",
        )
    need = byte_count(dtype, shape)
    if need != end - start:
        raise _header_error(
            path,
            f"tensor {name} is {dtype} {shape}, which is {need} bytes,"
            f" but its range has {end - start}",
        )
    return TensorInfo(name, dtype, tuple(shape), path.name, data_start + start, data_start + end)


def _is_natural_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _header_error(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: {problem}",
        "A complete safetensors file was expected",
        "Download or write it again",
    )
