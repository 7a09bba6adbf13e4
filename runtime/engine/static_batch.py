"""Fixed buffers for the inputs of a step, which every replay reads again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from llmkit.kernels.attention_metadata import (
    AttentionBatch,
    BlockTable,
    DeviceMetadata,
    Int64Array,
)
from llmkit.kernels.device_copy import to_device
from llmkit.kernels.recurrent_state import DeviceRows, RecurrentBatch, RecurrentState
from llmkit.model.language_model import LayerCache
from llmkit.runtime.engine.slot_block_tables import BlockTables, SlotBlockTables
from llmkit.runtime.engine.state_scheduler import StateRows


class StaticBatch:
    """An attention batch of up to `num_reqs` sequences in buffers that never move.

    A step with fewer sequences or tokens is padded: unused sequences and tokens come last. The
    tokens of a sequence follow those of the sequence before.

    host: one int64 tensor on the CPU, of these parts (R: sequences, T: tokens):
    - `num_graph_inputs` values of a subclass
    - the tokens of each sequence so far, those of this step included [R]
    - the position of each token [T]
    - the slot of each sequence, its row in `block_tables` [R]
    - for each window, the KV cache slot of each token [T]
    - with recurrent layers: the row of states that each sequence begins with [R], the row that is
      written after each token [T], and the place of that token in its sequence [T]
    - if sequences can have several tokens: where those of each begin [R + 1]
    device: the same on the device; on a CPU it is `host` itself. A step copies these to the device,
    and the blocks that are new.
    """

    def __init__(
        self,
        num_reqs: int,
        block_tables: SlotBlockTables,
        block_size: int,
        padding_blocks: Mapping[int | None, int],
        device: torch.device | str = "cpu",
        num_graph_inputs: int = 0,
        max_query_len: int = 1,
        max_num_tokens: int | None = None,
        padding_state_row: int | None = None,
    ) -> None:
        """block_tables: those of all slots. padding_blocks: by window, the block that unused tokens
        are written to. padding_state_row: the row of recurrent states that unused sequences read
        and write; None: there are no recurrent layers. max_query_len: the most new tokens of a
        sequence. max_num_tokens: see `AttentionBatch`; None: all sequences can have as many.
        """
        self.num_reqs = num_reqs
        self.num_tokens = max_num_tokens or num_reqs * max_query_len
        self.max_query_len = max_query_len
        self.block_tables = block_tables
        self.block_size = block_size
        self.padding_blocks = padding_blocks
        num_starts = num_reqs + 1 if max_query_len > 1 else 0
        slot_mappings = (self.num_tokens,) * len(padding_blocks)
        is_recurrent = padding_state_row is not None
        sizes = (
            num_graph_inputs,
            num_reqs,
            self.num_tokens,
            num_reqs,
            *slot_mappings,
            num_reqs * is_recurrent,
            self.num_tokens * is_recurrent,
            self.num_tokens * is_recurrent,
            num_starts,
        )
        self.host = torch.zeros(sum(sizes), dtype=torch.int64)
        bounds = list(pairwise([0, *accumulate(sizes)]))
        host_parts = [self.host[start:stop].numpy() for start, stop in bounds]
        host_parts[-2][:] = 1  # each sequence has one token, unless `prepare_inputs` says otherwise
        self.device = self.host
        if torch.device(device).type != "cpu":
            self.device = self.host.to(device)
        device_parts = [self.device[start:stop] for start, stop in bounds]
        self.graph_inputs, self.seq_lens, self.positions, self.slots = device_parts[:4]
        self.query_start_loc = device_parts[-1] if num_starts else None
        self.host_graph_inputs = self.host[:num_graph_inputs]
        self._host_seq_lens, self._host_positions, self._host_slots = host_parts[1:4]
        self._host_slot_mappings = host_parts[4:-4]
        self._host_initial_rows, self._host_write_rows, self._host_write_ends = host_parts[-4:-1]
        self._padding_state_row = padding_state_row
        self._host_query_start_loc = host_parts[-1]

        # Of the last step, whose values most steps have, too:
        self._slots: Sequence[int] | None = None
        self._num_tokens = 0
        self._query_lens: Sequence[int] | None = None
        # The sequence of each token, and its place after the tokens that the sequence had before.
        self._sequence_of_token = np.empty(0, dtype=np.int64)
        self._places_in_step = np.empty(0, dtype=np.int64)
        self._host_tables = [block_tables.rows(window) for window in padding_blocks]
        # Where the row of each sequence begins in the block tables of all slots.
        self._table_starts = np.full(
            num_reqs, block_tables.padding_slot * block_tables.width, dtype=np.int64
        )
        table_sizes = np.full(num_reqs, block_tables.width, dtype=np.int64)
        query_lens = np.full(num_reqs, 0 if num_starts else 1, dtype=np.int64)
        recurrent = None
        if is_recurrent:
            recurrent = self._recurrent_batch(query_lens, *device_parts[-4:-1])
        self.batch = AttentionBatch(
            query_lens,
            self._host_seq_lens,
            {
                window: BlockTable(rows, self._table_starts, table_sizes)
                for window, rows in zip(padding_blocks, self._host_tables, strict=True)
            },
            block_size,
            torch.device(device),
            max_query_len,
            max_num_tokens,
            recurrent,
        )
        for window, slot_mapping in zip(padding_blocks, device_parts[4:-4], strict=True):
            metadata = self.batch.metadata(window)
            metadata.slot_mapping = slot_mapping
            if block_tables.device is not None:
                metadata.set_device_tensors(self._device_metadata(window, query_lens))

    def _device_metadata(self, window: int | None, query_lens: Int64Array) -> DeviceMetadata:
        """What the attention kernels read: the first rows of the block table that graphs share."""
        starts = np.zeros(self.num_reqs + 1, dtype=np.int32)
        query_lens.cumsum(out=starts[1:])
        return DeviceMetadata(
            self.block_tables.input_block_table(window)[: self.num_reqs],
            self.seq_lens.int(),
            to_device(torch.from_numpy(starts), self.device.device),
        )

    def _recurrent_batch(
        self,
        query_lens: Int64Array,
        initial_rows: torch.Tensor,
        write_rows: torch.Tensor,
        write_ends: torch.Tensor,
    ) -> RecurrentBatch:
        """The rows of recurrent states; each token has one write. The tensors are on the device."""
        starts = np.arange(self.num_reqs + 1, dtype=np.int64)
        if self.query_start_loc is not None:
            starts = self._host_query_start_loc
        recurrent = RecurrentBatch(
            query_lens,
            self._host_initial_rows,
            starts,
            self._host_write_ends,
            self._host_write_rows,
            self.device.device,
            self.max_query_len,
        )
        if self.device is not self.host:
            starts_on_device = self.query_start_loc
            if starts_on_device is None:
                starts_on_device = torch.from_numpy(starts).to(self.device.device)
            recurrent.device_rows = DeviceRows(
                starts_on_device, initial_rows, starts_on_device, write_ends, write_rows
            )
        return recurrent

    def prepare_inputs(
        self,
        positions: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: BlockTables,
        query_lens: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        state_rows: Sequence[StateRows] = (),
    ) -> None:
        """Write the inputs of the next step and copy them to the device.

        query_lens: the new tokens of each sequence; None: one each. slots: the slot of each
        sequence; None: sequence i has slot i. state_rows: of each sequence, if the model has
        recurrent layers.
        """
        num_seqs = len(seq_lens)
        num_tokens = len(positions)
        slots = range(num_seqs) if slots is None else slots
        self.block_tables.update(slots, block_tables)
        if slots != self._slots or num_tokens != self._num_tokens:  # seldom
            self._slots = list(slots)
            self._num_tokens = num_tokens
            self._pad(num_seqs, num_tokens)
            self._query_lens = None
            self._host_slots[:num_seqs] = slots
            np.multiply(self._host_slots, self.block_tables.width, out=self._table_starts)
        self._host_seq_lens[:num_seqs] = seq_lens
        self._host_positions[:num_tokens] = positions
        if self._padding_state_row is not None:
            self._host_initial_rows[:num_seqs] = [rows.initial_row for rows in state_rows]
            self._host_write_rows[:num_tokens] = [
                row for rows in state_rows for _, row in rows.writes
            ]

        # The place of each token in its sequence, and where the sequence's block table begins.
        places = self._host_seq_lens[:num_seqs] - 1
        table_starts = self._table_starts[:num_seqs]
        if self.query_start_loc is not None:
            query_lens = [1] * num_seqs if query_lens is None else query_lens
            if query_lens != self._query_lens:
                self._query_lens = list(query_lens)
                self._prepare_query_lens(num_seqs, num_tokens)
            lens = self.batch.query_lens[:num_seqs]
            places = (places - lens)[self._sequence_of_token] + self._places_in_step
            table_starts = table_starts[self._sequence_of_token]
        blocks, offsets = np.divmod(places, self.block_size)
        blocks += table_starts
        for slot_mapping, rows in zip(self._host_slot_mappings, self._host_tables, strict=True):
            slot_mapping[:num_tokens] = rows[blocks] * self.block_size + offsets
        if self.device is not self.host:
            self.device.copy_(self.host.pin_memory(), non_blocking=True)

    def _prepare_query_lens(self, num_seqs: int, num_tokens: int) -> None:
        """Write what follows from `_query_lens`."""
        lens = self.batch.query_lens
        lens[:num_seqs] = np.array(self._query_lens)
        lens.cumsum(out=self._host_query_start_loc[1:])
        self._sequence_of_token = np.repeat(np.arange(num_seqs), lens[:num_seqs])
        starts = self._host_query_start_loc[self._sequence_of_token]
        self._places_in_step = np.arange(num_tokens) - starts + 1
        if self._padding_state_row is not None:
            self._host_write_ends[:num_tokens] = self._places_in_step

    def _pad(self, num_seqs: int, num_tokens: int) -> None:
        """Write the sequences and tokens after these."""
        # Where sequences can have several tokens, unused ones have none.
        self._host_seq_lens[num_seqs:] = int(self.query_start_loc is None)
        self._host_slots[num_seqs:] = self.block_tables.padding_slot
        self._host_positions[num_tokens:] = 0
        if self._padding_state_row is not None:
            self._host_initial_rows[num_seqs:] = self._padding_state_row
            self._host_write_rows[num_tokens:] = self._padding_state_row
        if self.query_start_loc is not None:
            self.batch.query_lens[num_seqs:] = 0
        paddings = self.padding_blocks.values()
        for slot_mapping, padding in zip(self._host_slot_mappings, paddings, strict=True):
            slot_mapping[num_tokens:] = padding * self.block_size


def has_recurrent_states(caches: Sequence[LayerCache]) -> bool:
    """Whether a layer keeps a recurrent state."""
    return any(isinstance(cache, RecurrentState) and cache.conv.numel() for cache in caches)
