"""A model with its paged KV cache: the forward pass over spans of sequences."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from llmkit.kernels.attention_metadata import AttentionBatch, BlockTable, Int64Array
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.device_copy import to_device
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.model.decoder import Decoder
from llmkit.model.draft_head import DraftHead
from llmkit.model.language_model import LanguageModel, LayerCache
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.slot_block_tables import BlockTables, SlotBlockTables
from llmkit.runtime.engine.state_scheduler import StateRows

Span = tuple[Sequence, int, int]  # the positions [start, stop) of a sequence


@dataclass(frozen=True)
class ForwardInputs:
    """What the model needs besides token ids to compute spans of sequences, one after the other."""

    query_lens: list[int]  # tokens of each span
    seq_lens: list[int]  # tokens of each sequence up to the end of its span
    positions: list[int]  # of all tokens, for the rotary embeddings
    block_tables: BlockTables
    slots: list[int]  # of each sequence
    state_rows: list[StateRows]  # of each sequence; empty without recurrent layers


class PagedModel:
    """A model and the KV cache of each of its layers."""

    def __init__(
        self,
        model: LanguageModel | DraftHead,
        kv_caches: list[LayerCache],
        config: EngineConfig,
        table_of_window: Mapping[int | None, int],
    ) -> None:
        """table_of_window: for each attention window of the model, which of a sequence's block
        tables it uses.
        """
        self.model = model
        self.kv_caches = kv_caches
        self._config = config
        self._table_of_window = table_of_window
        self._slot_tables = SlotBlockTables(
            config.max_num_seqs,
            -(-config.max_model_len // config.block_size),
            dict.fromkeys(table_of_window, 0),
        )
        # Of one sequence, in all layers of this rank.
        self.bytes_per_state = sum(
            tensor[:1].nbytes
            for cache in kv_caches
            if isinstance(cache, RecurrentState)
            for tensor in cache.tensors
        )
        # Whether compiled CPU kernels compute a step; torch has little to do beside them.
        self.is_compiled = (
            isinstance(model, Decoder | DraftHead)
            and cpu_kernels.library is not None
            and config.device.type == "cpu"
            and model.dtype == torch.float32
            and not any(layer.layer.is_moe and not layer.cpu_experts for layer in model.layers)
        )
        # Whether a request can be so long that its positions have an offset.
        self._has_rope_offsets = model.spec.rope_offset(config.max_model_len) != 0

    def forward_inputs(
        self, spans: SequenceOf[Span], state_rows: SequenceOf[StateRows] = ()
    ) -> ForwardInputs:
        """The inputs for these spans. state_rows: of each, if the model has recurrent layers."""
        positions: list[int] = []
        for sequence, start, stop in spans:
            offset = 0
            if self._has_rope_offsets:
                offset = self.model.spec.rope_offset(sequence.max_num_tokens)
            positions += range(start + offset, stop + offset)
        return ForwardInputs(
            query_lens=[stop - start for _, start, stop in spans],
            seq_lens=[stop for _, _, stop in spans],
            positions=positions,
            block_tables={
                window: [sequence.block_tables[table] for sequence, _, _ in spans]
                for window, table in self._table_of_window.items()
            },
            slots=[sequence.slot for sequence, _, _ in spans],
            state_rows=list(state_rows),
        )

    def forward(self, token_ids: torch.Tensor, inputs: ForwardInputs) -> torch.Tensor:
        """The hidden states [T, H] after `token_ids` int64 [T], which are on the device."""
        tables = self._slot_tables
        tables.update(inputs.slots, inputs.block_tables)
        starts = np.array(inputs.slots, dtype=np.int64) * tables.width
        recurrent = None
        if inputs.state_rows:
            recurrent = RecurrentBatch.build(
                inputs.query_lens,
                [rows.initial_row for rows in inputs.state_rows],
                [rows.writes for rows in inputs.state_rows],
                self._config.device,
            )
        batch = AttentionBatch(
            np.array(inputs.query_lens, dtype=np.int64),
            np.array(inputs.seq_lens, dtype=np.int64),
            {
                window: BlockTable(tables.rows(window), starts, _sizes(rows))
                for window, rows in inputs.block_tables.items()
            },
            self._config.block_size,
            self._config.device,
            recurrent=recurrent,
        )
        positions = int64_tensor(inputs.positions, self._config.device)
        return self.model(token_ids, positions, batch, self.kv_caches)

    def block_tensors(self, table: int) -> list[torch.Tensor]:
        """The cache tensors whose blocks this block table names, each [A, blocks, ...]."""
        return [
            tensor
            for layer, cache in zip(self.model.spec.layers, self.kv_caches, strict=True)
            if not isinstance(cache, RecurrentState)
            and self._table_of_window[layer.sliding_window] == table
            for tensor in cache.tensors
        ]

    def state_tensors(self) -> list[torch.Tensor]:
        """The tensors of the recurrent states, each [1, rows, ...]."""
        return [
            tensor[None]
            for cache in self.kv_caches
            if isinstance(cache, RecurrentState)
            for tensor in cache.tensors
        ]

    def zero_blocks(self, blocks: SequenceOf[list[int]]) -> None:
        """Zero blocks that may hold NaN.

        Attention multiplies masked values by 0, and 0 times NaN is NaN.

        blocks: the block ids, for each block table.
        """
        for layer, cache in zip(self.model.spec.layers, self.kv_caches, strict=True):
            if not isinstance(cache, RecurrentState):
                cache.clear(blocks[self._table_of_window[layer.sliding_window]])


def _sizes(rows: SequenceOf[SequenceOf[int]]) -> Int64Array:
    """The length of each row."""
    return np.array([len(row) for row in rows], dtype=np.int64)


def int64_tensor(values: list[int], device: torch.device) -> torch.Tensor:
    """An int64 tensor on the device."""
    # For short lists, numpy takes a third of the time of `torch.tensor`.
    return to_device(torch.from_numpy(np.array(values, dtype=np.int64)), device)
