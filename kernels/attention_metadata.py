"""Attention metadata of a step: the slots of new tokens, and the blocks that each query attends to.

It is computed on the host with numpy, once per step and sliding window; all layers with the same
window share it. Legend: S sequences, T tokens of this step over all sequences, W blocks of a block
table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from llmkit.kernels.device_copy import to_device

Int64Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
NO_WINDOW = 1 << 62  # in tokens: larger than any context


class AttentionBatch:
    """The sequences of a step: their new tokens, and the blocks of their keys and values."""

    def __init__(
        self,
        query_lens: Int64Array,
        seq_lens: Int64Array,
        block_tables: dict[int | None, BlockTable],
        block_size: int,
        device: torch.device,
    ) -> None:
        self.query_lens = query_lens  # [S]
        self.seq_lens = seq_lens  # [S]
        self.block_size = block_size
        self.device = device
        self._block_tables = block_tables  # by window
        self._metadata: dict[int | None, AttentionMetadata] = {}  # by window, made on first use

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Mapping[int | None, Sequence[Sequence[int]]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """Make a batch from plain lists. The tokens of a sequence are consecutive.

        query_lens: the number of new tokens of each sequence.
        seq_lens: the number of its tokens in the cache after this step, including the new ones.
        block_tables: for each sliding window of the model (None: the whole context), the blocks of
        each sequence. A freed block, which lies before the window, is -1. A window that is absent
        uses the tables of None.
        """
        return cls(
            np.array(query_lens, dtype=np.int64),
            np.array(seq_lens, dtype=np.int64),
            {window: BlockTable.build(rows) for window, rows in block_tables.items()},
            block_size,
            torch.device(device),
        )

    @classmethod
    def for_sequences(
        cls, lengths: list[int], block_size: int = 16, device: torch.device | str = "cpu"
    ) -> AttentionBatch:
        """A batch of complete sequences, in blocks 0, 1, 2, ...

        It is for calibration and evaluation, where nothing is cached between steps.
        """
        ends = list(accumulate(-(-length // block_size) for length in lengths))
        tables = [range(first, end) for first, end in pairwise([0, *ends])]
        return cls.build(lengths, lengths, {None: tables}, block_size, device)

    @property
    def num_blocks(self) -> int:
        """The number of blocks that a cache needs for a batch of `for_sequences`."""
        return int((-(-self.seq_lens // self.block_size)).sum())

    def metadata(self, window: int | None) -> AttentionMetadata:
        """The metadata for all layers with this sliding window."""
        if window not in self._metadata:
            block_table = self._block_tables.get(window) or self._block_tables[None]
            self._metadata[window] = AttentionMetadata(self, window, block_table)
        return self._metadata[window]


@dataclass(frozen=True)
class BlockTable:
    """The block tables of all sequences, one after the other."""

    blocks: Int64Array
    starts: Int64Array  # [S]: where each sequence's table begins in `blocks`

    @classmethod
    def build(cls, rows: Sequence[Sequence[int]]) -> BlockTable:
        """Make it from one list of blocks per sequence."""
        sizes = np.array([len(row) for row in rows], dtype=np.int64)
        blocks = np.fromiter(chain.from_iterable(rows), np.int64, int(sizes.sum()))
        return cls(blocks, sizes.cumsum() - sizes)


class DeviceMetadata(NamedTuple):
    """The metadata that a GPU kernel reads: int32 tensors on the device."""

    block_table: torch.Tensor  # [S, W or more]; -1 for a freed or missing block
    seq_lens: torch.Tensor  # [S]
    query_start_loc: torch.Tensor  # [S + 1]: the first query of each sequence, then the total
    # [number of tiles, 2]: the sequence and first query of each tile, in falling order of attended
    # tokens. None when every sequence has one query.
    tiles: torch.Tensor | None


class ReferenceSequence(NamedTuple):
    """The metadata of one sequence for the reference implementation."""

    num_queries: int
    blocks: torch.Tensor | slice  # the blocks that the queries attend to
    tokens: slice  # the tokens of these blocks up to the last query
    mask: torch.Tensor | None  # bool [queries, tokens]; None: every query attends to all tokens


class AttentionMetadata:
    """For the layers of one window: the slots of new tokens, and the tokens to attend to."""

    def __init__(self, batch: AttentionBatch, window: int | None, block_table: BlockTable) -> None:
        self.batch = batch
        self.window = window
        self.block_table = block_table
        self._device_metadata: DeviceMetadata | None = None

    @cached_property
    def slot_mapping(self) -> torch.Tensor:
        """int64 [T]: the slot of each new token, block * block_size + offset."""
        query_lens = self.batch.query_lens
        block_size = self.batch.block_size
        first_queries = query_lens.cumsum() - query_lens
        num_cached = self.batch.seq_lens - query_lens
        positions = _repeat(num_cached - first_queries, query_lens) + np.arange(query_lens.sum())
        entries = _repeat(self.block_table.starts, query_lens) + positions // block_size
        slots = self.block_table.blocks[entries] * block_size + positions % block_size
        assert slots.min() >= 0, "a new token in a block that was freed"
        return self._to_device(slots)

    @cached_property
    def host_addresses(self) -> tuple[int, int, int, int, int]:
        """For the compiled CPU kernel: the number of sequences, then the addresses of four arrays.

        They are query_lens, seq_lens, blocks and starts.
        """
        arrays = (
            self.batch.query_lens,
            self.batch.seq_lens,
            self.block_table.blocks,
            self.block_table.starts,
        )
        query_lens, seq_lens, blocks, starts = (array.ctypes.data for array in arrays)
        return len(self.batch.query_lens), query_lens, seq_lens, blocks, starts

    def device_tensors(self, tile_queries: int) -> DeviceMetadata:
        """The tensors for kernels with tiles of `tile_queries` queries.

        The first call makes them, and later calls return the same tensors. All layers pass the
        same `tile_queries`. A step with one query per sequence has no tiles.
        """
        if self._device_metadata is None:
            self._device_metadata = self._make_device_tensors(tile_queries)
        return self._device_metadata

    def _make_device_tensors(self, tile_queries: int) -> DeviceMetadata:
        query_lens = self.batch.query_lens
        seq_lens = self.batch.seq_lens
        num_sequences = len(query_lens)
        table, width = self._padded_block_table()

        tiles_per_sequence = -(-query_lens // tile_queries)
        sequence = np.repeat(np.arange(num_sequences), tiles_per_sequence)
        first_tile = np.repeat(tiles_per_sequence.cumsum() - tiles_per_sequence, tiles_per_sequence)
        first_query = (np.arange(len(sequence)) - first_tile) * tile_queries
        tiles = np.stack((sequence, first_query), 1)
        # Tiles that attend to the most tokens take the longest, so they start first.
        num_seen = (seq_lens - query_lens)[sequence] + first_query
        tiles = tiles[np.argsort(-num_seen, kind="stable")]

        # All parts go to the device in one copy. Each part is aligned to 16 bytes, because Triton
        # compiles another kernel for other alignments.
        query_start_loc = np.append(0, query_lens.cumsum())
        parts = table, seq_lens, query_start_loc, tiles.ravel()
        padded = [np.pad(part, (0, -len(part) % 4)) for part in parts]
        together = self._to_device(np.concatenate(padded, dtype=np.int32))
        on_device = together.split([len(part) for part in padded])
        return DeviceMetadata(
            on_device[0].view(-1, width),
            on_device[1][:num_sequences],
            on_device[2][: num_sequences + 1],
            None if query_lens.max() == 1 else on_device[3][: tiles.size].view(-1, 2),
        )

    def _padded_block_table(self) -> tuple[np.ndarray[Any, Any], int]:
        """The block table as a flat int32 array of rows of equal width, and that width."""
        blocks = self.block_table.blocks
        starts = self.block_table.starts
        num_sequences = len(starts)
        sizes = np.diff(starts, append=len(blocks))
        first_seen = self.batch.seq_lens - self.batch.query_lens + 1 - (self.window or NO_WINDOW)
        first_block = np.maximum(0, first_seen) // self.batch.block_size
        assert blocks[starts + first_block].min() >= 0, "a freed block within the window"
        # A multiple of 16, because Triton compiles another kernel for other widths.
        width = -(-int(sizes.max()) // 16) * 16
        table = np.full(num_sequences * width, -1, np.int32)
        row_offsets = np.repeat(np.arange(num_sequences) * width - starts, sizes)
        table[row_offsets + np.arange(len(blocks))] = blocks
        return table, width

    def update_block_tables(self, blocks: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Overwrite the blocks [S, up to W] and sequence lengths [S] in place, on the device.

        A replayed CUDA graph of a decode step reads the same tensors again.
        """
        device_metadata = self.device_tensors(1)
        device_metadata.block_table[:, : blocks.shape[1]] = blocks
        device_metadata.seq_lens.copy_(seq_lens)
        self.__dict__.pop("reference_sequences", None)

    @cached_property
    def reference_sequences(self) -> list[ReferenceSequence]:
        """The sequences, for the reference implementation."""
        block_size = self.batch.block_size
        window = self.window or NO_WINDOW
        sequences = []
        for query_len, seq_len, start in zip(
            self.batch.query_lens.tolist(),
            self.batch.seq_lens.tolist(),
            self.block_table.starts,
            strict=True,
        ):
            first_block = max(0, seq_len - query_len + 1 - window) // block_size
            last_block = -(-seq_len // block_size)
            blocks = self.block_table.blocks[start + first_block : start + last_block]
            assert blocks.min() >= 0, "a freed block within the window"
            # Consecutive blocks are read as a slice, without a copy.
            run = slice(int(blocks[0]), int(blocks[0]) + len(blocks))
            is_run = (blocks == np.arange(run.start, run.stop)).all()
            token = np.arange(first_block * block_size, seq_len)
            query = np.arange(seq_len - query_len, seq_len)[:, None]
            mask = (token <= query) & (token > query - window)
            sequences.append(
                ReferenceSequence(
                    query_len,
                    run if is_run else self._to_device(blocks),
                    slice(seq_len - first_block * block_size),
                    None if mask.all() else self._to_device(mask),
                )
            )
        return sequences

    def _to_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return to_device(torch.from_numpy(values), self.batch.device)


def _repeat(values: Int64Array, counts: Int64Array) -> Int64Array:
    """np.repeat(values, counts). No copy is made when all counts are 1, as in decode steps."""
    return values if len(counts) == counts.sum() else np.repeat(values, counts)
