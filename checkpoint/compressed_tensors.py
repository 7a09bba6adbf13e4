"""The compressed-tensors format: packed integers, INT8 and FP8 as they are, FP4 and MX formats.

For W[out, in] of `b` bits with G groups:

    pack-quantized   weight_packed      int32 [out, ceil(in*b/32)]  packed along `in`
                     weight_scale       [out, G]
                     weight_shape       int64 [2]
                     weight_zero_point  int32 [ceil(out*b/32), G]   if asymmetric; along `out`
    int-quantized    weight             int8 [out, in]
                     weight_scale       [out, G] or [1]
                     input_scale        [1]                         if inputs are static
    float-quantized, naive-quantized
                     weight             e4m3 [out, in]
                     weight_scale       [out, 1], or [ceil(out/R), ceil(in/C)] in blocks of R x C,
                                        or [1]
                     input_scale        [1]                         if inputs are static
    nvfp4-pack-quantized, mxfp4-pack-quantized
                     weight_packed      uint8 [out, in/2]           see `microscaling`
                     weight_scale       [out, G]                    e4m3; MXFP4: uint8, e8m0
                     weight_global_scale, input_global_scale [1]    NVFP4: both stored as 1 / scale
    mxfp8-quantized  weight             e4m3 [out, in]
                     weight_scale       uint8 [out, G], e8m0

(https://github.com/vllm-project/compressed-tensors)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

from llmkit.checkpoint.block_scales import (
    block_scale_shape,
    expand_block_scales,
    gather_block_scales,
)
from llmkit.checkpoint.compressed_tensors_groups import (
    MIXED,
    compression_format,
    group_dict,
    parse_group,
    readable_formats,
    unsupported,
)
from llmkit.checkpoint.microscaling import MicroscalingLayout
from llmkit.checkpoint.packing import pack, unpack, word_count, word_values
from llmkit.checkpoint.quantized_weight import (
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    ScaleRule,
    Scheme,
)
from llmkit.checkpoint.stored_tensors import check_stored
from llmkit.common.errors import InputError

# Engines use 16-bit scales for weight-only schemes, and float32 scales for 8-bit matrix products.
WEIGHT_ONLY_SCALE_DTYPE = "BF16"
W8A8_SCALE_DTYPE = "F32"
_KV_TYPES = {"fp8": "float", "int8": "int"}  # the `type` of a quantized KV cache
# Where transforms may lie that are merged into the stored weights.
_MERGED_TRANSFORMS = ("weight_input", "weight_output")
_MICROSCALING = MicroscalingLayout(
    "weight_packed",
    "weight_global_scale",
    "input_global_scale",
    stores_inverse=True,
    scalar_shape=(1,),
)


class CompressedTensorsFormat:
    """Reads and writes compressed-tensors checkpoints."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for FP4 and MX groups that do not divide the columns.
        """
        if scheme.scale_format != "float":
            return _MICROSCALING.tensors(scheme, out, in_)
        along = None if scheme.group_size == -1 else (1, scheme.group_size)
        groups = scheme.groups(in_)
        storage = compression_format(scheme)
        rule: ScaleRule = "not negative" if scheme.kind == "float" else "finite"
        if storage != "pack-quantized":
            dtype = "F8_E4M3" if scheme.kind == "float" else "I8"
            weight_scale = PackedTensor(
                "weight_scale", W8A8_SCALE_DTYPE, (1,), None, None, scale=rule
            )
            if scheme.block_rows != -1:
                weight_scale = PackedTensor(
                    "weight_scale",
                    W8A8_SCALE_DTYPE,
                    block_scale_shape(scheme, out, in_),
                    (0, scheme.block_rows),
                    along,
                    covers=scheme.block_rows > 1,
                    scale=rule,
                )
            weight = PackedTensor("weight", dtype, (out, in_), (0, 1), (1, 1))
            stored = (weight, weight_scale)
            input_scale = PackedTensor(
                "input_scale", W8A8_SCALE_DTYPE, (1,), None, None, scale="positive"
            )
            return (*stored, input_scale) if scheme.inputs == "tensor" else stored
        per_word = word_values(scheme.bits)
        packed_shape = (out, word_count(in_, scheme.bits))
        packed_tensors = [
            PackedTensor("weight_packed", "I32", packed_shape, (0, 1), (1, per_word)),
            PackedTensor(
                "weight_scale",
                WEIGHT_ONLY_SCALE_DTYPE,
                (out, groups),
                (0, 1),
                along,
                scale=rule,
            ),
        ]
        if not scheme.symmetric:
            zeros_shape = (word_count(out, scheme.bits), groups)
            packed_tensors.append(
                PackedTensor("weight_zero_point", "I32", zeros_shape, (0, per_word), along)
            )
        packed_tensors.append(PackedTensor("weight_shape", "I64", (2,), None, None, "shape"))
        return tuple(packed_tensors)

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix.

        Raises InputError for an asymmetric weight and a symmetric scheme, and for scales that do
        not fit.
        """
        if scheme.scale_format != "float":
            return _MICROSCALING.pack(scheme, weight)
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
        # pack-quantized. Scales in float16, of a converted checkpoint, stay as they are.
        is_half = weight.scales.dtype == torch.float16
        scales = weight.scales if is_half else weight.scales.to(torch.bfloat16)
        stored = {
            "weight_packed": pack(weight.q, scheme.bits),
            "weight_scale": scales.contiguous(),
        }
        if not scheme.symmetric:
            zeros = pack(weight.zeros.t(), scheme.bits).t().contiguous()
            stored["weight_zero_point"] = zeros
        stored["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        return stored

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix.

        Raises InputError as `check_stored`.
        """
        if scheme.scale_format != "float":
            return _MICROSCALING.unpack(scheme, tensors)
        is_packed = compression_format(scheme) == "pack-quantized"
        shape = tensors["weight_shape"].tolist() if is_packed else list(tensors["weight"].shape)
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"weight_shape is {shape}", "Two positive sizes were expected")
        out, in_ = shape
        check_stored(self.tensors(scheme, out, in_), tensors)
        scales = tensors["weight_scale"]
        if scheme.block_rows != 1:
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
                f"group_{index}": group_dict(scheme, names)
                for index, (scheme, names) in enumerate(targets.items())
            },
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`. Raises InputError, naming the field, for other schemes."""
        _check_options(d)
        kv = _parse_kv(d.get("kv_cache_scheme"))
        groups = d.get("config_groups")
        if not isinstance(groups, dict) or (not groups and not kv):
            raise unsupported("config_groups", groups, "at least one group")
        default_scheme: Scheme | None = None
        overrides: list[tuple[str, Scheme]] = []
        formats: dict[str, None] = {}
        for group in groups.values():
            scheme = parse_group(group, d.get("format"))
            formats |= dict.fromkeys(readable_formats(scheme))
            targets = group.get("targets")
            if not isinstance(targets, list) or not targets:
                raise unsupported("targets", targets, "'Linear' or names of modules")
            for target in targets:
                if target == "Linear":
                    default_scheme = scheme
                else:
                    overrides.append((str(target), scheme))
        if formats and d.get("format") not in (*formats, MIXED):
            raise unsupported(
                "format", d.get("format"), " or ".join(sorted(formats)) + ", as its groups say"
            )
        ignore = tuple(str(name) for name in d.get("ignore") or ())
        return QuantizationConfig(
            "compressed-tensors", default_scheme, ignore, tuple(overrides), kv=kv
        )

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """No files: config.json holds everything."""
        return {}


def _check_options(d: Mapping[str, Any]) -> None:
    """Raises InputError for sparse weights, and for transforms that are computed at run time."""
    sparsity = d.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise unsupported("sparsity_config", sparsity, "dense weights")
    transforms = d.get("transform_config") or {}
    groups = transforms.get("config_groups") or {} if isinstance(transforms, dict) else None
    if not isinstance(groups, dict):
        raise unsupported("transform_config", transforms, "an object")
    for group in groups.values():
        applied = group.get("apply") if isinstance(group, dict) else None
        for part in applied if isinstance(applied, list) else [None]:
            location = part.get("location") if isinstance(part, dict) else None
            if location not in _MERGED_TRANSFORMS:
                raise unsupported(
                    "transform_config with the location",
                    location,
                    f"{' or '.join(_MERGED_TRANSFORMS)}, as others are computed at run time",
                )


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
        raise unsupported("kv_cache_scheme", scheme, "an object")
    for name, allowed in (
        ("num_bits", (8,)),
        ("type", ("float", "int")),
        ("strategy", ("tensor",)),
        ("dynamic", (False, None)),
        ("symmetric", (True, None)),
    ):
        if scheme.get(name) not in allowed:
            raise unsupported(
                f"kv_cache_scheme {name}", scheme.get(name), " or ".join(map(str, allowed))
            )
    return "fp8" if scheme["type"] == "float" else "int8"
