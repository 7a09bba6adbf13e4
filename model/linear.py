"""The linear layer of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from llmkit.checkpoint.quantized import QuantizedWeight
from llmkit.kernels.linear import (
    HalfProduct,
    Int4Product,
    Int8Product,
    Product,
    TokenProduct,
    half_rows,
    has_bfloat16_products,
    has_half_products,
    has_int8_products,
    suits_int4,
)
from llmkit.kernels.rounding import round_tensor, round_tokens


@dataclass(frozen=True)
class Rounding:
    """What values are rounded to before they are used: 8 bits of `kind` with a stored scale, or one for each token."""

    kind: str  # "int" or "float"
    scale: torch.Tensor | None = None  # float32 [1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., C] in and out."""
        return round_tokens(x, self.kind) if self.scale is None else round_tensor(x, self.scale, self.kind)


class Linear(nn.Module):
    """y = round(x) W' + b with a dense weight [out, in]; an nn.Module so that calibration can hook it."""

    if TYPE_CHECKING:  # nn.Module's own says that it returns anything

        def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, rounding: Rounding | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.rounding = weight, bias, rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        return linear(x if self.rounding is None else self.rounding(x), self.weight, self.bias)


class PackedLinear(Linear):
    """The same with a packed weight, for serving only; `weight` is on the meta device, a shape without values."""

    def __init__(self, product: Product, shape: tuple[int, int], rounding: Rounding | None = None) -> None:
        super().__init__(torch.empty(shape, device="meta"), None, rounding)
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]."""
        return self.product(x if self.rounding is None else self.rounding(x))


def serving_linear(
    parts: Sequence[torch.Tensor | QuantizedWeight],
    bias: torch.Tensor | None,
    rounding: Rounding | None,
    dtype: torch.dtype,
) -> Linear:
    """The linear that serves the weight made of `parts`, one below the other, to inputs of `dtype` on a CPU.

    In float32 it gives what a dense one gives, up to the order of summation. In 16 bits it may round weights to 11
    bits, and the scales and inputs of INT4 to 8. parts: float tensors [rows, in], quantized weights; bias: of `dtype`.
    """
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if (whole := _one_weight(parts)) is not None:
        scheme, parts = whole.scheme, [whole]
        if scheme.kind == "int" and scheme.inputs == "token" and (has_int8_products() or has_half_products()):
            eight = has_int8_products()
            product = Int8Product(whole.codes, whole.scales) if eight else HalfProduct(*_half_rows(whole)[:2])
            return PackedLinear(TokenProduct(product, bias), shape)
        if dtype == torch.bfloat16 and scheme.bits == 4 and suits_int4(shape, scheme.group_size):
            return PackedLinear(Int4Product(whole.codes, whole.scales, whole.zeros, bias), shape)
    if has_half_products() and not (dtype == torch.bfloat16 and has_bfloat16_products()):
        rows = [_half_rows(part) for part in parts]
        if all(exact or (dtype != torch.float32 and values.isfinite().all()) for values, _, exact in rows):
            values, scales = _joined([values for values, _, _ in rows]), _joined([scales for _, scales, _ in rows])
            return PackedLinear(HalfProduct(values, scales, bias), shape, rounding)
    dense = [part.dequantize() if isinstance(part, QuantizedWeight) else part for part in parts]
    return Linear(_joined(dense).to(dtype), bias, rounding)


def _one_weight(parts: Sequence[torch.Tensor | QuantizedWeight]) -> QuantizedWeight | None:
    """The parts as one quantized weight, when all are of one scheme."""
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(quantized) < len(parts) or len({part.scheme for part in quantized}) > 1:
        return None
    codes, scales, zeros = (
        _joined([getattr(part, name) for part in quantized]) for name in ("codes", "scales", "zeros")
    )
    return QuantizedWeight(codes, scales, zeros, quantized[0].scheme)


def _half_rows(part: torch.Tensor | QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """See `half_rows`: codes are float16's numbers as they are, when there is one scale for a row of them."""
    if isinstance(part, QuantizedWeight):
        if part.scales.shape[1] == 1:
            return part.codes.float() - part.zeros.float(), part.scales.float().flatten(), True
        part = part.dequantize()
    return half_rows(part.float())


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
