"""Runs the Triton kernels of gated delta nets on plain tensors, for the interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from llmkit.kernels import gated_delta_net, gated_delta_net_triton, mamba2_triton
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState

# The lengths of sequences, their initial rows, and the ends and rows of their writes.
Steps = tuple[list[int], list[int], list[list[tuple[int, int]]]]
# qkv, ba, A_log, dt_bias, the number of key heads
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]


def run_delta_rule(
    function: str, inputs: Inputs, states: torch.Tensor, steps: Steps, in_graph: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs, and the states [R, Hv, K, V] afterwards."""
    rules = {
        "triton": partial(gated_delta_net_triton.gated_delta_rule_triton, in_chunks=True),
        "reference": gated_delta_net.gated_delta_rule_reference,
    }
    batch = RecurrentBatch.build(*steps)
    if in_graph:
        batch.max_query_len = max(steps[0])
    state = RecurrentState(torch.empty(0), states.clone())
    with torch.inference_mode():
        return rules[function](*inputs, state, batch), state.state


def run_gated_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`gated_rms_norm` of x [T, N, D]."""
    y = mamba2_triton.gated_group_rms_norm_triton(
        x.flatten(1), z.flatten(1), weight, eps, x.shape[1], norm_before_gate=True
    )
    return y.view_as(x)


def run_case(
    delta_rule: tuple[Any, ...] | None, gated_norm: tuple[Any, ...] | None
) -> tuple[torch.Tensor, ...]:
    """What one of the functions returns for its arguments: one process runs all cases."""
    if delta_rule is not None:
        return run_delta_rule("triton", *delta_rule)
    assert gated_norm is not None
    return (run_gated_norm(*gated_norm),)
