"""Linear layers with packed weights on a CPU: y = x W' + b, W [out, in] in 32, 16, 8 or 4 bits.

Each class takes a weight when it is constructed, and is called with x [..., in]. It returns
[..., out] in x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn.functional import pad

from llmkit.kernels.activation_quant import quantize_per_token
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import PANEL_WIDTH, PackedWeight

_UINT8_OFFSET = 128  # from int8 to uint8


class CpuLinear:
    """A linear layer with the compiled kernels: weights as stored, inputs and sums in float32.

    weights: parts of the weight, [rows, in] each, in the order of their rows. bias: [out].
    quantize_inputs: quantize inputs to 8 bits with a scale per token (W8A8). The weights must be
    int8 with one scale per row and no offsets.
    """

    def __init__(
        self,
        weights: Sequence[PackedWeight],
        bias: torch.Tensor | None = None,
        *,
        quantize_inputs: bool = False,
    ) -> None:
        self._kernel = cpu_kernels.linear_w8a8 if quantize_inputs else cpu_kernels.linear
        # For each part: its weight, its padded bias, and its first output.
        self._segments: list[tuple[PackedWeight, torch.Tensor | None, int]] = []
        self.out_features = 0
        for weight in weights:
            first = self.out_features
            rows = weight.shape[0]
            padded_bias = None
            if bias is not None:
                padded_bias = pad(bias[first : first + rows].float(), (0, -rows % PANEL_WIDTH))
            self._segments.append((weight, padded_bias, first))
            self.out_features += rows
        self.nbytes = sum(weight.nbytes for weight in weights)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `LinearKernel`."""
        is_plain = x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1
        rows = x if is_plain else x.reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], self.out_features)
        for weight, bias, first in self._segments:
            self._kernel(rows, weight, bias, y, first)
        return y if is_plain else y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class OneDnnInt8Linear:
    """W8A8 by oneDNN: 8-bit weights and inputs, summed as integers; each token has a scale.

    q: uint8 [out, in], W = (q - 128) * scales; scales: [out, 1]; bias: [out].
    """

    def __init__(
        self, q: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        weight = (q ^ _UINT8_OFFSET).view(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scales = scales.float().flatten()
        self._weight_zero_points = torch.zeros(len(q), dtype=torch.int64)
        self._input_scale = torch.ones(())
        self._input_zero_point = torch.tensor(_UINT8_OFFSET)
        self._bias = None if bias is None else bias.float()
        self.nbytes = q.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `LinearKernel`."""
        q, scale = quantize_per_token(x, "int")
        y = self.multiply(q)
        y = y.mul_(scale) if self._bias is None else torch.addcmul(self._bias, y, scale)
        return y.to(x.dtype)

    def multiply(self, q: torch.Tensor) -> torch.Tensor:
        """q W' as float32, where q holds integers from -127 to 127."""
        y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            (q + _UINT8_OFFSET).to(torch.uint8),
            self._input_scale,
            self._input_zero_point,
            self._packed,
            self._scales,
            self._weight_zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return y


@cache
def has_bfloat16_matmul() -> bool:
    """Whether this machine has AMX, which makes bfloat16 products faster than float32 ones."""
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def has_int8_matmul() -> bool:
    """Whether `OneDnnInt8Linear` runs and is exact here.

    Without VNNI, oneDNN adds two products in 16 bits, which saturates.
    """
    try:
        for num_tokens in (1, 5, 64):
            x = torch.full((num_tokens, 192), 127.0)
            x[:, ::3] = -127.0
            q = torch.zeros(48, 192, dtype=torch.uint8)
            q[::2, ::5] = 255
            q[::4] = 255
            y = OneDnnInt8Linear(q, torch.ones(48, 1)).multiply(x)
            if not torch.equal(y.double(), x.double() @ (q.double() - _UINT8_OFFSET).T):
                return False
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return False
    return True
