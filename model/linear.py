"""The linear layer of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from llmkit.checkpoint.quantized import QuantizedWeight, Scheme
from llmkit.kernels import native
from llmkit.kernels.jit import tl
from llmkit.kernels.linear import Int8Product, NativeProduct, Product, has_bfloat16_products, has_int8_products
from llmkit.kernels.native import Panels
from llmkit.kernels.quantized_linear import GroupedProduct, RoundedProduct
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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out]. There are no hooks."""
        return self.product(x if self.rounding is None else self.rounding(x))


def serving_linear(
    parts: Sequence[torch.Tensor | QuantizedWeight], bias: torch.Tensor | None, rounding: Rounding | None,
    dtype: torch.dtype, device: torch.device | str = "cpu",
) -> Linear:  # fmt: skip
    """The linear that serves the weight made of `parts`, one below the other, to inputs of `dtype`.

    It gives what a dense one gives in float32, up to the order of summation and, on a GPU, rounding to `dtype`. parts:
    float tensors [rows, in], quantized weights (on a GPU, of a scheme that `suits_gpu`); bias: of `dtype`.
    """
    shape, parts = (sum(part.shape[0] for part in parts), parts[0].shape[1]), _joined(parts)
    cpu = torch.device(device).type == "cpu"
    one = parts[0] if len(parts) == 1 and isinstance(parts[0], QuantizedWeight) else None
    if one is not None and not cpu:
        return PackedLinear(_gpu_product(one, bias, rounding), shape)
    if one is not None and one.scheme.inputs == "token" and suits_integers(one):
        if has_int8_products():
            return PackedLinear(Int8Product(one.codes, one.scales, bias), shape)
        if packs_weights(dtype):
            return PackedLinear(NativeProduct([panels_of(one)], bias, integers=True), shape)
    if cpu and packs_weights(dtype):
        return PackedLinear(NativeProduct([panels_of(part) for part in parts], bias), shape, rounding)
    dense = [part.dequantize() if isinstance(part, QuantizedWeight) else part for part in parts]
    return Linear((dense[0] if len(dense) == 1 else torch.cat(dense)).to(dtype), bias, rounding)


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether weights stay as they are stored when inputs are of `dtype` on a CPU."""
    return native.library is not None and not (dtype == torch.bfloat16 and has_bfloat16_products())


def packs_integers(scheme: Scheme) -> bool:
    """Whether a scheme's weights stay 8-bit integers on a CPU even without `packs_weights`."""
    return scheme.kind == "int" and scheme.inputs == "token" and has_int8_products()


def gpu_capability(device: torch.device | str) -> tuple[int, int]:
    """The compute capability of a CUDA device; (0, 0) where Triton has none to run on."""
    return torch.cuda.get_device_capability(device) if tl and torch.cuda.is_available() else (0, 0)


def suits_gpu(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a weight [out, in] stays as it is stored on a CUDA device, for inputs of `dtype`."""
    if scheme.inputs == "none":
        return scheme.kind == "int" and max(scheme.group_size, 0) % 32 == 0 and capability >= (8, 0)
    if scheme.kind == "float":
        return all(size % 16 == 0 for size in shape) and dtype != torch.float32 and capability >= (8, 9)
    return all(size % 8 == 0 for size in shape) and scheme.inputs == "token" and capability >= (8, 0)


def _gpu_product(weight: QuantizedWeight, bias: torch.Tensor | None, rounding: Rounding | None) -> Product:
    scheme = weight.scheme
    if rounding is None:
        return GroupedProduct(weight.codes, weight.scales, weight.zeros, scheme.bits, scheme.group_size, bias)
    codes = weight.codes if scheme.kind == "float" else (weight.codes ^ 128).view(torch.int8)
    return RoundedProduct(codes, weight.scales, bias, rounding.scale)


def _joined(parts: Sequence[torch.Tensor | QuantizedWeight]) -> Sequence[torch.Tensor | QuantizedWeight]:
    """The parts as one where all are of one scheme or one dtype."""
    if len(parts) == 1:
        return parts
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if len({tensor.dtype for tensor in tensors}) == 1 and len(tensors) == len(parts):
        return [torch.cat(tensors)]
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(quantized) < len(parts) or len({(part.scheme, part.scales.dtype) for part in quantized}) > 1:
        return parts
    codes, scales, zeros = (
        torch.cat([getattr(part, name) for part in quantized]) for name in ("codes", "scales", "zeros")
    )
    return [QuantizedWeight(codes, scales, zeros, quantized[0].scheme)]


def suits_integers(weight: QuantizedWeight) -> bool:
    """Whether its codes can be multiplied with codes of 8 bits."""
    scheme, (rows, columns) = weight.scheme, weight.shape
    return (
        (scheme.kind, scheme.bits, scheme.symmetric, columns % 2) == ("int", 8, True, 0)
        and weight.scales.shape == (rows, 1)
    )  # fmt: skip


def panels_of(part: torch.Tensor | QuantizedWeight) -> Panels:
    """A weight [rows, in] as the compiled kernels have it; its numbers are exact, whatever its dtype."""
    if isinstance(part, torch.Tensor):
        return Panels.pack(part if part.dtype in native.KINDS else part.float())
    scheme, scales, columns = part.scheme, part.scales.float(), part.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    if columns % size or (scheme.bits == 4 and size % 2):
        return Panels.pack(part.dequantize().float())
    if scheme.kind == "float":  # 8-bit floats are numbers of bfloat16
        return Panels.pack(part.codes.to(torch.bfloat16), scales)
    if scheme.bits == 4:
        return Panels.pack(part.codes, scales, scales * part.zeros.float())
    offsets = part.zeros.float() - 128
    return Panels.pack((part.codes ^ 128).view(torch.int8), scales, scales * offsets if bool(offsets.any()) else None)
