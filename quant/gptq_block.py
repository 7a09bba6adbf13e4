"""GPTQ's inner loop (arXiv 2210.17323, algorithm 1): the columns of one block, one after the other.

Legend: B columns of a weight in the block, `out` its rows. Everything is transposed, [B, out], so
that a column of the weight is a contiguous row. A quantized value q is 0 .. max_q and represents
(q - zero) * scale. With max_q FP8_VALUES or FP4_VALUES they are numbers of these types.
"""

from __future__ import annotations

import torch

from llmkit.kernels.activation_quant import FP8, FP8_MAX, round_to_fp4
from llmkit.kernels.triton_support import jit, runs_triton, tl

# Outputs of one program: the width of a warp. 4,096 outputs give 128 programs, about one for each
# multiprocessor.
_TILE = 32
# Values of `max_q` for floats.
FP8_VALUES = 0
FP4_VALUES = -1


def quantize_block(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a block in order and correct the later columns for each error.

    weight: float32 [B, out], B up to 128; it is consumed.
    hinv: float32 [B, B], the block's part of the upper triangular Hinv with inverse(H) = Hinv'Hinv.
    scales, zeros: float32 [B, out], those of each column's group.
    max_q: the largest quantized value, or FP8_VALUES (e4m3) or FP4_VALUES (E2M1) with zeros of 0.
    All are contiguous, except for hinv.

    Returns the quantized values as numbers, and the errors divided by Hinv's diagonal, both float32
    [B, out]. These errors correct the columns after the block.
    """
    run = quantize_block_triton if runs_triton(weight) else quantize_block_reference
    return run(weight, hinv, scales, zeros, max_q)


def quantize_block_reference(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_block` in plain torch."""
    q = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    centered = torch.empty_like(weight[0])
    for i, diagonal in enumerate(hinv.diagonal().tolist()):
        column_q = q[i]
        error = errors[i]
        torch.div(weight[i], scales[i], out=column_q)
        if max_q > 0:
            column_q.round_().add_(zeros[i]).clamp_(0, max_q)
        elif max_q == FP4_VALUES:
            column_q.copy_(round_to_fp4(column_q))
        else:
            column_q.copy_(column_q.clamp_(-FP8_MAX, FP8_MAX).to(FP8))
        torch.sub(column_q, zeros[i], out=centered)
        torch.addcmul(weight[i], centered, scales[i], value=-1, out=error)
        error.div_(diagonal)
        weight[i + 1 :].addr_(hinv[i, i + 1 :], error, alpha=-1)
    return q, errors


def quantize_block_triton(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_q: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_block` as one Triton kernel, which does not wait for the device."""
    assert all(tensor.is_contiguous() for tensor in (weight, scales, zeros))
    q = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    columns, outputs = weight.shape
    # The kernel reads one column of Hinv at a time.
    hinv_transposed = hinv.T.contiguous()
    grid = (-(-outputs // _TILE),)
    padded = 1 << (columns - 1).bit_length()
    with torch.cuda.device_of(weight):
        _quantize_block[grid](
            weight,
            hinv_transposed,
            scales,
            zeros,
            q,
            errors,
            outputs,
            max_q,
            columns,
            padded,
            _TILE,
            enable_fp_fusion=True,
        )
    return q, errors


@jit
def _quantize_block(
    weight: tl.tensor,
    hinv: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    q: tl.tensor,
    errors: tl.tensor,
    outputs: tl.tensor,
    MAX_Q: tl.constexpr,
    B: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Quantize TILE outputs of the block.

    hinv: float32 [B, B], transposed. PADDED: B or the next power of two.

    When the loop reaches a column, one product with Hinv's column applies the errors of all columns
    before it. So only the tile of errors stays in registers, and later columns are loaded ahead.
    """
    row = tl.arange(0, PADDED)
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = output < outputs
    # The errors so far; zero from the current column on.
    all_errors = tl.zeros((PADDED, TILE), tl.float32)
    for i in tl.range(0, B, num_stages=3):
        offset = i * outputs + output
        scale = tl.load(scales + offset, mask=inside, other=1.0)
        zero = tl.load(zeros + offset, mask=inside, other=0.0)
        hinv_column = tl.load(hinv + i * B + row, mask=row < i, other=0.0)
        value = tl.load(weight + offset, mask=inside, other=0.0) - tl.sum(
            all_errors * hinv_column[:, None], axis=0
        )
        # Adding and subtracting 1.5 * 2^23 quanta rounds a float32 to a multiple of the quantum,
        # ties to even.
        step = tl.div_rn(value, scale)
        if MAX_Q == 0:  # e4m3 keeps 3 bits after the leading one, which is 2^-6 or more
            step = tl.clamp(step, -448.0, 448.0)
            leading = (step.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            shift = tl.maximum(leading, 0.015625) * 1572864.0
            step = (step + shift) - shift
        elif MAX_Q == -1:  # E2M1 keeps 1 bit after the leading one, which is 1 or more
            step = tl.clamp(step, -6.0, 6.0)
            leading = (step.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            shift = tl.maximum(leading, 1.0) * 6291456.0
            step = (step + shift) - shift
        else:
            # The clamp keeps the value small enough for the rounding above.
            step = (tl.clamp(step, -512.0, 512.0) + 12582912.0) - 12582912.0
            step = tl.clamp(step + zero, 0.0, MAX_Q * 1.0)
        error = tl.div_rn(value - (step - zero) * scale, tl.load(hinv + i * B + i))
        tl.store(q + offset, step, mask=inside)
        tl.store(errors + offset, error, mask=inside)
        all_errors = tl.where((row == i)[:, None], error[None, :], all_errors)
