"""FP8 with block scales (`quant_method: fp8`), as DeepSeek V3 and MiniMax-M2 are released.

For W[out, in] in blocks of R x C (`weight_block_size`, usually 128 x 128):

    weight            e4m3 [out, in]
    weight_scale_inv  float32 [ceil(out/R), ceil(in/C)]   W = weight * weight_scale_inv
    activation_scale  float32 []                          if inputs are static

Without `weight_block_size`, `weight_scale_inv` is one number for the weight, as Ministral 3 is
released. Dynamic inputs have a scale for each token and group of C inputs; without blocks, for each
token.
The names and the config's fields are those of transformers' FineGrainedFP8Config.
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
from llmkit.checkpoint.quantized_weight import (
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.common.errors import InputError

DEFAULT_BLOCK_SIZE = (128, 128)  # of a config without weight_block_size
SCALE = "weight_scale_inv"
INPUT_SCALE = "activation_scale"


class Fp8Format:
    """Reads and writes checkpoints whose `quant_method` is fp8."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight."""
        weight = PackedTensor("weight", "F8_E4M3", (out, in_), (0, 1), (1, 1))
        if scheme.block_rows == -1:
            scale = PackedTensor(SCALE, "F32", (), None, None)
        else:
            scale = PackedTensor(
                SCALE,
                "F32",
                block_scale_shape(scheme, out, in_),
                (0, scheme.block_rows),
                (1, scheme.group_size),
                covers=True,
            )
        if scheme.inputs == "tensor":
            return weight, scale, PackedTensor(INPUT_SCALE, "F32", (), None, None)
        return weight, scale

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for a block with different scales."""
        scales = gather_block_scales(weight.scales.float(), scheme)
        if scheme.block_rows == -1:
            scales = scales.reshape(())
        stored = {"weight": weight.q.contiguous(), SCALE: scales}
        if weight.input_scale is not None:
            stored[INPUT_SCALE] = weight.input_scale.float().reshape(())
        return stored

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix.

        Raises InputError for shapes that disagree and for scales that are not above 0.
        """
        q = tensors["weight"]
        if q.ndim != 2:
            raise InputError(f"weight has shape {list(q.shape)}", "Two sizes were expected")
        out, in_ = q.shape
        for expected in self.tensors(scheme, out, in_):
            found = tensors[expected.suffix]
            if tuple(found.shape) != expected.shape:
                raise InputError(
                    f"{expected.suffix} has shape {list(found.shape)}",
                    f"{list(expected.shape)} was expected",
                )
            if expected.suffix != "weight":
                check_block_scales(expected.suffix, found.float())
        stored = tensors[SCALE].reshape(block_scale_shape(scheme, out, in_))
        scales = expand_block_scales(stored, scheme, out)
        zeros = torch.zeros(scales.shape, dtype=torch.uint8, device=scales.device)
        input_scale = None
        if scheme.inputs == "tensor":
            input_scale = tensors[INPUT_SCALE].float().reshape(1)
        return QuantizedWeight(q, scales, zeros, scheme, input_scale)

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
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
        default = None if is_static else DEFAULT_BLOCK_SIZE
        sizes = d.get("weight_block_size", default)
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
        return QuantizationConfig("fp8", scheme, tuple(ignore), method="fp8")

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """No files: config.json holds everything."""
        return {}


# transformers leaves a module dense when an entry, as a regular expression, matches the beginning
# of its name up to the end of a part, or when its name ends with the entry.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def _ignore_entry(key: str) -> str:
    """An entry of `modules_to_not_convert` as an entry of `QuantizationConfig.ignore`."""
    if key == "lm_head":
        return key
    return f"re:(?:{key}){_BOUNDARY}|.*{re.escape(key)}$"


def _module_pattern(entry: str) -> str:
    """The inverse of `_ignore_entry`; other entries stay what they are."""
    if not entry.startswith("re:"):
        return entry
    return entry.removeprefix("re:").partition(_BOUNDARY)[0].removeprefix("(?:").removesuffix(")")


def _unsupported(field: str, value: object, expected: str) -> InputError:
    return InputError(f"This FP8 checkpoint has {field} {str(value)[:200]}", f"Expected {expected}")
