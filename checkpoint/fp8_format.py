"""FP8 with block scales or one scale (`quant_method: fp8`), as DeepSeek V3 is released.

For W[out, in] in blocks of R x C (`weight_block_size`, usually 128 x 128):

    weight            e4m3 [out, in]
    weight_scale_inv  float32 [ceil(out/R), ceil(in/C)]   W = weight * weight_scale_inv
    activation_scale  float32 []                          if inputs are static

Without `weight_block_size`, `weight_scale_inv` is one number for the weight, as Ministral 3 is
released. Dynamic inputs have a scale for each token and group of C inputs; without blocks, for each
token. The names and the config's fields are those of transformers' FineGrainedFP8Config.

AutoFP8, and vLLM before compressed-tensors, wrote the same `quant_method` with other names:

    weight            e4m3 [out, in]
    weight_scale      float32 [] or [1]   W = weight * weight_scale
    input_scale       float32 [] or [1]   if inputs are static

Their configs have no `weight_block_size`, and `ignored_layers` for `modules_to_not_convert`. The
config does not say which names a checkpoint has, so its tensors decide (`quantized_formats`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llmkit.checkpoint.block_scales import (
    block_scale_shape,
    gather_block_scales,
    unpack_fp8,
)
from llmkit.checkpoint.quantized_weight import (
    KV_SCALES,
    Format,
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.common.errors import InputError

DEFAULT_BLOCK_SIZE = (128, 128)  # of a config without weight_block_size
OLD_KV_SCALE = "kv_scale"  # of keys and values, before they had two


@dataclass(frozen=True)
class Fp8Format:
    """Reads and writes checkpoints whose `quant_method` is fp8."""

    name: Format = "fp8"
    scale: str = "weight_scale_inv"
    input_scale: str = "activation_scale"
    has_blocks: bool = True  # whether weights may have a scale for each block

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight."""
        weight = PackedTensor("weight", "F8_E4M3", (out, in_), (0, 1), (1, 1))
        if scheme.block_rows == -1:
            scale = PackedTensor(self.scale, "F32", (), None, None, scale="not negative")
        else:
            scale = PackedTensor(
                self.scale,
                "F32",
                block_scale_shape(scheme, out, in_),
                (0, scheme.block_rows),
                (1, scheme.group_size),
                covers=True,
                scale="not negative",
            )
        if scheme.inputs == "tensor":
            input_scale = PackedTensor(self.input_scale, "F32", (), None, None, scale="positive")
            return weight, scale, input_scale
        return weight, scale

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for a block with different scales."""
        scales = gather_block_scales(weight.scales.float(), scheme)
        if scheme.block_rows == -1:
            scales = scales.reshape(())
        stored = {"weight": weight.q.contiguous(), self.scale: scales}
        if weight.input_scale is not None:
            stored[self.input_scale] = weight.input_scale.float().reshape(())
        return stored

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix.

        Raises InputError as `check_stored`.
        """
        return unpack_fp8(scheme, tensors, self.tensors, self.scale, self.input_scale)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json. Raises InputError for a quantized KV cache."""
        assert not config.overrides, "FP8 has one scheme"
        if config.kv and self.has_blocks:
            raise InputError(
                f"The fp8 format has no place for the scales of a {config.kv.upper()} KV cache",
                todo="Use --format compressed-tensors",
            )
        scheme = config.scheme
        blocks = None
        if scheme is not None and scheme.block_rows != -1:
            blocks = [scheme.block_rows, scheme.group_size]
        carried = [prefix.removesuffix(".") for prefix in config.carried]
        is_static = scheme is not None and scheme.inputs == "tensor"
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "static" if is_static else "dynamic",
            "weight_block_size": blocks,
            "modules_to_not_convert": [*map(_module_pattern, config.ignore), *carried],
        }

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """Parse a `quantization_config`. Raises InputError, naming the field, for other schemes."""
        fields: tuple[tuple[str, tuple[object, ...]], ...] = (
            ("activation_scheme", ("dynamic", "static", None)),
            ("fmt", ("e4m3", "float8_e4m3fn", None)),
            ("expert_dtype", ("fp8", None)),
            ("modules_to_convert", (None, [])),
        )
        for name, allowed in fields:
            if d.get(name) not in allowed:
                expected = " or ".join("none" if not value else str(value) for value in allowed)
                raise _unsupported(name, d[name], expected)
        is_static = d.get("activation_scheme") == "static"
        default = None if is_static or not self.has_blocks else DEFAULT_BLOCK_SIZE
        sizes = d.get("weight_block_size", default)
        if sizes is not None and not self.has_blocks:
            raise _unsupported(
                "weight_block_size",
                f"{sizes}, and tensors with the name {self.scale}",
                "no weight_block_size, or scales of blocks with the name weight_scale_inv",
            )
        inputs: Literal["token", "group", "tensor"]
        if sizes is None:
            inputs = "tensor" if is_static else "token"
            scheme = Scheme(8, kind="float", inputs=inputs, block_rows=-1)
        else:
            if (
                not isinstance(sizes, (list, tuple))
                or len(sizes) != 2
                or any(type(size) is not int or size < 1 for size in sizes)
            ):
                raise _unsupported(
                    "weight_block_size", sizes, "two positive numbers such as [128, 128], or null"
                )
            if is_static:
                raise _unsupported(
                    "activation_scheme", "static", "dynamic, as weight_block_size is not null"
                )
            scheme = Scheme(8, sizes[1], kind="float", inputs="group", block_rows=sizes[0])
        listed = d.get("modules_to_not_convert")
        if listed is None:
            listed = d.get("ignored_layers") or []
        if not isinstance(listed, (list, tuple)) or not all(isinstance(key, str) for key in listed):
            raise _unsupported("modules_to_not_convert", listed, "a list of module names")
        # Readers leave the output projection dense, whether it is listed or not.
        ignore = dict.fromkeys(["lm_head", *(_ignore_entry(key) for key in listed)])
        return QuantizationConfig(self.name, scheme, tuple(ignore), method="fp8")

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """No files: config.json holds everything."""
        return {}


def has_autofp8_names(tensors: Collection[str]) -> bool:
    """Whether an FP8 checkpoint has the names of AutoFP8."""
    suffixes = {name.rpartition(".")[2] for name in tensors}
    return "weight_scale" in suffixes and "weight_scale_inv" not in suffixes


def with_kv_scales(config: QuantizationConfig, tensors: Collection[str]) -> QuantizationConfig:
    """The config of an AutoFP8 checkpoint, with the KV cache whose scales are among `tensors`."""
    if any(name.endswith(f".{OLD_KV_SCALE}") for name in tensors):
        return replace(config, kv="fp8", kv_scales=(OLD_KV_SCALE, OLD_KV_SCALE))
    if any(name.endswith(f".{KV_SCALES[0]}") for name in tensors):
        return replace(config, kv="fp8")
    return config


# transformers leaves a module dense when an entry, as a regular expression, matches the beginning
# of its name up to the end of a part, or when its name ends with the entry.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def _ignore_entry(key: str) -> str:
    """An entry of `modules_to_not_convert` as an entry of `QuantizationConfig.ignore`."""
    if key == "lm_head" or key.startswith("re:"):  # AutoFP8 marks its regular expressions
        return key
    return f"re:(?:{key}){_BOUNDARY}|.*{re.escape(key)}$"


def _module_pattern(entry: str) -> str:
    """The inverse of `_ignore_entry`; other entries stay what they are."""
    if not entry.startswith("re:"):
        return entry
    pattern, boundary, _ = entry.removeprefix("re:").partition(_BOUNDARY)
    return pattern.removeprefix("(?:").removesuffix(")") if boundary else entry


def _unsupported(field: str, value: object, expected: str) -> InputError:
    return InputError(f"This FP8 checkpoint has {field} {str(value)[:200]}", f"Expected {expected}")
