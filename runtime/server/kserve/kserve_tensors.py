"""Tensors of the Open Inference Protocol: their names, and their values in JSON and binary form."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.runtime.server.http.http_errors import invalid

# The datatype of each input and output. All inputs but the first are optional.
INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
# A datatype's name in a model's configuration.
CONFIG_TYPES = {
    "BYTES": "TYPE_STRING",
    "BOOL": "TYPE_BOOL",
    "UINT32": "TYPE_UINT32",
}
_LENGTH = struct.Struct("<I")


def parse_values(
    name: str, datatype: str, shape: Sequence[int], data: Sequence[Any] | bytes
) -> list[str | bool]:
    """Return the values of the input `name`, in one list.

    data: from JSON, nested or flat, or in Triton's binary form. Raises ApiError 400 for an unknown
    name, another datatype, and values that do not have the type or the shape.
    """
    expected = INPUTS.get(name)
    if expected is None:
        raise invalid(
            name, f"There is no input {name!r}; there are {', '.join(INPUTS)}.", "unknown_parameter"
        )
    if datatype != expected:
        raise invalid(
            name, f"The datatype of {name} is {datatype}; {expected} was expected.", "invalid_type"
        )
    values = _unpack_values(name, expected, data) if isinstance(data, bytes) else _flatten(data)
    if len(values) != math.prod(shape) or not shape:
        raise invalid(name, f"{name} has {len(values)} values, and its shape is {list(shape)[:8]}.")
    python_type = str if expected == "BYTES" else bool
    if not all(type(value) is python_type for value in values):
        type_name = "text" if python_type is str else "boolean"
        raise invalid(name, f"A value of {name} is not of type {type_name}.", "invalid_type")
    return values


def pack_values(datatype: str, values: Sequence[Any]) -> bytes:
    """Return an output's values in Triton's binary form."""
    if datatype != "BYTES":
        return struct.pack(f"<{len(values)}I", *values)
    texts = [value.encode() for value in values]
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)


def output_values(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the outputs in a response of generate, where a single value is not in a list."""
    outputs = {}
    for name in names:
        value = document[name]
        outputs[name] = value if isinstance(value, list) else [value]
    return outputs


def decode_text(name: str, data: bytes) -> str:
    """Decode UTF-8 in the input `name`. Raises ApiError 400 if it is not."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise invalid(name, f"{name} is not UTF-8.") from None


def _unpack_values(name: str, datatype: str, data: bytes) -> list[str | bool]:
    if datatype == "BOOL":
        return [bool(byte) for byte in data]
    values: list[str | bool] = []
    offset = 0
    while offset < len(data):
        start = offset + _LENGTH.size
        truncated = start > len(data)
        if not truncated:
            (length,) = _LENGTH.unpack_from(data, offset)
            offset = start + length
            truncated = offset > len(data)
        if truncated:
            raise invalid(name, f"The binary data of {name} ends in the middle of a value.")
        values.append(decode_text(name, data[start:offset]))
    return values


def _flatten(data: Sequence[Any]) -> list[Any]:
    flat = []
    pending = list(reversed(data))
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(reversed(value))
        else:
            flat.append(value)
    return flat
