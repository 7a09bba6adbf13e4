"""The gated delta rule as Triton kernels: token by token, and for prompts in chunks.

A chunk of a prompt is computed by products of matrices (arXiv 2412.06464, section 3.3). One kernel
computes for all chunks at once what does not depend on the state, and a second one goes from chunk
to chunk of a sequence, with the state in registers.

Legend: see `gated_delta_net`; C tokens of a chunk.
"""

from __future__ import annotations

import torch

from llmkit.kernels.recurrent_state import (
    CHUNK_TOKENS,
    MAX_TOKENS_ONE_BY_ONE,
    DeviceChunks,
    RecurrentBatch,
    RecurrentState,
)
from llmkit.kernels.triton_support import is_amd, jit, tl

L2_NORM_EPS = 1e-6  # added to the sum of squares of a query and of a key
BLOCK_V = 32  # columns of a state that a program computes
ANY_NUMBER = 1 << 30  # of tokens


def gated_delta_rule_triton(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
    batch: RecurrentBatch,
    *,
    in_chunks: bool | None = None,
) -> torch.Tensor:
    """See `gated_delta_net.gated_delta_rule`.

    The last dimensions of qkv and ba, and each row of the states, are contiguous. in_chunks:
    whether long sequences are computed in chunks; None: where the inputs have 16 bits, because the
    registers do not suffice for exact products of float32.
    """
    num_v_heads, k_dim, v_dim = state.state.shape[1:]
    out = qkv.new_empty(len(qkv), num_v_heads, v_dim)
    rows = batch.device_rows
    in_chunks = qkv.element_size() == 2 if in_chunks is None else in_chunks
    chunks = batch.device_chunks if in_chunks else None
    v_blocks = -(-v_dim // BLOCK_V)
    sizes = {
        "K": k_dim,
        "V": v_dim,
        "PADDED_K": max(16, 1 << (k_dim - 1).bit_length()),
        "BLOCK_V": BLOCK_V,
        "EPS": L2_NORM_EPS,
    }
    with torch.cuda.device_of(qkv):
        _delta_tokens_kernel[len(batch.query_lens), num_v_heads, v_blocks](
            qkv,
            ba,
            A_log,
            dt_bias,
            out,
            state.state,
            *rows,
            qkv.stride(0),
            ba.stride(0),
            state.state.stride(0),
            num_k_heads,
            num_v_heads,
            MAX_TOKENS=ANY_NUMBER if chunks is None else MAX_TOKENS_ONE_BY_ONE,
            **sizes,
        )
        if chunks is None:
            return out
        _mix_chunks(qkv, ba, A_log, dt_bias, num_k_heads, state, batch, chunks, out, sizes)
    return out


def _mix_chunks(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
    batch: RecurrentBatch,
    chunks: DeviceChunks,
    out: torch.Tensor,
    sizes: dict[str, float],
) -> None:
    """Compute the tokens of the long sequences."""
    num_tokens, num_v_heads, v_dim = out.shape
    k_dim = state.state.shape[2]
    of_state = qkv.new_empty(num_tokens, num_v_heads, k_dim)
    added = qkv.new_empty(num_tokens, num_v_heads, v_dim)
    attention = qkv.new_empty(num_tokens, num_v_heads, CHUNK_TOKENS)
    decays = torch.empty(num_tokens, num_v_heads, device=qkv.device)
    padded_v = max(16, 1 << (v_dim - 1).bit_length())
    # Of products of float32. Not all AMD GPUs have TF32.
    precision = "ieee" if qkv.dtype == torch.float32 or is_amd() else "tf32"
    _delta_chunks_kernel[len(chunks.first_tokens), num_v_heads](
        qkv,
        ba,
        A_log,
        dt_bias,
        of_state,
        added,
        attention,
        decays,
        chunks.first_tokens,
        chunks.num_tokens,
        qkv.stride(0),
        ba.stride(0),
        num_k_heads,
        num_v_heads,
        PADDED_V=padded_v,
        CHUNK=CHUNK_TOKENS,
        PRECISION=precision,
        num_warps=4 if is_amd() else 8,  # a thread of an AMD GPU has more registers
        **sizes,
    )
    _delta_states_kernel[len(chunks.sequences), num_v_heads, -(-v_dim // BLOCK_V)](
        qkv,
        of_state,
        added,
        attention,
        decays,
        out,
        state.state,
        batch.device_rows.initial_rows,
        batch.device_rows.write_rows,
        *chunks,
        qkv.stride(0),
        state.state.stride(0),
        num_k_heads,
        num_v_heads,
        CHUNK=CHUNK_TOKENS,
        PRECISION=precision,
        num_stages=1 if is_amd() else 2,  # AMD GPUs have too little shared memory
        **sizes,
    )


@jit
def _decay_log(a: tl.tensor, dt_bias: tl.tensor, A_log: tl.tensor) -> tl.tensor:
    """-exp(A_log) softplus(a + dt_bias)"""
    x = a.to(tl.float32) + dt_bias
    softplus = tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
    return -tl.exp(A_log) * softplus


@jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    return 1 / (1 + tl.exp(-x.to(tl.float32)))


@jit
def _inverse_norm(x: tl.tensor, EPS: tl.constexpr) -> tl.tensor:
    """1 / the length of each row."""
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) + EPS)


