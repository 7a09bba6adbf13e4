"""The header of a safetensors file, parsed strictly and without reading any tensor.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes. Every figure in
the header is checked against the file before anything is read by it.
(https://huggingface.co/docs/safetensors/index#format)
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.errors import InputError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, end) of `file`, counted from the file's beginning."""

    name: str
    dtype: str  # a key of ITEM_BYTES; for GGUF the dtype it is read as
    shape: tuple[int, ...]
    file: str  # the file's name within the checkpoint
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory; for safetensors also on disk."""
        return byte_count(self.dtype, self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of `dtype`."""
        from llmkit.checkpoint.dtypes import DTYPES  # headers alone are read without torch

        return DTYPES[self.dtype]


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor of `shape` whose dtype is named as in a safetensors header."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises InputError, naming the file and the figures, when the file is truncated, when its header is
    longer than it, is not JSON, or names a tensor twice, and when dtypes, shapes and byte ranges do not
    agree, overlap, leave gaps or end outside the file.
    """
    header, data_start, size = _load_json(path)
    header.pop("__metadata__", None)
    tensors = sorted(
        (_tensor(path, name, entry, data_start, size) for name, entry in header.items()),
        key=lambda info: (info.start, info.end),
    )
    expected = data_start
    for info in tensors:
        if info.start != expected:
            problem = "overlaps the tensor before it" if info.start < expected else "leaves a gap before it"
            raise _bad(path, f"tensor {info.name} begins at byte {info.start} and {problem}, which ends at {expected}")
        expected = info.end
    if expected != size:
        raise _bad(path, f"its tensors end at byte {expected}, but the file has {size} bytes")
    return {info.name: info for info in tensors}


def write_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a file that holds `(name, dtype, shape)` in this order, and where each tensor goes.

    The header is padded with spaces to a multiple of 8 bytes; `file` of the infos is empty.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        assert name not in entries, f"{name} is planned twice in one file"
        end = offset + byte_count(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    infos = {}
    for name, dtype, shape in tensors:
        start, end = entries[name]["data_offsets"]
        infos[name] = TensorInfo(name, dtype, shape, "", first + start, first + end)
    return struct.pack("<Q", len(text)) + text, infos


def _load_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's entries, the byte at which data begins, and the file's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if len(first) < 8:
                raise _bad(path, f"it has {size} bytes, fewer than the 8 of a header length")
            (length,) = struct.unpack("<Q", first)
            if length > size - 8:
                raise _bad(path, f"its header claims {length} bytes, but the file has {size}")
            if length > MAX_HEADER_BYTES:
                raise _bad(path, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    return header, 8 + length, size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{name} occurs twice")
    return entries


def _tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _bad(path, f"tensor {name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape):
        raise _bad(path, f"tensor {name} has the impossible shape {str(shape)[:80]}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name} has the impossible byte range {str(offsets)[:80]}")
    start, end = offsets
    if end > size - data_start:
        raise _bad(path, f"tensor {name} ends at data byte {end}, but the file has {size - data_start} data bytes")
    need = byte_count(dtype, shape)
    if need != end - start:
        raise _bad(path, f"tensor {name} is {dtype} {shape}, which is {need} bytes, but its range has {end - start}")
    return TensorInfo(name, dtype, tuple(shape), path.name, data_start + start, data_start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bad(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: {problem}", "A complete safetensors file was expected", "Download or write it again")
