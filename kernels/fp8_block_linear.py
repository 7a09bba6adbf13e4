"""A linear layer with an FP8 weight in blocks on a GPU: y = x W' + b, W [N, K] in e4m3.

A weight and a token's inputs have a scale for each group of inputs. Products of one group are
summed in FP8's tensor cores, and their sums are multiplied by both scales. GPUs without FP8
products multiply inputs as they are with the weight's values, which 16 bits hold exactly.
Legend: M rows of x, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.float_bits import e4m3_times_2_to_minus_8
from llmkit.kernels.input_quant import (
    InputQuant,
    LinearInput,
    QuantizedInput,
    ScaleFormat,
    quantize_input,
)
from llmkit.kernels.quantized_linear import epilogue
from llmkit.kernels.triton_support import jit_without_specializing, tl

GROUP_SIZES = (32, 64, 128)  # the sizes of groups that the kernels take
# Each entry: the largest number of rows, then rows and outputs of a tile, warps and stages.
TILES = ((16, 16, 64, 4, 4), (64, 64, 64, 4, 4), (1 << 30, 128, 128, 8, 3))
WEIGHT_ONLY_TILES = ((16, 16, 64, 4, 4), (1 << 30, 64, 64, 4, 3))
MAX_SPLITS = 16


class Fp8BlockLinear:
    """W = q * scales, group by group; inputs are quantized by token and group.

    q: e4m3 [N, K]; scales: float [N, G], one for each group of `group_size` inputs, which is in
    GROUP_SIZES; bias: [N]. quantize_inputs: whether the GPU multiplies FP8 values (sm_89 and
    later); otherwise inputs keep their dtype. scale_format: of the inputs' groups.
    """

    def __init__(
        self,
        q: torch.Tensor,
        scales: torch.Tensor,
        group_size: int,
        bias: torch.Tensor | None = None,
        *,
        quantize_inputs: bool = True,
        scale_format: ScaleFormat = "float",
    ) -> None:
        self.q = q.contiguous()
        self.scales = scales.float().T.contiguous()  # [G, N]: the scales of a group lie together
        self.group_size = group_size
        self.bias = bias
        self.quantize_inputs = quantize_inputs
        self.scale_format = scale_format
        self.nbytes = self.q.nbytes + self.scales.nbytes

    @property
    def input_quant(self) -> InputQuant | None:
        """How inputs are quantized; None if they keep their dtype."""
        if not self.quantize_inputs:
            return None
        return InputQuant(FP8, self.group_size, self.scale_format)

    def __call__(self, x: LinearInput, splits: int = 0) -> torch.Tensor:
        """x: [..., K], or quantized. Returns [..., N] in x's dtype.

        splits: the number of partial sums over the inputs; 0: chosen so that the GPU is busy.
        """
        if isinstance(x, QuantizedInput):
            M = len(x)
            return self._multiply(x.values[:M], x.scales[:M], x.dtype, splits)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        quant = self.input_quant
        if quant is None:
            y = self._multiply(rows, None, x.dtype, splits)
        else:
            quantized = quantize_input(rows, quant)
            y = self._multiply(quantized.values, quantized.scales, x.dtype, splits)
        return y.view(*x.shape[:-1], y.shape[1])

    def _multiply(
        self, x: torch.Tensor, row_scales: torch.Tensor | None, dtype: torch.dtype, splits: int
    ) -> torch.Tensor:
        """The product [M, N] in `dtype`. x: [M, K], in FP8 with scales [M, G], or in `dtype`."""
        M, K = x.shape
        N = len(self.q)
        num_groups = len(self.scales)
        tiles = TILES if self.quantize_inputs else WEIGHT_ONLY_TILES
        BM, BN, warps, stages = next(tile[1:] for tile in tiles if tile[0] >= M)
        if x.dtype == torch.float32:
            BM = 16  # float32 values take twice the registers and shared memory
        grid = (-(-M // BM), -(-N // BN))
        if not splits:
            num_cores = torch.cuda.get_device_properties(x.device).multi_processor_count
            wanted = 2 * num_cores // max(1, grid[0] * grid[1])
            splits = max(1, min(wanted, num_groups // 2, MAX_SPLITS))
        groups_per_split = -(-num_groups // splits)
        splits = -(-num_groups // groups_per_split)  # so that no split is empty
        y_dtype = torch.float32 if splits > 1 else dtype
        y = torch.empty(splits, M, N, dtype=y_dtype, device=x.device)
        with torch.cuda.device_of(x):
            _fp8_block_linear_kernel[(*grid, splits)](
                x,
                row_scales,
                self.q if self.quantize_inputs else self.q.view(torch.uint8),
                self.scales,
                None if splits > 1 else self.bias,
                y,
                M,
                N,
                K,
                groups_per_split,
                GROUP=self.group_size,
                BM=BM,
                BN=BN,
                STAGES=stages,
                num_warps=warps,
            )
        return epilogue(y, M, dtype, self.bias) if splits > 1 else y[0]

    def dequantize(self) -> torch.Tensor:
        """The weight, float32 [N, K]."""
        K = self.q.shape[1]
        scales = self.scales.T.repeat_interleave(self.group_size, dim=1)[:, :K]
        return self.q.float() * scales


@jit_without_specializing("M", "groups_per_split")
def _fp8_block_linear_kernel(
    x: tl.tensor,
    row_scales: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    groups_per_split: tl.tensor,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """A program computes one tile of one split, transposed (W x', or x W' for many rows).

    row_scales: of FP8 inputs. Without them, x has the model's dtype and w holds the bits of e4m3.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    num_groups = tl.cdiv(K, GROUP)
    first = tl.program_id(2) * groups_per_split
    stop = tl.minimum(first + groups_per_split, num_groups)
    x_row = m.to(tl.int64) * K
    w_row = n.to(tl.int64) * K
    total = tl.zeros((BN, BM), tl.float32)
    for group in tl.range(first, stop, num_stages=STAGES):
        k = group * GROUP + tl.arange(0, GROUP)
        inside = (m < M)[None, :] & (k < K)[:, None]
        x_transposed = tl.load(x + x_row[None, :] + k[:, None], mask=inside, other=0.0)
        inside = (n < N)[:, None] & (k < K)[None, :]
        scale = tl.load(scales + group * N + n, mask=n < N, other=0.0)[:, None]
        if row_scales is not None:
            weight = tl.load(w + w_row[:, None] + k[None, :], mask=inside, other=0.0)
            row_at = row_scales + m * num_groups + group
            if BM >= 128:
                # Threads of x W' share out the rows, whose scales lie apart in memory. With W x',
                # Triton 3.6 lets each thread read 32 of them, and spills registers.
                part = tl.trans(tl.dot(tl.trans(x_transposed), tl.trans(weight)))
            else:
                part = tl.dot(weight, x_transposed)
            scale = scale * tl.load(row_at, mask=m < M, other=0.0)[None, :]
        else:
            bits = tl.load(w + w_row[:, None] + k[None, :], mask=inside, other=0).to(tl.int16)
            values = e4m3_times_2_to_minus_8(bits).to(x.dtype.element_ty)
            part = tl.dot(values, x_transposed, input_precision="ieee")
            scale = scale * 256.0
        total += part * scale
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])
