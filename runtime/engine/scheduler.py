"""Decides which tokens the next step computes, and records what the step returns.

There is one kind of step. It first advances every running sequence that decodes, by one token and
its draft tokens. Then it spends the rest of the token budget on prompts: each running or newly
admitted prompt gets one chunk before any gets more. The step that computes the last known token of
a sequence also samples its next token.

With async scheduling a step is scheduled before the tokens of the last one are known: the scheduler
counts these tokens without their values. With pipeline parallelism a sequence decodes in only one
of the steps in flight, so that the stages work on different sequences.
"""

from __future__ import annotations

from bisect import insort

from llmkit.runtime.engine.block_pool import BlockPool
from llmkit.runtime.engine.drafting import DraftProposer
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_outputs import EngineOutput, FinishReason, Logprobs
from llmkit.runtime.engine.host_cache import HostCache, HostCopies
from llmkit.runtime.engine.scheduler_output import (
    ModelRunnerOutput,
    ScheduledRequest,
    SchedulerOutput,
)
from llmkit.runtime.engine.sequence import HOST_BLOCK, NULL_BLOCK, Sequence
from llmkit.runtime.engine.state_scheduler import NO_STATE_ROWS, StateScheduler

MAX_SKIPS = 16  # how often later sequences may be admitted before one that does not fit
MAX_ADMISSION_ATTEMPTS = 64  # waiting sequences that one step looks at
LOGITS_NOT_FINITE = "the model's logits were not finite"


