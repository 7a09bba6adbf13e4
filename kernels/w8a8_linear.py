"""Linear layers with 8-bit weights and 8-bit inputs on a GPU: y = x W' + b, W [N, K].

Legend: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.input_quant import (
    MIN_INT8_ROWS,
    InputQuant,
    LinearInput,
    QuantizedInput,
    quantize_input,
)
from llmkit.kernels.quantized_linear import epilogue
from llmkit.kernels.tuned_configs import Tunable

# `torch._scaled_mm` may choose a faster kernel for more than 16 rows. vLLM's torch kernels pad to
# 17 for that reason, except where torch.compile forbids it (`TorchScaledMMLinearKernel`). Measured
# for each GPU and shape.
MIN_FP8_ROWS = Tunable("scaled_mm_rows", ((1, 17),))
PADDED_FP8_ROWS = 17


class W8A8Linear:
    """Products of 8-bit weights and 8-bit inputs, int8 or FP8 e4m3.

    q: [N, K], with N and K multiples of 8, or of 16 for FP8; scales: [N, 1]; input_scale: float32
    [1], the stored scale of all inputs; None: each input row gets a scale.
    row_scaling: whether `torch._scaled_mm` applies the scales of FP8; otherwise a kernel after it
    does (see `scales_rows`).
    """

    def __init__(
        self,
        q: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None = None,
        *,
        row_scaling: bool = True,
    ) -> None:
        self.q = q.T
        self.scales = scales.float().T.contiguous()
        self._input_scale = input_scale
        self._row_scaling = row_scaling
        is_fused = q.dtype == FP8 and row_scaling
        self._bias = bias.to(torch.bfloat16) if bias is not None and is_fused else bias
        self._one = None if row_scaling or q.dtype != FP8 else scales.new_ones(1).float()
        self.nbytes = q.nbytes + self.scales.nbytes

    @property
    def input_quant(self) -> InputQuant:
        """How inputs are quantized."""
        if self.q.dtype != FP8:
            min_rows = MIN_INT8_ROWS
        else:
            K, N = self.q.shape
            min_rows = MIN_FP8_ROWS.config((N, K), (PADDED_FP8_ROWS,), self.q.device)[0]
        return InputQuant(self.q.dtype, scale=self._input_scale, min_rows=min_rows)

    def __call__(self, x: LinearInput) -> torch.Tensor:
        """x: [..., K], or quantized. Returns [..., N] in x's dtype."""
        if isinstance(x, QuantizedInput):
            return self._multiply(x)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self._multiply(quantize_input(rows, self.input_quant))
        return y.view(*x.shape[:-1], y.shape[1])

    def _multiply(self, x: QuantizedInput) -> torch.Tensor:
        """The product [M, N]."""
        M = len(x)
        if self.q.dtype != FP8:
            sums = torch._int_mm(x.values, self.q)
        else:
            # With few rows, memory is the bottleneck, and exact accumulation costs nothing.
            fast_accumulation = M > 64
            if self._one is None:
                y = torch._scaled_mm(
                    x.values,
                    self.q,
                    x.scales,
                    self.scales,
                    self._bias,
                    None,
                    torch.bfloat16,
                    fast_accumulation,
                )
                return y[:M].to(x.dtype)
            sums = torch._scaled_mm(
                x.values,
                self.q,
                self._one,
                self._one,
                None,
                None,
                torch.float32,
                fast_accumulation,
            )
        return epilogue(sums[None], M, x.dtype, self._bias, x.scales, self.scales)


def scales_rows(capability: tuple[int, int], torch_version: str) -> bool:
    """Whether `torch._scaled_mm` may apply a scale to each row, within CUDA graphs too.

    On sm_89 it ignored the current stream before torch 2.12, so that a captured graph lacked the
    product (https://github.com/pytorch/pytorch/issues/177651).
    """
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return capability != (8, 9) or (major, minor) >= (2, 12)
