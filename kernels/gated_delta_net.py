"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): linear attention with a state per head.

The state S [K, V] of a head maps keys to values. Each token first decays it, then replaces a part
of the value that the state holds for the token's key (equation 10 of the paper):

    S' = exp(g) S                         g = -exp(A_log) softplus(a + dt_bias)
    S  = S' + k (beta (v - S'^T k))^T     beta = sigmoid(b)
    o  = S^T q

q and k have length 1, and q is divided by sqrt(K). Hv value heads share Hk key heads: value head h
has the key head h // (Hv / Hk).

Legend: T tokens of a step, S its sequences, Hk and Hv heads, K and V their sizes, R rows of states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad, softplus

from llmkit.kernels.cpu import cpu_gated_delta_net
from llmkit.kernels.gated_delta_net_triton import L2_NORM_EPS, gated_delta_rule_triton
from llmkit.kernels.mamba2 import gated_group_rms_norm
from llmkit.kernels.recurrent_state import CHUNK_TOKENS, NO_ROW, RecurrentBatch, RecurrentState
from llmkit.kernels.triton_support import runs_triton


class DeltaInputs(NamedTuple):
    """What the recurrence reads of each token, in float32."""

    q: torch.Tensor  # [T, Hv, K]
    k: torch.Tensor  # [T, Hv, K]
    v: torch.Tensor  # [T, Hv, V]
    g: torch.Tensor  # [T, Hv]: the logarithm of the decay, not positive
    beta: torch.Tensor  # [T, Hv]