class Scheduler:
    """The waiting and running sequences, and a block pool for each attention window."""

    def __init__(
        self,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...],
        draft_proposer: DraftProposer | None = None,
    ) -> None:
        assert not (config.async_scheduling and config.num_speculative_tokens), (
            "drafting needs the last step's tokens"
        )
        self.config = config
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pools = [
            BlockPool(config.num_blocks_for(window), _host_cache(config))
            for window in config.sliding_windows
        ]
        self.states = StateScheduler(config) if config.has_recurrent_states else None
        self.waiting: list[Sequence] = []  # in the order of their priority keys
        self.running: list[Sequence] = []  # in the order of their priority keys
        # Unused blocks of each pool that hold values that are not finite; see take_blocks_to_zero.
        self._blocks_to_zero: list[list[int]] = [[] for _ in self.pools]
        self._draft_proposer = draft_proposer
        self._device_counts_tokens = str(config.device).startswith("cuda")
        self._has_sliding_window = any(window is not None for window in config.sliding_windows)
        self._free_slots = list(range(config.max_num_seqs))
        self._sequences: dict[str, Sequence] = {}  # waiting and running ones, by request id
        self._num_arrivals = 0

        # Counters since the start
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_prefix_stateless = 0
        self.num_host_hits = 0
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.num_accepted_tokens_per_pos = [0] * config.num_speculative_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError when it can never finish."""
        num_prompt_tokens = sequence.num_prompt_tokens
        max_tokens = sequence.request.sampling_params.max_tokens
        limit = min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)
        if not num_prompt_tokens:
            raise RequestError(
                "invalid_value",
                "the prompt is empty; at least one token was expected",
                "prompt",
            )
        if sequence.max_num_tokens > limit:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {num_prompt_tokens} tokens and {max_tokens} were asked for, "
                f"{sequence.max_num_tokens} together; at most {limit} fit",
                "prompt" if num_prompt_tokens >= limit else "max_tokens",
            )
        params = sequence.request.sampling_params
        sequence.end_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            sequence.end_token_ids |= self.eos_token_ids
        sequence.waits_for_last_token = self._waits_for_token(sequence)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._sequences[sequence.request.request_id] = sequence
        self._enqueue(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its blocks; False when no such request is waiting or running."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence)
        return True

    def num_reusable_tokens(self, sequence: Sequence) -> int:
        """The tokens of a waiting sequence that it would find in the prefix cache now."""
        tables, _ = self._find_cached_prefix(sequence)
        return len(tables[0]) * self.config.block_size

    def hold(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue until `release`."""
        self.waiting.remove(sequence)

    def release(self, sequence: Sequence) -> None:
        """Put a sequence that was held back into the queue."""
        self._enqueue(sequence)

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step, and allocate KV cache blocks for them."""
        if self.states is not None:
            self.states.begin_step()
        if self._has_sliding_window:
            for sequence in self.running:
                self._free_out_of_window(sequence)
        preempted = self._allocate_decode_blocks()
        requests = self._schedule_tokens(admit=not preempted)
        # Without a request, all running prompts wait for blocks that the others hold.
        while not requests and len(self.running) > 1 and not self._has_tokens_in_flight():
            self._preempt(self.running[-1])
            requests = self._schedule_tokens(admit=False)
        return SchedulerOutput(requests)

    def update(self, step: SchedulerOutput, output: ModelRunnerOutput) -> list[EngineOutput]:
        """Record the result of a step.

        Returns one output for each request that got tokens or failed.
        """
        outputs = []
        for index, request in enumerate(step.requests):
            sequence = request.sequence
            token_ids = output.token_ids[index]
            if request.samples_next_token:
                sequence.num_in_flight -= 1
            if output.prompt_logprobs is not None:
                logprobs = output.prompt_logprobs[index]
                stop = request.start + len(logprobs)
                sequence.prompt_logprobs[request.start : stop] = logprobs
            if sequence.is_finished:  # cancelled, or ended by a step before
                continue
            if request.num_draft_tokens:
                self._update_computed_tokens(request, token_ids)
            else:
                sequence.num_draft_computed_tokens = request.start + request.num_tokens
            if request.samples_next_token:
                if len(sequence.token_ids) == sequence.num_prompt_tokens:
                    self.num_prompt_tokens += sequence.num_prompt_tokens
            elif token_ids[-1] >= 0:
                continue
            if sequence.is_plain and len(token_ids) == 1 and token_ids[0] >= 0:
                outputs.append(self._append_plain_token(sequence, token_ids))
                continue
            sampled_logprobs = [] if output.logprobs is None else output.logprobs[index]
            embedding = None
            if output.embeddings:
                embedding = output.embeddings.get(sequence.request.request_id)
            outputs.append(self._append_tokens(sequence, token_ids, sampled_logprobs, embedding))
        return outputs

    def abort_step(self, step: SchedulerOutput, message: str) -> EngineOutput:
        """Undo a step that could not be computed.

        The request with the most tokens in the step fails; the others wait again.
        """
        largest = max(step.requests, key=lambda request: request.num_tokens).sequence
        for request in step.requests:
            sequence = request.sequence
            sequence.num_in_flight -= request.samples_next_token
            for pool, table in zip(self.pools, sequence.block_tables, strict=True):
                pool.evict(_real_blocks(table))
            self._forget(sequence)
            if sequence is not largest and not sequence.is_finished:
                self._preempt(sequence)
        self._finish(largest)
        return EngineOutput(
            request_id=largest.request.request_id,
            token_ids=[],
            finish_reason="error",
            error=message,
            prompt_tokens=largest.num_prompt_tokens,
            cached_tokens=largest.num_cached_tokens or 0,
        )

    def take_host_copies(self) -> list[HostCopies]:
        """The copies from and to host memory that must be made before the next step.

        For each pool, and then for the recurrent states where the model has any.
        """
        hosts = self._hosts
        return [HostCopies() if host is None else host.take_copies() for host in hosts]

    @property
    def host_caches(self) -> list[HostCache]:
        """What is in host memory: of each pool, and of the recurrent states."""
        return [host for host in self._hosts if host is not None]

    @property
    def _hosts(self) -> list[HostCache | None]:
        hosts = [pool.host for pool in self.pools]
        if self.states is not None:
            hosts.append(self.states.cache.host)
        return hosts

    def take_blocks_to_zero(self) -> list[list[int]] | None:
        """The blocks of each pool that the runner must zero before the next allocation; or None."""
        if not any(self._blocks_to_zero):
            return None
        blocks = self._blocks_to_zero
        self._blocks_to_zero = [[] for _ in self.pools]
        return blocks

    # Recording a step

    def _update_computed_tokens(self, request: ScheduledRequest, token_ids: list[int]) -> None:
        """Correct the counts once the draft tokens of a request are verified.

        Rejected draft tokens are not computed tokens: later tokens overwrite their KV cache slots.
        """
        sequence = request.sequence
        num_drafts = request.num_draft_tokens
        num_accepted = len(token_ids) - 1
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.num_accepted_tokens_per_pos[position] += 1
        sequence.num_computed_tokens = request.start + len(token_ids)
        if self.states is not None:
            self.states.accept(sequence, len(token_ids))
        # The draft model has computed every known token and every draft token except the last.
        num_known = request.stop - num_drafts
        sequence.num_draft_computed_tokens = num_known + min(num_drafts - 1, num_accepted)

    def _append_plain_token(self, sequence: Sequence, token_ids: list[int]) -> EngineOutput:
        """What `_append_tokens` does for a token of a plain sequence: the most frequent case."""
        sequence.token_ids.append(token_ids[0])
        self.num_generation_tokens += 1
        finish_reason = self._finish_reason(sequence, token_ids[0])
        if finish_reason is not None:
            self._finish(sequence)
        # Values are passed by their order, because names would take twice as long.
        return EngineOutput(
            sequence.request.request_id,
            token_ids,
            finish_reason,
            None,
            sequence.num_prompt_tokens,
            sequence.num_cached_tokens or 0,
        )

    def _append_tokens(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[Logprobs],
        embedding: bytes | None,
    ) -> EngineOutput:
        request = sequence.request
        params = request.sampling_params
        is_first_output = len(sequence.token_ids) == sequence.num_prompt_tokens
        new_token_ids: list[int] = []
        finish_reason: FinishReason | None = None
        for token_id in token_ids:
            if token_id < 0:
                finish_reason = "error"
            elif request.pooling:  # its sampled token is not wanted
                finish_reason = "stop"
            else:
                sequence.token_ids.append(token_id)
                new_token_ids.append(token_id)
                if sequence.thinking is not None:
                    sequence.thinking.append(token_id)
                finish_reason = self._finish_reason(sequence, token_id)
            if finish_reason is not None:
                break
        self.num_generation_tokens += len(new_token_ids)
        if finish_reason is not None:
            self._finish(sequence, zero_blocks=finish_reason == "error")

        returns_prompt_logprobs = is_first_output and params.prompt_logprobs is not None
        return EngineOutput(
            request_id=request.request_id,
            token_ids=new_token_ids,
            finish_reason=finish_reason,
            error=LOGITS_NOT_FINITE if finish_reason == "error" else None,
            prompt_tokens=sequence.num_prompt_tokens,
            cached_tokens=sequence.num_cached_tokens or 0,
            logprobs=None if params.logprobs is None else logprobs[: len(new_token_ids)],
            prompt_logprobs=sequence.prompt_logprobs if returns_prompt_logprobs else None,
            embedding=embedding if finish_reason == "stop" else None,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Why the token just appended ends the sequence; None when it does not."""
        if token_id in sequence.end_token_ids:
            return "stop"
        matcher = sequence.grammar_matcher
        if matcher is not None:
            matcher.accept_token(token_id)
            if matcher.is_terminated():
                return "stop"
        if len(sequence.token_ids) >= sequence.max_num_tokens:
            return "length"
        return None

    # Choosing the tokens of a step

    def _schedule_tokens(self, admit: bool) -> list[ScheduledRequest]:
        """Divide the token budget of a step. admit: whether waiting sequences may begin to run."""
        budget = self.config.max_num_batched_tokens
        chunk_size = self.config.prefill_chunk_size
        requests: list[ScheduledRequest] = []

        # With a pipeline, each of the steps in flight gets its share of the decoding sequences.
        num_stages = self.config.pipeline_parallel_size
        max_decodes = -(-len(self.running) // num_stages)
        num_decodes = 0
        for sequence in self.running:
            if not budget or num_decodes >= max_decodes:
                break
            if sequence.num_uncomputed_tokens != 1:
                continue
            # A step in flight may still be sampling its last token, which only the device knows
            # then.
            if sequence.num_in_flight and (num_stages > 1 or sequence.waits_for_last_token):
                continue
            # The token in flight decides whether the next one is forced.
            thinking = sequence.thinking
            if thinking is not None and 0 < sequence.num_in_flight >= thinking.num_free_tokens:
                continue
            num_decodes += 1
            draft: list[int] = []
            if self._draft_proposer is not None:
                draft = self._propose_draft(self._draft_proposer, sequence, budget - 1)
            start = sequence.num_computed_tokens
            num_tokens = self._reserve(sequence, 1 + len(draft))
            if num_tokens:
                requests.append(self._make_request(sequence, start, draft))
            budget -= num_tokens

        prompts: list[Sequence] = []
        if num_decodes < len(self.running):
            prompts = [sequence for sequence in self.running if sequence.num_uncomputed_tokens > 1]
        starts: dict[Sequence, int] = {}  # the first position that the step computes of a prompt
        for sequence in prompts:
            starts[sequence] = sequence.num_computed_tokens
            num_tokens = self._chunk_of(sequence, min(chunk_size, budget))
            budget -= self._reserve(sequence, num_tokens)

        skipped: list[Sequence] = []
        for sequence in self.waiting[:MAX_ADMISSION_ATTEMPTS] if admit else ():
            if not budget or not self._free_slots:
                break
            if skipped and skipped[-1].skip_count >= MAX_SKIPS:
                break
            if sequence.num_in_flight or not self._admit(sequence):
                skipped.append(sequence)  # smaller ones may pass it, up to MAX_SKIPS times
                continue
            for other in skipped:
                other.skip_count += 1
            starts[sequence] = sequence.num_computed_tokens
            num_tokens = self._chunk_of(sequence, min(chunk_size, budget))
            budget -= self._reserve(sequence, num_tokens)
            prompts.append(sequence)

        for sequence in prompts:  # the rest of the budget, in the same order
            budget -= self._reserve(sequence, self._chunk_of(sequence, budget))

        for sequence, start in starts.items():
            if sequence.num_computed_tokens > start:
                requests.append(self._make_request(sequence, start, draft=[]))
        if starts or self._draft_proposer is not None:
            requests.sort(key=lambda request: request.num_tokens > 1)
        return requests

    def _chunk_of(self, sequence: Sequence, limit: int) -> int:
        """How many tokens of a prompt to compute in a step, at most `limit`."""
        num_uncomputed = sequence.num_uncomputed_tokens
        if self.states is None or num_uncomputed <= limit:
            return min(num_uncomputed, limit)
        alignment = self.config.state_alignment
        stop = (sequence.num_computed_tokens + limit) // alignment * alignment
        aligned = stop - sequence.num_computed_tokens
        return aligned if aligned > 0 else limit

    def _has_tokens_in_flight(self) -> bool:
        return any(sequence.num_in_flight for sequence in self.running)

    def _propose_draft(
        self, draft_proposer: DraftProposer, sequence: Sequence, budget: int
    ) -> list[int]:
        """Draft tokens for a sequence, as many as the available blocks can hold.

        No other sequence is preempted for them.
        """
        max_tokens = min(
            self.config.num_speculative_tokens,
            budget,
            sequence.request.sampling_params.max_tokens - sequence.num_output_tokens - 1,
        )
        if sequence.thinking is not None:
            # The token after the drafts must be free, too.
            max_tokens = min(max_tokens, sequence.thinking.num_free_tokens - 1)
        if max_tokens <= 0 or sequence.needs_known_tokens:
            return []
        draft = draft_proposer.propose(sequence, max_tokens)
        return draft[: self._allocatable(sequence, 1 + len(draft)) - 1]

    def _waits_for_token(self, sequence: Sequence) -> bool:
        """Whether the host must know the last token of a sequence before the next step.

        A GPU counts the tokens that it samples itself; see `LogitsProcessorTables`.
        """
        if self._device_counts_tokens:
            return sequence.grammar_matcher is not None
        return sequence.needs_known_tokens

    def _reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Schedule up to `num_tokens` more tokens of a sequence, as far as blocks are available.

        Returns their number.

        Other sequences can share the blocks that become full at once: in each layer, a step writes
        all keys and values before it reads any.
        """
        stop = sequence.num_computed_tokens + num_tokens
        if stop > sequence.num_block_tokens:
            num_tokens = self._allocatable(sequence, num_tokens)
            stop = sequence.num_computed_tokens + num_tokens
            self._allocate_blocks(sequence, stop)
        sequence.num_computed_tokens = stop
        if stop // self.config.block_size > sequence.num_hashed_blocks:
            self._cache_full_blocks(sequence)
        return num_tokens

    def _make_request(self, sequence: Sequence, start: int, draft: list[int]) -> ScheduledRequest:
        """The tokens that were reserved for a sequence since `start`."""
        stop = sequence.num_computed_tokens
        num_tokens = sequence.num_tokens
        samples_next_token = stop - len(draft) == num_tokens
        token_ids = sequence.token_ids[start:stop]
        state_rows = NO_STATE_ROWS
        if self.states is not None:
            state_rows = self.states.schedule(sequence, start, stop, len(draft))
        forced_token_id = None
        if sequence.thinking is not None and samples_next_token:
            forced_token_id = sequence.thinking.forced_token_id
        # Values are passed by their order, because names would take twice as long.
        request = ScheduledRequest(
            sequence,
            start,
            stop - start,
            samples_next_token,
            num_tokens - sequence.num_prompt_tokens,
            token_ids + draft if draft else token_ids,
            len(draft),
            state_rows,
            forced_token_id,
        )
        if samples_next_token:
            sequence.num_in_flight += 1
        return request

    # Admission and preemption

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.priority_key)

    def _admit(self, sequence: Sequence) -> bool:
        """Start running a waiting sequence, and reuse the blocks of its longest cached prefix.

        Returns False, without a change, when there are too few blocks for its prompt.
        """
        block_size = self.config.block_size
        num_tokens = sequence.num_tokens
        tables, num_matching_tokens = self._find_cached_prefix(sequence)
        num_cached_tokens = len(tables[0]) * block_size
        missing = []
        for window, table in zip(self.config.sliding_windows, tables, strict=True):
            needed = num_tokens
            if window is not None:  # blocks behind the window are freed between chunks
                needed = min(num_tokens, num_cached_tokens + self.config.prefill_chunk_size)
            missing.append(-(-needed // block_size) - len(table))
        for pool, table, count in zip(self.pools, tables, missing, strict=True):
            count += table.count(HOST_BLOCK)
            if count + sum(map(pool.is_cached, table)) > pool.num_available_blocks:
                return False

        num_host_blocks = sum(HOST_BLOCK in blocks for blocks in zip(*tables, strict=True))
        for pool, table, count in zip(self.pools, tables, missing, strict=True):
            pool.touch(_real_blocks(table))
            self._load_blocks(sequence, pool, table)
            table += pool.allocate(count)
        sequence.block_tables = tables
        sequence.num_block_tokens = min(map(len, tables)) * block_size
        sequence.slot = self._free_slots.pop()
        sequence.num_computed_tokens = num_cached_tokens
        sequence.num_draft_computed_tokens = num_cached_tokens
        sequence.num_hashed_blocks = num_cached_tokens // block_size
        if self.states is not None:
            self.states.start(sequence, num_cached_tokens, num_matching_tokens)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_cached_tokens
            self.num_prefix_queries += num_tokens
            self.num_prefix_hits += num_cached_tokens
            self.num_host_hits += num_host_blocks * block_size
            if self.states is not None:
                self.num_prefix_stateless += num_matching_tokens - num_cached_tokens
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.priority_key)
        return True

    def _find_cached_prefix(self, sequence: Sequence) -> tuple[list[list[int]], int]:
        """The block tables of the longest cached prefix, and the tokens of cached blocks.

        These are more than those of the prefix where a model has recurrent layers: a prefix ends
        where their states were kept.

        Blocks behind a sliding window are NULL_BLOCK, those in host memory HOST_BLOCK. The prefix
        never includes the last token, because the next token is sampled from that token's logits.
        """
        block_size = self.config.block_size
        windows = self.config.sliding_windows
        num_blocks = (sequence.num_tokens - 1) // block_size
        if not self.config.enable_prefix_caching or _must_compute_prompt(sequence):
            num_blocks = 0
        hashes = sequence.block_hashes(num_blocks, block_size) if num_blocks else []

        # Blocks of the longest prefix for which every window has cached the blocks that it sees.
        longest = 0
        num_matching = 0
        consecutive = [0] * len(self.pools)  # cached blocks in a row, up to the current one
        for count, block_hash in enumerate(hashes, start=1):
            for index, pool in enumerate(self.pools):
                is_cached = pool.has_block(block_hash)
                consecutive[index] = consecutive[index] + 1 if is_cached else 0
            visible = []  # blocks that each window sees from the end of this prefix
            for window in windows:
                num_visible = count
                if window is not None:
                    num_visible = min(count, -(-(window - 1) // block_size))
                visible.append(num_visible)
            if all(run >= needed for run, needed in zip(consecutive, visible, strict=True)):
                num_matching = count
                if self.states is None or self.states.has_snapshot(block_hash):
                    longest = count
            elif None in windows and consecutive[windows.index(None)] < count:
                break

        tables = []
        for pool, window in zip(self.pools, windows, strict=True):
            first = 0
            if window is not None:
                first = max(0, longest * block_size - window + 1) // block_size
            found = [pool.get_cached_block(block_hash) for block_hash in hashes[first:longest]]
            tables.append(
                [NULL_BLOCK] * first + [HOST_BLOCK if block is None else block for block in found]
            )
        return tables, num_matching * block_size

    def _load_blocks(self, sequence: Sequence, pool: BlockPool, table: list[int]) -> None:
        """Allocate blocks for those of a table that are in host memory, and load them."""
        places = [index for index, block in enumerate(table) if block == HOST_BLOCK]
        if not places:
            return
        assert pool.host is not None
        hashes = sequence.block_hashes(len(table), self.config.block_size)
        # What is allocated may push other blocks out of host memory, but not these.
        pool.host.lock(hashes[index] for index in places)
        for index, block in zip(places, pool.allocate(len(places)), strict=True):
            pool.load_block(block, hashes[index])
            table[index] = block

    def _preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks and let it wait; its tokens are computed again later."""
        self._free_sequence(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_draft_computed_tokens = 0
        sequence.num_hashed_blocks = 0
        sequence.skip_count = MAX_SKIPS  # no other sequence takes the blocks that it freed
        self._enqueue(sequence)
        self.num_preemptions += 1

    def _finish(self, sequence: Sequence, zero_blocks: bool = False) -> None:
        """Remove a sequence.

        zero_blocks: its blocks hold values that must not reach other sequences.
        """
        del self._sequences[sequence.request.request_id]
        sequence.is_finished = True
        if zero_blocks:
            self._forget(sequence)
        if self._draft_proposer is not None:
            self._draft_proposer.forget(sequence)
        if not sequence.block_tables:
            self.waiting.remove(sequence)
            return
        if zero_blocks:
            for pool, table in zip(self.pools, sequence.block_tables, strict=True):
                pool.evict(_real_blocks(table))
        unused = self._free_sequence(sequence)
        if zero_blocks:
            for blocks, more in zip(self._blocks_to_zero, unused, strict=True):
                blocks += more

    def _forget(self, sequence: Sequence) -> None:
        """Drop what other memory than its blocks has of a sequence whose values may be wrong."""
        if self.states is not None:
            self.states.forget(sequence)
        if self.config.num_host_blocks:
            num_blocks = len(sequence.token_ids) // self.config.block_size
            hashes = sequence.block_hashes(num_blocks, self.config.block_size)
            for pool in self.pools:
                pool.forget(hashes)

    # KV cache blocks

    def _allocate_decode_blocks(self) -> bool:
        """Give every decoding sequence a block for its next token, in the order of priority.

        When no block is available, the last running sequence is preempted. Returns whether any was.
        """
        num_preemptions = self.num_preemptions
        for sequence in list(self.running):
            if sequence.num_tokens <= sequence.num_block_tokens:
                continue
            if sequence.num_uncomputed_tokens != 1:
                continue
            # A sequence may preempt itself, which empties its block tables.
            while sequence.block_tables:
                if self._allocate_blocks(sequence, sequence.num_tokens):
                    break
                self._preempt(self.running[-1])
        return self.num_preemptions > num_preemptions

    def _allocatable(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of the sequence's next tokens its own and the available blocks can hold."""
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            capacity = (len(table) + pool.num_available_blocks) * self.config.block_size
            num_tokens = min(num_tokens, capacity - sequence.num_computed_tokens)
        return num_tokens

    def _allocate_blocks(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block tables to `num_tokens` tokens.

        Returns False, without a change, when there are too few blocks.
        """
        if num_tokens <= sequence.num_block_tokens:
            return True
        num_blocks = -(-num_tokens // self.config.block_size)
        missing = [max(0, num_blocks - len(table)) for table in sequence.block_tables]
        for pool, count in zip(self.pools, missing, strict=True):
            if count > pool.num_available_blocks:
                return False
        for pool, table, count in zip(self.pools, sequence.block_tables, missing, strict=True):
            if count:
                table += pool.allocate(count)
        sequence.num_block_tokens = min(map(len, sequence.block_tables)) * self.config.block_size
        return True

    def _cache_full_blocks(self, sequence: Sequence) -> None:
        """Put the blocks that the scheduled step fills into the prefix cache.

        A later step can read them at once, because steps run in the order of scheduling.
        """
        if not self.config.enable_prefix_caching:
            return
        block_size = self.config.block_size
        first = sequence.num_hashed_blocks
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // block_size
        if num_full <= first:
            return
        hashes = sequence.block_hashes(num_full, block_size)
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            for block, block_hash in zip(table[first:num_full], hashes[first:], strict=True):
                if block != NULL_BLOCK:
                    pool.cache_block(block, block_hash)
        sequence.num_hashed_blocks = num_full

    def _free_out_of_window(self, sequence: Sequence) -> None:
        """Free the blocks that no later token of the sequence attends to."""
        tables = zip(self.config.sliding_windows, self.pools, sequence.block_tables, strict=True)
        for window, pool, table in tables:
            if window is None:
                continue
            num_outside = max(0, sequence.num_computed_tokens - window + 1)
            index = min(len(table), num_outside // self.config.block_size) - 1
            while index >= 0 and table[index] != NULL_BLOCK:
                pool.free([table[index]])
                table[index] = NULL_BLOCK
                index -= 1

    def _free_sequence(self, sequence: Sequence) -> list[list[int]]:
        """Free a running sequence's blocks and slot; return the unused blocks of each pool."""
        unused = [
            pool.free(_real_blocks(table))
            for pool, table in zip(self.pools, sequence.block_tables, strict=True)
        ]
        if self.states is not None:
            self.states.stop(sequence)
        sequence.block_tables = []
        sequence.num_block_tokens = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self.running.remove(sequence)
        return unused


def _host_cache(config: EngineConfig) -> HostCache | None:
    if not config.num_host_blocks or not config.enable_prefix_caching:
        return None
    return HostCache(config.num_host_blocks)


def _real_blocks(table: list[int]) -> list[int]:
    return [block for block in table if block >= 0]


def _must_compute_prompt(sequence: Sequence) -> bool:
    """Whether the hidden states of all prompt tokens are needed.

    Then no part of the prompt may come from the prefix cache.
    """
    request = sequence.request
    return request.sampling_params.prompt_logprobs is not None or request.pooling == "mean"
