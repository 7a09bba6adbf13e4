"""The compressed-tensors format: INT4 and INT8 weights, and 8-bit weights with quantized inputs.

For W[out, in] of `b` bits with G groups:

    pack-quantized   weight_packed      int32 [out, ceil(in*b/32)]  packed along `in`
                     weight_scale       [out, G]
                     weight_shape       int64 [2]
                     weight_zero_point  int32 [ceil(out*b/32), G]   if asymmetric; along `out`
    int-quantized    weight             int8 [out, in]
                     weight_scale       [out, 1]
    float-quantized  weight             e4m3 [out, in]
                     weight_scale       [out, 1], or [ceil(out/R), ceil(in/C)] in blocks of R x C,
                                        or [1]
                     input_scale        [1]                         if inputs are static

(https://github.com/vllm-project/compressed-tensors)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

from llmkit.checkpoint.block_scales import (
    block_scale_shape,
    check_block_scales,
    expand_block_scales,
    gather_block_scales,
)
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized_weight import (
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.common.errors import InputError

# Engines use 16-bit scales for weight-only schemes, and float32 scales for 8-bit matrix products.
WEIGHT_ONLY_SCALE_DTYPE = "BF16"
W8A8_SCALE_DTYPE = "F32"
MIXED = "mixed-precision"
_KV_TYPES = {"fp8": "float", "int8": "int"}  # the `type` of a quantized KV cache


def compression_format(scheme: Scheme) -> str:
    """The `format` of a scheme: "pack-quantized", "int-quantized" or "float-quantized"."""
    if scheme.kind == "float":
        return "float-quantized"
    return "pack-quantized" if scheme.inputs == "none" else "int-quantized"


class CompressedTensorsFormat:
    """Reads and writes compressed-tensors checkpoints."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight."""
        along = None if scheme.group_size == -1 else (1, scheme.group_size)
        groups = scheme.groups(in_)
        storage = compression_format(scheme)
        if storage != "pack-quantized":
            dtype = "F8_E4M3" if storage == "float-quantized" else "I8"
            weight_scale = PackedTensor("weight_scale", W8A8_SCALE_DTYPE, (1,), None, None)
            if scheme.block_rows != -1:
                weight_scale = PackedTensor(
                    "weight_scale",
                    W8A8_SCALE_DTYPE,
                    block_scale_shape(scheme, out, in_),
                    (0, scheme.block_rows),
                    along,
                    covers=scheme.block_rows > 1,
                )
            weight = PackedTensor("weight", dtype, (out, in_), (0, 1), (1, 1))
            stored = (weight, weight_scale)
            scale = PackedTensor("input_scale", W8A8_SCALE_DTYPE, (1,), None, None)
            return (*stored, scale) if scheme.inputs == "tensor" else stored
        per_word = 32 // scheme.bits
        packed_shape = (out, -(-in_ // per_word))
        packed_tensors = [
            PackedTensor("weight_packed", "I32", packed_shape, (0, 1), (1, per_word)),
            PackedTensor("weight_scale", WEIGHT_ONLY_SCALE_DTYPE, (out, groups), (0, 1), along),
        ]
        if not scheme.symmetric:
            zeros_shape = (-(-out // per_word), groups)
            packed_tensors.append(
                PackedTensor("weight_zero_point", "I32", zeros_shape, (0, per_word), along)
            )
        packed_tensors.append(PackedTensor("weight_shape", "I64", (2,), None, None, "shape"))
        return tuple(packed_tensors)

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix.

        Raises InputError for an asymmetric weight and a symmetric scheme.
        """
        if scheme.symmetric and not bool((weight.zeros == scheme.half).all()):
            raise InputError(
                "Asymmetric values cannot be stored here", "Symmetric values were expected"
            )
        storage = compression_format(scheme)
        if storage != "pack-quantized":
            q = weight.q
            if storage == "int-quantized":
                q = (q ^ 128).view(torch.int8)  # from 0 .. 255 to -128 .. 127
            scales = gather_block_scales(weight.scales.float(), scheme)
            if scheme.block_rows == -1:
                scales = scales.reshape(1)
            stored = {"weight": q.contiguous(), "weight_scale": scales}
            if weight.input_scale is not None:
                stored["input_scale"] = weight.input_scale
            return stored
        # pack-quantized
        stored = {
            "weight_packed": pack(weight.q, scheme.bits),
            "weight_scale": weight.scales.to(torch.bfloat16).contiguous(),
        }
        if not scheme.symmetric:
            zeros = pack(weight.zeros.t(), scheme.bits).t().contiguous()
            stored["weight_zero_point"] = zeros
        stored["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        return stored

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. Raises InputError when shapes disagree."""
        is_packed = compression_format(scheme) == "pack-quantized"
        shape = tensors["weight_shape"].tolist() if is_packed else list(tensors["weight"].shape)
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"weight_shape is {shape}", "Two positive sizes were expected")
        out, in_ = shape
        for expected in self.tensors(scheme, out, in_):
            found = tuple(tensors[expected.suffix].shape)
            if not expected.accepts(found):
                raise InputError(
                    f"{expected.suffix} has shape {list(found)}",
                    f"{list(expected.shape)} was expected",
                )
        scales = tensors["weight_scale"]
        if scheme.block_rows != 1:
            check_block_scales("weight_scale", scales.float())
            stored_scales = scales.reshape(block_scale_shape(scheme, out, in_))
            scales = expand_block_scales(stored_scales, scheme, out)
        if is_packed:
            q = unpack(tensors["weight_packed"], scheme.bits, in_)
        elif scheme.kind == "float":
            q = tensors["weight"]
        else:
            q = tensors["weight"].contiguous().view(torch.uint8) ^ 128
        if scheme.symmetric:
            zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack(tensors["weight_zero_point"].t(), scheme.bits, out).t().contiguous()
        input_scale = None
        if scheme.inputs == "tensor":
            input_scale = tensors["input_scale"].float().reshape(1)
            check_block_scales("input_scale", input_scale, may_be_zero=False)
        return QuantizedWeight(q, scales, zeros, scheme, input_scale)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json: a group per scheme, `config.scheme` first."""
        targets: dict[Scheme, list[str]] = {config.scheme: ["Linear"]} if config.scheme else {}
        for module, scheme in config.overrides:
            targets.setdefault(scheme, []).append(module)
        storages = {compression_format(scheme) for scheme in targets}
        return {
            "quant_method": "compressed-tensors",
            "format": MIXED if len(storages) > 1 else next(iter(storages), "dense"),
            "quantization_status": "compressed",
            "ignore": [
                *config.ignore,
                *(f"re:{re.escape(prefix)}.*" for prefix in config.carried),
            ],
            "kv_cache_scheme": None if not config.kv else _kv_scheme(config.kv),
            "config_groups": {
                f"group_{index}": _group(scheme, names)
                for index, (scheme, names) in enumerate(targets.items())
            },
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`. Raises InputError, naming the field, for other schemes."""
        kv = _parse_kv(d.get("kv_cache_scheme"))
        groups = d.get("config_groups")
        if not isinstance(groups, dict) or (not groups and not kv):
            raise _unsupported("config_groups", groups, "at least one group")
        default_scheme: Scheme | None = None
        overrides: list[tuple[str, Scheme]] = []
        for group in groups.values():
            scheme = _parse_group(group)
            targets = group.get("targets")
            if not isinstance(targets, list) or not targets:
                raise _unsupported("targets", targets, "'Linear' or names of modules")
            for target in targets:
                if target == "Linear":
                    default_scheme = scheme
                else:
                    overrides.append((str(target), scheme))
        storages = {compression_format(scheme) for _, scheme in overrides}
        if default_scheme is not None:
            storages.add(compression_format(default_scheme))
        if storages and d.get("format") not in (*storages, MIXED):
            raise _unsupported(
                "format", d.get("format"), " or ".join(sorted(storages)) + ", as its groups say"
            )
        ignore = tuple(str(name) for name in d.get("ignore") or ())
        return QuantizationConfig(
            "compressed-tensors", default_scheme, ignore, tuple(overrides), kv=kv
        )

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """No files: config.json holds everything."""
        return {}


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
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
    if scheme.block_rows > 1:
        weights |= {
            "strategy": "block",
            "group_size": None,
            "block_structure": [scheme.block_rows, scheme.group_size],
        }
    if scheme.block_rows == -1:
        weights["strategy"] = "tensor"
    inputs = None
    if scheme.inputs != "none":
        inputs = {
            "num_bits": 8,
            "type": scheme.kind,
            "symmetric": True,
            "strategy": scheme.inputs,
            "group_size": scheme.group_size if scheme.inputs == "group" else None,
            "dynamic": scheme.inputs != "tensor",
            "actorder": None,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": compression_format(scheme),
    }


def _parse_group(group: object) -> Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise _unsupported("config_groups", group, "groups with weights")
    if group.get("output_activations"):
        raise _unsupported("output_activations", "set", "none")
    kind: Literal["int", "float"] = "float" if weights.get("type") == "float" else "int"
    block_rows = 1
    size: object = -1
    if kind == "float" and weights.get("strategy") == "tensor":
        block_rows = -1
    if kind == "float" and weights.get("strategy") == "block":
        block_rows, size = _parse_blocks(weights.get("block_structure"))
    inputs = _parse_inputs(group.get("input_activations"), kind, size if block_rows > 1 else None)
    is_w8a8 = kind == "float" or inputs != "none"
    strategies: tuple[str, ...] = ("group", "channel")
    if is_w8a8:
        strategies = ("channel", "block", "tensor") if kind == "float" else ("channel",)
    for name, allowed in (
        ("num_bits", (8,) if is_w8a8 else (4, 8)),
        ("type", ("int", "float", None)),
        ("symmetric", (True, None) if is_w8a8 else (True, False, None)),
        ("dynamic", (False, None)),
        ("strategy", strategies),
        ("actorder", (None, False, "weight", "static")),
    ):
        if weights.get(name) not in allowed:
            raise _unsupported(
                name, weights.get(name), " or ".join(str(value) for value in allowed)
            )
    if weights["strategy"] == "group":
        size = weights.get("group_size")
    if type(size) is not int or (size < 1 and size != -1):
        raise _unsupported("group_size", size, "a positive number")
    return Scheme(
        weights["num_bits"], size, weights.get("symmetric") is not False, kind, inputs, block_rows
    )


def _parse_blocks(structure: object) -> tuple[int, int]:
    """The rows and columns of a block; a block of one row is not known."""
    if (
        not isinstance(structure, (list, tuple))
        or len(structure) != 2
        or any(type(size) is not int or size < 1 for size in structure)
        or structure[0] == 1
    ):
        raise _unsupported("block_structure", structure, "two numbers such as [128, 128]")
    return structure[0], structure[1]


def _parse_inputs(
    inputs: object, kind: str, block_columns: object
) -> Literal["none", "token", "group", "tensor"]:
    """How inputs are quantized. block_columns: of the weight's blocks; None when it has none."""
    if not inputs:
        if kind == "float":
            raise _unsupported("input_activations", "none", "8 bits, for weights of the type float")
        return "none"
    if not isinstance(inputs, dict):
        raise _unsupported("input_activations", inputs, "an object")
    for name, allowed in (("num_bits", (8,)), ("type", (kind,)), ("symmetric", (True, None))):
        if inputs.get(name) not in allowed:
            raise _unsupported(
                f"input_activations {name}", inputs.get(name), " or ".join(map(str, allowed))
            )
    if block_columns is not None:
        found = inputs.get("strategy"), inputs.get("group_size")
        if inputs.get("dynamic") is True and found == ("group", block_columns):
            return "group"
        raise _unsupported(
            "input_activations strategy",
            f"{found[0]} with group_size {found[1]}",
            f"group with group_size {block_columns} and dynamic true, as weights are in blocks",
        )
    strategies = ("token", "tensor") if kind == "float" else ("token",)
    if inputs.get("dynamic") is True and inputs.get("strategy") in strategies:
        return "token"  # vLLM, too, gives each token a scale where config.json says one for all
    if not inputs.get("dynamic") and inputs.get("strategy") == "tensor" and kind == "float":
        return "tensor"
    expected = "token with dynamic true"
    if kind == "float":
        expected += ", or tensor with dynamic false"
    raise _unsupported("input_activations strategy", inputs.get("strategy"), expected)


def _kv_scheme(kv: str) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": _KV_TYPES[kv],
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }


def _parse_kv(scheme: object) -> Literal["", "fp8", "int8"]:
    if not scheme:
        return ""
    if not isinstance(scheme, dict):
        raise _unsupported("kv_cache_scheme", scheme, "an object")
    for name, allowed in (
        ("num_bits", (8,)),
        ("type", ("float", "int")),
        ("strategy", ("tensor",)),
        ("dynamic", (False, None)),
        ("symmetric", (True, None)),
    ):
        if scheme.get(name) not in allowed:
            raise _unsupported(
                f"kv_cache_scheme {name}", scheme.get(name), " or ".join(map(str, allowed))
            )
    return "fp8" if scheme["type"] == "float" else "int8"


def _unsupported(field: str, value: object, expected: str) -> InputError:
    return InputError(
        f"This compressed-tensors checkpoint has {field} {str(value)[:200]}", f"Expected {expected}"
    )
