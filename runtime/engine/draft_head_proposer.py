"""Draft tokens from the model's own hidden states: an MTP head, or an EAGLE-3 head."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from llmkit.model.draft_head import DraftHead
from llmkit.runtime.engine.draft_model import DraftModelProposer
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.paged_model import Span
from llmkit.runtime.engine.scheduler_output import ScheduledRequest, SchedulerOutput
from llmkit.runtime.engine.sequence import Sequence


class SlotRows(NamedTuple):
    """Whose drafts the rows of a slot hold."""

    sequence: Sequence
    start: int  # the position of the first row
    stop: int  # the position after the last one


class DraftHeadProposer(DraftModelProposer):
    """Runs a draft head at the end of each step, and for further drafts at the start of the next.

    At a position, the head reads the model's hidden state and the token after it, and predicts the
    token after that one. At the end of a step (`observe`) it computes all positions of the step,
    those of rejected drafts too: it need not wait until the host knows which ones are accepted. So
    its KV cache always has the positions that the model's has, cached prefixes included, and the
    first draft of the next step is known. At the start of the next step (`run`), the head continues
    from its own output.
    """

    def __init__(self, head: DraftHead, config: EngineConfig) -> None:
        num_rows = 1 + config.num_speculative_tokens
        size = head.spec.hidden_size
        head.reserve(config.max_num_batched_tokens)
        super().__init__(head, config, max_query_len=num_rows, hidden_size=size)
        self.head = head
        self._num_rows = num_rows
        # By slot, for each position whose next token was sampled in the slot's last step: the first
        # draft, and the head's hidden state for the drafts after it.
        num_slots = config.max_num_seqs
        self._first_drafts = torch.zeros(
            num_slots * num_rows, dtype=torch.int64, device=config.device
        )
        self._outputs = self.head.hidden_states.new_zeros(num_slots * num_rows, size)
        self._rows_of_slot: dict[int, SlotRows] = {}
        # For the next `_compute` of a round: what the head reads, [rows, H].
        self._next_hidden = self._outputs[:0]

    @property
    def input_size(self) -> int:
        """The columns of what it reads of the model (`draft_inputs`)."""
        aux_layers = self.head.head.aux_layers
        return max(1, len(aux_layers)) * self.head.target.spec.hidden_size

    def draft_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """What it reads of the model's last step, [T, C]. hidden: [T, H], the model's result."""
        return self.head.target.draft_inputs(hidden)

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """See `DraftProposer.propose`; the tokens are placeholders."""
        rows = self._rows_of_slot.get(sequence.slot)
        position = sequence.num_tokens - 2  # the last one whose next token is known
        if rows is None or rows.sequence is not sequence or not rows.start <= position < rows.stop:
            return []  # it was admitted, and its last token alone is not computed yet
        return super().propose(sequence, max_tokens)

    def forget(self, sequence: Sequence) -> None:
        """See `DraftProposer.forget`."""
        rows = self._rows_of_slot.get(sequence.slot)
        if rows is not None and rows.sequence is sequence:
            del self._rows_of_slot[sequence.slot]

    def _run(self, step: SchedulerOutput) -> torch.Tensor | None:
        """See `DraftModelProposer.run`."""
        drafting = [request for request in step.requests if request.num_draft_tokens]
        if not drafting:
            return None
        rows = self._to_device([self._row(request) for request in drafting])
        self._next_hidden = self._outputs[rows]
        return self._draft(step.requests, drafting, self._first_drafts[rows])

    def observe(
        self,
        step: SchedulerOutput,
        token_ids: torch.Tensor,
        sampled_token_ids: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """Compute the positions of a step, and the first draft after each sampled token.

        token_ids: int64 [T], of the step. sampled_token_ids: int64 [sampled rows], -1 for none.
        hidden: [T, C], what `draft_inputs` returned for the step.
        """
        with self._few_threads():
            self._observe(step, token_ids, sampled_token_ids, hidden)

    def _observe(
        self,
        step: SchedulerOutput,
        token_ids: torch.Tensor,
        sampled_token_ids: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """See `observe`."""
        sampled_rows: list[int] = []  # those of the step's tokens
        known_rows: list[int] = []  # whose next token is in the prompt
        known_token_ids: list[int] = []
        # Of the sampled tokens whose sequences may have drafts in the next step:
        rows: list[int] = []
        sequences: list[Sequence] = []
        counters: list[int] = []  # the output tokens before the first draft
        places: list[int] = []  # where first draft and output are kept
        ends = accumulate(request.num_tokens for request in step.requests)
        for request, end in zip(step.requests, ends, strict=True):
            sequence = request.sequence
            num_sampled = request.num_sampled_rows
            sampled_rows += range(end - num_sampled, end)
            if not request.samples_next_token:
                known_rows.append(end - 1)
                known_token_ids.append(sequence.token_ids[request.stop])
            elif not sequence.needs_known_tokens:
                rows += range(end - num_sampled, end)
                sequences += [sequence] * num_sampled
                counters += range(request.num_sampled + 1, request.num_sampled + 1 + num_sampled)
                first_place = sequence.slot * self._num_rows
                places += range(first_place, first_place + num_sampled)
                start = request.stop - num_sampled
                self._rows_of_slot[sequence.slot] = SlotRows(sequence, start, request.stop)

        next_token_ids = sampled_token_ids.clamp_min(0)
        if len(sampled_rows) < len(token_ids):
            of_sampled = next_token_ids
            next_token_ids = token_ids.roll(-1)
            next_token_ids[self._to_device(sampled_rows)] = of_sampled
        if known_rows:
            next_token_ids[self._to_device(known_rows)] = self._to_device(known_token_ids)
        self._next_hidden = self.head.project(hidden)
        spans = [(request.sequence, request.start, request.stop) for request in step.requests]
        first_drafts = self._compute(next_token_ids, spans, rows, sequences, counters)
        if rows:
            kept = self._to_device(places)
            self._first_drafts.index_copy_(0, kept, first_drafts)
            outputs = self._rows_of(self._hidden_states, rows)
            self._outputs.index_copy_(0, kept, outputs)

    def propose_next(self, step: SchedulerOutput, token_ids: list[list[int]]) -> torch.Tensor:
        """The draft tokens for the next steps of the sequences of a step, after `observe`.

        For a pipeline: its first stage needs them when it begins those steps. token_ids: see
        `ModelRunnerOutput`. Returns int64 [requests, N] on the host, -1 where there is none.
        """
        requests: list[ScheduledRequest] = []
        rows: list[int] = []
        columns: list[int] = []
        for index, (request, sampled) in enumerate(zip(step.requests, token_ids, strict=True)):
            next_request = self._next_request(request, sampled)
            if next_request is not None:
                requests.append(next_request)
                rows += [index] * next_request.num_draft_tokens
                columns += range(next_request.num_draft_tokens)
        drafts = torch.full((len(token_ids), self._num_rows - 1), -1, dtype=torch.int64)
        found = self.run(SchedulerOutput(requests))
        if found is not None:
            drafts[rows, columns] = found.cpu()
        self._rows_of_slot.clear()
        return drafts

    def _next_request(
        self, request: ScheduledRequest, sampled: list[int]
    ) -> ScheduledRequest | None:
        """What the next step may verify of a sequence; None: no drafts.

        sampled: its new tokens. There are no more drafts than its blocks have places for, because
        the head writes to its cache before the next step allocates more.
        """
        sequence = request.sequence
        if not request.samples_next_token or sequence.needs_known_tokens:
            return None
        if sampled[-1] < 0 or not sequence.end_token_ids.isdisjoint(sampled):
            return None
        start = request.stop - request.num_sampled_rows + len(sampled)
        num_drafts = min(
            self._num_rows - 1,
            sequence.max_num_tokens - start - 2,
            sequence.num_block_tokens - start + 1,
        )
        if num_drafts <= 0:
            return None
        return ScheduledRequest(
            sequence,
            start,
            1 + num_drafts,
            samples_next_token=True,
            num_sampled=request.num_sampled + len(sampled),
            token_ids=[],
            num_draft_tokens=num_drafts,
        )

    def _row(self, request: ScheduledRequest) -> int:
        """The row of `_first_drafts` and `_outputs` for the position before a request's first."""
        slot = request.sequence.slot
        return slot * self._num_rows + request.start - 1 - self._rows_of_slot[slot].start

    def _compute(
        self,
        token_ids: torch.Tensor,
        spans: list[Span],
        rows: list[int],
        sequences: list[Sequence],
        counters: list[int],
    ) -> torch.Tensor:
        """See `DraftModelProposer._compute`; the head also reads `_next_hidden`."""
        self.head.hidden_states[: len(token_ids)] = self._next_hidden
        draft_token_ids = super()._compute(token_ids, spans, rows, sequences, counters)
        self._next_hidden = self._hidden_states
        return draft_token_ids

    def _continued(self, draft_token_ids: torch.Tensor, left: list[int]) -> torch.Tensor:
        """See `DraftModelProposer._continued`."""
        self._next_hidden = self._rows_of(self._next_hidden, left)
        return super()._continued(draft_token_ids, left)

    def _draft_span(self, request: ScheduledRequest, index: int) -> Span:
        """See `DraftModelProposer._draft_span`. A token is computed at the position before it."""
        sequence, start, stop = super()._draft_span(request, index)
        return sequence, start - 1, stop - 1
