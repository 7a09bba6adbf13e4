"""Quantizing the inputs of linear layers to 8 bits on a GPU, in a kernel of its own or fused.

A linear layer whose products are 8-bit says in `input_quant` how it quantizes its inputs. The norm
or activation before it can do that in its own kernel: it then returns a `QuantizedInput`, which
the layer takes in place of a tensor. The results have the same bits as those of `quantize_input`.
Legend: M rows, K inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from llmkit.kernels.activation_quant import FP8, FP8_MAX, INT8_MAX
from llmkit.kernels.triton_support import jit, tl

ScaleFormat = Literal["float", "e8m0"]

MIN_INT8_ROWS = 32  # `torch._int_mm` takes more than 16 rows, a multiple of 8


@dataclass(frozen=True)
class QuantizedInput:
    """Inputs [M, K] of linear layers in 8 bits; on a CPU in bfloat16, without scales.

    Values and scales may have more rows than M, as many as the matrix product wants. Those after
    M are uninitialized.
    """

    values: torch.Tensor  # int8 or e4m3 [M or more, K]
    scales: torch.Tensor  # float32 [M or more, 1], or [M or more, G]
    num_rows: int  # M
    dtype: torch.dtype  # of the tensor that was quantized, and of the outputs

    def __len__(self) -> int:
        return self.num_rows


LinearInput = torch.Tensor | QuantizedInput


@dataclass(frozen=True)
class InputQuant:
    """How a linear layer quantizes its inputs."""

    dtype: torch.dtype  # int8 or e4m3 on a GPU, bfloat16 on a CPU
    group_size: int = 0  # inputs of a row that share a scale; 0: all
    scale_format: ScaleFormat = "float"  # of groups: float, or e8m0, powers of two
    # float32 [1], the stored scale of all inputs; None: scales come from the inputs.
    scale: torch.Tensor | None = field(default=None, compare=False)
    # Rows that the matrix product wants at least. Every layer takes any number of them.
    min_rows: int = field(default=1, compare=False)

    @property
    def max_value(self) -> float:
        """The largest 8-bit value."""
        return FP8_MAX if self.dtype == FP8 else INT8_MAX

    def is_same(self, other: InputQuant | None) -> bool:
        """Whether the other layer takes the same quantized inputs."""
        return other is not None and self == other and self.scale is other.scale

    def empty(self, M: int, K: int, like: torch.Tensor) -> QuantizedInput:
        """An uninitialized QuantizedInput of the dtype and on the device of `like`."""
        rows = M if self.dtype == FP8 else M + -M % 8
        rows = max(rows, self.min_rows)
        num_scales = -(-K // self.group_size) if self.group_size else 1
        return QuantizedInput(
            like.new_empty(rows, K, dtype=self.dtype),
            like.new_empty(rows, num_scales, dtype=torch.float32),
            M,
            like.dtype,
        )


def quantize_input(x: torch.Tensor, quant: InputQuant) -> QuantizedInput:
    """Quantize x [M, K], contiguous, in a kernel of its own."""
    M, K = x.shape
    result = quant.empty(M, K, x)
    group_size = quant.group_size
    tile = 1 << (K - 1).bit_length()
    if group_size:
        tile = min(16 * group_size, max(tile, group_size))
    with torch.cuda.device_of(x):
        _quantize_input_kernel[M, -(-K // tile)](
            x,
            result.values,
            result.scales,
            quant.scale,
            K,
            result.scales.shape[1],
            GROUP=group_size,
            MAX_VALUE=quant.max_value,
            E8M0=quant.scale_format == "e8m0",
            TILE=tile,
            num_warps=min(16, max(4, tile // 1024)),
        )
    return result


@jit
def row_scale(x: tl.tensor, MAX_VALUE: tl.constexpr) -> tl.tensor:
    """The scale of each row, as `activation_quant.quantize_per_token` computes it."""
    return scale_of_largest(largest_bits(x), MAX_VALUE)


@jit
def largest_bits(x: tl.tensor) -> tl.tensor:
    """The bits of the largest magnitude of each row, int32.

    The maximum is taken over bit patterns as integers: there NaN is above infinity, so that it is
    not lost.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=len(x.shape) - 1)


