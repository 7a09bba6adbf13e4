"""Products with packed weights on a CPU: y = x W' + b with W [out, in] held in 32, 16, 8 or 4 bits.

Each class packs a weight when it is made and is called with x [..., in]; it returns [..., out] in x's dtype. The
weights it is given are no longer needed afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch.nn.functional import pad

from llmkit.kernels import native
from llmkit.kernels.native import WIDTH, Panels
from llmkit.kernels.rounding import token_codes

_OFFSET = 128  # between codes with and without a sign


class Product(Protocol):
    """A packed weight that inputs can be multiplied with."""

    nbytes: int  # of the packed weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype."""


class NativeProduct:
    """Weights as they are stored, inputs and sums in float32.

    parts: weights [rows, in], one below the other; bias: [out]. integers: inputs are rounded to 8 bits, with a scale
    for each token, and multiplied with codes of parts that are int8, with a scale for each row and no offsets.
    """

    def __init__(self, parts: Sequence[Panels], bias: torch.Tensor | None = None, *, integers: bool = False) -> None:
        self._product = native.integer_product if integers else native.product
        self._segments: list[tuple[Panels, torch.Tensor | None, int]] = []  # weight, bias, first row
        self.rows = 0
        for part in parts:
            own, rows = None, part.shape[0]
            if bias is not None:
                own = pad(bias[self.rows : self.rows + rows].float(), (0, -rows % WIDTH))
            self._segments.append((part, own, self.rows))
            self.rows += rows
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        plain = x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1
        rows = x if plain else x.reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], self.rows)
        for weight, bias, first in self._segments:
            self._product(rows, weight, bias, y, first)
        return y if plain else y.view(*x.shape[:-1], self.rows).to(x.dtype)


class Int8Product:
    """Weights and inputs of 8 bits, multiplied and summed as integers; each input token has a scale of its own.

    codes: uint8 [out, in], W = (codes - 128) * scales; scales: [out, 1]; bias: [out].
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack((codes ^ _OFFSET).view(torch.int8), None)
        self._scales, self._zeros = scales.float().flatten(), torch.zeros(len(codes), dtype=torch.int64)
        self._one, self._offset = torch.ones(()), torch.tensor(_OFFSET)
        self._bias = None if bias is None else bias.float()
        self.nbytes = codes.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        codes, scale = token_codes(x, "int")
        y = self.multiply(codes)
        y = y.mul_(scale) if self._bias is None else torch.addcmul(self._bias, y, scale)
        return y.to(x.dtype)

    def multiply(self, codes: torch.Tensor) -> torch.Tensor:
        """The product with inputs that are whole numbers from -127 to 127."""
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            (codes + _OFFSET).to(torch.uint8), self._one, self._offset, self._packed, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y


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
            y = Int8Product(codes, torch.ones(48, 1)).multiply(x)
            if not torch.equal(y.double(), x.double() @ (codes.double() - _OFFSET).T):
                return False
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return False
    return True
