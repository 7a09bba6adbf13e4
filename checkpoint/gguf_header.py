"""Reads the header of a GGUF file: metadata and tensors.

Every length is checked against the file before it is used. The reader of the `gguf` package checks
no bounds, and a corrupt count makes it loop forever. Versions 2 and 3 of the little-endian format
are read. (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError

# The `struct` format of each scalar type of GGUF, by the type's number.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9
_FLOAT32 = 6
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata (scalars, strings and lists) and the tensors by their GGUF names.

    Shapes have the outermost dimension first, as in torch. `dtype` is F32, because tensors are
    dequantized when they are read; `ggml_type` is the stored type.
    Raises InputError, with the file and the numbers, when it is no GGUF file or is cut short, and
    when its tensors have unknown types, overlap or end outside the file.
    """
    try:
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8 or first[:4] != b"GGUF":
                raise _header_error(path, f"it begins with {first[:4]!r}, not with b'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).parse()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 4

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        version = self._scalar("I")
        if version not in (2, 3):
            raise _header_error(
                self._path,
                f"it has version {version}, and little-endian files of versions 2 and 3 are read",
            )
        # A tensor's entry has at least 24 bytes and a metadata entry at least 13, so that a corrupt
        # count is detected before anything is read.
        tensor_count = self._count(24)
        entry_count = self._count(13)
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in metadata:
                raise _header_error(self._path, f"its metadata names {key} twice")
            metadata[key] = self._value(self._scalar("I"))
        entries = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _header_error(
                self._path, f"its alignment is {alignment}, and a power of two was expected"
            )
        base = -(-self._position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        end = base
        for name, qtype, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            start = base + offset
            if start < end:
                raise _header_error(
                    self._path,
                    f"tensor {name} begins at byte {start}, before the end of another at {end}",
                )
            block, block_bytes = GGML_QUANT_SIZES[qtype]
            if not shape or shape[-1] % block:
                raise _header_error(
                    self._path,
                    f"tensor {name} has the shape {list(shape)},"
                    f" and rows of {qtype.name} are made of blocks of {block} values",
                )
            end = start + math.prod(shape) // block * block_bytes
            if end > self._size:
                raise _header_error(
                    self._path, f"tensor {name} ends at byte {end}, but the file has {self._size}"
                )
            if name in tensors:
                raise _header_error(self._path, f"tensor {name} occurs twice")
            tensors[name] = TensorInfo(
                name, "F32", shape, self._path.name, start, end, ggml_type=qtype.name
            )
        return metadata, tensors

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise _header_error(self._path, f"tensor {name[:80]} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        number = self._scalar("I")
        offset = self._scalar("Q")
        try:
            qtype = GGMLQuantizationType(number)
        except ValueError:
            raise _header_error(
                self._path, f"tensor {name[:80]} has the unknown type {number}"
            ) from None
        if qtype not in GGML_QUANT_SIZES:
            raise _header_error(self._path, f"tensor {name[:80]} has the unknown type {qtype.name}")
        return name, qtype, shape, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _header_error(self._path, f"its metadata has the unknown type {kind}")
        value = self._scalar(_SCALARS[kind])
        # The shortest decimal for this float32: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self) -> list[Any]:
        kind = self._scalar("I")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if kind not in _SCALARS:
            raise _header_error(self._path, f"its metadata has an array of the unknown type {kind}")
        code = _SCALARS[kind]
        size = struct.calcsize(f"<{code}")
        count = self._count(size)
        return list(struct.unpack(f"<{count}{code}", self._take(count * size)))

    def _count(self, min_item_bytes: int) -> int:
        """A count of items of at least `min_item_bytes` each."""
        count: int = self._scalar("Q")
        if count * min_item_bytes > self._size - self._position:
            raise _header_error(
                self._path,
                f"it claims {count} items at byte {self._position}, but has {self._size} bytes",
            )
        return count

    def _string(self) -> str:
        text = self._take(self._scalar("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _header_error(
                self._path, f"a text before byte {self._position} is not UTF-8"
            ) from None

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        if count > self._size - self._position:
            raise _header_error(
                self._path,
                f"it has {self._size} bytes, too few for {count} more after {self._position}",
            )
        self._position += count
        return self._data[self._position - count : self._position]


def _header_error(path: Path, problem: str) -> InputError:
    return InputError(
        f"{path}: {problem}", "A complete GGUF file was expected", "Download it again"
    )
