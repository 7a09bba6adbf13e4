"""Fixed buffers for the inputs of a decode step, which every replay reads again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from llmkit.kernels.attention_metadata import AttentionBatch, BlockTable

# By attention window, the block table of each sequence; -1 where a block was freed.
BlockTables = Mapping[int | None, Sequence[Sequence[int]]]


class StaticDecodeBatch:
    """An attention batch of sequences with one new token each, in buffers that never move.

    host: one int64 tensor on the CPU, of context lengths [rows], positions [rows], for each window
    slots [rows] and block tables [rows, width], and `num_extra` values for a subclass. device: the
    same on the device; on a CPU it is `host` itself. A step has one copy to the device.
    """

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        block_size: int,
        padding_blocks: Mapping[int | None, int],
        device: torch.device | str = "cpu",
        num_extra: int = 0,
    ) -> None:
        """max_blocks: blocks of the longest request. padding_blocks: by window, the block that
        unused rows write to.
        """
        self.num_rows = num_rows
        self.max_blocks = max_blocks
        self.block_size = block_size
        self.padding_blocks = padding_blocks
        num_values = num_rows * (2 + len(padding_blocks) * (1 + max_blocks)) + num_extra
        self.host = torch.zeros(num_values, dtype=torch.int64)
        self.device = self.host
        if torch.device(device).type != "cpu":
            self.device = self.host.to(device)

        # The parts: context lengths, positions, for each window slots and block tables, and extra.
        per_window = (num_rows, num_rows * max_blocks)
        sizes = (num_rows, num_rows, *per_window * len(padding_blocks), num_extra)
        bounds = list(pairwise([0, *accumulate(sizes)]))
        self._host_parts = [self.host[start:stop].numpy() for start, stop in bounds]
        device_parts = [self.device[start:stop] for start, stop in bounds]
        self.seq_lens = device_parts[0]
        self.positions = device_parts[1]
        self.extra = device_parts[-1]
        self.host_extra = self.host[len(self.host) - num_extra :]

        table_starts = np.arange(num_rows, dtype=np.int64) * max_blocks
        self.block_tables: dict[int | None, torch.Tensor] = {}
        host_tables: dict[int | None, BlockTable] = {}
        for index, window in enumerate(padding_blocks):
            part = 3 + 2 * index
            self.block_tables[window] = device_parts[part].view(num_rows, max_blocks)
            host_tables[window] = BlockTable(self._host_parts[part], table_starts)
        self.batch = AttentionBatch(
            np.ones(num_rows, dtype=np.int64),
            self._host_parts[0],
            host_tables,
            block_size,
            torch.device(device),
        )
        for index, window in enumerate(padding_blocks):
            self.batch.metadata(window).slot_mapping = device_parts[2 + 2 * index]

    def fill(
        self, positions: Sequence[int], seq_lens: Sequence[int], block_tables: BlockTables
    ) -> None:
        """Write the inputs of the next step and copy them to the device."""
        size = self.block_size
        width = self.max_blocks
        num_unused = self.num_rows - len(seq_lens)
        self._host_parts[0][:] = [*seq_lens, *[1] * num_unused]
        self._host_parts[1][:] = [*positions, *[0] * num_unused]
        for index, (window, padding) in enumerate(self.padding_blocks.items()):
            slots = []
            blocks = self._host_parts[3 + 2 * index]
            tables = zip(block_tables[window], seq_lens, strict=True)
            for row, (table, context_len) in enumerate(tables):
                blocks[row * width : row * width + len(table)] = table
                last = context_len - 1
                slots.append(table[last // size] * size + last % size)
            blocks[len(seq_lens) * width :: width] = padding
            self._host_parts[2 + 2 * index][:] = [*slots, *[padding * size] * num_unused]
        if self.device is not self.host:
            self.device.copy_(self.host.pin_memory(), non_blocking=True)
