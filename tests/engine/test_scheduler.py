"""The scheduler and its blocks under random arrivals, cancellations and steps, without a model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmkit.runtime.engine.block_pool import BlockPool
from llmkit.runtime.engine.drafting import NgramIndex, NgramProposer, accepted_tokens
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.host_cache import HostCopies
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler import MAX_SKIPS, Scheduler
from llmkit.runtime.engine.scheduler_output import (
    ModelRunnerOutput,
    ScheduledRequest,
    SchedulerOutput,
)
from llmkit.runtime.engine.sequence import NULL_BLOCK, Sequence
from llmkit.runtime.engine.state_scheduler import NO_ROW

EOS = 1
FAILS = 999  # a prompt that starts so gets logits that are not finite


def scheduler(**sizes: object) -> Scheduler:
    chosen = {
        "max_model_len": 40,
        "num_blocks": 12,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
    }
    config: EngineConfig = EngineConfig(device=None, dtype=None, **(chosen | sizes))
    return Scheduler(config, (EOS,), NgramProposer())


def sequence(
    name: str, prompt: list[int], max_tokens: int = 8, priority: int = 0, salt: str = ""
) -> Sequence:
    return Sequence(
        EngineRequest(name, prompt, SamplingParams(max_tokens=max_tokens), priority, salt), seed=0
    )


def answer(tokens: list[int]) -> int:
    """The next token of the fake model.

    It depends on the last two tokens, often repeats, and is sometimes EOS.
    """
    return -1 if tokens[0] == FAILS else 1 + hash(tuple(tokens[-2:])) % 13


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and (token := answer(tokens)) >= 0:
        tokens.append(token)
        if token == EOS:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Computes nothing, but remembers which prefix each KV cache slot ends.

    So a lost block is noticed.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.slots: dict[tuple[int, int, int], object] = {}  # by pool, block and offset
        self.last_token_ids: dict[int, int] = {}  # by sequence slot
        self.states: dict[int, object] = {}  # the prefix of the recurrent state in each row
        # Of each pool, and then of the states: what each row of host memory has.
        self.host = [dict[int, object]() for _ in (*config.sliding_windows, "states")]

    def copy(self, copies: list[HostCopies]) -> None:
        """All saves of the device's rows as they are, then all loads."""
        num_pools = len(self.config.sliding_windows)
        for pool, (of_pool, host) in enumerate(zip(copies, self.host, strict=False)):
            for row, host_row in of_pool.saves:
                host[host_row] = self.states[row] if pool == num_pools else self.block(pool, row)
            for host_row, row in of_pool.loads:
                if pool == num_pools:
                    self.states[row] = host[host_row]
                else:
                    self.slots |= {
                        (pool, row, offset): prefix for offset, prefix in host[host_row].items()
                    }

    def block(self, pool: int, block: int) -> dict[int, object]:
        size = self.config.block_size
        return {offset: self.slots[pool, block, offset] for offset in range(size)}

    def launch(self, step: SchedulerOutput) -> ModelRunnerOutput:
        size = self.config.block_size
        contexts = []
        for request in step.requests:
            sequence = request.sequence
            tokens = request.token_ids or [max(0, self.last_token_ids[sequence.slot])]
            assert len(tokens) == request.num_tokens
            contexts.append([*sequence.token_ids[: request.start], *tokens])
        for request, context in zip(step.requests, contexts, strict=True):
            for position in range(request.start, request.stop):
                for pool, table in enumerate(request.sequence.block_tables):
                    block = table[position // size]
                    assert block != NULL_BLOCK, "a token is written into a block that was freed"
                    slot = (pool, block, position % size)
                    self.slots[slot] = self.prefix_of(request, context, position)
        if self.config.has_recurrent_states:
            self.run_recurrent_layer(step.requests, contexts)
        token_ids = []
        for request, context in zip(step.requests, contexts, strict=True):
            for pool, window in enumerate(self.config.sliding_windows):
                first = 0 if window is None else max(0, request.start - window + 1)
                for position in range(first, request.stop):
                    block = request.sequence.block_tables[pool][position // size]
                    assert self.slots[pool, block, position % size] == self.prefix_of(
                        request, context, position
                    ), "the cache holds other tokens"
            known = request.stop - request.num_draft_tokens
            sampled = [answer(context[:stop]) for stop in range(known, request.stop + 1)]
            self.last_token_ids[request.sequence.slot] = sampled[-1]
            token_ids.append(accepted_tokens(context[known:], sampled))
        return output_of(token_ids)

    def run_recurrent_layer(
        self, requests: list[ScheduledRequest], contexts: list[list[int]]
    ) -> None:
        reads = Counter(request.state_rows.initial_row for request in requests)
        written: set[int] = set()
        for request, context in zip(requests, contexts, strict=True):
            initial_row, writes = request.state_rows
            assert (initial_row == NO_ROW) == (request.start == 0)
            if request.start:
                state = self.states[initial_row]
                assert state == self.prefix_of(request, context, request.start - 1), "another state"
            ends = [end for end, _ in writes]
            assert ends == sorted(set(ends)) and ends[-1] == request.num_tokens
            if request.num_draft_tokens:
                assert ends == list(range(1, request.num_tokens + 1)), "any draft may be rejected"
            for _, row in writes:
                others = reads[row] - (row == initial_row)
                assert row not in written and not others, "two sequences use a row"
                assert 0 <= row < self.config.num_state_rows
                written.add(row)
        for request, context in zip(requests, contexts, strict=True):
            for end, row in request.state_rows.writes:
                self.states[row] = self.prefix_of(request, context, request.start + end - 1)

    @staticmethod
    def prefix_of(request: ScheduledRequest, context: list[int], position: int) -> object:
        return request.sequence.request.cache_salt, hash(tuple(context[: position + 1]))


def output_of(token_ids: list[list[int]]) -> ModelRunnerOutput:
    return ModelRunnerOutput(token_ids, logprobs=None, prompt_logprobs=None, embeddings={})


class Driver:
    """The engine's step with the fake runner."""

    def __init__(self, state: Scheduler) -> None:
        self.state = state
        self.runner = FakeRunner(state.config)
        self.in_flight: tuple[SchedulerOutput, ModelRunnerOutput] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.state.running or self.state.waiting or self.in_flight)

    def step(self) -> list[tuple[str, list[int], str | None]]:
        step = self.state.schedule()
        assert step.requests or self.in_flight or not self.has_work, "work without progress"
        self.runner.copy(self.state.take_host_copies())
        check(self.state, step.requests)
        finished = (step, self.runner.launch(step)) if step.requests else None
        if self.state.config.async_scheduling:
            finished, self.in_flight = self.in_flight, finished
        outputs = self.state.update(*finished) if finished else []
        check(self.state, step.requests)
        return [(output.request_id, output.token_ids, output.finish_reason) for output in outputs]


def check(state: Scheduler, requests: list[ScheduledRequest]) -> None:
    for index, pool in enumerate(state.pools):
        pool.check_invariants()
        tables = [sequence.block_tables[index] for sequence in state.running]
        held = Counter(block for table in tables for block in table if block != NULL_BLOCK)
        references = {block: count for block, count in enumerate(pool._ref_counts) if count}
        assert references == held, "a reference for each holder"
    if state.states is not None:
        state.states.cache.check_invariants()
    assert all(not s.block_tables and s.num_computed_tokens == 0 for s in state.waiting)
    assert len({s.slot for s in state.running}) == len(state.running) <= state.config.max_num_seqs
    num_tokens = sum(request.num_tokens for request in requests)
    assert num_tokens <= state.config.max_num_batched_tokens
    assert all(request.num_tokens > 0 for request in requests)
    running = [sequence.priority_key for sequence in state.running]
    waiting = [sequence.priority_key for sequence in state.waiting]
    assert running == sorted(running)
    assert waiting == sorted(waiting)


class RandomRequests(RuleBasedStateMachine):
    """In every mode and for every order of events, a request gets the tokens it gets alone."""

    @initialize(
        budget=st.integers(1, 40),
        blocks=st.integers(10, 30),
        windows=st.sampled_from([(None,), (None, 6), (6,), (9, None), (17,)]),
        chunk=st.sampled_from([3, 8, 100]),
        mode=st.sampled_from(["plain", "async", "speculate"]),
        prefix_cache=st.booleans(),
        checkpoints=st.sampled_from([None, None, 0, 2, 5, 20]),
        host_blocks=st.sampled_from([0, 1, 3, 10, 60]),
    )
    def start(
        self,
        budget: int,
        blocks: int,
        windows: tuple[int | None, ...],
        chunk: int,
        mode: str,
        prefix_cache: bool,
        checkpoints: int | None,
        host_blocks: int,
    ) -> None:
        """checkpoints: of recurrent states; None: the model has no recurrent layers."""
        self.driver = Driver(
            scheduler(
                max_num_batched_tokens=budget,
                num_blocks=blocks,
                sliding_windows=windows,
                prefill_chunk_size=chunk,
                async_scheduling=mode == "async",
                num_speculative_tokens=3 if mode == "speculate" else 0,
                enable_prefix_caching=prefix_cache,
                has_recurrent_states=checkpoints is not None,
                num_state_snapshots=checkpoints or 0,
                num_host_blocks=host_blocks,
                num_host_states=host_blocks // 2,
            )
        )
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    @rule(
        shared=st.integers(0, 20),
        own=st.lists(st.integers(2, 9), min_size=1, max_size=10),
        max_tokens=st.integers(1, 10),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "", "other"]),
        fails=st.integers(0, 9).map(lambda n: n == 0),
    )
    def add(
        self, shared: int, own: list[int], max_tokens: int, priority: int, salt: str, fails: bool
    ) -> None:
        name = str(len(self.asked))
        prompt = [FAILS] * fails + [2 + i % 5 for i in range(shared)][fails:] + own
        self.asked[name] = (prompt, max_tokens)
        self.got[name] = []
        self.driver.state.add(sequence(name, prompt, max_tokens, priority, salt))

    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        if str(number) in self.asked and self.driver.state.cancel(str(number)):
            assert str(number) not in self.ended
            self.ended[str(number)] = "cancelled"
            assert not self.driver.state.cancel(str(number))

    @precondition(lambda self: self.driver.has_work)
    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            for name, tokens, reason in self.driver.step():
                assert name not in self.ended, "an output after the last one"
                self.got[name] += tokens
                if reason:
                    self.ended[name] = reason

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if hasattr(self, "driver"):
            check(self.driver.state, [])

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        for _ in range(3000):
            if not self.driver.has_work:
                break
            self.steps(1)
        state = self.driver.state
        assert not self.driver.has_work, "it never ends"
        assert all(pool.num_used_blocks == 0 for pool in state.pools)
        if state.states is not None:
            state.states.begin_step()
            assert not state.states.cache.num_held_rows
        assert self.ended.keys() == self.asked.keys()
        for name, (prompt, max_tokens) in self.asked.items():
            expected = alone(prompt, max_tokens)
            if self.ended[name] == "cancelled":
                assert self.got[name] == expected[: len(self.got[name])]
                continue
            assert self.got[name] == expected
            reason = "error" if prompt[0] == FAILS else "stop" if expected[-1] == EOS else "length"
            assert self.ended[name] == reason
        assert state.num_generation_tokens == sum(map(len, self.got.values()))
        assert state.num_prompt_tokens <= sum(len(prompt) for prompt, _ in self.asked.values())


