"""Products with packed weights on a CPU: y = x W' + b with W [out, in] held in 16, 8 or 4 bits.

Each class packs a weight when it is made and is called with x [..., in]; it returns [..., out] in x's dtype. The
weights it is given are no longer needed afterwards.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from llmkit.kernels.rounding import token_codes

_OFFSET = 128  # between codes with and without a sign
_HALF_BLOCK = 512  # fbgemm pads columns to a multiple of it, with zeros that take memory and no time
_CHUNK = 1 << 15  # elements that fit a core's cache and that torch gives to one thread


class Product(Protocol):
    """A packed weight that inputs can be multiplied with."""

    nbytes: int  # of the packed weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype."""


class HalfProduct:
    """Weights in float16, inputs and sums in float32: the exact product where the weight's values are float16's.

    values: float32 [out, in], rounded to float16 here; scales: float32 [out], of the rows; bias: [out].
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._scales = scales if bool((scales != 1).any()) else None
        self._bias = None if bias is None else bias.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(values, self._bias if self._scales is None else None)
        self.nbytes = 2 * len(values) * -(-values.shape[1] // _HALF_BLOCK) * _HALF_BLOCK

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        if self._scales is not None:
            y = y.mul_(self._scales) if self._bias is None else torch.addcmul(self._bias, y, self._scales)
        return y.to(x.dtype)


class Int8Product:
    """Weights and inputs of 8 bits, multiplied and summed as integers.

    codes: uint8 [out, in], W = (codes - 128) * scales; scales: [out, 1]. It is called with the inputs' codes, whole
    numbers from -127 to 127 in float32.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack((codes ^ _OFFSET).view(torch.int8), None)
        self._scales, self._zeros = scales.float().flatten(), torch.zeros(len(codes), dtype=torch.int64)
        self._one, self._offset = torch.ones(()), torch.tensor(_OFFSET)
        self.nbytes = codes.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            (x + _OFFSET).to(torch.uint8), self._one, self._offset, self._packed, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y


class TokenProduct:
    """The product of inputs rounded to 8 bits, with a scale for each token.

    product: of the inputs' codes; integers whose sums have 24 bits are exact in float32, too. bias: [out].
    """

    def __init__(self, product: Product, bias: torch.Tensor | None = None) -> None:
        self._product, self._bias = product, None if bias is None else bias.float()
        self.nbytes = product.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        codes, scale = token_codes(x, "int")
        y = self._product(codes)
        y = y.mul_(scale) if self._bias is None else torch.addcmul(self._bias, y, scale)
        return y.to(x.dtype)


class Int4Product:
    """Weights of 4 bits in groups along the inputs; inputs and scales in bfloat16, sums in float32.

    codes: uint8 [out, in]; scales, zeros: [out, in / group], as `suits_int4` says; W = (codes - zeros) * scales;
    bias: [out].
    """

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self._group = codes.shape[1] // scales.shape[1]
        middle = (8 - zeros.float()) * scales.float()  # what the code 8 stands for
        self._grid = torch.stack((scales.float(), middle), -1).transpose(0, 1).bfloat16().contiguous()
        self._bias = bias
        self.nbytes = self._packed.nbytes + self._grid.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self._packed, self._group, self._grid
        )
        y = y.to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


def suits_int4(shape: tuple[int, int], group: int) -> bool:
    """Whether `Int4Product` is made for a weight [out, in] in groups of this size."""
    return group in (32, 64, 128, 256) and shape[0] % 16 == 0 and shape[1] % group == 0


def half_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A weight, float32 [out, in], as float16's numbers times powers of two, one for a row.

    Returns the numbers in float32, not yet rounded to float16, the powers [out], and whether rounding loses no more of
    any row than rounding to float32 does.
    """
    if _is_half(weight):
        return weight, torch.ones(len(weight)), True
    largest = weight.abs().amax(dim=1)
    powers = torch.exp2(torch.frexp(largest).exponent - 15.0)  # the largest number of a row is below 2^15
    numbers = weight / powers[:, None]
    return numbers, powers, _is_half(numbers)


def _is_half(weight: torch.Tensor) -> bool:
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        lost = (rows - rows.half().float()).square_().sum(dim=1)
        if not bool((lost <= 2.0**-48 * rows.square().sum(dim=1)).all()):
            return False
    return True


@cache
def has_half_products() -> bool:
    """Whether `HalfProduct` runs on this machine."""
    try:
        values = torch.arange(-32.0, 32.0).view(4, 16)
        return torch.equal(HalfProduct(values, torch.ones(4))(torch.ones(2, 16)), values.sum(1).expand(2, 4))
    except (AttributeError, RuntimeError):  # torch without fbgemm, a processor without AVX2
        return False


@cache
def has_bfloat16_products() -> bool:
    """Whether this machine multiplies dense bfloat16 matrices faster than float32 ones: it has AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def has_int8_products() -> bool:
    """Whether `Int8Product` runs and is exact here: without VNNI, sums of two products are cut off at 16 bits."""
    try:
        for tokens in (1, 5, 64):
            x = torch.full((tokens, 192), 127.0)
            x[:, ::3] = -127.0
            codes = torch.zeros(48, 192, dtype=torch.uint8)
            codes[::2, ::5], codes[::4] = 255, 255
            y = Int8Product(codes, torch.ones(48, 1))(x)
            if not torch.equal(y.double(), x.double() @ (codes.double() - _OFFSET).T):
                return False
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return False
    return True
