"""The methods as data, and what a choice of options means for one model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.checkpoint.formats import format_of
from llmkit.checkpoint.quantized import Format, QuantizationConfig
from llmkit.checkpoint.safetensors_header import DTYPES
from llmkit.model.layout import Parameter, parameters
from llmkit.model.spec import ModelSpec

GROUP_SIZES = (128, 64, 32)  # what every engine has kernels for, the best compression first


@dataclass(frozen=True)
class Method:
    """How codes are chosen. The first of `bits` is the default."""

    bits: tuple[int, ...]
    format: Format | None = None  # None: a cast, nothing is quantized
    calibrated: bool = False
    grouped: bool = False  # one scale per group of columns; otherwise one per row
    dtype: torch.dtype | None = None  # of a cast


METHODS: dict[str, Method] = {
    "bf16": Method((16,), dtype=torch.bfloat16),
    "fp16": Method((16,), dtype=torch.float16),
    "int8": Method((8,), "compressed-tensors"),
    "gptq": Method((4, 8), "gptq", calibrated=True, grouped=True),
    "rtn": Method((4, 8), "compressed-tensors", grouped=True),
}


def method_of(name: str, bits: int | None, group_size: int | None) -> tuple[Method, int]:
    """The method and its bits. Raises UsageError when method, bits and group size do not go together."""
    method = METHODS.get(name)
    if method is None:
        raise UsageError(f"--method {name} is not known", f"One of {', '.join(METHODS)} was expected")
    if bits is not None and bits not in method.bits:
        pairs = ", ".join(f"{other} {choice}" for other, entry in METHODS.items() for choice in entry.bits)
        raise UsageError(f"--method {name} and --bits {bits} do not go together", f"The pairs that do: {pairs}")
    if group_size is not None and not method.grouped:
        grouped = ", ".join(other for other, entry in METHODS.items() if entry.grouped)
        raise UsageError(
            f"--method {name} has no groups, and --group-size is {group_size}", f"Groups go with {grouped}"
        )
    return method, bits or method.bits[0]


def quantization_of(spec: ModelSpec, name: str, bits: int, group_size: int | None) -> QuantizationConfig | None:
    """How the linear layers of `spec` are stored by a method; None for a cast.

    `group_size` None: the largest of GROUP_SIZES that divides every layer, or one scale per row when none does.
    Raises InputError for one that does not divide, naming the layer and the sizes that do.
    """
    method = METHODS[name]
    if method.format is None:
        return None
    rows = parameters(spec)
    size = _group_size([row for row in rows if row.linear], group_size) if method.grouped else -1
    # Readers of compressed-tensors take every linear layer for quantized that is not listed here: routers too.
    others = [row for row in rows if len(row.shape) == 2 and not row.linear and row.name.startswith("layers.")]
    routers = [tensor.removesuffix(".weight") for row in others for tensor in row.tensors]
    ignore = ("lm_head", *(routers if method.format == "compressed-tensors" else ()))
    return QuantizationConfig(method.format, bits, size, symmetric=True, ignore=ignore, method=name)


def scale_dtype(quantization: QuantizationConfig) -> torch.dtype:
    """The dtype that the format stores scales in."""
    tensors = format_of(quantization).tensors(quantization, 128, 128)
    return next(DTYPES[packed.dtype] for packed in tensors if "scale" in packed.suffix)


def _group_size(linears: list[Parameter], wanted: int | None) -> int:
    common = math.gcd(*(row.shape[1] for row in linears))
    if wanted is None:
        return next((size for size in GROUP_SIZES if common % size == 0), -1)
    if wanted == -1:
        return wanted
    sizes = [size for size in range(8, common + 1, 8) if common % size == 0]
    for row in linears:
        if wanted < 1 or row.shape[1] % wanted:
            raise InputError(
                f"group size {wanted} does not divide {row.module}, which has {row.shape[1]} in_features",
                f"The sizes that divide every layer: {', '.join(map(str, [*sizes, -1]))}",
            )
    return wanted