@pytest.mark.parametrize("mode", ["plain", "async", "speculate"])
def test_states_of_a_thousand_random_arrivals_cancels_and_preemptions_are_all_freed(
    mode: str,
) -> None:
    """A hybrid: its sequences have blocks, a slot and recurrent states, of which some are kept."""
    driver = Driver(
        scheduler(
            num_blocks=20,
            max_num_seqs=6,
            async_scheduling=mode == "async",
            num_speculative_tokens=3 if mode == "speculate" else 0,
            has_recurrent_states=True,
            num_state_snapshots=12,
        )
    )
    state = driver.state
    assert state.states is not None
    random = Random(7)
    system_prompts = [[2 + (i * n) % 5 for i in range(8 * n)] for n in (0, 1, 2)]
    asked: dict[str, tuple[list[int], int]] = {}
    got: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    while len(asked) < 1000 or driver.has_work:
        for _ in range(random.randrange(4) if len(asked) < 1000 else 0):
            name = str(len(asked))
            own = [random.randint(2, 9) for _ in range(random.randint(1, 12))]
            asked[name] = (random.choice(system_prompts) + own, random.randint(1, 12))
            got[name] = []
            state.add(sequence(name, *asked[name], priority=random.randrange(2)))
        if asked and random.random() < 0.4:
            chosen = random.choice([*asked][-20:])
            if state.cancel(chosen):
                cancelled.add(chosen)
        for name, tokens, _ in driver.step():
            got[name] += tokens
    assert len(asked) >= 1000
    assert min(len(cancelled), state.num_preemptions) > 100
    assert state.num_prefix_hits > 1000
    for name, (prompt, max_tokens) in asked.items():
        expected = alone(prompt, max_tokens)
        assert got[name] == (expected[: len(got[name])] if name in cancelled else expected)

    assert sorted(state._free_slots) == list(range(6))
    assert all(pool.num_used_blocks == 0 for pool in state.pools)
    state.states.begin_step()
    assert state.states.cache.num_held_rows == 0
    assert 0 < state.states.cache.num_used_rows <= 12, "of cached prefixes only"


