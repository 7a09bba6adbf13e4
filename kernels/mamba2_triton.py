"""Mamba 2's scan and the gated norm of its output as Triton kernels.

Decodes and draft tokens run through the recurrence. Longer sequences are cut into chunks, which
are computed by products of matrices (arXiv 2405.21060, section 6): one kernel goes from chunk to
chunk of a sequence with the state in registers, and a second one computes the outputs of all chunks
at once.

Legend: see `mamba2`; S sequences, C chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llmkit.kernels.recurrent_state import (
    CHUNK_TOKENS,
    MAX_TOKENS_ONE_BY_ONE,
    RecurrentBatch,
    RecurrentState,
)
from llmkit.kernels.triton_support import interprets, is_amd, jit, jit_without_specializing, tl

ANY_NUMBER = 1 << 30  # of tokens
MAX_STATE_ELEMENTS = 4096  # that a program of the recurrence holds


class ChunkTiles(NamedTuple):
    """How the kernels of chunks multiply inputs of a dtype. Sums are float32."""

    dtype: torch.dtype  # of the factors, and of the states before chunks
    precision: str  # of factors in float32
    state_elements: int  # that a program of the first kernel holds
    state_warps: int  # of the first kernel
    output_columns: int  # that a program of the second kernel computes
    state_tile: int  # rows of a state that it multiplies at once


CHUNK_TILES = {
    torch.bfloat16: ChunkTiles(torch.bfloat16, "ieee", 4096, 4, 64, 64),
    # States may be beyond the range of float16.
    torch.float16: ChunkTiles(torch.float32, "tf32", 4096, 4, 32, 32),
    torch.float32: ChunkTiles(torch.float32, "ieee", 2048, 8, 16, 32),
}


def chunk_tiles(dtype: torch.dtype) -> ChunkTiles:
    """The tiles for inputs of this dtype.

    The interpreter has no products of bfloat16, and not all AMD GPUs have those of TF32.
    """
    if (dtype == torch.bfloat16 and interprets) or (dtype == torch.float16 and is_amd()):
        dtype = torch.float32
    return CHUNK_TILES[dtype]


def mamba2_scan_triton(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    n_groups: int,
    time_step_limit: tuple[float, float],
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """`mamba2.mamba2_scan`. xbc, dt: their last dimensions are contiguous."""
    _, num_heads, state_size, head_dim = state.state.shape
    y = xbc.new_empty(len(xbc), num_heads, head_dim)
    padded_size = max(16, 1 << (state_size - 1).bit_length())
    padded_dim = max(16, 1 << (head_dim - 1).bit_length())
    columns = max(16, min(padded_dim, MAX_STATE_ELEMENTS // padded_size))
    rows = batch.device_rows
    chunks = batch.device_chunks
    strides_and_limit = (xbc.stride(0), dt.stride(0), *time_step_limit)
    sizes = {
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "STATE_SIZE": state_size,
        "GROUPS": n_groups,
    }
    with torch.cuda.device_of(xbc):
        _scan_tokens_kernel[-(-head_dim // columns), num_heads, len(batch.query_lens)](
            xbc,
            dt,
            A_log,
            D,
            dt_bias,
            state.state,
            y,
            *rows,
            *strides_and_limit,
            PADDED_SIZE=padded_size,
            COLUMNS=columns,
            MAX_TOKENS=ANY_NUMBER if chunks is None else MAX_TOKENS_ONE_BY_ONE,
            **sizes,
        )
        if chunks is None:
            return y
        tiles = chunk_tiles(xbc.dtype)
        before = xbc.new_empty(
            (len(chunks.first_tokens), num_heads, state_size, head_dim), dtype=tiles.dtype
        )
        common = sizes | {"CHUNK": CHUNK_TOKENS, "PRECISION": tiles.precision}
        columns = max(16, min(padded_dim, tiles.state_elements // padded_size))
        _chunk_states_kernel[-(-head_dim // columns), num_heads, len(chunks.sequences)](
            xbc,
            dt,
            A_log,
            dt_bias,
            state.state,
            before,
            rows.initial_rows,
            rows.write_rows,
            *chunks,
            *strides_and_limit,
            PADDED_SIZE=padded_size,
            COLUMNS=columns,
            **common,
            num_warps=tiles.state_warps,
        )
        columns = min(padded_dim, tiles.output_columns)
        _chunk_outputs_kernel[len(chunks.first_tokens), num_heads, -(-head_dim // columns)](
            xbc,
            dt,
            A_log,
            D,
            dt_bias,
            before,
            y,
            chunks.first_tokens,
            chunks.num_tokens,
            *strides_and_limit,
            STATE_TILE=min(padded_size, tiles.state_tile),
            COLUMNS=columns,
            **common,
            num_warps=8,
        )
    return y


def gated_group_rms_norm_triton(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    num_groups: int,
    *,
    norm_before_gate: bool,
) -> torch.Tensor:
    """`mamba2.gated_group_rms_norm`. x: contiguous; the last dimension of gate is contiguous.

    A program holds a group, of at most 1 << 15 elements or so.
    """
    rows, size = x.shape
    y = torch.empty_like(x)
    group_size = size // num_groups
    tile = max(128, 1 << (group_size - 1).bit_length())
    with torch.cuda.device_of(x):
        _gated_group_norm_kernel[rows, num_groups](
            x,
            gate,
            weight,
            y,
            gate.stride(0),
            eps,
            SIZE=size,
            GROUP_SIZE=group_size,
            WEIGHT_STRIDE=0 if weight is not None and len(weight) < size else group_size,
            NORM_BEFORE_GATE=norm_before_gate,
            TILE=tile,
            num_warps=max(1, min(16, tile // 1024)),
        )
    return y


@jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x), precise for all x: the logarithm of a GPU is not, near 1.

    log(1 + e) = 2 artanh(s) with s = e / (2 + e): the first terms of its series.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    square = s * s
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13 + square * (1 / 15)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series)))
    return tl.where(x < 0, 0.0, x) + 2 * s * series  # NaN stays NaN


@jit
def _time_steps(raw: tl.tensor, bias: tl.tensor, min_dt: tl.tensor, max_dt: tl.tensor) -> tl.tensor:
    """NaN stays NaN."""
    steps = _softplus(raw.to(tl.float32) + bias)
    steps = tl.where(steps < min_dt, min_dt, steps)
    return tl.where(steps > max_dt, max_dt, steps)


@jit_without_specializing("min_dt", "max_dt")
def _scan_tokens_kernel(
    xbc: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    states: tl.tensor,
    y: tl.tensor,
    query_start_loc: tl.tensor,
    initial_rows: tl.tensor,
    write_starts: tl.tensor,
    write_ends: tl.tensor,
    write_rows: tl.tensor,
    xbc_stride: tl.tensor,
    dt_stride: tl.tensor,
    min_dt: tl.tensor,
    max_dt: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
) -> None:
    """The recurrence, in sequences of at most MAX_TOKENS tokens.

    A program computes COLUMNS columns of a head.
    """
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(query_start_loc + sequence).to(tl.int64)
    length = tl.load(query_start_loc + sequence + 1).to(tl.int64) - start
    if length > MAX_TOKENS:
        return
    n = tl.arange(0, PADDED_SIZE)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    has_n = n < STATE_SIZE
    has_p = p < HEAD_DIM
    in_state = has_n[:, None] & has_p[None, :]
    at = (head * STATE_SIZE + n[:, None]) * HEAD_DIM + p[None, :]
    row_size: tl.constexpr = HEADS * STATE_SIZE * HEAD_DIM
    row = tl.load(initial_rows + sequence).to(tl.int64)
    is_held = in_state & (n < tl.where(row >= 0, STATE_SIZE, 0))[:, None]
    state = tl.load(states + row * row_size + at, mask=is_held, other=0.0)
    tl.debug_barrier()  # all threads have read the initial row
    first_write = tl.load(write_starts + sequence)
    end_of_writes = tl.load(write_starts + sequence + 1)
    A = -tl.exp(tl.load(A_log + head))
    skip = tl.load(D + head)
    bias = tl.load(dt_bias + head)
    B_at = HEADS * HEAD_DIM + head // (HEADS // GROUPS) * STATE_SIZE + n
    for t in range(length):
        token = start + t
        row_at = xbc + token * xbc_stride
        step = _time_steps(tl.load(dt + token * dt_stride + head), bias, min_dt, max_dt)
        x = tl.load(row_at + head * HEAD_DIM + p, mask=has_p, other=0.0).to(tl.float32)
        B = tl.load(row_at + B_at, mask=has_n, other=0.0).to(tl.float32)
        C = tl.load(row_at + B_at + GROUPS * STATE_SIZE, mask=has_n, other=0.0).to(tl.float32)
        state = state * tl.exp(A * step) + B[:, None] * (step * x)[None, :]
        out = tl.sum(C[:, None] * state, 0) + skip * x
        out_at = y + (token * HEADS + head) * HEAD_DIM + p
        tl.store(out_at, out.to(y.dtype.element_ty), mask=has_p)
        for write in range(first_write, end_of_writes):
            if tl.load(write_ends + write) == t + 1:
                to = tl.load(write_rows + write).to(tl.int64) * row_size
                tl.store(states + to + at, state, mask=in_state)


@jit_without_specializing("min_dt", "max_dt")
def _chunk_states_kernel(
    xbc: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    dt_bias: tl.tensor,
    states: tl.tensor,
    before: tl.tensor,
    initial_rows: tl.tensor,
    write_rows: tl.tensor,
    sequences: tl.tensor,
    segment_starts: tl.tensor,
    first_writes: tl.tensor,
    num_writes: tl.tensor,
    chunk_starts: tl.tensor,
    first_tokens: tl.tensor,
    num_tokens: tl.tensor,
    xbc_stride: tl.tensor,
    dt_stride: tl.tensor,
    min_dt: tl.tensor,
    max_dt: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The states before each chunk, and those that are written to rows.

    before: [C, H, N, P]. A program goes from chunk to chunk of a long sequence, with COLUMNS
    columns of a head's state in registers.
    """
    head = tl.program_id(1)
    long = tl.program_id(2)
    n = tl.arange(0, PADDED_SIZE)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, CHUNK)
    has_n = n < STATE_SIZE
    has_p = p < HEAD_DIM
    in_state = has_n[:, None] & has_p[None, :]
    at = (head * STATE_SIZE + n[:, None]) * HEAD_DIM + p[None, :]
    row_size: tl.constexpr = HEADS * STATE_SIZE * HEAD_DIM
    row = tl.load(initial_rows + tl.load(sequences + long)).to(tl.int64)
    is_held = in_state & (n < tl.where(row >= 0, STATE_SIZE, 0))[:, None]
    state = tl.load(states + row * row_size + at, mask=is_held, other=0.0)
    tl.debug_barrier()  # all threads have read the initial row
    A = -tl.exp(tl.load(A_log + head))
    bias = tl.load(dt_bias + head)
    B_at = HEADS * HEAD_DIM + head // (HEADS // GROUPS) * STATE_SIZE + n
    dtype: tl.constexpr = before.dtype.element_ty
    first_segment = tl.load(segment_starts + long)
    before += tl.load(chunk_starts + first_segment).to(tl.int64) * row_size
    for segment in range(first_segment, tl.load(segment_starts + long + 1)):
        for chunk in range(tl.load(chunk_starts + segment), tl.load(chunk_starts + segment + 1)):
            tl.store(before + at, state.to(dtype), mask=in_state)
            before += row_size
            has_token = i < tl.load(num_tokens + chunk)
            token = tl.load(first_tokens + chunk).to(tl.int64) + i
            raw = tl.load(dt + token * dt_stride + head, mask=has_token, other=0.0)
            step = tl.where(has_token, _time_steps(raw, bias, min_dt, max_dt), 0.0)
            sums = tl.cumsum(A * step, 0)
            total = tl.sum(A * step, 0)
            rows = xbc + token[:, None] * xbc_stride
            in_x = has_token[:, None] & has_p[None, :]
            in_B = has_token[:, None] & has_n[None, :]
            x = tl.load(rows + head * HEAD_DIM + p[None, :], mask=in_x, other=0.0)
            B = tl.load(rows + B_at[None, :], mask=in_B, other=0.0).to(tl.float32)
            B *= (step * tl.exp(total - sums))[:, None]
            state = tl.dot(
                tl.trans(B.to(dtype)), x.to(dtype), state * tl.exp(total), input_precision=PRECISION
            )
        first_write = tl.load(first_writes + segment)
        for write in range(first_write, first_write + tl.load(num_writes + segment)):
            to = tl.load(write_rows + write).to(tl.int64) * row_size
            tl.store(states + to + at, state, mask=in_state)


