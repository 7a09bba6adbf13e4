"""The states of recurrent layers: one of fixed size for each sequence, beside the KV cache.

A layer such as a gated delta net, Mamba 2 or a short convolution keeps a state of fixed size of
each sequence's past. The states of a layer are rows of its tensors. Each running sequence has a
row; other rows hold the states at the ends of cached prefixes. A step reads the state of each
sequence from one row and writes it to others: after its last new token and, where a prefix shall
be kept or draft tokens may be rejected, after earlier ones. So states are never copied on their
own.

Legend: S sequences of a step, R rows, W writes of a step.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from llmkit.kernels.device_copy import to_device

Int64Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
NO_ROW = -1  # as an initial row: the sequence begins with a state of zeros
CHUNK_TOKENS = 64  # of a prompt that GPU kernels compute together, by products of matrices
MAX_TOKENS_ONE_BY_ONE = 16  # GPU kernels compute longer sequences in chunks


@dataclass(frozen=True)
class RecurrentState:
    """The states of one layer.

    conv: [R, width - 1, channels]: the last inputs of the convolution, the oldest first.
    state: float32 [R, heads, K, V]: for each head a matrix from keys to values (in Mamba 2, from
    the state's dimensions to the head's). [R, 0, 0, 0] where the layer is only a convolution.
    """

    conv: torch.Tensor
    state: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the states, [R, ...]."""
        return self.conv, self.state

    def clear(self, rows: Sequence[int]) -> None:
        """Set rows to zero that may hold NaN."""
        self.conv[list(rows)] = 0
        self.state[list(rows)] = 0


class DeviceRows(NamedTuple):
    """A `RecurrentBatch` as a GPU kernel reads it: integers on the device.

    They are int32, and int64 where a CUDA graph reads them again after they have changed.
    """

    query_start_loc: torch.Tensor  # [S + 1]: the first token of each sequence, then the total
    initial_rows: torch.Tensor  # [S]
    write_starts: torch.Tensor  # [S + 1]: the first write of each sequence, then the total
    write_ends: torch.Tensor  # [W]
    write_rows: torch.Tensor  # [W]


class DeviceChunks(NamedTuple):
    """The long sequences of a step, cut into segments and chunks: int32 tensors on the device.

    A segment ends before writes or at the end of its sequence. It is cut into chunks of
    CHUNK_TOKENS tokens; its last chunk may have fewer.
    """

    sequences: torch.Tensor  # [L]: which sequences are long
    segment_starts: torch.Tensor  # [L + 1]: the first segment of each, then the total
    first_writes: torch.Tensor  # [G]: the first of the writes after a segment
    num_writes: torch.Tensor  # [G]
    chunk_starts: torch.Tensor  # [G + 1]: the first chunk of each segment, then the total
    first_tokens: torch.Tensor  # [C]
    num_tokens: torch.Tensor  # [C]


