"""Batches for the tests of recurrent layers: a prompt in pieces, and several sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmkit.kernels.recurrent_state import NO_ROW, RecurrentBatch, RecurrentState

NUM_ROWS = 12
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


def ragged_batch(total: int) -> RecurrentBatch:
    """A prompt with checkpoints, a decode, draft tokens and a sequence that is not kept."""
    rest = total - 6
    return RecurrentBatch.build(
        [rest, 1, 4, 1],
        [NO_ROW, 4, 5, NO_ROW],
        [
            [(1, 0), (rest - rest % 7, 1), (rest, 2), (rest, 9)],
            [(1, 4)],
            [(1, 5), (2, 6), (3, 7), (4, 8)],
            [],
        ],
    )


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