@jit_without_specializing("min_dt", "max_dt")
def _chunk_outputs_kernel(
    xbc: tl.tensor,
    dt: tl.tensor,
    A_log: tl.tensor,
    D: tl.tensor,
    dt_bias: tl.tensor,
    before: tl.tensor,
    y: tl.tensor,
    first_tokens: tl.tensor,
    num_tokens: tl.tensor,
    xbc_stride: tl.tensor,
    dt_stride: tl.tensor,
    min_dt: tl.tensor,
    max_dt: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The outputs of the tokens of a chunk, in COLUMNS columns of a head.

    They are a sum over the chunk's own tokens, as in attention, with the decay between two tokens
    as mask, and a part of the state before the chunk.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    p = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, CHUNK)
    has_p = p < HEAD_DIM
    has_token = i < tl.load(num_tokens + chunk)
    token = tl.load(first_tokens + chunk).to(tl.int64) + i
    A = -tl.exp(tl.load(A_log + head))
    raw = tl.load(dt + token * dt_stride + head, mask=has_token, other=0.0)
    step = _time_steps(raw, tl.load(dt_bias + head), min_dt, max_dt)
    step = tl.where(has_token, step, 0.0)
    sums = tl.cumsum(A * step, 0)
    dtype: tl.constexpr = before.dtype.element_ty
    rows = xbc + token[:, None] * xbc_stride
    B_at = HEADS * HEAD_DIM + head // (HEADS // GROUPS) * STATE_SIZE
    before += (chunk.to(tl.int64) * HEADS + head) * STATE_SIZE * HEAD_DIM
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    out = tl.zeros((CHUNK, COLUMNS), tl.float32)
    for first in range(0, STATE_SIZE, STATE_TILE):
        n = first + tl.arange(0, STATE_TILE)
        has_n = n < STATE_SIZE
        in_B = has_token[:, None] & has_n[None, :]
        B = tl.load(rows + B_at + n[None, :], mask=in_B, other=0.0).to(dtype)
        C_at = rows + GROUPS * STATE_SIZE + B_at
        C = tl.load(C_at + n[None, :], mask=in_B, other=0.0).to(dtype)
        in_state = has_n[:, None] & has_p[None, :]
        at = before + n[:, None] * HEAD_DIM + p[None, :]
        state = tl.load(at, mask=in_state, other=0.0)
        scores = tl.dot(C, tl.trans(B), scores, input_precision=PRECISION)
        out = tl.dot(C, state, out, input_precision=PRECISION)
    between = sums[:, None] - sums[None, :]
    decay = tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))
    scores *= decay * step[None, :]
    out *= tl.exp(sums)[:, None]
    in_x = has_token[:, None] & has_p[None, :]
    x = tl.load(rows + head * HEAD_DIM + p[None, :], mask=in_x, other=0.0)
    out += tl.load(D + head) * x.to(tl.float32)
    out = tl.dot(scores.to(dtype), x.to(dtype), out, input_precision=PRECISION)
    out_at = y + (token[:, None] * HEADS + head) * HEAD_DIM + p[None, :]
    tl.store(out_at, out.to(y.dtype.element_ty), mask=in_x)


@jit
def _gated_group_norm_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    gate_stride: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program computes a group of a row.

    WEIGHT_STRIDE: from the weight of a group to that of the next; 0: all groups share one.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    inside = d < GROUP_SIZE
    in_weight = tl.program_id(1) * WEIGHT_STRIDE + d
    d += tl.program_id(1) * GROUP_SIZE
    values = tl.load(x + row * SIZE + d, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    gates = gates / (1 + tl.exp(-gates))
    if not NORM_BEFORE_GATE:
        values *= gates
    if weight is not None:
        variance = tl.sum(values * values, 0) / GROUP_SIZE
        factors = tl.load(weight + in_weight, mask=inside, other=0.0).to(tl.float32)
        values = values * tl.rsqrt(variance + eps) * factors
    if NORM_BEFORE_GATE:
        values *= gates
    tl.store(y + row * SIZE + d, values.to(y.dtype.element_ty), mask=inside)