@jit
def scale_of_largest(bits: tl.tensor, MAX_VALUE: tl.constexpr) -> tl.tensor:
    """The scale of values of which `bits` are the largest magnitude's."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), MAX_VALUE)
    return tl.maximum(scale, 1e-12, propagate_nan=tl.PropagateNan.ALL)


@jit
def power_of_two_scale(x: tl.tensor) -> tl.tensor:
    """The e8m0 scale of each row for FP8, as `activation_quant.group_scales` computes it.

    That of a row with NaN or infinity is NaN.
    """
    bits = largest_bits(x)
    exponent = (bits >> 23) - 8  # 448 is 1.75 * 2^8
    scale_bits = tl.where(exponent > 0, exponent << 23, 0x00400000)  # at least 2^-127
    scale_bits = tl.where(bits < 0x7F800000, scale_bits, 0x7FC00000)
    return scale_bits.to(tl.float32, bitcast=True)


@jit
def quantize(x: tl.tensor, scale: tl.tensor, MAX_VALUE: tl.constexpr) -> tl.tensor:
    """The 8-bit values of x, as `activation_quant.quantize_static` computes them, as float32.

    MAX_VALUE: 127 for int8, 448 for FP8 e4m3.
    """
    min_value = -128.0 if MAX_VALUE == 127 else -MAX_VALUE
    steps = tl.div_rn(x, scale)
    steps = tl.clamp(steps, min_value, MAX_VALUE, propagate_nan=tl.PropagateNan.ALL)
    # Adding and subtracting 1.5 * 2^23 quanta rounds to a multiple of the quantum, ties to even.
    shift = 12582912.0
    if MAX_VALUE == 448:  # e4m3 has 3 bits after the leading one, which is 2^-6 or more
        leading = (steps.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(leading, 0.015625) * 1572864.0
    return (steps + shift) - shift


@jit
def store_quantized(
    x: tl.tensor,
    q: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    size: tl.tensor,
    GROUP: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    E8M0: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Quantize and store x, float32 [TILE]: a row, or some groups of one, or any part if static.

    q, scales: where they begin. size: how many of x's values exist; the others are 0. E8M0: the
    scales of groups are powers of two.
    """
    k = tl.arange(0, TILE)
    if GROUP:
        groups = tl.reshape(x, (TILE // GROUP, GROUP))
        scale = power_of_two_scale(groups) if E8M0 else row_scale(groups, MAX_VALUE)
        values = tl.reshape(quantize(groups, scale[:, None], MAX_VALUE), (TILE,))
        g = tl.arange(0, TILE // GROUP)
        tl.store(scales + g, scale, mask=g * GROUP < size)
    else:
        scale = row_scale(x, MAX_VALUE) if static_scale is None else tl.load(static_scale)
        values = quantize(x, scale, MAX_VALUE)
        tl.store(scales, scale)
    tl.store(q + k, values.to(q.dtype.element_ty), mask=k < size)


@jit
def _quantize_input_kernel(
    x: tl.tensor,
    q: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    K: tl.tensor,
    num_scales: tl.tensor,
    GROUP: tl.constexpr,
    MAX_VALUE: tl.constexpr,
    E8M0: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program quantizes one row, or TILE / GROUP groups of one."""
    m = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    k = first + tl.arange(0, TILE)
    values = tl.load(x + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale_at = scales + m * num_scales
    if GROUP:
        scale_at += first // GROUP
    store_quantized(
        values, q + m * K + first, scale_at, static_scale, K - first, GROUP, MAX_VALUE, E8M0, TILE
    )
