"""Mamba 2's selective state space (arXiv 2405.21060), and the gated norm of its output.

Each head has a state, a matrix [N, P]. With dt > 0 a token makes of it
exp(-exp(A_log) dt) state + dt B x', and its output is C state + D x.

Legend: T tokens, H heads, P head_dim, N state_size, G groups of heads, which share B and C.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu, softplus

from llmkit.kernels.causal_conv import sequence_writes
from llmkit.kernels.cpu import cpu_mamba2
from llmkit.kernels.mamba2_triton import gated_group_rms_norm_triton, mamba2_scan_triton
from llmkit.kernels.recurrent_state import CHUNK_TOKENS, NO_ROW, RecurrentBatch, RecurrentState
from llmkit.kernels.triton_support import runs_triton

# Fewer tokens are computed one by one.
MIN_CHUNK_TOKENS = 9


def mamba2_scan(
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
    """The outputs of all heads for the new tokens, computed in float32.

    xbc: [T, H * P + 2 * G * N], after the convolution: x, B, then C. dt: [T, H]; the time steps are
    softplus(dt + dt_bias), clamped to time_step_limit. A_log, D, dt_bias: float32 [H].
    Reads and writes the rows of `state.state`, [R, H, N, P], that `batch` names.
    Returns [T, H, P] in the dtype of xbc.
    """
    inputs = (xbc, dt, A_log, D, dt_bias)
    if cpu_mamba2.supports(*inputs, state):
        return cpu_mamba2.mamba2_scan(*inputs, n_groups, time_step_limit, state, batch)
    if runs_triton(xbc) and xbc.stride(1) == dt.stride(1) == 1:
        return mamba2_scan_triton(*inputs, n_groups, time_step_limit, state, batch)
    return mamba2_scan_torch(*inputs, n_groups, time_step_limit, state, batch, CHUNK_TOKENS)


def gated_group_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    num_groups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """norm(x * silu(gate)) * weight, with an RMS norm of each of num_groups equal parts of a row.

    With norm_before_gate: norm(x) * weight * silu(gate). Without a weight: x * silu(gate).
    x, gate: [T, size]; weight: [size], or [size / num_groups], which all groups share. Computes in
    float32. Returns x's shape and dtype.
    """
    if cpu_mamba2.supports_norm(x, gate, weight):
        return cpu_mamba2.gated_group_rms_norm(
            x, gate, weight, eps, num_groups, norm_before_gate=norm_before_gate
        )
    if runs_triton(x) and x.is_contiguous() and gate.stride(1) == 1:
        return gated_group_rms_norm_triton(
            x, gate, weight, eps, num_groups, norm_before_gate=norm_before_gate
        )
    gated = silu(gate.float())
    y = x.float()
    if weight is None:
        return (y * gated).to(x.dtype)
    if not norm_before_gate:
        y = y * gated
    groups = y.reshape(len(y), num_groups, -1)
    variance = groups.square().mean(-1, keepdim=True)
    weights = weight.float().view(-1, groups.shape[2])
    y = (groups * torch.rsqrt(variance + eps) * weights).flatten(1)
    return (y * gated if norm_before_gate else y).to(x.dtype)


def mamba2_scan_torch(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    n_groups: int,
    time_step_limit: tuple[float, float],
    state: RecurrentState,
    batch: RecurrentBatch,
    chunk_tokens: int = 1,
) -> torch.Tensor:
    """`mamba2_scan` in torch operations. Gradients pass through it to all inputs but the state.

    chunk_tokens: so many tokens at most are computed together, by matrix products; 1: the
    recurrence itself.
    """
    _, heads, state_size, head_dim = state.state.shape
    sizes = (heads * head_dim, n_groups * state_size, n_groups * state_size)
    x, B, C = xbc.float().split(sizes, dim=1)
    x = x.view(-1, heads, head_dim)
    B = _for_heads(B, n_groups, heads)
    C = _for_heads(C, n_groups, heads)
    dt = softplus(dt.float() + dt_bias.float()).clamp(*time_step_limit)
    log_decay = -A_log.float().exp() * dt
    dt_x = dt[:, :, None] * x
    outputs = []
    start = 0
    for sequence, length in enumerate(batch.query_lens.tolist()):
        row = int(batch.initial_rows[sequence])
        current = x.new_zeros(heads, state_size, head_dim)
        if row != NO_ROW:
            current.copy_(state.state[row])
        writes = list(sequence_writes(batch, sequence))
        done = 0
        chunk_ends = range(chunk_tokens, length, chunk_tokens)
        ends = {*chunk_ends, length, *(write_end for write_end, _ in writes)} - {0}
        for end in sorted(ends):
            piece = slice(start + done, start + end)
            scan = _scan_chunk if end - done >= MIN_CHUNK_TOKENS else _scan_tokens
            y, current = scan(current, log_decay[piece], B[piece], C[piece], dt_x[piece])
            outputs.append(y)
            done = end
            for write_end, row in writes:
                if write_end == end:
                    state.state[row] = current.detach()
        start += length
    skipped: torch.Tensor = D.float()[:, None] * x
    return (torch.cat(outputs) + skipped).to(xbc.dtype)


def _for_heads(values: torch.Tensor, n_groups: int, heads: int) -> torch.Tensor:
    """[T, G * N] -> [T, H, N]: each head has the values of its group."""
    groups = values.view(len(values), n_groups, -1)
    return groups.repeat_interleave(heads // n_groups, dim=1)


def _scan_tokens(
    state: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence. Returns the outputs, [T, H, P], and the state after the last token."""
    outputs = []
    for token, decay in enumerate(log_decay.exp()):
        state = state * decay[:, None, None] + B[token, :, :, None] * dt_x[token, :, None]
        outputs.append((C[token, :, :, None] * state).sum(1))
    return torch.stack(outputs), state


def _scan_chunk(
    state: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt_x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_scan_tokens` by matrix products (section 6 of the paper).

    A token's output is a sum over the tokens up to it, as in attention, with the decay between two
    tokens as mask, and a part of the state before them.
    """
    # In float64: differences of these sums matter, and they may be large.
    sums = log_decay.T.double().cumsum(1)  # [H, T]
    between = (sums[:, :, None] - sums[:, None, :]).float()
    later = torch.ones_like(between[0], dtype=torch.bool).triu(1)
    decay = between.masked_fill(later, float("-inf")).exp()  # [H, T, T]
    B, C, dt_x = (values.transpose(0, 1) for values in (B, C, dt_x))  # [H, T, N or P]
    scores = C @ B.transpose(1, 2) * decay
    from_start = sums.float().exp()[:, :, None]
    y = scores @ dt_x + from_start * (C @ state)
    to_end = decay[:, -1, :, None]
    state = from_start[:, -1:] * state + (B * to_end).transpose(1, 2) @ dt_x
    return y.transpose(0, 1), state
