"""The block tables of the running sequences, by slot, on the host and on the device.

A sequence keeps its slot while it runs, and its block table grows by a block every few tokens. So a
step writes only the blocks that are new, and the first one a whole row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from llmkit.kernels.attention_metadata import Int64Array
from llmkit.kernels.device_copy import to_device

# By attention window, the block table of each sequence; -1 where a block was freed.
BlockTables = Mapping[int | None, Sequence[Sequence[int]]]

ROW_MULTIPLE = 16  # of the blocks of a row: Triton compiles another kernel for other widths


class SlotBlockTables:
    """For each attention window a table with a row for each slot, and a last row for padding.

    host: int64 [windows, slots + 1, width]; -1 where a block was freed. device: the same in int32,
    with the null block where a block was freed, so that tiles can be read whole and masked.
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        padding_blocks: Mapping[int | None, int],
        device: torch.device | str | None = None,
    ) -> None:
        """max_blocks: blocks of the longest request. padding_blocks: by window, the block that
        unused rows of a step write to. device: None for a table on the host alone.
        """
        self.padding_slot = num_slots
        self.width = -(-max_blocks // ROW_MULTIPLE) * ROW_MULTIPLE
        self._index_of_window = {window: index for index, window in enumerate(padding_blocks)}
        shape = (len(padding_blocks), num_slots + 1, self.width)
        self.host: Int64Array = np.zeros(shape, np.int64)
        self.host[:, num_slots, 0] = list(padding_blocks.values())
        self.device: torch.Tensor | None = None
        if device is not None:
            self.device = torch.from_numpy(self.host.astype(np.int32)).to(device)
            # The rows of the sequences of a step, in its order. All graphs read this one, because
            # each writes its rows first and no two run at the same time.
            self._input_block_tables = torch.zeros_like(self.device)
        # Of each window and slot: the block table whose entries the row has, how many of them, and
        # how many of its first blocks are known to be freed.
        num_rows = num_slots + 1
        empty: list[int] = []
        self._tables: list[list[Sequence[int]]] = [[empty] * num_rows for _ in padding_blocks]
        self._num_blocks = [[0] * num_rows for _ in padding_blocks]
        self._num_freed = [[0] * num_rows for _ in padding_blocks]
        # Entries of `host` that the device does not have yet, as ranges of the flat table.
        self._unsent: list[tuple[int, int]] = []

    def rows(self, window: int | None) -> Int64Array:
        """The table of a window on the host, flat: slot s has the entries from s * width."""
        table: Int64Array = self.host[self._index_of_window[window]].reshape(-1)
        return table

    def device_table(self, window: int | None) -> torch.Tensor:
        """The table of a window on the device, int32 [slots + 1, width]."""
        assert self.device is not None
        return self.device[self._index_of_window[window]]

    def input_block_table(self, window: int | None) -> torch.Tensor:
        """The table of a window that graphs read, int32 [slots + 1, width] on the device."""
        assert self.device is not None
        return self._input_block_tables[self._index_of_window[window]]

    def update(self, slots: Sequence[int], block_tables: BlockTables) -> None:
        """Write what has changed in the block tables of the sequences in these slots.

        A table grows at its end and is freed from its beginning. A slot that another sequence has
        got has another table, so that its row is written again.
        """
        for window, index in self._index_of_window.items():
            tables = self._tables[index]
            num_blocks = self._num_blocks[index]
            for slot, table in zip(slots, block_tables[window], strict=True):
                if table is not tables[slot]:
                    tables[slot] = table
                    num_blocks[slot] = 0
                    self._num_freed[index][slot] = 0
                if len(table) > num_blocks[slot]:
                    self._write(index, slot, num_blocks[slot], table)
                    num_blocks[slot] = len(table)
            if window is not None:
                self._free(index, slots)
        if self._unsent:
            self._send()

    def _free(self, index: int, slots: Sequence[int]) -> None:
        """Write the entries that became -1 since the last step."""
        num_freed = self._num_freed[index]
        for slot in slots:
            table = self._tables[index][slot]
            first = num_freed[slot]
            last = first
            while last < len(table) and table[last] < 0:
                last += 1
            if last > first:
                num_freed[slot] = last
                self._write(index, slot, first, table[:last])

    def _write(self, index: int, slot: int, first: int, table: Sequence[int]) -> None:
        """Write the entries of a block table from `first` on."""
        self.host[index, slot, first : len(table)] = table[first:]
        if self.device is not None:
            start = (index * (self.padding_slot + 1) + slot) * self.width
            self._unsent.append((start + first, start + len(table)))

    def _send(self) -> None:
        """Copy the new entries to the device: their places and blocks in one copy."""
        assert self.device is not None
        places = np.concatenate([np.arange(start, stop) for start, stop in self._unsent])
        self._unsent.clear()
        blocks = np.maximum(self.host.reshape(-1)[places], 0)
        sent = to_device(torch.from_numpy(np.stack((places, blocks))), self.device.device)
        self.device.view(-1).index_copy_(0, sent[0], sent[1].int())
