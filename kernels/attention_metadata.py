"""Attention metadata of a step: the slots of new tokens, and the blocks that each query attends to.

It is computed on the host with numpy, once per step and sliding window; all layers with the same
window share it. Legend: S sequences, T tokens of this step over all sequences, W blocks of a block
table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from llmkit.kernels.device_copy import to_device
from llmkit.kernels.recurrent_state import RecurrentBatch

Int64Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Schedule = tuple[torch.Tensor, ...]  # what a kernel made from the metadata, on the device
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
        max_query_len: int | None = None,
        max_num_tokens: int | None = None,
        recurrent: RecurrentBatch | None = None,
    ) -> None:
        """max_query_len: for a batch that a CUDA graph reads again after its arrays have changed,
        the most new tokens of a sequence; None: those of `query_lens`. max_num_tokens: where
        prompts are beside decodes in such a graph, the most new tokens of all sequences. The last
        sequence has none then. recurrent: the rows of recurrent states that the step reads and
        writes; None: those of whole sequences, whose states are not kept.
        """
        self.query_lens = query_lens  # [S]
        self.seq_lens = seq_lens  # [S]
        self.block_size = block_size
        self.device = device
        self._max_query_len = max_query_len
        self.max_num_tokens = max_num_tokens
        self._block_tables = block_tables  # by window
        self._metadata: dict[int | None, AttentionMetadata] = {}  # by window, made on first use
        self._recurrent = recurrent
        self._split: dict[int, SplitBatch | None] = {}  # by the least number of queries

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Mapping[int | None, Sequence[Sequence[int]]],
        block_size: int,
        device: torch.device | str = "cpu",
        recurrent: RecurrentBatch | None = None,
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
            recurrent=recurrent,
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
    def recurrent(self) -> RecurrentBatch:
        """The rows of recurrent states that the step reads and writes."""
        if self._recurrent is None:
            self._recurrent = RecurrentBatch.fresh(self.query_lens, self.device)
        return self._recurrent

    @property
    def max_query_len(self) -> int:
        """The most new tokens that a sequence has or, in a CUDA graph, can have."""
        return self._max_query_len or int(self.query_lens.max())

    @property
    def is_fixed(self) -> bool:
        """Whether a CUDA graph reads this batch again after its arrays have changed."""
        return self._max_query_len is not None

    @property
    def query_lens_of_tiles(self) -> Int64Array:
        """[S]: for how many new tokens of each sequence there are tiles."""
        if self._max_query_len is None:
            return self.query_lens
        return np.full_like(self.query_lens, self._max_query_len)

    @property
    def num_blocks(self) -> int:
        """The number of blocks that a cache needs for a batch of `for_sequences`."""
        return int((-(-self.seq_lens // self.block_size)).sum())

    def split_prompts(self, min_queries: int) -> SplitBatch | None:
        """The sequences with at least so many new tokens, and the others.

        None where no sequence has as many, and in a batch that a CUDA graph reads again. All layers
        get the same result.
        """
        if min_queries not in self._split:
            self._split[min_queries] = self._make_split(min_queries)
        return self._split[min_queries]

    def _make_split(self, min_queries: int) -> SplitBatch | None:
        is_prompt = self.query_lens >= min_queries
        if self.is_fixed or not is_prompt.any():
            return None
        table = self._block_tables[None]
        ends = self.query_lens.cumsum()
        prompts = []
        for index in is_prompt.nonzero()[0]:
            num_queries, num_tokens = int(self.query_lens[index]), int(self.seq_lens[index])
            num_blocks = -(-num_tokens // self.block_size)
            start = table.starts[index]
            blocks = to_device(
                torch.from_numpy(table.blocks[start : start + num_blocks].copy()), self.device
            )
            copied = AttentionBatch.build(
                [num_queries],
                [num_tokens],
                {None: [range(num_blocks)]},
                self.block_size,
                self.device,
            )
            end = int(ends[index])
            prompts.append(Prompt(slice(end - num_queries, end), blocks, copied))
        others = (~is_prompt).nonzero()[0]
        if not len(others):
            return SplitBatch(prompts, None, None)
        rows = np.concatenate([np.arange(ends[i] - self.query_lens[i], ends[i]) for i in others])
        batch = AttentionBatch(
            self.query_lens[others],
            self.seq_lens[others],
            {None: BlockTable(table.blocks, table.starts[others], table.sizes[others])},
            self.block_size,
            self.device,
        )
        return SplitBatch(prompts, batch, to_device(torch.from_numpy(rows), self.device))

    def metadata(self, window: int | None) -> AttentionMetadata:
        """The metadata for all layers with this sliding window."""
        if window not in self._metadata:
            block_table = self._block_tables.get(window) or self._block_tables[None]
            self._metadata[window] = AttentionMetadata(self, window, block_table)
        return self._metadata[window]


class Prompt(NamedTuple):
    """A sequence with many new tokens, on its own."""

    rows: slice  # its new tokens among those of the step
    blocks: torch.Tensor  # int64, of its tokens, on the device
    batch: AttentionBatch  # of this sequence, for a cache into which these blocks were copied


class SplitBatch(NamedTuple):
    """The sequences of a step in two parts."""

    prompts: list[Prompt]
    others: AttentionBatch | None  # None: there are none
    other_rows: torch.Tensor | None  # int64: the new tokens of the others among those of the step


@dataclass(frozen=True)
class BlockTable:
    """The block tables of all sequences, one after the other."""

    blocks: Int64Array
    starts: Int64Array  # [S]: where each sequence's table begins in `blocks`
    sizes: Int64Array  # [S]: the blocks of each sequence's table

    @classmethod
    def build(cls, rows: Sequence[Sequence[int]]) -> BlockTable:
        """Make it from one list of blocks per sequence."""
        sizes = np.array([len(row) for row in rows], dtype=np.int64)
        blocks = np.fromiter(chain.from_iterable(rows), np.int64, int(sizes.sum()))
        return cls(blocks, sizes.cumsum() - sizes, sizes)


class DeviceMetadata(NamedTuple):
    """The metadata that a GPU kernel reads: int32 tensors on the device."""

    # [S, W or more]; 0 for a freed or missing block, so that tiles can be read whole and masked. An
    # engine's block 0 is always zero.
    block_table: torch.Tensor
    seq_lens: torch.Tensor  # [S]
    query_start_loc: torch.Tensor  # [S + 1]: the first query of each sequence, then the total


class QueryTiles(NamedTuple):
    """The tiles of one launch of an attention kernel. A tile has consecutive queries."""

    tile_queries: int  # the queries of a tile; the last one of a sequence may have fewer
    # int32 [number of tiles, 2] on the device: the sequence and first query of each tile, in
    # falling order of attended tokens. None: one tile per sequence, which begins at its first query
    tiles: torch.Tensor | None
    num_tiles: int
    max_tokens: int  # the most tokens that a tile attends to
    # That all tiles attend to; None where lengths may change, because a CUDA graph reads them again
    # or because they are those of decodes.
    total_tokens: int | None


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
        self._query_tiles: dict[tuple[int, int], tuple[QueryTiles, ...]] = {}
        self._schedules: dict[object, Schedule] = {}
        self._zero: torch.Tensor | None = None

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

    def device_tensors(self) -> DeviceMetadata:
        """The tensors for kernels. The first call makes them, later calls return the same ones."""
        if self._device_metadata is None:
            self._device_metadata = self._make_device_tensors()
        return self._device_metadata

    def set_device_tensors(self, tensors: DeviceMetadata) -> None:
        """Have kernels read these tensors, which `update_block_tables` overwrites."""
        self._device_metadata = tensors

    def query_tiles(self, short_queries: int, long_queries: int) -> tuple[QueryTiles, ...]:
        """The tiles of a step, for one or two launches.

        A sequence of up to `short_queries` new tokens (a decode) is one tile of that size. Others
        (prompts) are cut into tiles of `long_queries`, so that a decode beside a prompt does not
        take a tile of mostly unused rows. All layers with the same sizes get the same tensors.
        """
        key = (short_queries, long_queries)
        if key not in self._query_tiles:
            self._query_tiles[key] = self._make_query_tiles(*key)
        return self._query_tiles[key]

    def _make_tiles_on_device(
        self, short_queries: int, long_queries: int, max_num_tokens: int
    ) -> tuple[QueryTiles, ...]:
        """`query_tiles` of a CUDA graph with prompts beside decodes, from data on the device.

        There are as many tiles as a step can need. Unused ones are of the last sequence, which has
        no tokens.
        """
        tensors = self.device_tensors()
        lens = tensors.query_start_loc.diff()
        last = len(lens) - 1
        width = tensors.block_table.shape[1] * self.batch.block_size
        window = self.window or NO_WINDOW
        is_short = lens <= (short_queries if short_queries < long_queries else 0)
        num_tiles = ((lens + (long_queries - 1)) // long_queries).masked_fill(is_short, 0)
        ends = num_tiles.cumsum(0)
        most_long = min(last, max_num_tokens // (short_queries + 1))
        if short_queries == long_queries:
            most_long = last
        tile = torch.arange(max_num_tokens // long_queries + most_long, device=lens.device)
        sequence = torch.searchsorted(ends, tile, right=True).clamp_max(last)
        first_query = (tile - (ends - num_tiles)[sequence]) * long_queries
        first_query = first_query.masked_fill(sequence == last, 0)
        tiles = [(long_queries, sequence, first_query)]
        if short_queries < long_queries:
            row = torch.arange(last + 1, device=lens.device)
            tiles.append((short_queries, row.masked_fill(~is_short, last), torch.zeros_like(row)))
        return tuple(
            QueryTiles(
                tile_queries,
                torch.stack((sequence, first_query), 1).int(),
                len(sequence),
                min(width, window + tile_queries - 1),
                None,
            )
            for tile_queries, sequence, first_query in tiles
        )

    def _make_query_tiles(self, short_queries: int, long_queries: int) -> tuple[QueryTiles, ...]:
        if self.batch.max_num_tokens is not None:
            return self._make_tiles_on_device(
                short_queries, long_queries, self.batch.max_num_tokens
            )
        query_lens = self.batch.query_lens_of_tiles
        width = self.device_tensors().block_table.shape[1] * self.batch.block_size
        window = self.window or NO_WINDOW
        num_sequences = len(query_lens)
        if self.batch.max_query_len <= short_queries:
            # Contexts grow without new tensors: a graph is launched again with other lengths.
            most = min(width, window + short_queries - 1)
            return (QueryTiles(short_queries, None, num_sequences, most, None),)
        is_short = (query_lens <= short_queries) & (short_queries < long_queries)
        launches = []
        for tile_queries, chosen in ((long_queries, ~is_short), (short_queries, is_short)):
            lens = np.where(chosen, query_lens, 0)
            num_tiles = -(-lens // tile_queries)
            if not num_tiles.any():
                continue
            sequence = np.repeat(np.arange(num_sequences), num_tiles)
            first_tile = np.repeat(num_tiles.cumsum() - num_tiles, num_tiles)
            first_query = (np.arange(len(sequence)) - first_tile) * tile_queries
            end = np.minimum(first_query + tile_queries, query_lens[sequence])
            attended = (self.batch.seq_lens - query_lens)[sequence] + end
            # Tiles that attend to the most tokens take the longest, so they start first.
            order = np.argsort(-attended, kind="stable")
            tiles = np.stack((sequence, first_query), 1)[order].astype(np.int32)
            attended = np.minimum(attended, window + tile_queries - 1)
            is_fixed = self.batch.is_fixed
            most = min(width, window + tile_queries - 1) if is_fixed else int(attended.max())
            total = None if is_fixed else int(attended.sum())
            on_device = self._to_device(tiles)
            launches.append(QueryTiles(tile_queries, on_device, len(tiles), most, total))
        return tuple(launches)

    def schedule(self, key: object, make: Callable[[], Schedule]) -> Schedule:
        """What `make` returns for this step. All layers with the same `key` share it."""
        if key not in self._schedules:
            self._schedules[key] = make()
        return self._schedules[key]

    def _make_device_tensors(self) -> DeviceMetadata:
        num_sequences = len(self.batch.seq_lens)
        # A multiple of 16, because Triton compiles another kernel for other widths.
        width = -(-int(self.block_table.sizes.max()) // 16) * 16
        # All parts go to the device in one copy: block table, sequence lengths, query_start_loc.
        # Each is aligned to 16 bytes, because Triton compiles another kernel for other alignments.
        sizes = (num_sequences * width, num_sequences, num_sequences + 1)
        bounds = [0, *accumulate(-(-size // 4) * 4 for size in sizes)]
        host = np.zeros(bounds[-1], np.int32)
        table, seq_lens, query_start_loc = (
            host[start : start + size] for start, size in zip(bounds, sizes, strict=False)
        )
        self._write_block_table(table, width)
        seq_lens[:] = self.batch.seq_lens
        self.batch.query_lens.cumsum(out=query_start_loc[1:])
        device = self._to_device(host)
        parts = [device[start : start + size] for start, size in zip(bounds, sizes, strict=False)]
        return DeviceMetadata(parts[0].view(-1, width), parts[1], parts[2])

    def _write_block_table(self, table: np.ndarray[Any, Any], width: int) -> None:
        """Write the block table to zeros, int32 [S * width]."""
        blocks = self.block_table.blocks
        starts = self.block_table.starts
        sizes = self.block_table.sizes
        first_seen = self.batch.seq_lens - self.batch.query_lens + 1 - (self.window or NO_WINDOW)
        first_block = np.maximum(0, first_seen) // self.batch.block_size
        assert blocks[starts + first_block].min() >= 0, "a freed block within the window"
        # The entries of all rows, one after the other: their places in a row, then in the arrays.
        columns = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        entries = np.repeat(starts, sizes) + columns
        rows = np.repeat(np.arange(len(starts)) * width, sizes)
        table[rows + columns] = np.maximum(blocks[entries], 0)

    def update_block_tables(
        self,
        blocks: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Overwrite the blocks [S, up to W] and sequence lengths [S] in place, on the device.

        A replayed CUDA graph reads the same tensors again. query_start_loc: [S + 1], where the new
        tokens of each sequence begin; None: each sequence has one. slots: int64 [S], the row of
        each sequence in `blocks`, int32 [slots, W] without freed blocks; None: row i is sequence i.
        """
        device_metadata = self.device_tensors()
        self._schedules.clear()
        if self.batch.max_num_tokens is not None:
            self._query_tiles.clear()
        # Freed blocks are -1 on the host. `clamp` would not convert int64 to int32 in one kernel.
        table = device_metadata.block_table[:, : blocks.shape[1]]
        if slots is not None:
            torch.index_select(blocks, 0, slots, out=table)
        else:
            if self._zero is None:
                self._zero = blocks.new_zeros(())
            torch.maximum(blocks, self._zero, out=table)
        device_metadata.seq_lens.copy_(seq_lens)
        if query_start_loc is not None:
            device_metadata.query_start_loc.copy_(query_start_loc)
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
            if not query_len:  # an unused row of a CUDA graph
                continue
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
