"""Batches for the tests of recurrent layers: a prompt in pieces, and several sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.kernels.causal_conv import causal_conv, gated_short_conv
from llmkit.kernels.causal_conv_triton import causal_conv_triton
from llmkit.kernels.mamba2 import mamba2_scan, mamba2_scan_torch
from llmkit.kernels.mamba2_triton import gated_group_rms_norm_triton, mamba2_scan_triton
from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch, RecurrentState

NUM_ROWS = 12
TOKENS = 90
# Heads, head_dim, state_size, groups: usual sizes, and such that fill no vectors or passes.
SIZES = ((4, 64, 32, 1), (6, 20, 9, 2), (3, 100, 16, 3))
# The lengths of sequences, their initial rows, and the ends and rows of their writes.
Steps = tuple[list[int], list[int], list[list[tuple[int, int]]]]
# Computes the outputs of the tokens of all sequences, and writes states.
Step = Callable[[slice, RecurrentState, RecurrentBatch], torch.Tensor]


@dataclass(frozen=True)
class StateShape:
    """What a layer keeps of a sequence."""

    width: int
    channels: int
    heads: int = 0
    state_size: int = 0
    head_dim: int = 0

    def states(self, seed: int = 0) -> RecurrentState:
        """NUM_ROWS random states."""
        draw = torch.Generator().manual_seed(seed)
        matrix = (NUM_ROWS, self.heads, self.state_size, self.head_dim)
        return RecurrentState(
            torch.randn(NUM_ROWS, self.width - 1, self.channels, generator=draw),
            torch.randn(matrix, generator=draw),
        )


def copy_of(state: RecurrentState) -> RecurrentState:
    return RecurrentState(state.conv.clone(), state.state.clone())


def assert_same(actual: torch.Tensor, expected: torch.Tensor, level: str) -> None:
    """The same bits; close in torch, whose operators depend on an element's place in its tensor."""
    if level == "torch":
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    else:
        assert torch.equal(actual, expected)


def run_in_pieces(
    step: Step, state: RecurrentState, lengths: Sequence[int], first_row: int = NO_ROW
) -> torch.Tensor:
    """Run a sequence in steps of so many tokens each, with its state in row 3 between them."""
    outputs = []
    begin = 0
    for length in lengths:
        row = 3 if begin else first_row
        batch = RecurrentBatch.build([length], [row], [[(length, 3)]])
        outputs.append(step(slice(begin, begin + length), state, batch))
        begin += length
    return torch.cat(outputs)


def ragged_steps(total: int) -> Steps:
    """A prompt with checkpoints, a decode, draft tokens and a sequence that is not kept."""
    rest = total - 6
    return (
        [rest, 1, 4, 1],
        [NO_ROW, 4, 5, NO_ROW],
        [
            [(1, 0), (rest - rest % 7, 1), (rest, 2), (rest, 9)],
            [(1, 4)],
            [(1, 5), (2, 6), (3, 7), (4, 8)],
            [],
        ],
    )


def ragged_batch(total: int) -> RecurrentBatch:
    return RecurrentBatch.build(*ragged_steps(total))


def sequences_of(batch: RecurrentBatch) -> list[tuple[slice, RecurrentBatch]]:
    """Each sequence of a batch alone, and which tokens are its own."""
    alone = []
    begin = 0
    for index, length in enumerate(batch.query_lens.tolist()):
        writes = slice(batch.write_starts[index], batch.write_starts[index + 1])
        pairs = zip(
            batch.write_ends[writes].tolist(), batch.write_rows[writes].tolist(), strict=True
        )
        own = RecurrentBatch.build([length], [int(batch.initial_rows[index])], [list(pairs)])
        alone.append((slice(begin, begin + length), own))
        begin += length
    return alone


