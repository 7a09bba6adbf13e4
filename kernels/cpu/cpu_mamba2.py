"""Mamba 2's scan and the gated norm of its output by the compiled CPU kernels.

Legend: T tokens, H heads, P head_dim.
"""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState


def supports(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state: RecurrentState,
) -> bool:
    """Whether `mamba2_scan` takes these tensors."""
    return all(
        cpu_kernels.supports(x) and cpu_kernels.has_compact_rows(x) for x in (xbc, dt)
    ) and all(
        tensor.dtype == torch.float32 and tensor.is_contiguous()
        for tensor in (A_log, D, dt_bias, state.state)
    )


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
    """See `mamba2.mamba2_scan`."""
    assert cpu_kernels.library is not None
    _, num_heads, state_size, head_dim = state.state.shape
    num_tokens = len(xbc)
    y = torch.empty(num_tokens, num_heads, head_dim)
    min_dt, max_dt = time_step_limit
    cpu_kernels.library.mamba2_scan(
        xbc.data_ptr(),
        xbc.stride(0),
        dt.data_ptr(),
        dt.stride(0),
        A_log.data_ptr(),
        D.data_ptr(),
        dt_bias.data_ptr(),
        state.state.data_ptr(),
        y.data_ptr(),
        num_tokens,
        num_heads,
        head_dim,
        state_size,
        n_groups,
        *batch.host_addresses,
        min_dt,
        max_dt,
    )
    return y


def supports_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether `gated_group_rms_norm` takes these tensors."""
    return (
        cpu_kernels.supports(x)
        and cpu_kernels.supports(gate)
        and x.is_contiguous()
        and cpu_kernels.has_compact_rows(gate)
        and (weight is None or (weight.dtype == torch.float32 and weight.is_contiguous()))
    )


def gated_group_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    num_groups: int,
    *,
    norm_before_gate: bool,
) -> torch.Tensor:
    """See `mamba2.gated_group_rms_norm`. weight: also that of one group, which all groups have."""
    assert cpu_kernels.library is not None
    rows, size = x.shape
    is_shared = weight is not None and len(weight) < size
    y = torch.empty(rows, size)
    cpu_kernels.library.gated_group_rms_norm(
        x.data_ptr(),
        gate.data_ptr(),
        gate.stride(0),
        cpu_kernels.address(weight),
        y.data_ptr(),
        rows,
        size,
        num_groups,
        0 if is_shared else size // num_groups,
        norm_before_gate,
        eps,
    )
    return y
