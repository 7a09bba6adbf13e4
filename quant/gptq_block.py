"""GPTQ's inner loop (arXiv 2210.17323, algorithm 1): the columns of one block, one after the other.

Legend: B columns of a weight in the block, `out` its rows. Everything lies transposed, [B, out], so that a column of
the weight is a contiguous row. A code is 0 .. top and stands for (code - zero) * scale; with top 0 it is an FP8 number.
"""

from __future__ import annotations

import torch

from llmkit.kernels.jit import jit, runs_triton, tl
from llmkit.kernels.rounding import FP8, FP8_MAX

_TILE = 32  # outputs a program: a warp's width, and enough programs for every multiprocessor from 4096 outputs on


def quantize_block(
    weight: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a block in order, each error spread over the columns to come.

    weight: float32 [B, out], B up to 128, which is used up; factor: float32 [B, B], the block of the upper triangular
    U with inverse(H) = U'U; scales, zeros: float32 [B, out], those of each column's group; top: the highest code, or 0
    for FP8 e4m3, where zeros are 0. All contiguous, but for factor.
    Returns the codes, as numbers, and the errors over U's diagonal, by which the columns after the block are still to
    be corrected: both float32 [B, out].
    """
    run = quantize_block_triton if runs_triton(weight) else quantize_block_reference
    return run(weight, factor, scales, zeros, top)


def quantize_block_reference(
    weight: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_block` in plain torch."""
    steps, errors = torch.empty_like(weight), torch.empty_like(weight)
    value = torch.empty_like(weight[0])
    for i, diagonal in enumerate(factor.diagonal().tolist()):
        scale, zero, step, error = scales[i], zeros[i], steps[i], errors[i]
        torch.div(weight[i], scale, out=step)
        if top:
            step.round_().add_(zero).clamp_(0, top)
        else:
            step.copy_(step.clamp_(-FP8_MAX, FP8_MAX).to(FP8))
        torch.sub(step, zero, out=value)
        torch.addcmul(weight[i], value, scale, value=-1, out=error)
        error.div_(diagonal)
        weight[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return steps, errors


def quantize_block_triton(
    weight: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_block` as one Triton kernel, without a wait for the device."""
    assert all(t.is_contiguous() for t in (weight, scales, zeros))
    steps, errors = torch.empty_like(weight), torch.empty_like(weight)
    rows, width = weight.shape
    columns = factor.T.contiguous()  # the kernel reads a column of U at a time
    grid = (-(-width // _TILE),)
    padded = 1 << (rows - 1).bit_length()
    with torch.cuda.device_of(weight):
        _quantize_block[grid](
            weight, columns, scales, zeros, steps, errors, width, top, rows, padded, _TILE, enable_fp_fusion=True
        )
    return steps, errors


@jit
def _quantize_block(
    weight: tl.tensor, columns: tl.tensor, scales: tl.tensor, zeros: tl.tensor, steps: tl.tensor, errors: tl.tensor,
    width: tl.tensor, TOP: tl.constexpr, B: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """TILE outputs. A column is corrected by all errors before it when its turn comes: one product with U's column.

    So the tile of errors is all that stays in registers, and the loads of the columns to come run ahead. columns:
    float32 [B, B], U transposed; PADDED: B or the next power of two.
    """
    row = tl.arange(0, PADDED)
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = output < width
    found = tl.zeros((PADDED, TILE), tl.float32)  # the errors so far; zero from the current column on
    for i in tl.range(0, B, num_stages=3):
        at = i * width + output
        scale = tl.load(scales + at, mask=inside, other=1.0)
        zero = tl.load(zeros + at, mask=inside, other=0.0)
        spread = tl.load(columns + i * B + row, mask=row < i, other=0.0)
        value = tl.load(weight + at, mask=inside, other=0.0) - tl.sum(found * spread[:, None], axis=0)
        # Adding and subtracting 1.5 * 2^23 quanta rounds a float32 to a multiple of the quantum, ties to even.
        step = tl.div_rn(value, scale)
        if TOP == 0:  # e4m3 keeps 3 bits after the leading one, which is 2^-6 or more
            step = tl.clamp(step, -448.0, 448.0)
            leading = (step.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            shift = tl.maximum(leading, 0.015625) * 1572864.0
            step = (step + shift) - shift
        else:
            step = (tl.clamp(step, -512.0, 512.0) + 12582912.0) - 12582912.0  # within reach of the trick
            step = tl.clamp(step + zero, 0.0, TOP * 1.0)
        error = tl.div_rn(value - (step - zero) * scale, tl.load(columns + i * B + i))
        tl.store(steps + at, step, mask=inside)
        tl.store(errors + at, error, mask=inside)
        found = tl.where((row == i)[:, None], error[None, :], found)