class Conv:
    """A convolution and its inputs: 300 channels, of which some fill no vector or block."""

    def __init__(
        self,
        width: int = 4,
        *,
        bias: bool = True,
        gated: bool = False,
        num_tokens: int = TOKENS,
    ) -> None:
        draw = torch.Generator().manual_seed(width)
        channels = 300
        self.shape = StateShape(width, channels)
        self.weight = torch.randn(channels, width, generator=draw)
        self.bias = torch.randn(channels, generator=draw) if bias else None
        self.gated = gated
        columns = 3 * channels if gated else channels
        # Its rows are part of longer ones, as those of a fused projection are.
        self.x = torch.randn(num_tokens, columns + 40, generator=draw)[:, 8 : columns + 8]

    def __call__(self, tokens: slice, state: RecurrentState, batch: RecurrentBatch) -> torch.Tensor:
        x = self.x[tokens]
        if self.gated:
            return gated_short_conv(x, self.weight, self.bias, state, batch)
        return causal_conv(x, self.weight, self.bias, state, batch, silu=True)


class Scan:
    """A layer's parameters and inputs."""

    def __init__(
        self, sizes: tuple[int, int, int, int] = SIZES[0], num_tokens: int = TOKENS
    ) -> None:
        self.heads, self.head_dim, self.state_size, self.n_groups = sizes
        draw = torch.Generator().manual_seed(self.heads)
        x_size = self.heads * self.head_dim
        bc_size = self.n_groups * self.state_size
        channels = x_size + 2 * bc_size
        self.shape = StateShape(4, channels, self.heads, self.state_size, self.head_dim)
        # Rows of both are part of longer ones.
        wide = torch.randn(num_tokens, channels + 2 * self.heads + 5, generator=draw)
        self.xbc = wide[:, 2 : channels + 2]
        self.dt = wide[:, channels + 3 : channels + 3 + self.heads] * 2 - 1
        self.A_log = torch.rand(self.heads, generator=draw) * 4 - 1
        self.D = torch.randn(self.heads, generator=draw)
        self.dt_bias = torch.randn(self.heads, generator=draw)
        self.limit = (0.1, 1.5)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, B and C by heads and groups."""
        x_size = self.heads * self.head_dim
        x, B, C = self.xbc.split([x_size, *2 * [self.n_groups * self.state_size]], 1)
        return (
            x.unflatten(1, (self.heads, self.head_dim)),
            B.unflatten(1, (self.n_groups, self.state_size)),
            C.unflatten(1, (self.n_groups, self.state_size)),
        )

    def __call__(self, tokens: slice, state: RecurrentState, batch: RecurrentBatch) -> torch.Tensor:
        inputs = (self.xbc[tokens], self.dt[tokens], self.A_log, self.D, self.dt_bias)
        return mamba2_scan(*inputs, self.n_groups, self.limit, state, batch)

    def reference(
        self, tokens: slice, state: RecurrentState, batch: RecurrentBatch
    ) -> torch.Tensor:
        """Token by token."""
        inputs = (self.xbc[tokens], self.dt[tokens], self.A_log, self.D, self.dt_bias)
        return mamba2_scan_torch(*inputs, self.n_groups, self.limit, state, batch)


def run_triton(
    kernel: str,
    arguments: tuple[Any, ...],
    states: tuple[torch.Tensor, torch.Tensor],
    steps: Steps,
    in_graph: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The outputs and the states afterwards of a kernel in Triton's interpreter."""
    batch = RecurrentBatch.build(*steps)
    if in_graph:
        batch.max_query_len = max(steps[0])
    state = RecurrentState(*states)
    with torch.no_grad():
        if kernel == "mamba2_scan":
            y = mamba2_scan_triton(*arguments, state, batch)
        elif kernel == "gated_group_rms_norm":
            y = gated_group_rms_norm_triton(*arguments[:-1], norm_before_gate=arguments[-1])
        else:
            gated = kernel == "gated_short_conv"
            y = causal_conv_triton(*arguments, state, batch, silu=not gated, gated=gated)
    return y, state.conv, state.state
