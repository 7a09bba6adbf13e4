"""A linear layer with weights and inputs in FP4 on a GPU that multiplies them: y = x W' + b.

Tensor cores from compute capability 10.0 on multiply values of E2M1 together with their scales:
powers of two of 32 values (MXFP4), or e4m3 of 16 values (NVFP4). Two codes are in a byte.
Legend: M rows of x, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8
from llmkit.kernels.float_bits import E4M3_DIVISOR
from llmkit.kernels.fp4_expert import Fp4Expert
from llmkit.kernels.input_quant import largest_bits
from llmkit.kernels.quantized_linear import epilogue
from llmkit.kernels.triton_support import jit, jit_without_specializing, tl

GROUP_SIZES = {"e8m0": 32, "e4m3": 16}  # the sizes of groups that GPUs multiply, by scale format
# Each entry: the largest number of rows, then rows and outputs of a tile, inputs of a step, warps
# and stages.
TILES = ((16, 16, 128, 256, 4, 3), (64, 64, 128, 256, 4, 3), (1 << 30, 128, 128, 256, 4, 3))
MAX_SPLITS = 16
MAX_QUANTIZED = 4096  # inputs of a row that a program quantizes


class W4A4Linear:
    """W = value(codes) * scales; inputs are quantized to FP4 by token and group.

    codes: uint8 [N, K], of 4 bits; scales: float [N, G]; bias: [N].
    global_scale: float32 [1] or [N], of scales that are e4m3 times it; None: scales are powers of
    two. input_scale: float32 [1], with `global_scale`: a group's scale is e4m3 times this.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
    ) -> None:
        weight = Fp4Expert(codes, scales, None, global_scale)
        self.blocks = weight.blocks
        self.scales = weight.scales
        self.group_size = weight.group_size
        self.bias = bias
        self.input_scale = input_scale
        self.factors: torch.Tensor | None = None  # float32 [N], what outputs are multiplied with
        self.nbytes = self.blocks.nbytes + self.scales.nbytes
        if weight.factors is not None:
            assert input_scale is not None
            self.scales = weight.scales.view(FP8)
            self.factors = weight.factors / E4M3_DIVISOR * input_scale
            self.nbytes += self.factors.nbytes

    def __call__(self, x: torch.Tensor, splits: int = 0) -> torch.Tensor:
        """x: [..., K]. Returns [..., N] in x's dtype.

        splits: the number of partial sums over the inputs; 0: chosen so that the GPU is busy.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        M, K = rows.shape
        N = len(self.blocks)
        values, scales = self.quantize(rows)
        BM, BN, BK, warps, stages = next(tile[1:] for tile in TILES if tile[0] >= M)
        tiles = (-(-M // BM), -(-N // BN))
        num_steps = -(-K // BK)
        if not splits:
            num_cores = torch.cuda.get_device_properties(x.device).multi_processor_count
            wanted = 2 * num_cores // (tiles[0] * tiles[1])
            splits = max(1, min(wanted, num_steps // 2, MAX_SPLITS))
        steps_per_split = -(-num_steps // splits)
        splits = -(-num_steps // steps_per_split)  # so that no split is empty
        y_dtype = torch.float32 if splits > 1 else x.dtype
        y = torch.empty(splits, M, N, dtype=y_dtype, device=x.device)
        with torch.cuda.device_of(x):
            _w4a4_linear_kernel[(*tiles, splits)](
                values,
                scales,
                self.blocks,
                self.scales,
                self.factors,
                None if splits > 1 else self.bias,
                y,
                M,
                N,
                K,
                steps_per_split,
                GROUP=self.group_size,
                BM=BM,
                BN=BN,
                BK=BK,
                STAGES=stages,
                num_warps=warps,
            )
        result = epilogue(y, M, x.dtype, self.bias) if splits > 1 else y[0]
        return result.view(*x.shape[:-1], N)

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of x [M, K], uint8 [M, K / 2], and their scales [M, G], as those of W."""
        M, K = x.shape
        codes = torch.empty(M, K // 2, dtype=torch.uint8, device=x.device)
        scales = torch.empty(M, K // self.group_size, dtype=self.scales.dtype, device=x.device)
        tile = min(MAX_QUANTIZED, 1 << (K - 1).bit_length())
        with torch.cuda.device_of(x):
            _quantize_fp4_kernel[M, -(-K // tile)](
                x,
                codes,
                scales.view(torch.uint8),
                self.input_scale if self.factors is not None else None,
                K,
                GROUP=self.group_size,
                TILE=tile,
                num_warps=max(1, min(8, tile // 512)),
            )
        return codes, scales


@jit_without_specializing("M", "steps_per_split")
def _w4a4_linear_kernel(
    x: tl.tensor,
    row_scales: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    steps_per_split: tl.tensor,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """A program computes one tile of one split, transposed: W x'."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    byte = tl.arange(0, BK // 2)
    g = tl.arange(0, BK // GROUP)
    num_bytes = K // 2
    num_groups = K // GROUP
    first = tl.program_id(2) * steps_per_split
    stop = tl.minimum(first + steps_per_split, tl.cdiv(K, BK))
    x_row = m.to(tl.int64)[:, None]
    w_row = n.to(tl.int64)[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, stop, num_stages=STAGES):
        k = step * (BK // 2) + byte[None, :]
        group = step * (BK // GROUP) + g[None, :]
        x_inside = (m < M)[:, None]
        w_inside = (n < N)[:, None]
        part = tl.load(x + x_row * num_bytes + k, mask=x_inside & (k < num_bytes), other=0)
        weight = tl.load(w + w_row * num_bytes + k, mask=w_inside & (k < num_bytes), other=0)
        x_inside &= group < num_groups
        w_inside &= group < num_groups
        part_scale = tl.load(row_scales + x_row * num_groups + group, mask=x_inside)
        scale = tl.load(scales + w_row * num_groups + group, mask=w_inside)
        total = tl.dot_scaled(weight, scale, "e2m1", tl.trans(part), part_scale, "e2m1", total)
    if factors is not None:
        total *= tl.load(factors + n, mask=n < N, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@jit
def _quantize_fp4_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    input_scale: tl.tensor,
    K: tl.tensor,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program quantizes TILE inputs of a row, as `activation_quant.fake_quantize_per_group`.

    scales: their bits. input_scale: of scales in e4m3; without it, they are e8m0. The scale of a
    group with NaN or infinity is NaN.
    """
    m = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    k = first + tl.arange(0, TILE)
    values = tl.load(x + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    groups = tl.reshape(values, (TILE // GROUP, GROUP))
    bits = largest_bits(groups)
    g = first // GROUP + tl.arange(0, TILE // GROUP)
    scale_at = scales + m * (K // GROUP) + g
    inside = g < K // GROUP
    if input_scale is None:
        exponent = tl.maximum((bits >> 23) - 2, 0)  # 6 is 1.5 * 2^2
        scale_bits = tl.where(exponent > 0, exponent << 23, 0x00400000)  # at least 2^-127
        scale = scale_bits.to(tl.float32, bitcast=True)
        stored = tl.where(bits < 0x7F800000, exponent, 255).to(tl.uint8)
    else:
        whole = tl.load(input_scale)
        steps = tl.div_rn(bits.to(tl.float32, bitcast=True), 6.0 * whole)
        steps = tl.minimum(steps, 448.0)
        leading = (steps.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(leading, 0.015625) * 1572864.0  # see `input_quant.quantize`
        steps = (steps + shift) - shift
        scale = steps * whole
        stored = steps.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        stored = tl.where(bits < 0x7F800000, stored, 0x7F)
    tl.store(scale_at, stored.to(tl.uint8), mask=inside)
    divisor = tl.where(scale == 0, 1.0, scale)
    steps = tl.clamp(tl.div_rn(groups, divisor[:, None]), -6.0, 6.0)
    leading = (steps.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(leading, 1.0) * 6291456.0  # 1.5 * 2^23 quanta of E2M1
    steps = (steps + shift) - shift
    # A float16 that is 2^14 times smaller has the digits of E2M1.
    half = (steps * 0.00006103515625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    sign = (steps.to(tl.int32, bitcast=True) >> 28) & 8
    code = ((half >> 9) & 7) | sign
    low, high = tl.split(tl.reshape(code, (TILE // 2, 2)))
    byte = first // 2 + tl.arange(0, TILE // 2)
    packed = (low | (high << 4)).to(tl.uint8)
    tl.store(codes + m * (K // 2) + byte, packed, mask=byte < K // 2)
