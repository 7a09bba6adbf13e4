"""Tensors of the Open Inference Protocol: which there are, and their values in JSON and in Triton's binary form."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.runtime.server.http.errors import invalid

INPUTS = {  # by name: the datatype; all but the first may be left out
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
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL", "UINT32": "TYPE_UINT32"}  # in a model's configuration
_LENGTH = struct.Struct("<I")


def values_of(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any] | bytes) -> list[str | bool]:
    """The values of an input. data: from JSON, nested or not, or in the binary form. ApiError 400 for others."""
    if (wanted := INPUTS.get(name)) is None:
        raise invalid(name, f"There is no input {name!r}; there are {', '.join(INPUTS)}.", "unknown_parameter")
    if datatype != wanted:
        raise invalid(name, f"The datatype of {name} is {datatype}; {wanted} was expected.", "invalid_type")
    values = _unpacked(name, wanted, data) if isinstance(data, bytes) else _flat(data)
    if len(values) != math.prod(shape) or not shape:
        raise invalid(name, f"{name} has {len(values)} values, and its shape is {list(shape)[:8]}.")
    kind = str if wanted == "BYTES" else bool
    if not all(type(value) is kind for value in values):
        raise invalid(name, f"A value of {name} is no {'text' if kind is str else 'boolean'}.", "invalid_type")
    return values


def packed(datatype: str, values: Sequence[Any]) -> bytes:
    """The binary form of an output's values."""
    if datatype != "BYTES":
        return struct.pack(f"<{len(values)}I", *values)
    texts = [value.encode() for value in values]
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)


def answered(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """The outputs in an answer of generate, where one value stands for a list of it."""
    return {name: one if isinstance(one := document[name], list) else [one] for name in names}


def _unpacked(name: str, datatype: str, data: bytes) -> list[str | bool]:
    if datatype == "BOOL":
        return [bool(byte) for byte in data]
    values: list[str | bool] = []
    at = 0
    while at < len(data):
        end = at + _LENGTH.size
        if end > len(data) or (stop := end + _LENGTH.unpack_from(data, at)[0]) > len(data):
            raise invalid(name, f"The binary data of {name} ends in the middle of a value.")
        values.append(decoded(name, data[end:stop]))
        at = stop
    return values


def decoded(name: str, text: bytes) -> str:
    """A text in UTF-8. ApiError 400 for what is none."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise invalid(name, f"{name} is not UTF-8.") from None


def _flat(data: Sequence[Any]) -> list[Any]:
    flat, left = [], list(reversed(data))
    while left:
        value = left.pop()
        if isinstance(value, list):
            left.extend(reversed(value))
        else:
            flat.append(value)
    return flat
