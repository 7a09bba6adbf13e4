"""Fixed buffers for the inputs of a decode step, which every replay reads again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from llmkit.kernels.attention_metadata import AttentionBatch, BlockTable
from llmkit.runtime.engine.slot_block_tables import BlockTables, SlotBlockTables


class StaticDecodeBatch:
    """An attention batch of sequences with a few new tokens each, in buffers that never move.

    host: one int64 tensor on the CPU, of `num_extra` values for a subclass, context lengths [rows],
    positions [tokens], the slot of each row in `block_tables` [rows], for each window the KV cache
    slots of the tokens [tokens], and where each row's tokens begin [rows + 1] if rows can have
    several. device: the same on the device; on a CPU it is `host` itself. A step copies these to
    the device, and the blocks that are new.
    The tokens of a sequence follow those of the sequence before; unused tokens are the last ones.
    """

    def __init__(
        self,
        num_rows: int,
        block_tables: SlotBlockTables,
        block_size: int,
        padding_blocks: Mapping[int | None, int],
        device: torch.device | str = "cpu",
        num_extra: int = 0,
        max_query_len: int = 1,
        max_num_tokens: int | None = None,
    ) -> None:
        """block_tables: those of all slots. padding_blocks: by window, the block that unused rows
        write to. max_query_len: the most new tokens of a sequence. max_num_tokens: see
        `AttentionBatch`; None: all sequences can have as many.
        """
        self.num_rows = num_rows
        self.num_tokens = max_num_tokens or num_rows * max_query_len
        self.max_query_len = max_query_len
        self.block_tables = block_tables
        self.block_size = block_size
        self.padding_blocks = padding_blocks
        num_starts = num_rows + 1 if max_query_len > 1 else 0
        slot_mappings = (self.num_tokens,) * len(padding_blocks)
        sizes = (num_extra, num_rows, self.num_tokens, num_rows, *slot_mappings, num_starts)
        self.host = torch.zeros(sum(sizes), dtype=torch.int64)
        self.device = self.host
        if torch.device(device).type != "cpu":
            self.device = self.host.to(device)

        bounds = list(pairwise([0, *accumulate(sizes)]))
        host_parts = [self.host[start:stop].numpy() for start, stop in bounds]
        device_parts = [self.device[start:stop] for start, stop in bounds]
        self.extra, self.seq_lens, self.positions, self.slots = device_parts[:4]
        self.query_start_loc = device_parts[-1] if num_starts else None
        self.host_extra = self.host[:num_extra]
        self._host_seq_lens, self._host_positions, self._host_slots = host_parts[1:4]
        self._host_slot_mappings = host_parts[4:-1]
        self._host_query_start_loc = host_parts[-1]

        self._slots: Sequence[int] | None = None  # of the last step
        self._num_tokens = 0
        self._host_tables = [block_tables.rows(window) for window in padding_blocks]
        # Where the row of each sequence begins in the block tables of all slots.
        self._table_starts = np.full(
            num_rows, block_tables.padding_slot * block_tables.width, dtype=np.int64
        )
        table_sizes = np.full(num_rows, block_tables.width, dtype=np.int64)
        self.batch = AttentionBatch(
            np.full(num_rows, 0 if num_starts else 1, dtype=np.int64),
            self._host_seq_lens,
            {
                window: BlockTable(rows, self._table_starts, table_sizes)
                for window, rows in zip(padding_blocks, self._host_tables, strict=True)
            },
            block_size,
            torch.device(device),
            max_query_len,
            max_num_tokens,
        )
        for window, slot_mapping in zip(padding_blocks, device_parts[4:-1], strict=True):
            self.batch.metadata(window).slot_mapping = slot_mapping

    def fill(
        self,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        query_lens: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
    ) -> None:
        """Write the inputs of the next step and copy them to the device.

        query_lens: the new tokens of each sequence; None: one each. slots: the slot of each
        sequence; None: sequence i has slot i.
        """
        num_seqs = len(seq_lens)
        num_tokens = len(positions)
        slots = range(num_seqs) if slots is None else slots
        self.block_tables.update(slots, block_tables)
        if slots != self._slots or num_tokens != self._num_tokens:  # seldom
            self._slots = list(slots)
            self._num_tokens = num_tokens
            self._fill_unused(num_seqs, num_tokens)
            self._host_slots[:num_seqs] = slots
            np.multiply(self._host_slots, self.block_tables.width, out=self._table_starts)
        self._host_seq_lens[:num_seqs] = seq_lens
        self._host_positions[:num_tokens] = positions

        # The place of each token in its sequence, and where the sequence's block table begins.
        places = self._host_seq_lens[:num_seqs] - 1
        table_starts = self._table_starts[:num_seqs]
        if self.query_start_loc is not None:
            lens = self.batch.query_lens
            lens[:num_seqs] = 1 if query_lens is None else query_lens
            lens.cumsum(out=self._host_query_start_loc[1:])
            of_sequence = np.repeat(np.arange(num_seqs), lens[:num_seqs])
            ends = self._host_query_start_loc[1:][of_sequence]
            places = places[of_sequence] + 1 - ends + np.arange(num_tokens)
            table_starts = table_starts[of_sequence]
        blocks, offsets = np.divmod(places, self.block_size)
        blocks += table_starts
        for slot_mapping, rows in zip(self._host_slot_mappings, self._host_tables, strict=True):
            slot_mapping[:num_tokens] = rows[blocks] * self.block_size + offsets
        if self.device is not self.host:
            self.device.copy_(self.host.pin_memory(), non_blocking=True)

    def _fill_unused(self, num_seqs: int, num_tokens: int) -> None:
        """Write the rows and tokens after these."""
        # Where rows can have several tokens, unused ones have none.
        self._host_seq_lens[num_seqs:] = int(self.query_start_loc is None)
        self._host_slots[num_seqs:] = self.block_tables.padding_slot
        self._host_positions[num_tokens:] = 0
        if self.query_start_loc is not None:
            self.batch.query_lens[num_seqs:] = 0
        paddings = self.padding_blocks.values()
        for slot_mapping, padding in zip(self._host_slot_mappings, paddings, strict=True):
            slot_mapping[num_tokens:] = padding * self.block_size