@jit
def _delta_tokens_kernel(
    qkv: tl.tensor,
    ba: tl.tensor,
    A_log: tl.tensor,
    dt_bias: tl.tensor,
    out: tl.tensor,
    state: tl.tensor,
    query_start_loc: tl.tensor,
    initial_rows: tl.tensor,
    write_starts: tl.tensor,
    write_ends: tl.tensor,
    write_rows: tl.tensor,
    qkv_stride: tl.tensor,
    ba_stride: tl.tensor,
    row_stride: tl.tensor,
    num_k_heads: tl.tensor,
    num_v_heads: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EPS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
) -> None:
    """A program computes BLOCK_V columns of a head of a sequence, token by token.

    Sequences with more than MAX_TOKENS tokens are left out.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(query_start_loc + sequence)
    end = tl.load(query_start_loc + sequence + 1)
    if end - begin > MAX_TOKENS:
        return
    first_write = tl.load(write_starts + sequence)
    end_write = tl.load(write_starts + sequence + 1)
    i = tl.arange(0, PADDED_K)
    d = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < K)[:, None] & (d < V)[None, :]
    in_row = head * K * V + i[:, None] * V + d[None, :]
    row = tl.load(initial_rows + sequence).to(tl.int64)
    s = tl.zeros((PADDED_K, BLOCK_V), tl.float32)
    if row >= 0:
        s = tl.load(state + row * row_stride + in_row, mask=inside, other=0.0)
    k_head = head // (num_v_heads // num_k_heads)
    bias = tl.load(dt_bias + head)
    rate = tl.load(A_log + head)
    # Those of the first token; the loop moves them.
    qkv += begin.to(tl.int64) * qkv_stride
    ba += begin.to(tl.int64) * ba_stride + head
    out += (begin.to(tl.int64) * num_v_heads + head) * V + d
    for ended in range(1, end - begin + 1):
        q = tl.load(qkv + k_head * K + i, mask=i < K, other=0.0).to(tl.float32)
        k = tl.load(qkv + (num_k_heads + k_head) * K + i, mask=i < K, other=0.0).to(tl.float32)
        v = tl.load(qkv + 2 * num_k_heads * K + head * V + d, mask=d < V, other=0.0)
        beta = _sigmoid(tl.load(ba))
        decay = tl.exp(_decay_log(tl.load(ba + num_v_heads), bias, rate))
        q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * K**-0.5
        k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
        s *= decay
        update = beta * (v.to(tl.float32) - tl.sum(s * k[:, None], 0))
        s += k[:, None] * update[None, :]
        o = tl.sum(s * q[:, None], 0)
        tl.store(out, o.to(out.dtype.element_ty), mask=d < V)
        for write in range(first_write, end_write):
            if tl.load(write_ends + write) == ended:
                write_row = tl.load(write_rows + write).to(tl.int64)
                tl.store(state + write_row * row_stride + in_row, s, mask=inside)
        qkv += qkv_stride
        ba += ba_stride
        out += num_v_heads * V


@jit
def _unit_lower_inverse(system: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """The inverse of 1 + system. system: [64, 64], zeros on and above the diagonal.

    The blocks of 16 rows on the diagonal are inverted row by row. With D their inverse, B the
    blocks below them and M = D B, whose fourth power is zero, the whole inverse is
    (1 - M) (1 + M^2) D.
    """
    blocks = tl.reshape(system, (4, 16, 4, 16))
    b = tl.arange(0, 4)
    is_diagonal = b[:, None, None, None] == b[None, None, :, None]
    diagonal = tl.sum(tl.where(is_diagonal, blocks, 0.0), 2)
    i = tl.arange(0, 16)
    is_unit = i[None, :, None] == i[None, None, :]
    inverse = tl.where(is_unit, 1.0, 0.0) + tl.zeros((4, 16, 16), tl.float32)
    for n in range(1, 16):
        is_row = i[None, :, None] == n
        row = tl.sum(tl.where(is_row, diagonal, 0.0), 1)
        combined = tl.sum(row[:, :, None] * inverse, 1)
        inverse -= tl.where(is_row, combined[:, None, :], 0.0)
    below = tl.reshape(tl.where(is_diagonal, 0.0, blocks), (64, 64))
    spread = tl.reshape(tl.where(is_diagonal, inverse[:, :, None, :], 0.0), (64, 64))
    m = tl.dot(spread, below, input_precision=PRECISION)
    squared = tl.dot(m, m, input_precision=PRECISION)
    partial = spread + tl.dot(squared, spread, input_precision=PRECISION)
    return partial - tl.dot(m, partial, input_precision=PRECISION)


@jit
def _delta_chunks_kernel(
    qkv: tl.tensor,
    ba: tl.tensor,
    A_log: tl.tensor,
    dt_bias: tl.tensor,
    of_state: tl.tensor,
    added: tl.tensor,
    attention: tl.tensor,
    decays: tl.tensor,
    first_tokens: tl.tensor,
    num_tokens: tl.tensor,
    qkv_stride: tl.tensor,
    ba_stride: tl.tensor,
    num_k_heads: tl.tensor,
    num_v_heads: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A program computes what a chunk of a head needs besides the state before it.

    The values that the tokens of a chunk add to the state are the solution of a triangular system:
    added - of_state S, with the state S before the chunk. attention: the products of queries and
    keys, with the decay between them. decays: the logarithm of the decay since the chunk began.
    """
    head = tl.program_id(1)
    count = tl.load(num_tokens + tl.program_id(0))
    t = tl.arange(0, CHUNK)
    is_token = t < count
    token = tl.load(first_tokens + tl.program_id(0)).to(tl.int64) + t
    i = tl.arange(0, PADDED_K)
    inside = is_token[:, None] & (i < K)[None, :]
    k_head = head // (num_v_heads // num_k_heads)
    of_head = qkv + token[:, None] * qkv_stride + k_head * K + i[None, :]
    k = tl.load(of_head + num_k_heads * K, mask=inside, other=0.0)
    logits = ba + token * ba_stride + head
    beta = _sigmoid(tl.load(logits, mask=is_token, other=0.0))
    a = tl.load(logits + num_v_heads, mask=is_token, other=0.0)
    g = _decay_log(a, tl.load(dt_bias + head), tl.load(A_log + head))
    decay = tl.cumsum(tl.where(is_token, g, 0.0), 0)
    at = token * num_v_heads + head
    tl.store(decays + at, decay, mask=is_token)
    # exp of nothing but what is not positive
    is_later = t[:, None] < t[None, :]
    between = tl.exp(tl.where(is_later, float("-inf"), decay[:, None] - decay[None, :]))
    k_scale = _inverse_norm(k, EPS)
    system = tl.dot(k, tl.trans(k), input_precision=PRECISION) * between
    system *= (beta * k_scale)[:, None] * k_scale[None, :]
    system = tl.where(t[:, None] > t[None, :], system, 0.0)
    q = tl.load(of_head, mask=inside, other=0.0)
    q_scale = _inverse_norm(q, EPS) * K**-0.5
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between
    scores *= q_scale[:, None] * k_scale[None, :]
    to = attention + at[:, None] * CHUNK + t[None, :]
    tl.store(to, scores.to(attention.dtype.element_ty), mask=is_token[:, None])
    inverse = _unit_lower_inverse(system, PRECISION)
    weighted = (inverse * (beta * k_scale * tl.exp(decay))[None, :]).to(k.dtype)
    w = tl.dot(weighted, k, input_precision=PRECISION)
    to = of_state + at[:, None] * K + i[None, :]
    tl.store(to, w.to(of_state.dtype.element_ty), mask=inside)
    d = tl.arange(0, PADDED_V)
    inside = is_token[:, None] & (d < V)[None, :]
    of_head = qkv + token[:, None] * qkv_stride + 2 * num_k_heads * K + head * V + d[None, :]
    v = tl.load(of_head, mask=inside, other=0.0)
    u = tl.dot((inverse * beta[None, :]).to(v.dtype), v, input_precision=PRECISION)
    tl.store(added + at[:, None] * V + d[None, :], u.to(added.dtype.element_ty), mask=inside)


