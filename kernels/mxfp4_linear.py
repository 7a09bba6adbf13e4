"""A linear layer with a weight in MXFP4 on a GPU: y = x W' + b.

A block of 32 values of a row shares a scale, a power of two (see checkpoint/mxfp4_format.py).
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

BLOCK_SIZE = 32
SCALE_BIAS = 127
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the highest bit of a code is the sign


class Mxfp4Linear:
    """One expert. The experts of a layer run in one launch of `FusedExperts`, on packed weights.

    Where an expert runs alone, as with adapters, its weight is dequantized for each call.
    """

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """codes: uint8 [out, in], of 4 bits. scales: [out, in / 32], powers of two. bias: [out]."""
        self.blocks = codes[:, 0::2] | codes[:, 1::2] << 4  # uint8 [out, in / 2]
        exponents = torch.frexp(scales.float()).exponent - 1
        self.scales = (exponents + SCALE_BIAS).to(torch.uint8)  # [out, in / 32]
        self.bias = bias
        self.nbytes = self.blocks.nbytes + self.scales.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype."""
        return linear(x, self.dequantize().to(x.dtype), self.bias)

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        positive = torch.tensor(E2M1_VALUES, device=self.blocks.device)
        codes = torch.stack((self.blocks & 15, self.blocks >> 4), dim=-1).flatten(-2)
        values = torch.cat((positive, -positive))[codes.int()].unflatten(-1, (-1, BLOCK_SIZE))
        exponents = self.scales.int().unsqueeze(-1) - SCALE_BIAS
        return torch.ldexp(values, exponents).flatten(-2)
