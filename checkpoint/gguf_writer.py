"""Writes the header of a GGUF file: metadata and the places of tensors. The reverse of gguf_header.

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmkit.checkpoint.safetensors_header import TensorInfo

ALIGNMENT = 32  # what readers assume when the metadata has no general.alignment
_VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10
_MAX_UINT32 = 2**32 - 1


def write_gguf_header(
    metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a file with `tensors` in this order, and the tensors with their byte ranges.

    tensors: `shape` and `ggml_type` are those of the stored tensor. The result has the bytes as
    they are written: dtype U8 and a shape of one dimension, padded to the alignment.
    metadata: values are bool, int, float, str, or lists of one of these.
    """
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, content = _value(value)
        parts += [_string(key), struct.pack("<I", kind), content]
    offset = 0
    offsets = {}
    for tensor in tensors:
        assert tensor.name not in offsets, f"{tensor.name} is planned twice"
        offsets[tensor.name] = offset
        shape = tensor.shape[::-1]
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        kind = GGMLQuantizationType[tensor.ggml_type]
        parts.append(struct.pack("<IQ", kind, offset))
        offset += padded_bytes(tensor)
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    placed = {}
    for tensor in tensors:
        start = len(header) + offsets[tensor.name]
        size = padded_bytes(tensor)
        placed[tensor.name] = replace(
            tensor, dtype="U8", shape=(size,), start=start, end=start + size
        )
    return header, placed


def stored_bytes(tensor: TensorInfo) -> int:
    """The bytes of a tensor of a `ggml_type`."""
    size = 1
    for length in tensor.shape:
        size *= length
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.ggml_type]]
    assert tensor.shape[-1] % block == 0, f"{tensor.name} is not made of whole blocks"
    return size // block * block_bytes


def padded_bytes(tensor: TensorInfo) -> int:
    """The bytes of a tensor and of the zeros before the next one."""
    return -(-stored_bytes(tensor) // ALIGNMENT) * ALIGNMENT


def _value(value: Any) -> tuple[int, bytes]:
    """The type's number and the bytes of a value."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        if 0 <= value <= _MAX_UINT32:
            return _UINT32, struct.pack("<I", value)
        return _UINT64, struct.pack("<Q", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    assert isinstance(value, list), f"GGUF has no type for {type(value)}"
    return _ARRAY, _array(value)


def _array(values: Sequence[Any]) -> bytes:
    first = values[0] if values else ""
    if isinstance(first, str):
        kind = _STRING
        content = b"".join(map(_string, values))
    else:
        kind, code = {bool: (_BOOL, "?"), int: (_INT32, "i"), float: (_FLOAT32, "f")}[type(first)]
        content = struct.pack(f"<{len(values)}{code}", *values)
    return struct.pack("<IQ", kind, len(values)) + content


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