RandomRequests.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
TestSchedulerWithRandomRequests = RandomRequests.TestCase


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["allocate", "touch", "free", "cache", "find", "evict"]),
            st.integers(0, 7),
        ),
        max_size=60,
    )
)
def test_block_pool_blocks_are_free_cached_or_used(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(9)
    holders: list[list[int]] = []
    for kind, number in operations:
        name = bytes([number])
        if kind == "allocate" and number <= pool.num_available_blocks:
            holders.append(pool.allocate(number))
        elif kind == "touch" and holders:
            shared = holders[number % len(holders)]
            pool.touch(shared)
            holders.append(list(shared))
        elif kind == "free" and holders:
            pool.free(holders.pop(number % len(holders)))
        elif kind == "cache" and holders and (held := holders[number % len(holders)]):
            has_one = held[0] in pool._hash_of_block
            pool.cache_block(held[0], name)
            assert has_one or pool.get_cached_block(name) is not None
        elif kind == "find" and (found := pool.get_cached_block(name)) is not None:
            pool.touch([found])
            holders.append([found])
        elif kind == "evict" and (found := pool.get_cached_block(name)) is not None:
            pool.evict([found])
            assert pool.get_cached_block(name) is None
        pool.check_invariants()
        assert pool.num_used_blocks == len({block for blocks in holders for block in blocks})
        assert pool.num_available_blocks + pool.num_used_blocks == 9
    for blocks in holders:
        pool.free(blocks)
    assert pool.num_available_blocks == 9


def test_block_pool_reuses_oldest_free_blocks_first_and_a_tail_before_its_head() -> None:
    pool = BlockPool(6)
    first = pool.allocate(3)
    second = pool.allocate(3)
    pool.free(second)
    pool.free(first)
    assert pool.allocate(6) == [*reversed(second), *reversed(first)]


def test_block_pool_keeps_cached_blocks_until_no_free_one_is_left() -> None:
    pool = BlockPool(4)
    cached = pool.allocate(2)
    free = pool.allocate(2)
    pool.cache_block(cached[0], b"head")
    pool.cache_block(cached[1], b"tail")
    pool.free(cached)
    pool.free(free)
    assert (pool.num_cached_blocks, pool.num_available_blocks, pool.num_used_blocks) == (2, 4, 0)
    assert pool.allocate(3) == [*reversed(free), cached[1]]
    assert (pool.get_cached_block(b"head"), pool.get_cached_block(b"tail")) == (cached[0], None)


def test_block_pool_refuses_to_allocate_used_blocks_and_to_free_free_ones() -> None:
    pool = BlockPool(2)
    taken = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.allocate(1)
    pool.free(taken)
    with pytest.raises(AssertionError, match="is free"):
        pool.free(taken)
    with pytest.raises(AssertionError, match="is free"):
        pool.touch(taken)


def run_step(state: Scheduler) -> list[tuple[str, int, int]]:
    """One step with the fake model; which tokens it computed."""
    step = state.schedule()
    token_ids = []
    for request in step.requests:
        known = request.sequence.token_ids[: request.start]
        token_ids.append([answer([*known, *request.token_ids])])
    state.update(step, output_of(token_ids))
    return [(r.sequence.request.request_id, r.start, r.num_tokens) for r in step.requests]


def test_scheduler_advances_decodes_before_prompts_within_its_budget() -> None:
    state = scheduler(max_num_batched_tokens=8)
    state.add(sequence("decoding", [5, 6, 7]))
    run_step(state)
    state.add(sequence("long", list(range(2, 22))))
    state.add(sequence("later", [3, 4]))
    assert run_step(state) == [("decoding", 3, 1), ("long", 0, 7)]
    assert [s.request.request_id for s in state.waiting] == ["later"]


def test_scheduler_gives_every_prompt_a_chunk_before_one_gets_more() -> None:
    state = scheduler(
        max_num_batched_tokens=16, prefill_chunk_size=8, max_model_len=100, num_blocks=100
    )
    state.add(sequence("long", [5] * 60))
    state.add(sequence("short", [6] * 5))
    assert run_step(state) == [("long", 0, 11), ("short", 0, 5)], (
        "the share that nobody else wants is the long one's"
    )
    assert run_step(state) == [("short", 5, 1), ("long", 11, 15)]


def test_scheduler_lets_small_requests_skip_a_large_one_at_most_max_skips_times() -> None:
    state = scheduler(max_model_len=200, num_blocks=20, max_num_batched_tokens=200, max_num_seqs=3)
    state.add(
        Sequence(
            EngineRequest("holds", [5] * 40, SamplingParams(max_tokens=40, ignore_eos=True)), seed=0
        )
    )
    run_step(state)
    state.add(sequence("large", [6] * 60, 1))
    for index in range(60):
        state.add(sequence(f"small {index}", [7, 8, index + 10], 1))
    order = []
    for _ in range(80):
        order += [name for name, start, _ in run_step(state) if start == 0]
    place = order.index("large")
    assert place == MAX_SKIPS == 16, "as many as may pass it, and no more"
    assert set(order) >= {f"small {index}" for index in range(60)}


def test_scheduler_lets_nothing_skip_a_request_at_its_limit_behind_another_large_one() -> None:
    state = scheduler(max_model_len=200, num_blocks=20, max_num_batched_tokens=200)
    state.add(sequence("holds", [5] * 60, 4))
    run_step(state)
    state.add(sequence("large", [6] * 60, 1))
    late = sequence("at its limit", [7] * 50, 1)
    state.add(late)
    late.skip_count = MAX_SKIPS
    state.add(sequence("small", [8, 9], 1))
    order = []
    while state.running or state.waiting:
        order += [name for name, start, _ in run_step(state) if start == 0]
    assert order == ["large", "at its limit", "small"]


def test_scheduler_lets_nothing_skip_a_preempted_request() -> None:
    """A later one would take the blocks that it freed for the others."""
    state = scheduler(num_blocks=10, max_num_batched_tokens=40)
    state.add(sequence("first", [6] * 20, 10))
    state.add(sequence("later", [5] * 15, 20))
    while not state.num_preemptions:
        run_step(state)
    state.add(sequence("small", [7], 1))
    steps: dict[str, list[int]] = {"first": [], "later": [], "small": []}
    for index in range(80):
        for name, _, _ in run_step(state):
            steps[name].append(index)
    assert steps["first"][-1] < steps["later"][0] <= steps["small"][0]


def test_scheduler_runs_most_urgent_first_and_preempts_least_urgent() -> None:
    state = scheduler(num_blocks=10, max_num_batched_tokens=40)
    state.add(sequence("later", [5] * 15, 20, priority=1))
    state.add(sequence("first", [6] * 20, 10, priority=0))
    assert [name for name, _, _ in run_step(state)] == ["first", "later"]
    while not state.num_preemptions:
        run_step(state)
    assert [s.request.request_id for s in state.waiting] == ["later"]


def test_scheduler_preempts_newest_first_and_counts_its_prompt_once() -> None:
    state = scheduler(num_blocks=10, max_num_batched_tokens=12)
    state.add(sequence("old", [5] * 15, 20))
    state.add(sequence("new", [6] * 24, 4))
    while not state.num_preemptions:
        run_step(state)
        assert state.running[0].request.request_id == "old", "the oldest is never preempted"
    assert [s.request.request_id for s in state.waiting] == ["new"]
    while state.running or state.waiting:
        run_step(state)
    assert state.num_prompt_tokens == 15 + 24


def test_scheduler_reuses_a_prefix_except_its_last_token_and_only_with_its_salt() -> None:
    state = scheduler(max_num_batched_tokens=100, num_blocks=40)
    driver = Driver(state)
    prompt = list(range(2, 18))  # four whole blocks
    for name, tokens, salt in (
        ("cold", prompt, ""),
        ("same", prompt, ""),
        ("longer", [*prompt, 30, 31], ""),
        ("salted", prompt, "key"),
        ("salted again", prompt, "key"),
        ("differs early", [20, *prompt[1:]], ""),
    ):
        state.add(sequence(name, tokens, 1, salt=salt))
    found = {}
    while driver.has_work:
        step = state.schedule()
        for request in step.requests:
            if request.num_sampled == 0:
                found[request.sequence.request.request_id] = request.start
        for output in state.update(step, driver.runner.launch(step)):
            assert output.cached_tokens == found[output.request_id]
    assert found == {
        "cold": 0,
        "same": 12,  # its fourth block is whole, but its last token is computed again
        "longer": 16,
        "salted": 0,
        "salted again": 12,
        "differs early": 0,
    }
    assert (state.num_prefix_queries, state.num_prefix_hits) == (16 * 5 + 18, 12 + 16 + 12)


def test_scheduler_frees_blocks_that_leave_every_window() -> None:
    state = scheduler(sliding_windows=(6,), max_model_len=40, num_blocks=10)
    driver = Driver(state)
    state.add(sequence("a", [2, 3, 4], 37))
    most = 0
    while driver.has_work:
        driver.step()
        most = max(most, state.pools[0].num_used_blocks)
    assert most <= 3, "six tokens touch three blocks of four"


def test_scheduler_fails_only_the_largest_request_of_an_aborted_step() -> None:
    state = scheduler(max_num_batched_tokens=40, num_blocks=20)
    driver = Driver(state)
    state.add(sequence("small", [2, 3, 4, 5, 6], 6))
    state.add(sequence("large", [7] * 30, 6))
    output = state.abort_step(state.schedule(), "no memory")
    assert (output.request_id, output.finish_reason, output.error) == (
        "large",
        "error",
        "no memory",
    )
    check(state, [])
    got = []
    while driver.has_work:
        for _, tokens, _ in driver.step():
            got += tokens
    assert got == alone([2, 3, 4, 5, 6], 6)


def test_ngram_index_proposes_what_followed_the_last_occurrence() -> None:
    index = NgramIndex()
    assert index.find_continuation([1, 2, 3, 4], 3) == []
    assert index.find_continuation([1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert index.find_continuation([1, 2, 3, 4, 9, 2, 3, 5, 2, 3], 2) == [5, 2], (
        "the latest place counts"
    )
    assert index.find_continuation([1, 2, 3, 4, 9, 2, 3, 5, 2, 3, 1, 2, 3], 2) == [4, 9], (
        "the longest context counts most"
    )


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_accepted_tokens_end_with_the_first_difference(
    drafts: list[int], sampled: list[int]
) -> None:
    accepted = accepted_tokens(drafts, sampled[: len(drafts) + 1])
    assert accepted == sampled[: len(accepted)]
    assert accepted[:-1] == drafts[: len(accepted) - 1]
    assert len(accepted) == len(drafts) + 1 or accepted[-1] != drafts[len(accepted) - 1]


def test_scheduler_does_not_import_torch() -> None:
    code = "import sys, llmkit.runtime.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
