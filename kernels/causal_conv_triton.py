"""The short causal convolutions of recurrent layers as one Triton kernel.

Legend: T tokens, C channels, S sequences.
"""

from __future__ import annotations

import torch

from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.kernels.triton_support import jit, jit_without_specializing, tl

TILE_CHANNELS = 128
# Tokens of a sequence that a program computes. Only those of the first program read the initial
# row, so that they are at least the width of a convolution.
TILE_TOKENS = 16


def causal_conv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: RecurrentState,
    batch: RecurrentBatch,
    *,
    silu: bool,
    gated: bool,
) -> torch.Tensor:
    """`causal_conv.causal_conv`; gated: `causal_conv.gated_short_conv`.

    x: its last dimension is contiguous. weight: contiguous, at most TILE_TOKENS wide.
    """
    num_tokens = len(x)
    num_channels, width = weight.shape
    y = x.new_empty(num_tokens, num_channels)
    num_sequences = len(batch.query_lens)
    tile_tokens = TILE_TOKENS
    # The kernel is compiled for each size. A CUDA graph always has the same.
    if batch.longest_query == 1 or batch.max_query_len is not None:
        tile_tokens = min(TILE_TOKENS, 1 << (batch.longest_query - 1).bit_length())
    grid = (num_tokens // tile_tokens + num_sequences, -(-num_channels // TILE_CHANNELS))
    with torch.cuda.device_of(x):
        _causal_conv_kernel[grid](
            x,
            weight,
            bias,
            state.conv,
            y,
            *batch.device_rows,
            x.stride(0),
            num_channels,
            num_sequences,
            WIDTH=width,
            STATE_TILE=1 << (width - 1).bit_length(),
            SILU=silu,
            GATED=gated,
            TOKENS=tile_tokens,
            CHANNELS=TILE_CHANNELS,
        )
    return y


@jit
def sequence_of_tile(
    query_start_loc: tl.tensor, tile: tl.tensor, num_sequences: tl.tensor, TOKENS: tl.constexpr
) -> tl.tensor:
    """The sequence of a tile. The tiles of sequence s begin at query_start_loc[s] // TOKENS + s.

    So each sequence has enough of them, and there are T // TOKENS + S.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@jit
def _load_inputs(
    x: tl.tensor, c: tl.tensor, num_channels: tl.tensor, mask: tl.tensor, GATED: tl.constexpr
) -> tl.tensor:
    """The inputs of the convolution in float32; x: where their tokens begin."""
    values = tl.load(x + c, mask=mask, other=0.0)
    if GATED:  # rounded as the state is
        factor = tl.load(x + 2 * num_channels + c, mask=mask, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) * factor).to(x.dtype.element_ty)
    return values.to(tl.float32)


@jit_without_specializing("num_sequences")
def _causal_conv_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    conv: tl.tensor,
    y: tl.tensor,
    query_start_loc: tl.tensor,
    initial_rows: tl.tensor,
    write_starts: tl.tensor,
    write_ends: tl.tensor,
    write_rows: tl.tensor,
    x_stride: tl.tensor,
    num_channels: tl.tensor,
    num_sequences: tl.tensor,
    WIDTH: tl.constexpr,
    STATE_TILE: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """A program computes TOKENS tokens of a sequence in CHANNELS channels.

    That of a sequence's first tokens also does all writes: nobody else reads its initial row.
    """
    tile = tl.program_id(0)
    sequence = sequence_of_tile(query_start_loc, tile, num_sequences, TOKENS)
    start = tl.load(query_start_loc + sequence).to(tl.int64)
    length = tl.load(query_start_loc + sequence + 1).to(tl.int64) - start
    first = (tile - (start // TOKENS + sequence)) * TOKENS
    if first >= length:
        return
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    has_channel = c < num_channels
    t = first + tl.arange(0, TOKENS)
    x += start * x_stride
    row_size = (WIDTH - 1) * num_channels
    # The inputs before the sequence's first token: number i is that of position i - (WIDTH - 1).
    row = tl.load(initial_rows + sequence).to(tl.int64)
    i = tl.arange(0, STATE_TILE)
    first_inputs = tl.where((row >= 0) & (first == 0), WIDTH - 1, 0)
    is_old = (i < first_inputs)[:, None] & has_channel[None, :]
    at = conv + row * row_size + i[:, None] * num_channels + c[None, :]
    old = tl.load(at, mask=is_old, other=0.0).to(tl.float32)
    sums = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if bias is not None:
        sums += tl.load(bias + c, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        position = t - (WIDTH - 1) + k
        mask = ((position >= 0) & (t < length))[:, None] & has_channel[None, :]
        rows = x + position[:, None] * x_stride
        values = _load_inputs(rows, c[None, :], num_channels, mask, GATED)
        for j in tl.static_range(WIDTH - 1):
            older = tl.sum(tl.where((i == j)[:, None], old, 0.0), 0)
            values = tl.where((position == j - (WIDTH - 1))[:, None], older[None, :], values)
        taps = tl.load(weight + c * WIDTH + k, mask=has_channel, other=0.0).to(tl.float32)
        sums += values * taps[None, :]
    if SILU:
        sums = sums / (1 + tl.exp(-sums))
    out = sums.to(y.dtype.element_ty)
    mask = (t < length)[:, None] & has_channel[None, :]
    if GATED:
        gates = tl.load(x + t[:, None] * x_stride + num_channels + c[None, :], mask=mask, other=0.0)
        out = (out.to(tl.float32) * gates.to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + (start + t[:, None]) * num_channels + c[None, :], out, mask=mask)
    if first == 0:
        tl.debug_barrier()  # all threads have read the initial row
        for write in range(tl.load(write_starts + sequence), tl.load(write_starts + sequence + 1)):
            end = tl.load(write_ends + write).to(tl.int64)
            to = conv + tl.load(write_rows + write).to(tl.int64) * row_size
            for k in tl.static_range(WIDTH - 1):
                at_input = end - (WIDTH - 1) + k
                has_input = c < tl.where(at_input >= 0, num_channels, 0)
                written = _load_inputs(x + at_input * x_stride, c, num_channels, has_input, GATED)
                held = tl.sum(tl.where((i == end + k)[:, None], old, 0.0), 0)
                written = tl.where(at_input < 0, held, written)
                tl.store(
                    to + k * num_channels + c, written.to(conv.dtype.element_ty), mask=has_channel
                )
