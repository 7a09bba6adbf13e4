"""Gated activations of an MLP."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import gelu, silu

from llmkit.kernels import elementwise, native
from llmkit.kernels.jit import runs_triton


def gated(gate_up: torch.Tensor, activation: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
    """act(gate) * up. gate_up: [T, 2 * size], gate first. Returns [T, size]."""
    if native.runs(gate_up) and gate_up.is_contiguous() and gate_up.shape[1] % 16 == 0:
        return native.gate(gate_up, activation == "gelu_tanh")
    if runs_triton(gate_up) and gate_up.is_contiguous():
        return elementwise.gate(gate_up, activation == "gelu_tanh")
    gate, up = gate_up.chunk(2, dim=-1)
    return (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")).mul_(up)