@jit
def _delta_states_kernel(
    qkv: tl.tensor,
    of_state: tl.tensor,
    added: tl.tensor,
    attention: tl.tensor,
    decays: tl.tensor,
    out: tl.tensor,
    state: tl.tensor,
    initial_rows: tl.tensor,
    write_rows: tl.tensor,
    sequences: tl.tensor,
    segment_starts: tl.tensor,
    first_writes: tl.tensor,
    num_writes: tl.tensor,
    chunk_starts: tl.tensor,
    first_tokens: tl.tensor,
    num_tokens: tl.tensor,
    qkv_stride: tl.tensor,
    row_stride: tl.tensor,
    num_k_heads: tl.tensor,
    num_v_heads: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A program computes BLOCK_V columns of a head of a long sequence, chunk by chunk."""
    head = tl.program_id(1)
    i = tl.arange(0, PADDED_K)
    d = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.arange(0, CHUNK)
    in_state = (i < K)[:, None] & (d < V)[None, :]
    in_row = head * K * V + i[:, None] * V + d[None, :]
    row = tl.load(initial_rows + tl.load(sequences + tl.program_id(0))).to(tl.int64)
    s = tl.zeros((PADDED_K, BLOCK_V), tl.float32)
    if row >= 0:
        s = tl.load(state + row * row_stride + in_row, mask=in_state, other=0.0)
    k_head = head // (num_v_heads // num_k_heads)
    first_segment = tl.load(segment_starts + tl.program_id(0))
    end_segment = tl.load(segment_starts + tl.program_id(0) + 1)
    for segment in range(first_segment, end_segment):
        first_chunk = tl.load(chunk_starts + segment)
        end_chunk = tl.load(chunk_starts + segment + 1)
        for chunk in range(first_chunk, end_chunk):
            first_token = tl.load(first_tokens + chunk).to(tl.int64)
            count = tl.load(num_tokens + chunk)
            is_token = t < count
            token = first_token + t
            at = token * num_v_heads + head
            decay = tl.load(decays + at, mask=is_token, other=0.0)
            last = tl.load(decays + (first_token + count - 1) * num_v_heads + head)
            inside = is_token[:, None] & (i < K)[None, :]
            in_values = is_token[:, None] & (d < V)[None, :]
            w = tl.load(of_state + at[:, None] * K + i[None, :], mask=inside, other=0.0)
            rounded = s.to(w.dtype)
            u = tl.load(added + at[:, None] * V + d[None, :], mask=in_values, other=0.0)
            update = u.to(tl.float32) - tl.dot(w, rounded, input_precision=PRECISION)
            of_head = qkv + token[:, None] * qkv_stride + k_head * K + i[None, :]
            q = tl.load(of_head, mask=inside, other=0.0)
            o = tl.dot(q, rounded, input_precision=PRECISION)
            o *= (_inverse_norm(q, EPS) * K**-0.5 * tl.exp(decay))[:, None]
            of_chunk = attention + at[:, None] * CHUNK + t[None, :]
            scores = tl.load(of_chunk, mask=is_token[:, None], other=0.0)
            o += tl.dot(scores, update.to(scores.dtype), input_precision=PRECISION)
            to = out + at[:, None] * V + d[None, :]
            tl.store(to, o.to(out.dtype.element_ty), mask=in_values)
            k = tl.load(of_head + num_k_heads * K, mask=inside, other=0.0)
            update *= (_inverse_norm(k, EPS) * tl.exp(last - decay))[:, None]
            s *= tl.exp(last)
            s += tl.dot(tl.trans(k), update.to(k.dtype), input_precision=PRECISION)
        first_write = tl.load(first_writes + segment)
        for write in range(first_write, first_write + tl.load(num_writes + segment)):
            write_row = tl.load(write_rows + write).to(tl.int64)
            tl.store(state + write_row * row_stride + in_row, s, mask=in_state)
