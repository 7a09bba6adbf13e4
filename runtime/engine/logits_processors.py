"""Changes to the logits before a token is sampled: bias, minimum length and penalties.

Those of grammars are in `grammar_bitmasks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.kernels.penalties import IN_PROMPT, penalize
from llmkit.model.parallel_group import MASKED_LOGIT
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence


def apply_logits_processors(
    logits: torch.Tensor,
    sequences: SequenceOf[Sequence],
    num_sampled: SequenceOf[int],
    vocab_start: int,
    eos_token_ids: Iterable[int],
) -> None:
    """Change the rows of logits float32 [n, V] in place, each for its sequence.

    num_sampled: the output tokens before each row's token. vocab_start: the token of the first
    column; a tensor parallel rank has only some columns. The order is vLLM's: bias, minimum
    length, penalties. Tokens that a grammar has masked stay masked.
    """
    for row, sequence, num_output_tokens in zip(logits, sequences, num_sampled, strict=True):
        params = sequence.request.sampling_params
        if params.logit_bias:
            columns, indices = _columns(params.logit_bias, vocab_start, row)
            bias = torch.tensor([*params.logit_bias.values()], dtype=torch.float32)
            row[columns] += to_device(bias[indices], row.device)
        if num_output_tokens < params.min_tokens:
            columns, _ = _columns(_end_tokens(params, eos_token_ids), vocab_start, row)
            row[columns] = float("-inf")
        if params.repetition_penalty != 1:
            columns, _ = _columns(set(sequence.token_ids), vocab_start, row)
            penalty = params.repetition_penalty
            values = row[columns]
            row[columns] = torch.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
            columns, indices = _columns(counts, vocab_start, row)
            times = torch.tensor(list(counts.values()), dtype=torch.float32)[indices]
            penalties = params.presence_penalty + params.frequency_penalty * times
            row[columns] -= to_device(penalties, row.device)


class TokenTables:
    """The same changes for all rows of a step at once, without the tokens on the host.

    A table on the device has a row for each slot: how often each token is in the output, and
    whether it is in the prompt. The device adds the tokens that it samples, so that a step with
    penalties can be launched before the host knows the tokens of the last one. The table is
    allocated when a request with penalties comes; the memory plan counts it.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, vocab_start: int, device: torch.device
    ) -> None:
        """vocab_size, vocab_start: the columns of this rank, and the token of the first."""
        self._shape = (num_slots, vocab_size)
        self._vocab_start = vocab_start
        self._device = device
        self._table: torch.Tensor | None = None  # int32 [slots, V]
        # Of each slot: its sequence, and how many output tokens are counted.
        self._counted: dict[int, tuple[Sequence, int]] = {}
        self._pending: tuple[list[int], list[int]] = ([], [])  # rows and slots to count next

    def apply(
        self,
        logits: torch.Tensor,
        sequences: SequenceOf[Sequence],
        num_sampled: SequenceOf[int],
        samples: SequenceOf[bool],
        eos_token_ids: Iterable[int],
    ) -> None:
        """Change logits float32 [n, V] in place, as `apply_logits_processors` does.

        Masked logits stay finite, as the GPU's sampler wants them. samples: whether a row's token
        will be used; rows that sample nothing yet do not change.
        Call `count` with the sampled tokens afterwards.
        """
        bias: list[tuple[int, int, float]] = []
        ends: list[tuple[int, int]] = []
        penalized: list[tuple[int, int]] = []  # rows and slots
        penalties: list[tuple[float, float, float]] = []
        for row, sequence in enumerate(sequences):
            if not samples[row]:
                continue
            params = sequence.request.sampling_params
            bias += [(row, token, value) for token, value in params.logit_bias.items()]
            if num_sampled[row] < params.min_tokens:
                ends += [(row, token) for token in _end_tokens(params, eos_token_ids)]
            if params.has_penalties:
                penalized.append((row, sequence.slot))
                penalties.append(
                    (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
                )
                self._know(sequence, num_sampled[row])
        bias = [one for one in bias if self._has(one[1])]
        if bias:
            rows, columns = self._places([one[:2] for one in bias])
            values = torch.tensor([value for *_, value in bias])
            logits[rows, columns] += to_device(values, self._device)
        ends = [one for one in ends if self._has(one[1])]
        if ends:
            rows, columns = self._places(ends)
            logits.index_put_((rows, columns), logits.new_full((), MASKED_LOGIT))
        self._pending = ([], [])
        if penalized and self._table is not None:
            self._pending = ([row for row, _ in penalized], [slot for _, slot in penalized])
            rows, slots = to_device(torch.tensor(self._pending), self._device)
            # Parameters may be integers, which the kernel would not take.
            values = torch.tensor(penalties, dtype=torch.float32)
            factors = to_device(values.T.contiguous(), self._device)
            penalize(logits, self._table, rows, slots, factors)

    def count(self, token_ids: torch.Tensor) -> None:
        """Add the sampled tokens, int64 [n] on the device, of the rows that have penalties."""
        rows, slots = self._pending
        if not rows or self._table is None:
            return
        where, of_slots = to_device(torch.tensor(self._pending), self._device)
        columns = token_ids[where] - self._vocab_start
        is_here = (columns >= 0) & (columns < self._shape[1])
        columns = columns.where(is_here, 0)
        # A sequence has one row: no two rows have the same slot.
        self._table[of_slots, columns] += is_here.int()
        for slot in slots:
            sequence, num_counted = self._counted[slot]
            self._counted[slot] = (sequence, num_counted + 1)

    def _know(self, sequence: Sequence, num_sampled: int) -> None:
        """Write the slot's row, unless it has exactly the tokens before the next one."""
        known = self._counted.get(sequence.slot)
        if known is not None and known[0] is sequence and known[1] == num_sampled:
            return
        if self._table is None:
            self._table = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        row = self._table[sequence.slot]
        row.zero_()
        prompt, _ = _columns(sequence.request.prompt_token_ids, self._vocab_start, row)
        output, _ = _columns(
            sequence.token_ids[sequence.num_prompt_tokens :], self._vocab_start, row
        )
        row.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        row[prompt] |= IN_PROMPT
        self._counted[sequence.slot] = (sequence, num_sampled)

    def _has(self, token_id: int) -> bool:
        return 0 <= token_id - self._vocab_start < self._shape[1]

    def _places(self, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns on the device, for rows and tokens."""
        rows, tokens = to_device(torch.tensor(places).T.contiguous(), self._device)
        return rows, tokens - self._vocab_start


def _end_tokens(params: SamplingParams, eos_token_ids: Iterable[int]) -> set[int]:
    """The tokens that may not come before `min_tokens`."""
    tokens = set(params.stop_token_ids)
    if not params.ignore_eos:
        tokens.update(eos_token_ids)
    return tokens


def _columns(
    token_ids: Iterable[int], vocab_start: int, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the tokens that this rank has.

    Returns the columns on the device, and the indices of these tokens on the CPU.
    """
    columns = torch.tensor(list(token_ids), dtype=torch.int64) - vocab_start
    is_here = (columns >= 0) & (columns < len(row))
    indices = is_here.nonzero()[:, 0]
    return to_device(columns[indices], row.device), indices
