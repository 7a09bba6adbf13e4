"""Decides which rows of the recurrent states a step reads and writes.

A running sequence has a row for its state, and with speculative decoding one more for each draft
token: a step that verifies drafts writes the state after each token, and the next step begins with
that of the last accepted one.

Snapshots are kept where a later request may begin: at the last block boundary of a prompt; after
its system prompt and tools (`EngineRequest.num_shared_tokens`); where the cached blocks of a prompt
end for which no state was kept, since two requests part there; and at the last block boundary of
the answer so far, for the next turn of a conversation and for a sequence that was preempted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.host_cache import HostCache
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.state_cache import StateCache

NO_ROW = -1  # that of kernels/recurrent_state.py, which needs torch


class StateRows(NamedTuple):
    """The rows that a sequence reads and writes in a step; see `RecurrentBatch`."""

    initial_row: int
    writes: tuple[tuple[int, int], ...]  # pairs of (tokens of the step, row)


NO_STATE_ROWS = StateRows(NO_ROW, ())


@dataclass
class _SequenceStates:
    """The rows of a running sequence."""

    # With the state after its computed tokens; NO_ROW: none is computed, or drafts are verified.
    row: int
    snapshots: list[int]  # numbers of prompt tokens after which the state shall be kept
    # In a step with drafts: the row with the state after each of its tokens.
    draft_rows: list[int] = field(default_factory=list)
    answer_hash: bytes | None = None  # of its last snapshot within the answer


@dataclass(frozen=True)
class _Unnamed:
    """A snapshot that a step writes, and whose tokens were not all known then."""

    sequence: Sequence
    num_tokens: int
    row: int
    has_drafts: bool  # draft tokens may be among them


class StateScheduler:
    """The rows of running sequences, and the snapshots of cached prefixes."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._rows_per_sequence = 1 + config.num_speculative_tokens
        first_snapshot = config.max_num_seqs * self._rows_per_sequence
        num_snapshots = config.num_state_snapshots if config.enable_prefix_caching else 0
        host = None
        if num_snapshots and config.num_host_states:
            host = HostCache(config.num_host_states)
        self.cache = StateCache(first_snapshot, num_snapshots, host)
        # The tokens of a page of the prefix cache on disk; states at ends of pages are kept then.
        self.page_tokens = 0
        self._states: dict[Sequence, _SequenceStates] = {}  # of running sequences
        self._unnamed: list[_Unnamed] = []

    def begin_step(self) -> None:
        """Name the snapshots of earlier steps whose tokens are known by now."""
        self.cache.begin_step()
        still_unnamed = []
        for snapshot in self._unnamed:
            sequence = snapshot.sequence
            is_running = sequence.num_in_flight and not sequence.is_finished
            if snapshot.num_tokens > len(sequence.token_ids) and is_running:
                still_unnamed.append(snapshot)
                continue
            num_right = len(sequence.token_ids)
            if snapshot.has_drafts:
                num_right = min(num_right, sequence.num_computed_tokens)
            if snapshot.num_tokens <= num_right:
                self._name(snapshot)
            self.cache.release(snapshot.row)
        self._unnamed = still_unnamed

    def find_snapshot(self, block_hash: bytes) -> int | None:
        """The row with the state after a prefix, given the hash of its last block."""
        return self.cache.get(block_hash)

    def has_snapshot(self, block_hash: bytes) -> bool:
        """Whether a sequence that is admitted now could begin after this block."""
        return self.cache.get(block_hash) is not None or self.cache.can_load(block_hash)

    def start(self, sequence: Sequence, num_cached_tokens: int, num_matching_tokens: int) -> None:
        """A sequence begins to run.

        num_cached_tokens: those that it does not compute, at whose end there is a snapshot, in
        memory or in host memory.
        num_matching_tokens: those whose blocks are cached.
        """
        row = NO_ROW
        if num_cached_tokens:
            block_hash = self._hash_after(sequence, num_cached_tokens)
            found = self.cache.get(block_hash)
            if found is None:
                row = self.cache.load(block_hash)
            else:
                row = found
                self.cache.hold(row)
        last_token = sequence.num_prompt_tokens - 1
        wanted: set[int] = set()
        shared = sequence.request.num_shared_tokens
        for num_tokens in (
            last_token,
            min(last_token, num_matching_tokens),
            min(last_token, shared),
        ):
            wanted.add(self._boundary(num_tokens))
            if self.page_tokens:
                wanted.add(num_tokens // self.page_tokens * self.page_tokens)
        snapshots = sorted(position for position in wanted if position > num_cached_tokens)
        self._states[sequence] = _SequenceStates(row, snapshots)

    def schedule(self, sequence: Sequence, start: int, stop: int, num_drafts: int) -> StateRows:
        """The rows of a step that computes the positions [start, stop), drafts included."""
        states = self._states[sequence]
        initial_row = states.row
        own_row = sequence.slot * self._rows_per_sequence
        writes: dict[int, int] = {}
        if num_drafts:
            writes = {1 + index: own_row + index for index in range(stop - start)}
        else:
            writes[stop - start] = own_row
        for position in self._snapshots_within(sequence, start, stop):
            row = self.cache.allocate()
            if row is None:
                break
            writes[position - start] = row
            self._unnamed.append(_Unnamed(sequence, position, row, num_drafts > 0))
        rows = [writes[end] for end in sorted(writes)]
        if num_drafts:
            states.draft_rows = rows
            states.row = NO_ROW  # `accept` says which it is
            for row in rows:
                self._hold_snapshot(row)
        else:
            states.row = rows[-1]
            self._hold_snapshot(rows[-1])
        self._release_snapshot(initial_row)
        return StateRows(initial_row, tuple(sorted(writes.items())))

    def accept(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens of the sequence's step with drafts are right."""
        states = self._states.get(sequence)
        if states is None or not states.draft_rows:  # preempted while the step was in flight
            return
        states.row = states.draft_rows[num_tokens - 1]
        self._hold_snapshot(states.row)
        for row in states.draft_rows:
            self._release_snapshot(row)
        states.draft_rows = []

    def stop(self, sequence: Sequence) -> None:
        """A sequence ends or is preempted."""
        states = self._states.pop(sequence)
        for row in (states.row, *states.draft_rows):
            self._release_snapshot(row)

    def forget(self, sequence: Sequence) -> None:
        """The sequence's states may be wrong: no other sequence shall begin with them."""
        kept = []
        for snapshot in self._unnamed:
            if snapshot.sequence is sequence:
                self.cache.release(snapshot.row)
            else:
                kept.append(snapshot)
        self._unnamed = kept
        num_blocks = len(sequence.token_ids) // self._config.block_size
        for block_hash in sequence.block_hashes(num_blocks, self._config.block_size):
            self.cache.forget(block_hash)

    def _snapshots_within(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        """The numbers of tokens, in (start, stop], after which the state shall be kept."""
        states = self._states[sequence]
        found = [position for position in states.snapshots if start < position <= stop]
        # Snapshots of answers must not push out those of prompts.
        keeps_answers = self.cache.num_rows >= 2 * len(self._states)
        boundary = self._boundary(stop)
        if boundary > start and boundary >= sequence.num_prompt_tokens and keeps_answers:
            found.append(boundary)
        return found

    def _boundary(self, num_tokens: int) -> int:
        """The last position up to `num_tokens` where a snapshot can be."""
        alignment = self._config.state_alignment
        return max(0, num_tokens) // alignment * alignment

    def _name(self, snapshot: _Unnamed) -> None:
        """Make a snapshot known to later requests."""
        sequence = snapshot.sequence
        block_hash = self._hash_after(sequence, snapshot.num_tokens)
        self.cache.cache_row(snapshot.row, block_hash)
        states = self._states.get(sequence)
        if states is None or snapshot.num_tokens <= sequence.num_prompt_tokens:
            return
        if self.cache.get(block_hash) != snapshot.row:  # another sequence's has that name
            return
        if states.answer_hash is not None:
            self.cache.evict(states.answer_hash)
        states.answer_hash = block_hash

    def _hash_after(self, sequence: Sequence, num_tokens: int) -> bytes:
        """The hash of the block that ends after so many tokens."""
        block_size = self._config.block_size
        return sequence.block_hashes(num_tokens // block_size, block_size)[-1]

    def _hold_snapshot(self, row: int) -> None:
        if self.cache.is_snapshot(row):
            self.cache.hold(row)

    def _release_snapshot(self, row: int) -> None:
        if self.cache.is_snapshot(row):
            self.cache.release(row)
