"""The `config_groups` of a compressed-tensors config: how weights and inputs are quantized.

A group has `weights`, `input_activations`, `targets` and, in newer files, the `format` in which its
weights are stored. Fields that only say how scales were found (`observer`, ...) are not read.
The fields are those of compressed-tensors' QuantizationArgs and QuantizationScheme.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llmkit.checkpoint.microscaling import GROUP_SIZES
from llmkit.checkpoint.quantized_weight import InputType, ScaleFormat, Scheme
from llmkit.common.errors import InputError

MIXED = "mixed-precision"
# By scale format: the strategy of weights in such groups, and the dtype of their scales.
_STRATEGIES: dict[ScaleFormat, str] = {"e8m0": "group", "e4m3": "tensor_group"}
_SCALE_DTYPES: dict[ScaleFormat, str] = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}
_INT_BITS = (2, 3, 4, 8)
_Inputs = Literal["none", "token", "group", "tensor"]


def compression_format(scheme: Scheme) -> str:
    """The `format` of a scheme as it is written, for example "pack-quantized"."""
    if scheme.scale_format == "e4m3":
        return "nvfp4-pack-quantized"
    if scheme.scale_format == "e8m0":
        return "mxfp4-pack-quantized" if scheme.is_fp4 else "mxfp8-quantized"
    if scheme.kind == "float":
        return "naive-quantized" if scheme.inputs == "none" else "float-quantized"
    is_int8 = scheme.bits == 8 and scheme.inputs != "none"
    return "int-quantized" if is_int8 else "pack-quantized"


def readable_formats(scheme: Scheme) -> tuple[str, ...]:
    """All `format`s that mean the same tensors."""
    written = compression_format(scheme)
    if written in ("float-quantized", "naive-quantized"):
        return "float-quantized", "naive-quantized"
    return (written, "naive-quantized") if written == "int-quantized" else (written,)


def group_dict(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """A group of `config_groups`."""
    channel = scheme.group_size == -1
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    if scheme.scale_format != "float":
        weights |= {
            "strategy": _STRATEGIES[scheme.scale_format],
            "scale_dtype": _SCALE_DTYPES[scheme.scale_format],
        }
    elif scheme.block_rows > 1:
        weights |= {
            "strategy": "block",
            "group_size": None,
            "block_structure": [scheme.block_rows, scheme.group_size],
        }
    elif scheme.block_rows == -1:
        weights["strategy"] = "tensor"
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _inputs_dict(scheme),
        "output_activations": None,
        "format": compression_format(scheme),
    }


def _inputs_dict(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.input_type is None:
        return None
    inputs: dict[str, Any] = {
        "num_bits": 4 if scheme.input_type == "fp4" else 8,
        "type": "int" if scheme.input_type == "int8" else "float",
        "symmetric": True,
        "strategy": scheme.inputs,
        "group_size": scheme.group_size if scheme.inputs == "group" else None,
        "dynamic": scheme.inputs != "tensor",
        "actorder": None,
    }
    if scheme.inputs == "group" and scheme.scale_format != "float":
        inputs |= {
            "strategy": _STRATEGIES[scheme.scale_format],
            "scale_dtype": _SCALE_DTYPES[scheme.scale_format],
        }
        if scheme.scale_format == "e4m3":  # one scale is stored, and those of groups are dynamic
            inputs |= {"dynamic": "local", "observer": "static_minmax"}
    return inputs


def parse_group(group: object, model_format: object) -> Scheme:
    """The scheme of a group. Raises InputError, naming the field, for one that is not known.

    model_format: the `format` of the whole config, for groups without their own.
    """
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise unsupported("config_groups", group, "groups with weights")
    if group.get("output_activations"):
        raise unsupported("output_activations", "set", "none")
    inputs = group.get("input_activations") or None
    if inputs is not None and not isinstance(inputs, dict):
        raise unsupported("input_activations", inputs, "an object")
    found_format = group.get("format") or model_format
    _check(weights, "", type=("int", "float", None))
    if weights.get("type") != "float":
        scheme = _parse_int(weights, inputs, found_format)
    elif weights.get("num_bits") == 4 or _has_e8m0_scales(weights, found_format):
        scheme = _parse_microscaling(weights, inputs)
    else:
        scheme = _parse_float(weights, inputs)
    readable = readable_formats(scheme)
    if group.get("format") not in (None, MIXED, *readable):
        raise unsupported("format", group["format"], f"{' or '.join(readable)} for {scheme.label}")
    return scheme


def _has_e8m0_scales(weights: Mapping[str, Any], found_format: object) -> bool:
    if found_format == "mxfp8-quantized":
        return True
    return weights.get("strategy") == "group" and weights.get("scale_dtype") == "torch.uint8"


def _parse_int(
    weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, found_format: object
) -> Scheme:
    input_type: InputType | None = None
    if inputs is not None:
        input_type = "fp8" if inputs.get("type") == "float" else "int8"
    is_unpacked = inputs is not None and (
        weights.get("num_bits") == 8 or found_format in ("int-quantized", "naive-quantized")
    )
    _check(
        weights,
        "",
        num_bits=_INT_BITS,
        symmetric=(True, None) if inputs is not None else (True, False, None),
        dynamic=(False, None),
        strategy=("group", "channel", "tensor") if is_unpacked else ("group", "channel"),
        actorder=(None, False, "weight", "static"),
    )
    # Without packing, values of few bits are stored as INT8, which they are then.
    bits = 8 if is_unpacked else weights["num_bits"]
    return Scheme(
        bits,
        _group_size(weights),
        weights.get("symmetric") is not False,
        inputs=_parse_inputs(inputs, input_type, is_unpacked),
        block_rows=-1 if weights["strategy"] == "tensor" else 1,
        input_type=input_type,
    )


def _parse_float(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    """FP8 with scales in 16 or 32 bits."""
    _check(
        weights,
        "",
        num_bits=(8,),
        symmetric=(True, None),
        dynamic=(False, None),
        strategy=("channel", "block", "tensor"),
        actorder=(None, False, "weight", "static"),
    )
    if weights["strategy"] != "block":
        rows = -1 if weights["strategy"] == "tensor" else 1
        return Scheme(8, kind="float", inputs=_parse_inputs(inputs, "fp8"), block_rows=rows)
    rows, columns = _parse_blocks(weights.get("block_structure"))
    found: _Inputs = "none" if inputs is None else _parse_block_inputs(inputs, columns)
    return Scheme(8, columns, kind="float", inputs=found, block_rows=rows)


def _parse_microscaling(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    """FP4, and FP8 whose groups have a power of two as scale."""
    bits = weights.get("num_bits")
    scale_format: ScaleFormat = "e8m0"
    if bits == 4 and weights.get("strategy") == "tensor_group":
        scale_format = "e4m3"
    size = GROUP_SIZES[scale_format]
    scale_dtypes = (None, _SCALE_DTYPES[scale_format])
    _check(
        weights,
        "",
        num_bits=(4, 8),
        symmetric=(True, None),
        dynamic=(False, None),
        strategy=("tensor_group", "group") if bits == 4 else ("group",),
        group_size=(size,),
        scale_dtype=scale_dtypes,
        actorder=(None, False, "weight", "static"),
    )
    assert bits in (4, 8)
    found: _Inputs = "none"
    input_type: InputType | None = None
    if inputs is not None and scale_format == "e8m0" and inputs.get("strategy") == "token":
        input_type = "fp8"
        found = _parse_inputs(inputs, input_type)
    elif inputs is not None:
        _check(
            inputs,
            "input_activations ",
            num_bits=(bits,) if scale_format == "e4m3" or bits == 8 else (4, 8),
            type=("float",),
            symmetric=(True, None),
            dynamic=("local",) if scale_format == "e4m3" else (True,),
            strategy=(_STRATEGIES[scale_format],),
            group_size=(size,),
            scale_dtype=scale_dtypes if inputs.get("num_bits") == 4 else scale_dtypes[1:],
        )
        input_type = "fp4" if inputs["num_bits"] == 4 else "fp8"
        found = "group"
    return Scheme(
        bits, size, kind="float", inputs=found, scale_format=scale_format, input_type=input_type
    )


def _group_size(weights: Mapping[str, Any]) -> int:
    """The size of groups of integers; -1: a row has one scale."""
    if weights["strategy"] != "group":
        return -1
    size = weights.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        raise unsupported("group_size", size, "a positive number")
    return size


def _parse_blocks(structure: object) -> tuple[int, int]:
    """The rows and columns of a block; a block of one row is not known."""
    if (
        not isinstance(structure, (list, tuple))
        or len(structure) != 2
        or any(type(size) is not int or size < 1 for size in structure)
        or structure[0] == 1
    ):
        raise unsupported("block_structure", structure, "two numbers such as [128, 128]")
    return structure[0], structure[1]


def _parse_block_inputs(inputs: Mapping[str, Any], columns: int) -> _Inputs:
    """How inputs are quantized where weights are in blocks of `columns`."""
    _check(inputs, "input_activations ", num_bits=(8,), type=("float",), symmetric=(True, None))
    found = inputs.get("strategy"), inputs.get("group_size")
    if inputs.get("dynamic") is True and found == ("group", columns):
        return "group"
    raise unsupported(
        "input_activations strategy",
        f"{found[0]} with group_size {found[1]}",
        f"group with group_size {columns} and dynamic true, as weights are in blocks",
    )


def _parse_inputs(
    inputs: Mapping[str, Any] | None, input_type: InputType | None, may_be_static: bool = True
) -> _Inputs:
    """How 8-bit inputs are quantized: with a scale for each token, or with one stored scale."""
    if inputs is None:
        return "none"
    kind = "int" if input_type == "int8" else "float"
    _check(inputs, "input_activations ", num_bits=(8,), type=(kind,), symmetric=(True, None))
    strategies = ("token", "tensor") if kind == "float" else ("token",)
    if inputs.get("dynamic") is True and inputs.get("strategy") in strategies:
        return "token"  # vLLM, too, gives each token a scale where config.json says one for all
    if not inputs.get("dynamic") and inputs.get("strategy") == "tensor" and may_be_static:
        return "tensor"
    expected = "token with dynamic true"
    if may_be_static:
        expected += ", or tensor with dynamic false"
    raise unsupported("input_activations strategy", inputs.get("strategy"), expected)


def _check(values: Mapping[str, Any], where: str, **allowed: tuple[object, ...]) -> None:
    """Raises InputError, naming the field, for a value that is not allowed.

    where: what the field's name begins with in the message.
    """
    for name, choices in allowed.items():
        if values.get(name) not in choices:
            expected = " or ".join(str(value) for value in choices)
            raise unsupported(f"{where}{name}", values.get(name), expected)


def unsupported(field: str, value: object, expected: str) -> InputError:
    """The error for a value of the config that is not known."""
    return InputError(
        f"This compressed-tensors checkpoint has {field} {str(value)[:200]}", f"Expected {expected}"
    )