@dataclass(eq=False)
class RecurrentBatch:
    """The rows that a step reads and writes. The arrays may change in place between steps.

    query_lens: [S], the new tokens of each sequence.
    initial_rows: [S], the row with the state before a sequence's first new token; NO_ROW: zeros.
    write_starts: [S + 1], the first write of each sequence, then their number.
    write_ends: [W]: the state is written after so many of the sequence's new tokens, at least one.
    They grow within a sequence. write_rows: [W], the row that it is written to.
    max_query_len: for a batch that a CUDA graph reads again after its arrays have changed, the most
    new tokens of a sequence. Every token has a write then, and unused sequences have no tokens, or
    one token of a padding row.
    A sequence may write to its initial row. No row is written by one sequence and read or written
    by another in the same step.
    """

    query_lens: Int64Array
    initial_rows: Int64Array
    write_starts: Int64Array
    write_ends: Int64Array
    write_rows: Int64Array
    device: torch.device
    max_query_len: int | None = None

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int] | Int64Array,
        initial_rows: Sequence[int],
        writes: Sequence[Sequence[tuple[int, int]]],
        device: torch.device | str = "cpu",
    ) -> RecurrentBatch:
        """Make a batch from plain lists. writes: for each sequence pairs of (end, row)."""
        counts = [len(of_sequence) for of_sequence in writes]
        pairs = [pair for of_sequence in writes for pair in of_sequence]
        return cls(
            np.asarray(query_lens, np.int64),
            np.array(initial_rows, np.int64),
            np.cumsum([0, *counts], dtype=np.int64),
            np.array([end for end, _ in pairs], np.int64),
            np.array([row for _, row in pairs], np.int64),
            torch.device(device),
        )

    @classmethod
    def fresh(cls, query_lens: Int64Array, device: torch.device) -> RecurrentBatch:
        """Whole sequences whose states are not kept, for calibration and evaluation."""
        return cls.build(query_lens, [NO_ROW] * len(query_lens), [()] * len(query_lens), device)

    @cached_property
    def host_addresses(self) -> tuple[int, int, int, int, int, int]:
        """For the compiled CPU kernels: S, then the addresses of the five arrays."""
        arrays = (
            self.query_lens,
            self.initial_rows,
            self.write_starts,
            self.write_ends,
            self.write_rows,
        )
        lens, initial, starts, ends, rows = (array.ctypes.data for array in arrays)
        return len(self.query_lens), lens, initial, starts, ends, rows

    @cached_property
    def device_rows(self) -> DeviceRows:
        """The tensors for GPU kernels. All layers of a step share them."""
        query_start_loc = np.concatenate(([0], self.query_lens.cumsum()))
        arrays = (
            query_start_loc,
            self.initial_rows,
            self.write_starts,
            self.write_ends,
            self.write_rows,
        )
        return DeviceRows(
            *(to_device(torch.from_numpy(array.astype(np.int32)), self.device) for array in arrays)
        )

    @cached_property
    def device_chunks(self) -> DeviceChunks | None:
        """The chunks of sequences longer than MAX_TOKENS_ONE_BY_ONE; None if there are none.

        A CUDA graph has none: it computes all tokens one by one.
        """
        if self.longest_query <= MAX_TOKENS_ONE_BY_ONE or self.max_query_len is not None:
            return None
        sequences = np.flatnonzero(self.query_lens > MAX_TOKENS_ONE_BY_ONE)
        segment_starts = [0]
        writes: list[tuple[int, int]] = []
        chunk_starts = [0]
        chunks: list[tuple[int, int]] = []
        starts = self.query_lens.cumsum() - self.query_lens
        for sequence in sequences.tolist():
            start = int(starts[sequence])
            first_write, end_write = self.write_starts[sequence : sequence + 2].tolist()
            ends = self.write_ends[first_write:end_write].tolist()
            begin = 0
            for end in sorted({*ends, int(self.query_lens[sequence])}):
                before = bisect_left(ends, end)
                writes.append((first_write + before, bisect_right(ends, end) - before))
                chunks += [
                    (start + first_token, min(CHUNK_TOKENS, end - first_token))
                    for first_token in range(begin, end, CHUNK_TOKENS)
                ]
                chunk_starts.append(len(chunks))
                begin = end
            segment_starts.append(len(writes))
        columns = (sequences, segment_starts, *zip(*writes, strict=True), chunk_starts)
        arrays = (*columns, *zip(*chunks, strict=True))
        return DeviceChunks(
            *(to_device(torch.tensor(array, dtype=torch.int32), self.device) for array in arrays)
        )

    @property
    def longest_query(self) -> int:
        """The most new tokens that a sequence has or, in a CUDA graph, can have."""
        return self.max_query_len or int(self.query_lens.max())

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one new token."""
        return len(self.query_lens) == int(self.query_lens.sum()) and bool(
            (self.query_lens == 1).all()
        )
