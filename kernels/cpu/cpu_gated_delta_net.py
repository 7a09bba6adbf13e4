"""The gated delta rule by the compiled CPU kernel.

Legend: see `gated_delta_net`.
"""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState


def supports(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: RecurrentState,
) -> bool:
    """Whether `gated_delta_rule` takes these tensors."""
    return (
        cpu_kernels.supports(qkv)
        and qkv.stride(1) == 1
        and cpu_kernels.supports(ba)
        and ba.stride(1) == 1
        and all(x.dtype is torch.float32 and x.is_contiguous() for x in (A_log, dt_bias))
        and state.state.is_cpu
        and (state.state.shape[0] == 0 or state.state[0].is_contiguous())
    )


def gated_delta_rule(
    qkv: torch.Tensor,
    ba: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """See `gated_delta_net.gated_delta_rule`.

    The last dimensions of qkv and ba, and each row of the states, are contiguous.
    """
    assert cpu_kernels.library is not None
    num_v_heads, k_dim, v_dim = state.state.shape[1:]
    out = torch.empty(len(qkv), num_v_heads, v_dim)
    cpu_kernels.library.gated_delta_rule(
        qkv.data_ptr(),
        qkv.stride(0),
        ba.data_ptr(),
        ba.stride(0),
        A_log.data_ptr(),
        dt_bias.data_ptr(),
        out.data_ptr(),
        state.state.data_ptr(),
        state.state.stride(0),
        num_k_heads,
        num_v_heads,
        k_dim,
        v_dim,
        *batch.host_addresses,
    )
    return out