# Computes consecutive tokens of a sequence from the state [Hv, K, V] before them. Returns their
# outputs [T, Hv, V] and the state after them.
Recurrence = Callable[[DeltaInputs, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def gated_delta_rule(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """Mix the tokens of a step, and write the states that `batch` asks for.

    qkv: [T, 2 Hk K + Hv V], the output of the convolution: queries, keys, values. ba: [T, 2 Hv]: b,
    then a. A_log, dt_bias: float32 [Hv]. state.state: float32 [R, Hv, K, V]; the rows' number may
    be 0 where `batch` reads and writes none. Returns [T, Hv, V] in the dtype of qkv.
    """
    run = gated_delta_rule_torch
    if cpu_gated_delta_net.supports(qkv, ba, A_log, dt_bias, state):
        run = cpu_gated_delta_net.gated_delta_rule
    elif runs_triton(qkv):
        run = gated_delta_rule_triton
    return run(qkv, ba, A_log, dt_bias, num_k_heads, state, batch)


def gated_rms_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The norm of each head, times a gate: x / rms(x) * weight * silu(z).

    x, z: [N, D] or [T, N, D]; weight: [D]. Computed in float32. Returns x's shape and dtype.
    """
    num_groups = x.shape[1] if x.dim() == 3 else 1
    y = gated_group_rms_norm(
        x.flatten(1), z.flatten(1), weight, eps, num_groups, norm_before_gate=True
    )
    return y.view_as(x)


def gated_delta_rule_torch(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """`gated_delta_rule` by torch operators: gradients pass through it (not through states)."""
    inputs = _inputs(qkv, ba, A_log, dt_bias, num_k_heads, state)
    if batch.is_decode:
        return _decode(inputs, state, batch).to(qkv.dtype)
    return _mix_sequences(inputs, state, batch, _chunkwise).to(qkv.dtype)


def gated_delta_rule_reference(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """`gated_delta_rule`, token by token as the equations stand."""
    inputs = _inputs(qkv, ba, A_log, dt_bias, num_k_heads, state)
    return _mix_sequences(inputs, state, batch, _token_by_token).to(qkv.dtype)


def _inputs(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
) -> DeltaInputs:
    num_v_heads, k_dim, v_dim = state.state.shape[1:]
    sizes = (num_k_heads * k_dim, num_k_heads * k_dim, num_v_heads * v_dim)
    q, k, v = (
        part.unflatten(1, (-1, size))
        for part, size in zip(qkv.float().split(sizes, 1), (k_dim, k_dim, v_dim), strict=True)
    )
    group = num_v_heads // num_k_heads
    b, a = ba.float().chunk(2, 1)
    return DeltaInputs(
        (_l2_norm(q) * k_dim**-0.5).repeat_interleave(group, 1),
        _l2_norm(k).repeat_interleave(group, 1),
        v,
        -A_log.float().exp() * softplus(a + dt_bias),
        b.sigmoid(),
    )


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def _mix_sequences(
    inputs: DeltaInputs, state: RecurrentState, batch: RecurrentBatch, recurrence: Recurrence
) -> torch.Tensor:
    """Compute each sequence from write to write."""
    outputs = []
    first_token = 0
    for i, num_tokens in enumerate(batch.query_lens.tolist()):
        writes = slice(batch.write_starts[i], batch.write_starts[i + 1])
        ends = batch.write_ends[writes].tolist()
        rows = batch.write_rows[writes].tolist()
        initial_row = int(batch.initial_rows[i])
        if initial_row == NO_ROW:
            current = inputs.v.new_zeros(state.state.shape[1:])
        else:
            current = state.state[initial_row].clone()
        begin = 0
        for end in sorted({*ends, num_tokens} - {0}):
            tokens = slice(first_token + begin, first_token + end)
            out, current = recurrence(DeltaInputs(*(part[tokens] for part in inputs)), current)
            outputs.append(out)
            begin = end
            for write_end, row in zip(ends, rows, strict=True):
                if write_end == end:
                    state.state[row] = current.detach()
        first_token += num_tokens
    return torch.cat(outputs)


def _token_by_token(inputs: DeltaInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for token in range(len(inputs.q)):
        out, state = _one_token(DeltaInputs(*(part[token] for part in inputs)), state)
        outputs.append(out)
    return torch.stack(outputs), state


def _one_token(inputs: DeltaInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """inputs: without the dimension of tokens, or with that of sequences in its place.

    state: [Hv, K, V], or [S, Hv, K, V].
    """
    q, k, v, g, beta = inputs
    state = state * g.exp()[..., None, None]
    held = (k[..., None, :] @ state).squeeze(-2)
    update = beta[..., None] * (v - held)
    state = state + k[..., None] * update[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def _decode(inputs: DeltaInputs, state: RecurrentState, batch: RecurrentBatch) -> torch.Tensor:
    """One token of each sequence."""
    has_state = torch.from_numpy(batch.initial_rows != NO_ROW).to(inputs.v.device)
    before = inputs.v.new_zeros(len(has_state), *state.state.shape[1:])
    before[has_state] = state.state[batch.initial_rows[batch.initial_rows != NO_ROW].tolist()]
    out, after = _one_token(inputs, before)
    counts = np.diff(batch.write_starts)
    written = np.repeat(np.arange(len(counts)), counts)
    state.state[batch.write_rows.tolist()] = after.detach()[written.tolist()]
    return out


def _chunkwise(inputs: DeltaInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunk by chunk, with products of matrices (section 3.3 of the paper).

    Within a chunk, the values that its tokens add are the solution of a triangular system: each
    depends on what the tokens before it have added.
    """
    num_tokens = len(inputs.q)
    size = min(CHUNK_TOKENS, num_tokens)
    q, k, v, g, beta = (_cut_into_chunks(part, size) for part in inputs)
    # The logarithm of the decay from the beginning of the chunk to the end of each token.
    total = g.cumsum(-1)
    is_later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(is_later, -torch.inf).exp()
    weighted_k = beta[..., None] * k
    system = weighted_k @ k.mT * between
    sides = torch.cat((beta[..., None] * v, total.exp()[..., None] * weighted_k), -1)
    solution = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    added, of_state = solution.split((v.shape[-1], k.shape[-1]), -1)
    attention = q @ k.mT * between
    decayed_q = total.exp()[..., None] * q
    decayed_k = (total[..., -1:] - total).exp()[..., None] * k
    chunk_decay = total[..., -1].exp()[..., None, None]
    outputs = []
    for chunk in range(q.shape[1]):
        update = added[:, chunk] - of_state[:, chunk] @ state
        outputs.append(decayed_q[:, chunk] @ state + attention[:, chunk] @ update)
        state = chunk_decay[:, chunk] * state + decayed_k[:, chunk].mT @ update
    return torch.cat(outputs, 1).transpose(0, 1)[:num_tokens], state


def _cut_into_chunks(values: torch.Tensor, size: int) -> torch.Tensor:
    """[T, Hv, ...] -> [Hv, chunks, size, ...].

    Tokens of zeros fill the last chunk: they neither change the state nor let it decay.
    """
    missing = -len(values) % size
    padded = pad(values.transpose(0, 1), (0, 0) * (values.dim() - 2) + (0, missing))
    return padded.reshape(len(padded), -1, size, *padded.shape[2:])
