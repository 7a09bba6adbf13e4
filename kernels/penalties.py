"""Penalties for tokens that a request's prompt or output has.

Legend: n rows, V vocabulary columns of this rank, S slots.
"""

from __future__ import annotations

import torch

from llmkit.kernels.triton_support import jit_without_specializing, runs_triton, tl

IN_PROMPT = 1 << 30  # in an entry of a table of tokens; the bits below count the output


def penalize(
    logits: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """Change rows of logits float32 [n, V] in place.

    table: int32 [S, V], for each slot how often a token is in the output, plus IN_PROMPT if it is
    in the prompt. rows, slots: int64 [m], the rows that change, and the slot of each. factors:
    float32 [3, m]: the repetition penalty divides positive logits of tokens in the prompt or output
    and multiplies the others; the presence penalty is subtracted once from the logits of tokens in
    the output, and the frequency penalty once per occurrence.
    """
    vocab_size = logits.shape[1]
    if runs_triton(logits):
        tile = 1024
        with torch.cuda.device_of(logits):
            _penalize_kernel[(len(rows), -(-vocab_size // tile))](
                logits,
                table,
                rows,
                slots,
                factors,
                len(rows),
                logits.stride(0),
                vocab_size,
                TILE=tile,
                num_warps=4,
            )
        return
    repetition, presence, frequency = factors[:, :, None]
    values = logits[rows]
    counts = table[slots]
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = repeated.where(counts > 0, values)
    times = counts & (IN_PROMPT - 1)
    logits[rows] = values - (presence + frequency * times).where(times > 0, 0.0)


@jit_without_specializing("rows", "slots", "num_rows")
def _penalize_kernel(
    logits: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    factors: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program changes a tile of a row."""
    index = tl.program_id(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < vocab_size
    counts = tl.load(table + tl.load(slots + index) * vocab_size + column, mask=inside, other=0)
    place = logits + tl.load(rows + index) * row_stride + column
    values = tl.load(place, mask=counts > 0, other=0.0)
    repetition = tl.load(factors + index)
    presence = tl.load(factors + num_rows + index)
    frequency = tl.load(factors + 2 * num_rows + index)
    values = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
    times = counts & 0x3FFFFFFF
    penalty = presence + frequency * times.to(tl.float32)
    tl.store(place, values - tl.where(times > 0, penalty, 0.0), mask=counts > 0)
