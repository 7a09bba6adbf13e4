"""compressed-tensors: integer weights of 4 or 8 bits, and 8-bit weights whose inputs are rounded too.

For W[out, in] of `b` bits, G groups:
pack-quantized: weight_packed int32 [out, ceil(in*b/32)] holds the codes, packed along `in`; weight_scale [out, G];
weight_shape int64 [2]; asymmetric adds weight_zero_point int32 [ceil(out*b/32), G], packed along `out`.
int-quantized: weight int8 [out, in], weight_scale [out, 1]. float-quantized: weight e4m3, weight_scale [out, 1],
and input_scale [1] unless the inputs' scales are found as they come.
(https://github.com/vllm-project/compressed-tensors)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig, QuantizedWeight, Scheme

# Engines compute 4 and 8 bit weights with 16-bit scales, and 8-bit products with float32 ones.
PACKED_SCALES, PRODUCT_SCALES = "BF16", "F32"
MIXED = "mixed-precision"
KINDS = {"fp8": "float", "int8": "int"}


def storage_of(scheme: Scheme) -> str:
    """The name compressed-tensors gives to the way a scheme is stored."""
    if scheme.kind == "float":
        return "float-quantized"
    return "pack-quantized" if scheme.inputs == "none" else "int-quantized"


class CompressedTensorsFormat:
    """Reads and writes compressed-tensors checkpoints."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The tensors of a quantized [out, in_] weight."""
        along = None if scheme.group_size == -1 else (1, scheme.group_size)
        groups, storage = scheme.groups(in_), storage_of(scheme)
        if storage != "pack-quantized":
            dtype = "F8_E4M3" if storage == "float-quantized" else "I8"
            stored = (
                PackedTensor("weight", dtype, (out, in_), (0, 1), (1, 1)),
                PackedTensor("weight_scale", PRODUCT_SCALES, (out, groups), (0, 1), along),
            )
            scale = PackedTensor("input_scale", PRODUCT_SCALES, (1,), None, None)
            return (*stored, scale) if scheme.inputs == "tensor" else stored
        per_word = 32 // scheme.bits
        zeros = PackedTensor("weight_zero_point", "I32", (-(-out // per_word), groups), (0, per_word), along)
        return (
            PackedTensor("weight_packed", "I32", (out, -(-in_ // per_word)), (0, 1), (1, per_word)),
            PackedTensor("weight_scale", PACKED_SCALES, (out, groups), (0, 1), along),
            *(() if scheme.symmetric else (zeros,)),
            PackedTensor("weight_shape", "I64", (2,), None, None, "shape"),
        )

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for asymmetric codes under a symmetric scheme."""
        if scheme.symmetric and not bool((weight.zeros == scheme.half).all()):
            raise InputError("Asymmetric codes cannot be stored here", "Symmetric codes were expected")
        storage = storage_of(scheme)
        if storage != "pack-quantized":
            codes = weight.codes if storage == "float-quantized" else (weight.codes ^ 128).view(torch.int8)
            stored = {"weight": codes.contiguous(), "weight_scale": weight.scales.float().contiguous()}
            return stored if weight.input_scale is None else stored | {"input_scale": weight.input_scale}
        zeros = {} if scheme.symmetric else {"weight_zero_point": pack(weight.zeros.t(), scheme.bits).t().contiguous()}
        return {
            "weight_packed": pack(weight.codes, scheme.bits),
            "weight_scale": weight.scales.to(torch.bfloat16).contiguous(),
            **zeros,
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. Raises InputError when shapes disagree."""
        packed = storage_of(scheme) == "pack-quantized"
        shape = tensors["weight_shape"].tolist() if packed else list(tensors["weight"].shape)
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"weight_shape is {shape}", "Two positive sizes were expected")
        out, in_ = shape
        for part in self.tensors(scheme, out, in_):
            found = tuple(tensors[part.suffix].shape)
            if found != part.shape:
                raise InputError(f"{part.suffix} has shape {list(found)}", f"{list(part.shape)} was expected")
        scales = tensors["weight_scale"]
        if not packed:
            codes = tensors["weight"]
            codes = codes if scheme.kind == "float" else codes.contiguous().view(torch.uint8) ^ 128
        else:
            codes = unpack(tensors["weight_packed"], scheme.bits, in_)
        if scheme.symmetric:
            zeros = torch.full(scales.shape, scheme.half, dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack(tensors["weight_zero_point"].t(), scheme.bits, out).t().contiguous()
        scale = tensors["input_scale"].float() if scheme.inputs == "tensor" else None
        return QuantizedWeight(codes, scales, zeros, scheme, scale)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json: a group per scheme, the general one first."""
        targets: dict[Scheme, list[str]] = {config.scheme: ["Linear"]} if config.scheme else {}
        for module, scheme in config.overrides:
            targets.setdefault(scheme, []).append(module)
        storages = {storage_of(scheme) for scheme in targets}
        return {
            "quant_method": "compressed-tensors",
            "format": MIXED if len(storages) > 1 else next(iter(storages), "dense"),
            "quantization_status": "compressed",
            "ignore": list(config.ignore),
            "kv_cache_scheme": None if not config.kv else _kv_scheme(config.kv),
            "config_groups": {
                f"group_{index}": _group(scheme, names) for index, (scheme, names) in enumerate(targets.items())
            },
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """A `quantization_config`. Raises InputError, naming the field, for any scheme but the above."""
        kv = _parse_kv(d.get("kv_cache_scheme"))
        groups = d.get("config_groups")
        if not isinstance(groups, dict) or (not groups and not kv):
            raise _unsupported("config_groups", groups, "at least one group")
        general: Scheme | None = None
        overrides: list[tuple[str, Scheme]] = []
        for group in groups.values():
            scheme, targets = _parse_group(group), group.get("targets")
            if not isinstance(targets, list) or not targets:
                raise _unsupported("targets", targets, "'Linear' or names of modules")
            for target in targets:
                if target == "Linear":
                    general = scheme
                else:
                    overrides.append((str(target), scheme))
        schemes = [scheme for scheme in (general, *(scheme for _, scheme in overrides)) if scheme is not None]
        storages = {storage_of(scheme) for scheme in schemes}
        if storages and (stored := d.get("format")) not in (*storages, MIXED):
            raise _unsupported("format", stored, " or ".join(sorted(storages)) + ", as its groups say")
        ignore = tuple(str(name) for name in d.get("ignore") or ())
        return QuantizationConfig("compressed-tensors", general, ignore, tuple(overrides), kv)

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """None: everything is in config.json."""
        return {}


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    inputs = None
    if scheme.inputs != "none":
        inputs = {
            "num_bits": 8,
            "type": scheme.kind,
            "symmetric": True,
            "strategy": scheme.inputs,
            "group_size": None,
            "dynamic": scheme.inputs == "token",
            "actorder": None,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": storage_of(scheme),
    }


def _parse_group(group: object) -> Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise _unsupported("config_groups", group, "groups with weights")
    if group.get("output_activations"):
        raise _unsupported("output_activations", "set", "none")
    kind: Literal["int", "float"] = "float" if weights.get("type") == "float" else "int"
    inputs = _parse_inputs(group.get("input_activations"), kind)
    products = kind == "float" or inputs != "none"  # then both sides have 8 bits
    for name, allowed in (
        ("num_bits", (8,) if products else (4, 8)),
        ("type", ("int", "float", None)),
        ("symmetric", (True, None) if products else (True, False, None)),
        ("dynamic", (False, None)),
        ("strategy", ("channel",) if products else ("group", "channel")),
        ("actorder", (None, False, "weight", "static")),
    ):
        if weights.get(name) not in allowed:
            raise _unsupported(name, weights.get(name), " or ".join(str(value) for value in allowed))
    size = weights.get("group_size") if weights["strategy"] == "group" else -1
    if type(size) is not int or (size < 1 and size != -1):
        raise _unsupported("group_size", size, "a positive number")
    return Scheme(weights["num_bits"], size, weights.get("symmetric") is not False, kind, inputs)


def _parse_inputs(inputs: object, kind: str) -> Literal["none", "token", "tensor"]:
    if not inputs:
        if kind == "float":
            raise _unsupported("input_activations", "none", "8 bits, for weights of the type float")
        return "none"
    if not isinstance(inputs, dict):
        raise _unsupported("input_activations", inputs, "an object")
    for name, allowed in (("num_bits", (8,)), ("type", (kind,)), ("symmetric", (True, None))):
        if inputs.get(name) not in allowed:
            raise _unsupported(f"input_activations {name}", inputs.get(name), " or ".join(map(str, allowed)))
    if inputs.get("dynamic") is True and inputs.get("strategy") == "token":
        return "token"
    if not inputs.get("dynamic") and inputs.get("strategy") == "tensor" and kind == "float":
        return "tensor"
    expected = "token with dynamic true" + (", or tensor with dynamic false" if kind == "float" else "")
    raise _unsupported("input_activations strategy", inputs.get("strategy"), expected)


def _kv_scheme(kv: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": KINDS[kv], "symmetric": True, "strategy": "tensor", "dynamic": False}


def _parse_kv(scheme: object) -> Literal["", "fp8", "int8"]:
    if not scheme:
        return ""
    if not isinstance(scheme, dict):
        raise _unsupported("kv_cache_scheme", scheme, "an object")
    for name, allowed in (("num_bits", (8,)), ("type", ("float", "int")), ("strategy", ("tensor",)),
                          ("dynamic", (False, None)), ("symmetric", (True, None))):  # fmt: skip
        if scheme.get(name) not in allowed:
            raise _unsupported(f"kv_cache_scheme {name}", scheme.get(name), " or ".join(map(str, allowed)))
    return "fp8" if scheme["type"] == "float" else "int8"


def _unsupported(field: str, value: object, expected: str) -> InputError:
    return InputError(f"This compressed-tensors checkpoint has {field} {str(value)[:200]}", f"Expected {expected}")
