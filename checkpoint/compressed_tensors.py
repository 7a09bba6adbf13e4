"""compressed-tensors `pack-quantized`, symmetric: 4 or 8 bit integer weights, one scale per group or output row.

For W[out, in] of `b` bits, G groups: weight_packed int32 [out, ceil(in*b/32)] holds q + 2^(b-1), packed along
`in`; weight_scale [out, G]; weight_shape int64 [2]. (https://github.com/neuralmagic/compressed-tensors)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.packing import pack, unpack
from llmkit.checkpoint.quantized import PackedTensor, QuantizationConfig, QuantizedWeight

SCALE_DTYPE = "BF16"  # what models are computed in; scales of any float dtype are read


class CompressedTensorsFormat:
    """Reads and writes symmetric pack-quantized checkpoints."""

    def tensors(self, config: QuantizationConfig, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The tensors of a quantized [out, in_] weight."""
        per_word = 32 // config.bits
        along = None if config.group_size == -1 else (1, config.group_size)
        return (
            PackedTensor("weight_packed", "I32", (out, -(-in_ // per_word)), (0, 1), (1, per_word)),
            PackedTensor("weight_scale", SCALE_DTYPE, (out, config.groups(in_)), (0, 1), along),
            PackedTensor("weight_shape", "I64", (2,), None, None, "shape"),
        )

    def pack(self, config: QuantizationConfig, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix; scales are rounded to bfloat16. Raises InputError for asymmetric codes."""
        if not bool((weight.zeros == 1 << (config.bits - 1)).all()):
            raise InputError("Asymmetric codes cannot be stored here", "Symmetric codes were expected")
        return {
            "weight_packed": pack(weight.codes, config.bits),
            "weight_scale": weight.scales.to(torch.bfloat16).contiguous(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }

    def unpack(self, config: QuantizationConfig, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. Raises InputError when shapes disagree."""
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        shape = tensors["weight_shape"].tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"weight_shape is {shape}", "Two positive sizes were expected")
        out, in_ = shape
        for part in self.tensors(config, out, in_):
            found = tuple(tensors[part.suffix].shape)
            if found != part.shape:
                raise InputError(f"{part.suffix} has shape {list(found)}", f"{list(part.shape)} was expected")
        zeros = torch.full(scales.shape, 1 << (config.bits - 1), dtype=torch.uint8, device=packed.device)
        return QuantizedWeight(unpack(packed, config.bits, in_), scales, zeros, config.bits, config.group_size)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        channel = config.group_size == -1
        weights = {
            "num_bits": config.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else config.group_size,
            "dynamic": False,
            "actorder": None,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(config.ignore),
            "kv_cache_scheme": None,
            "config_groups": {"group_0": group},
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """A `quantization_config`. Raises InputError, naming the field, for any scheme but the above."""
        if d.get("format") != "pack-quantized":
            raise _unsupported("format", d.get("format"), "pack-quantized")
        if d.get("kv_cache_scheme"):
            raise _unsupported("kv_cache_scheme", d["kv_cache_scheme"], "none")
        groups = d.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise _unsupported("config_groups", groups, "one group")
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("targets") != ["Linear"]:
            raise _unsupported("config_groups", groups, "weights, and the targets ['Linear']")
        if group.get("input_activations") or group.get("output_activations"):
            raise _unsupported("input_activations or output_activations", "set", "none")
        for name, allowed in (
            ("num_bits", (4, 8)), ("type", ("int", None)), ("symmetric", (True, None)), ("dynamic", (False, None)),
            ("strategy", ("group", "channel")), ("actorder", (None, False, "weight", "static")),
        ):  # fmt: skip
            if weights.get(name) not in allowed:
                raise _unsupported(name, weights.get(name), " or ".join(str(value) for value in allowed))
        size = weights.get("group_size") if weights["strategy"] == "group" else -1
        if type(size) is not int or (size < 1 and size != -1):
            raise _unsupported("group_size", size, "a positive number")
        ignore = tuple(str(name) for name in d.get("ignore") or ())
        return QuantizationConfig("compressed-tensors", weights["num_bits"], size, True, ignore)

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """None: everything is in config.json."""
        return {}


def _unsupported(field: str, value: object, expected: str) -> InputError:
    return InputError(f"This compressed-tensors checkpoint has {field} {str(value)[:200]}", f"Expected {expected}")
