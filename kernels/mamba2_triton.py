"""Mamba 2's scan and the gated norm of its output as Triton kernels.

Sequences with a few new tokens (decodes, draft tokens) run through the recurrence, those with more
through the chunkwise form. Which of the two depends only on the sequence.

Legend: T tokens, H heads, P head_dim, N state_size, G groups, S sequences.
"""

from __future__ import annotations

import torch

from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.kernels.triton_support import is_amd, jit, jit_without_specializing, tl

FEW_TOKENS = 16  # new tokens of a sequence, at most, that run through the recurrence
CHUNK_TOKENS = 64
MAX_STATE_TILE = 4096  # elements of a state that a program holds
MAX_GROUP_SIZE = 1 << 15  # elements that a program of the gated norm holds


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
    num_sequences = len(batch.query_lens)
    padded_size = max(16, 1 << (state_size - 1).bit_length())
    columns = min(1 << (head_dim - 1).bit_length(), MAX_STATE_TILE // padded_size)
    columns = max(16, columns)
    # A CUDA graph runs with other lengths than those it is captured with.
    has_few = batch.max_query_len is not None or bool((batch.query_lens <= FEW_TOKENS).any())
    precision = "ieee" if is_amd() else "tf32" if xbc.element_size() == 2 else "tf32x3"
    grid = (-(-head_dim // columns), num_heads, num_sequences)
    arguments = (
        xbc,
        dt,
        A_log,
        D,
        dt_bias,
        state.state,
        y,
        *batch.device_rows,
        xbc.stride(0),
        dt.stride(0),
        *time_step_limit,
    )
    sizes = {
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "STATE_SIZE": state_size,
        "GROUPS": n_groups,
        "PADDED_SIZE": padded_size,
        "COLUMNS": columns,
        "FEW": FEW_TOKENS,
    }
    with torch.cuda.device_of(xbc):
        if has_few:
            _scan_tokens_kernel[grid](*arguments, **sizes)
        if batch.longest_query > FEW_TOKENS:
            _scan_chunks_kernel[grid](
                *arguments, **sizes, CHUNK=CHUNK_TOKENS, PRECISION=precision
            )
    return y


def supports_norm(x: torch.Tensor, num_groups: int) -> bool:
    """Whether a program of `gated_group_rms_norm_triton` holds a group."""
    return x.shape[1] // num_groups <= MAX_GROUP_SIZE


def gated_group_rms_norm_triton(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    num_groups: int,
    *,
    norm_before_gate: bool,
) -> torch.Tensor:
    """`mamba2.gated_group_rms_norm`. x: contiguous; the last dimension of gate is contiguous."""
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
            NORM_BEFORE_GATE=norm_before_gate,
            TILE=tile,
            num_warps=min(16, max(4, tile // 1024)),
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
def _time_steps(
    raw: tl.tensor, bias: tl.tensor, min_dt: tl.tensor, max_dt: tl.tensor
) -> tl.tensor:
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
    FEW: tl.constexpr,
) -> None:
    """The recurrence. A program computes COLUMNS columns of a head, in sequences of FEW tokens."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(query_start_loc + sequence).to(tl.int64)
    length = tl.load(query_start_loc + sequence + 1).to(tl.int64) - start
    if length > FEW:
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
def _scan_chunks_kernel(
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
    FEW: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The chunkwise form, in sequences of more than FEW tokens.

    A program computes COLUMNS columns of a head, chunk after chunk, with their state in registers.
    States at writes within a chunk are computed from that before the chunk, so that outputs do not
    depend on writes.
    """
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(query_start_loc + sequence).to(tl.int64)
    length = tl.load(query_start_loc + sequence + 1).to(tl.int64) - start
    if length <= FEW:
        return
    n = tl.arange(0, PADDED_SIZE)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, CHUNK)
    has_n = n < STATE_SIZE
    has_p = p < HEAD_DIM
    in_state = has_n[:, None] & has_p[None, :]
    at = (head * STATE_SIZE + n[:, None]) * HEAD_DIM + p[None, :]
    row_size: tl.constexpr = HEADS * STATE_SIZE * HEAD_DIM
    row = tl.load(initial_rows + sequence).to(tl.int64)
    is_held = in_state & (n < tl.where(row >= 0, STATE_SIZE, 0))[:, None]
    state = tl.load(states + row * row_size + at, mask=is_held, other=0.0)
    tl.debug_barrier()  # all threads have read the initial row
    write = tl.load(write_starts + sequence)
    end_of_writes = tl.load(write_starts + sequence + 1)
    write_end = tl.load(write_ends + write, mask=write < end_of_writes, other=-1)
    A = -tl.exp(tl.load(A_log + head))
    skip = tl.load(D + head)
    bias = tl.load(dt_bias + head)
    B_at = HEADS * HEAD_DIM + head // (HEADS // GROUPS) * STATE_SIZE + n
    for begin in range(0, length, CHUNK):
        has_token = begin + i < length
        token = start + begin + i
        raw = tl.load(dt + token * dt_stride + head, mask=has_token, other=0.0)
        step = tl.where(has_token, _time_steps(raw, bias, min_dt, max_dt), 0.0)
        log_decay = tl.cumsum(A * step, 0)
        rows = xbc + token[:, None] * xbc_stride
        in_x = has_token[:, None] & has_p[None, :]
        in_B = has_token[:, None] & has_n[None, :]
        x = tl.load(rows + head * HEAD_DIM + p[None, :], mask=in_x, other=0.0).to(tl.float32)
        B = tl.load(rows + B_at[None, :], mask=in_B, other=0.0)
        C = tl.load(rows + GROUPS * STATE_SIZE + B_at[None, :], mask=in_B, other=0.0)
        step_x = step[:, None] * x
        between = log_decay[:, None] - log_decay[None, :]
        decay = tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decay
        B = B.to(tl.float32)
        out = tl.dot(C.to(tl.float32), state, input_precision=PRECISION)
        out = out * tl.exp(log_decay)[:, None] + skip * x
        out = tl.dot(scores, step_x, out, input_precision=PRECISION)
        out_at = y + (token[:, None] * HEADS + head) * HEAD_DIM + p[None, :]
        tl.store(out_at, out.to(y.dtype.element_ty), mask=in_x)
        end = tl.minimum(begin + CHUNK, length)
        while (write_end > 0) & (write_end < end):
            kept = begin + i < write_end
            before = _state_after(state, B, step_x, log_decay, A * step, kept, PRECISION)
            to = tl.load(write_rows + write).to(tl.int64) * row_size
            tl.store(states + to + at, before, mask=in_state)
            write += 1
            write_end = tl.load(write_ends + write, mask=write < end_of_writes, other=-1)
        state = _state_after(state, B, step_x, log_decay, A * step, has_token, PRECISION)
        while write_end == end:
            to = tl.load(write_rows + write).to(tl.int64) * row_size
            tl.store(states + to + at, state, mask=in_state)
            write += 1
            write_end = tl.load(write_ends + write, mask=write < end_of_writes, other=-1)


@jit
def _state_after(
    state: tl.tensor,
    B: tl.tensor,
    step_x: tl.tensor,
    log_decay: tl.tensor,
    log_decays: tl.tensor,
    kept: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """The state after those tokens of a chunk that are kept.

    log_decays: of each token; log_decay: their sum up to it.
    """
    total = tl.sum(tl.where(kept, log_decays, 0.0), 0)
    to_end = tl.exp(tl.where(kept, total - log_decay, float("-inf")))
    added = tl.where(kept[:, None], to_end[:, None] * step_x, 0.0)
    return tl.dot(tl.trans(B), added, state * tl.exp(total), input_precision=PRECISION)


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
    NORM_BEFORE_GATE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program computes a group of a row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, TILE)
    inside = d < GROUP_SIZE
    d += tl.program_id(1) * GROUP_SIZE
    values = tl.load(x + row * SIZE + d, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    gates = gates / (1 + tl.exp(-gates))
    if not NORM_BEFORE_GATE:
        values *= gates
    if weight is not None:
        variance = tl.sum(values * values, 0) / GROUP_SIZE
        factors = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        values = values * tl.rsqrt(variance + eps) * factors
    if NORM_BEFORE_GATE:
        values *= gates
    tl.store(y + row * SIZE + d, values.to(y.dtype.element_ty), mask=inside)
