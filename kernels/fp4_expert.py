"""An expert's linear layer with a weight in FP4 (E2M1) on a GPU: y = x W' + b.

Neighbouring values of a row share a scale: a power of two (MXFP4, groups of 32), or e4m3 times one
number of the weight (NVFP4, groups of 16). Dense layers are `Fp4Linear`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from llmkit.kernels.float_bits import E4M3_DIVISOR
from llmkit.kernels.quantized_linear import e4m3_scale_bytes

SCALE_BIAS = 127
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the highest bit of a code is the sign


class Fp4Expert:
    """One expert. The experts of a layer run in one launch of `FusedExperts`, on packed weights.

    Where an expert runs alone, as with adapters, its weight is dequantized for each call.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        """codes: uint8 [out, in], of 4 bits. scales: [out, G]. bias: [out].

        global_scale: float32 [1] or [out], of scales that are e4m3 times it; None: scales are
        powers of two.
        """
        self.blocks = codes[:, 0::2] | codes[:, 1::2] << 4  # uint8 [out, in / 2]
        self.group_size = codes.shape[1] // scales.shape[1]
        # float32 [out], what outputs are multiplied with; None: nothing
        self.factors: torch.Tensor | None = None
        if global_scale is None:
            exponents = torch.frexp(scales.float()).exponent - 1
            self.scales = (exponents + SCALE_BIAS).to(torch.uint8)  # [out, G]
        else:
            self.scales, self.factors = e4m3_scale_bytes(scales, global_scale)
        self.bias = bias
        self.nbytes = self.blocks.nbytes + self.scales.nbytes
        self.nbytes += 0 if self.factors is None else self.factors.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]. Returns [..., out] in x's dtype."""
        return linear(x, self.dequantize().to(x.dtype), self.bias)

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        positive = torch.tensor(E2M1_VALUES, device=self.blocks.device)
        codes = torch.stack((self.blocks & 15, self.blocks >> 4), dim=-1).flatten(-2)
        values: torch.Tensor = torch.cat((positive, -positive))[codes.int()]
        shape = (len(values), -1, self.group_size)
        values = values.view(shape)
        if self.factors is None:
            exponents = self.scales.int().unsqueeze(-1) - SCALE_BIAS
            return torch.ldexp(values, exponents).flatten(-2)
        scales = self.scales.view(torch.float8_e4m3fn).float()
        scales *= (self.factors / E4M3_DIVISOR)[:, None]
        return (values * scales.unsqueeze(-1)).flatten(-2)
