"""The logits processors of a GPU: what `LogitsTables` has for the requests of a step."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.kernels.logits_tables import (
    IN_PROMPT,
    IS_END,
    NO_SLOT,
    LogitsTables,
    change_logits,
    count_tokens,
)
from llmkit.runtime.engine.logits_processors import columns_of, end_tokens
from llmkit.runtime.engine.sequence import Sequence


class LogitsProcessorTables:
    """What `apply_logits_processors` does, for all rows of a step at once.

    The tables are on the device. A request's row is written when it first samples in its slot, and
    a step whose requests are those of the step before sends nothing. The device counts the tokens
    that it samples, so that a step with penalties can be launched before the host knows the tokens
    of the last one. What a request has left in its slot is not read: rows without logits processors
    have no slot, and the next request that has some writes its own row.
    """

    def __init__(
        self,
        num_slots: int,
        max_rows: int,
        vocab_size: int,
        vocab_start: int,
        device: torch.device,
    ) -> None:
        """max_rows: the most rows of logits of a step. vocab_size, vocab_start: the columns of the
        logits, and the token of the first.
        """
        self.tables = LogitsTables.empty(num_slots, vocab_size, device)
        # Of each row of logits of a step, its slot or NO_SLOT; int64 [max_rows]. Graphs read it.
        self.row_slots = torch.full((max_rows,), NO_SLOT, dtype=torch.int64, device=device)
        self._vocab_start = vocab_start
        self._device = device
        self._rows: list[int] = []  # what `row_slots` begins with; the others are NO_SLOT
        # Of each slot: whose row the tables have, and how many of its output tokens are counted.
        self._written: dict[int, tuple[Sequence, int]] = {}

    def update(
        self,
        sequences: SequenceOf[Sequence],
        num_sampled: SequenceOf[int],
        samples: SequenceOf[bool],
        eos_token_ids: Iterable[int],
    ) -> None:
        """Write what a step needs and the device does not have. Call it before the step.

        sequences: that of each row of logits. num_sampled: the output tokens before each row's
        token. samples: whether a row's token will be used; the logits of the others do not change.
        """
        rows = []
        for sequence, num_output_tokens, is_sampled in zip(
            sequences, num_sampled, samples, strict=True
        ):
            is_changed = is_sampled and sequence.request.sampling_params.needs_logits_processors
            rows.append(sequence.slot if is_changed else NO_SLOT)
            if is_changed:
                self._write(sequence, num_output_tokens, eos_token_ids)
        if rows != self._rows:
            self._rows = rows
            padding = [NO_SLOT] * (len(self.row_slots) - len(rows))
            self.row_slots.copy_(to_device(torch.tensor(rows + padding), self._device))

    def apply(self, logits: torch.Tensor, num_sampled: SequenceOf[int]) -> torch.Tensor:
        """The changed logits [n, V], float32, for a sampler that does not read the tables."""
        counters = to_device(torch.tensor(num_sampled), self._device)
        return change_logits(logits, self.tables, self.row_slots[: len(logits)], counters)

    def count(self, token_ids: torch.Tensor) -> None:
        """Count the sampled tokens of a step's rows, int64 [n] on the device."""
        if self._vocab_start:
            token_ids = token_ids - self._vocab_start
        count_tokens(self.tables, self.row_slots[: len(token_ids)], token_ids)
        for slot in set(self._rows) - {NO_SLOT}:
            sequence, num_counted = self._written[slot]
            self._written[slot] = (sequence, num_counted + 1)

    def _write(
        self, sequence: Sequence, num_output_tokens: int, eos_token_ids: Iterable[int]
    ) -> None:
        """Write the row of a slot, unless it has exactly the tokens before the next one."""
        params = sequence.request.sampling_params
        slot = sequence.slot
        written_for, num_counted = self._written.get(slot, (None, 0))
        has_counts = num_counted == num_output_tokens or not params.has_penalties
        if written_for is sequence and has_counts:
            return
        self._written[slot] = (sequence, num_output_tokens)
        tables = self.tables
        if params.has_penalties or params.min_tokens:
            counts = tables.token_counts[slot]
            counts.zero_()
            if params.has_penalties:
                output_ids = sequence.token_ids[sequence.num_prompt_tokens :]
                output, _ = columns_of(output_ids, self._vocab_start, counts)
                counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
                prompt_ids = set(sequence.request.prompt_token_ids)
                counts[columns_of(prompt_ids, self._vocab_start, counts)[0]] |= IN_PROMPT
            if params.min_tokens:
                ends = end_tokens(params, eos_token_ids)
                counts[columns_of(ends, self._vocab_start, counts)[0]] |= IS_END
        if params.logit_bias:
            bias = tables.bias[slot]
            bias.zero_()
            columns, indices = columns_of(params.logit_bias, self._vocab_start, bias)
            values = torch.tensor([*params.logit_bias.values()], dtype=torch.float32)
            bias[columns] = to_device(values[indices], self._device)
        factors = (
            min(1 / params.repetition_penalty, torch.finfo(torch.float32).max),
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            bool(params.logit_bias),
        )
        tables.factors[slot] = to_device(torch.tensor(factors, dtype=torch.float32), self._device)
        tables.min_tokens[slot] = params.min_tokens
