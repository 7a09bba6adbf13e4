"""The short causal convolutions of recurrent layers: one filter a channel over the last few inputs.

The result does not depend on how a prompt was cut: the inputs before a step's first new token come
from the state's `conv` rows, and the sums have one order.

Legend: T tokens, C channels, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import silu as torch_silu

from llmkit.kernels.causal_conv_triton import causal_conv_triton
from llmkit.kernels.cpu import cpu_causal_conv
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch, RecurrentState
from llmkit.kernels.triton_support import runs_triton


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: RecurrentState,
    batch: RecurrentBatch,
    silu: bool,
) -> torch.Tensor:
    """y[t] = bias + the sum over k of weight[:, k] x[t - width + 1 + k], in float32.

    x: [T, C], the new tokens of all sequences. weight: [C, width]. bias: [C]. silu: the sum goes
    through SiLU. Reads and writes the rows of `state.conv` that `batch` names. Returns x's shape
    and dtype.
    """
    if cpu_causal_conv.supports(x, weight, bias, state):
        return cpu_causal_conv.causal_conv(x, weight, bias, state, batch, silu=silu, gated=False)
    if runs_triton(x) and x.stride(1) == 1:
        return causal_conv_triton(x, weight, bias, state, batch, silu=silu, gated=False)
    return causal_conv_torch(x, weight, bias, state, batch, silu)


def gated_short_conv(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """c * conv(b * x), LFM2's mixer; conv: `causal_conv` without SiLU.

    bcx: [T, 3C]: b, c, then x. The state holds the products b * x. Returns [T, C].
    """
    if cpu_causal_conv.supports(bcx, weight, bias, state):
        return cpu_causal_conv.causal_conv(bcx, weight, bias, state, batch, silu=False, gated=True)
    if runs_triton(bcx) and bcx.stride(1) == 1:
        return causal_conv_triton(bcx, weight, bias, state, batch, silu=False, gated=True)
    return gated_short_conv_torch(bcx, weight, bias, state, batch)


def causal_conv_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: RecurrentState,
    batch: RecurrentBatch,
    silu: bool,
) -> torch.Tensor:
    """`causal_conv` in torch operations. Gradients pass through it to x, weight and bias."""
    parts = []
    wide_weight = weight.float()
    width = weight.shape[1]
    for sequence, new_inputs in enumerate(x.split(batch.query_lens.tolist())):
        inputs = torch.cat((_initial_inputs(state, batch, sequence, width, x), new_inputs))
        for end, row in sequence_writes(batch, sequence):
            state.conv[row] = inputs[end : end + width - 1].detach()
        wide = inputs.float()
        length = len(new_inputs)
        y = wide[:length] * wide_weight[:, 0]
        for k in range(1, width):
            y = y + wide[k : k + length] * wide_weight[:, k]
        parts.append(y)
    y = torch.cat(parts)
    if bias is not None:
        y = y + bias.float()
    return (torch_silu(y) if silu else y).to(x.dtype)


def gated_short_conv_torch(
    bcx: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: RecurrentState,
    batch: RecurrentBatch,
) -> torch.Tensor:
    """`gated_short_conv` in torch operations. Gradients pass through it."""
    b, c, x = bcx.chunk(3, dim=1)
    return c * causal_conv_torch(b * x, weight, bias, state, batch, silu=False)


def _initial_inputs(
    state: RecurrentState, batch: RecurrentBatch, sequence: int, width: int, x: torch.Tensor
) -> torch.Tensor:
    """The inputs before a sequence's first new token, [width - 1, C]."""
    row = int(batch.initial_rows[sequence])
    if row == NO_ROW:
        return x.new_zeros(width - 1, x.shape[1])
    return state.conv[row].to(x.dtype)


def sequence_writes(batch: RecurrentBatch, sequence: int) -> Iterator[tuple[int, int]]:
    """The writes of a sequence: (after so many of its new tokens, to this row)."""
    for write in range(int(batch.write_starts[sequence]), int(batch.write_starts[sequence + 1])):
        yield int(batch.write_ends[write]), int(batch.write_rows[write])
