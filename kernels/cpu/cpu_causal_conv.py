"""The short convolutions of recurrent layers by the compiled CPU kernel.

Legend: T tokens, C channels.
"""

from __future__ import annotations

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState

MAX_WIDTH = 8  # MAX_CONV_WIDTH in cpu_kernels.h


def supports(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: RecurrentState
) -> bool:
    """Whether `causal_conv` takes these tensors."""
    return (
        cpu_kernels.supports(x)
        and cpu_kernels.has_compact_rows(x)
        and weight.shape[1] <= MAX_WIDTH
        and all(
            tensor.dtype == torch.float32 and tensor.is_contiguous()
            for tensor in (weight, bias, state.conv)
            if tensor is not None
        )
    )


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: RecurrentState,
    batch: RecurrentBatch,
    *,
    silu: bool,
    gated: bool,
) -> torch.Tensor:
    """See `causal_conv.causal_conv`; gated: see `causal_conv.gated_short_conv`."""
    assert cpu_kernels.library is not None
    num_channels, width = weight.shape
    y = torch.empty(len(x), num_channels)
    cpu_kernels.library.causal_conv(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        cpu_kernels.address(bias),
        state.conv.data_ptr(),
        y.data_ptr(),
        len(x),
        num_channels,
        width,
        silu,
        gated,
        *batch.host_addresses,
    )
    return y
