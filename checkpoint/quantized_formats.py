"""The quantized formats by name. They define how a quantized weight is stored.

How a weight is quantized is the subject of `llmkit.quant`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch

from llmkit.checkpoint.awq_format import AwqFormat
from llmkit.checkpoint.compressed_tensors import CompressedTensorsFormat
from llmkit.checkpoint.fp8_format import Fp8Format, has_autofp8_names, with_kv_scales
from llmkit.checkpoint.gptq_format import GptqFormat
from llmkit.checkpoint.modelopt_format import ModeloptFormat, with_stored_scales
from llmkit.checkpoint.mxfp4_format import Mxfp4Format
from llmkit.checkpoint.quantized_weight import (
    PRE_QUANT_SCALE,
    PackedTensor,
    QuantizationConfig,
    QuantizedWeight,
    Scheme,
)
from llmkit.common.errors import InputError


class QuantizedFormat(Protocol):
    """How a format stores the weight [out, in] of a linear module M: as tensors `M.<suffix>`."""

    def tensors(self, scheme: Scheme, out: int, in_: int) -> tuple[PackedTensor, ...]:
        """The stored tensors of an [out, in_] weight.

        Raises InputError for sizes that do not pack.
        """

    def pack(self, scheme: Scheme, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix. Raises InputError for a weight the format cannot hold."""

    def unpack(self, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight from its stored tensors by suffix. Raises InputError as `check_stored`."""

    def config_dict(self, config: QuantizationConfig) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def parse(self, d: Mapping[str, Any]) -> QuantizationConfig:
        """The inverse of `config_dict`. Raises InputError for options that cannot be read."""

    def extra_files(self, config: QuantizationConfig) -> dict[str, bytes]:
        """Further files that readers of the format need."""


_FP8 = Fp8Format()
# The names of AutoFP8 and vLLM, under the same `quant_method`.
_AUTOFP8 = Fp8Format("autofp8", "weight_scale", "input_scale", has_blocks=False)
# By `quant_method`.
METHODS: dict[str, QuantizedFormat] = {
    "gptq": GptqFormat(),
    "awq": AwqFormat(),
    "compressed-tensors": CompressedTensorsFormat(),
    "mxfp4": Mxfp4Format(),
    "fp8": _FP8,
    "modelopt": ModeloptFormat(),
}
FORMATS: dict[str, QuantizedFormat] = METHODS | {
    "gptq_v2": GptqFormat("gptq_v2"),
    "autofp8": _AUTOFP8,
}
# What the stored scale of inputs is called, by format.
_INPUT_SCALES = {
    "compressed-tensors": "input_scale",
    "fp8": _FP8.input_scale,
    "autofp8": _AUTOFP8.input_scale,
    "modelopt": "input_scale",
}


def format_of(config: QuantizationConfig) -> QuantizedFormat:
    """The format that `config` is stored in."""
    return FORMATS[config.format]


def packed_tensors(
    config: QuantizationConfig, module: str, scheme: Scheme, out: int, in_: int
) -> tuple[PackedTensor, ...]:
    """The tensors that a checkpoint stores for the [out, in_] weight of a linear layer.

    Raises InputError for sizes that do not pack.
    """
    tensors = format_of(config).tensors(scheme, out, in_)
    if not config.has_pre_quant_scale(module):
        return tensors
    scale = PackedTensor(PRE_QUANT_SCALE, "BF16", (in_,), None, (0, 1), scale="positive")
    return (*tensors, scale)


def read_input_scale(
    name: str, scheme: Scheme, read: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """The stored scale of a linear layer's inputs, float32 [1].

    name: of the format. read: returns the layer's stored tensor by suffix.
    """
    if scheme.inputs == "group" and name == "compressed-tensors":  # it stores the divisor
        return 1.0 / read("input_global_scale").float().reshape(1)
    return read(_INPUT_SCALES[name]).float().reshape(1)


def parse_quantization(d: object, tensors: Collection[str] = ()) -> QuantizationConfig:
    """Parse the `quantization_config` of a config.json.

    tensors: the names of the checkpoint's tensors, where the config does not say them.
    Raises InputError for unknown methods and options.
    """
    method = d.get("quant_method") if isinstance(d, dict) else None
    if str(method).startswith("modelopt"):  # vLLM's names of its parts: modelopt_fp4, ...
        method = "modelopt"
    if not isinstance(d, dict) or method not in METHODS:
        raise InputError(
            f"This checkpoint is quantized with {method or 'a method it does not name'}",
            f"One of {', '.join(METHODS)} was expected",
        )
    if method == "fp8" and has_autofp8_names(tensors):
        config = with_kv_scales(_AUTOFP8.parse(d), tensors)
    else:
        config = METHODS[method].parse(d)
    if method == "modelopt":
        config = with_stored_scales(config, tensors)
    for entry in (*config.ignore, *(entry for entry, _ in config.overrides)):
        try:
            re.compile(entry[3:] if entry.startswith("re:") else "")
        except re.error as error:
            raise InputError(
                f"This checkpoint's quantization_config has {entry} ({error})",
                "A regular expression was expected after re:",
            ) from error
    return config
