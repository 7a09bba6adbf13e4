"""The header of a GGUF file: metadata and tensor places, every length checked against the file before it is used.

The `gguf` package's own reader checks no bounds: a corrupt count makes it loop for ever. Little-endian files of
versions 2 and 3 are read. (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmkit.checkpoint.errors import InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor: bytes [start, end) of the file hold `shape` (outermost dimension first) as `qtype` blocks."""

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    end: int


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata (scalars, strings and lists) and the tensors by their GGUF names.

    Raises InputError, naming the file and the figures, when it is no GGUF file, is cut short, or when its
    tensors are of unknown types, overlap or end outside the file.
    """
    try:
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8 or first[:4] != b"GGUF":
                raise _bad(path, f"it begins with {first[:4]!r}, not with b'GGUF'")
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

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._scalar("I")
        if version not in (2, 3):
            raise _bad(self._path, f"it has version {version}, and little-endian files of versions 2 and 3 are read")
        # The least a tensor or an entry can take, so that a corrupt count is found before any work is done.
        tensor_count, entry_count = self._count(24), self._count(13)
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in metadata:
                raise _bad(self._path, f"its metadata names {key} twice")
            metadata[key] = self._value(self._scalar("I"))
        described = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _bad(self._path, f"its alignment is {alignment}, and a power of two was expected")
        base = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = base
        for name, qtype, shape, offset in sorted(described, key=lambda item: item[3]):
            start = base + offset
            if start < end:
                raise _bad(self._path, f"tensor {name} begins at byte {start}, before the end of another at {end}")
            block, block_bytes = GGML_QUANT_SIZES[qtype]
            if not shape or shape[-1] % block:
                raise _bad(
                    self._path, f"tensor {name} has the shape {list(shape)}, and {qtype.name} rows hold {block}s"
                )
            end = start + math.prod(shape) // block * block_bytes
            if end > self._size:
                raise _bad(self._path, f"tensor {name} ends at byte {end}, but the file has {self._size}")
            if name in tensors:
                raise _bad(self._path, f"tensor {name} occurs twice")
            tensors[name] = GgufTensor(name, qtype, shape, start, end)
        return metadata, tensors

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise _bad(self._path, f"tensor {name[:80]} has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        number, offset = self._scalar("I"), self._scalar("Q")
        try:
            qtype = GGMLQuantizationType(number)
        except ValueError:
            raise _bad(self._path, f"tensor {name[:80]} has the unknown type {number}") from None
        if qtype not in GGML_QUANT_SIZES:
            raise _bad(self._path, f"tensor {name[:80]} has the unknown type {qtype.name}")
        return name, qtype, shape, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _bad(self._path, f"its metadata has the unknown type {kind}")
        value = self._scalar(_SCALARS[kind])
        # The shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self) -> list[Any]:
        kind = self._scalar("I")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if kind not in _SCALARS:
            raise _bad(self._path, f"its metadata has an array of the unknown type {kind}")
        code = _SCALARS[kind]
        size = struct.calcsize(f"<{code}")
        count = self._count(size)
        return list(struct.unpack(f"<{count}{code}", self._take(count * size)))

    def _count(self, least_bytes: int) -> int:
        count: int = self._scalar("Q")
        if count * least_bytes > self._size - self._position:
            raise _bad(self._path, f"it claims {count} items at byte {self._position}, but has {self._size} bytes")
        return count

    def _string(self) -> str:
        text = self._take(self._scalar("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _bad(self._path, f"a text before byte {self._position} is not UTF-8") from None

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        if count > self._size - self._position:
            raise _bad(self._path, f"it has {self._size} bytes, too few for {count} more after {self._position}")
        self._position += count
        return self._data[self._position - count : self._position]


def _bad(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: {problem}", "A complete GGUF file was expected", "Download it again")
