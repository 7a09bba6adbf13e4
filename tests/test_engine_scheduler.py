"""The scheduler and its blocks under any order of arrivals, cancellations and steps, without a model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmkit.runtime.engine.blocks import BlockPool
from llmkit.runtime.engine.scheduler import OVERTAKEN, Scheduler
from llmkit.runtime.engine.sequence import GONE, Chunk, Sequence
from llmkit.runtime.engine.speculate import NgramIndex, confirmed
from llmkit.runtime.engine.types import EngineConfig, Request, SamplingParams

EOS = 1
FAILS = 999  # a prompt that starts so gets logits that are not finite


def scheduler(**sizes: object) -> Scheduler:
    chosen = {"max_model_len": 40, "num_blocks": 12, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    config: EngineConfig = EngineConfig(device=None, dtype=None, **(chosen | sizes))  # type: ignore[arg-type]
    return Scheduler(config, (EOS,))


def sequence(name: str, prompt: list[int], max_tokens: int = 8, priority: int = 0, salt: str = "") -> Sequence:
    return Sequence(Request(name, prompt, SamplingParams(max_tokens=max_tokens), priority, salt), seed=0)


def answer(tokens: list[int]) -> int:
    """The fake model: the next token depends on the last ones, repeats itself often and is at times the end."""
    return -1 if tokens[0] == FAILS else 1 + hash(tuple(tokens[-2:])) % 13


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and (token := answer(tokens)) >= 0:
        tokens.append(token)
        if token == EOS:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Computes nothing, but keeps the cache: of what prefix each slot holds the end, so that a lost block is seen."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cells: dict[tuple[int, int, int], object] = {}
        self.last: dict[int, int] = {}

    def launch(self, chunks: list[Chunk]) -> list[list[int]]:
        size = self.config.block_size
        contexts = []
        for chunk in chunks:
            tokens = chunk.tokens or [max(0, self.last[chunk.sequence.slot])]
            assert len(tokens) == chunk.count
            contexts.append([*chunk.sequence.tokens[: chunk.start], *tokens])
        for chunk, context in zip(chunks, contexts, strict=True):
            for position in range(chunk.start, chunk.stop):
                for group, table in enumerate(chunk.sequence.tables):
                    assert table[position // size] != GONE, "a token is written into a block that was given back"
                    self.cells[group, table[position // size], position % size] = self.holds(chunk, context, position)
        results = []
        for chunk, context in zip(chunks, contexts, strict=True):
            for group, window in enumerate(self.config.windows):
                first = 0 if window is None else max(0, chunk.start - window + 1)
                for position in range(first, chunk.stop):
                    where = group, chunk.sequence.tables[group][position // size], position % size
                    assert self.cells[where] == self.holds(chunk, context, position), "the cache holds other tokens"
            known = chunk.stop - chunk.drafts
            chosen = [answer(context[:stop]) for stop in range(known, chunk.stop + 1)]
            self.last[chunk.sequence.slot] = chosen[-1]
            results.append(confirmed(context[known:], chosen))
        return results

    @staticmethod
    def holds(chunk: Chunk, context: list[int], position: int) -> object:
        return chunk.sequence.request.salt, hash(tuple(context[: position + 1]))


class Driver:
    """The engine's step with the fake runner."""

    def __init__(self, state: Scheduler) -> None:
        self.state, self.runner = state, FakeRunner(state.config)
        self.flight: tuple[list[Chunk], list[list[int]]] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.state.running or self.state.waiting or self.flight)

    def step(self) -> list[tuple[str, list[int], str | None]]:
        chunks = self.state.schedule()
        assert chunks or self.flight or not self.has_work, "work without progress"
        check(self.state, chunks)
        flight = (chunks, self.runner.launch(chunks)) if chunks else None
        if self.state.config.ahead:
            flight, self.flight = self.flight, flight
        outputs = self.state.commit(*flight) if flight else []
        check(self.state, chunks)
        return [(output.request_id, output.token_ids, output.finish_reason) for output in outputs]


def check(state: Scheduler, chunks: list[Chunk]) -> None:
    for group, pool in enumerate(state.pools):
        pool.check()
        held = Counter(block for s in state.running for block in s.tables[group] if block != GONE)
        assert {b: n for b, n in enumerate(pool._references) if n} == held, "a reference for each holder"
    assert all(not s.tables and s.scheduled == 0 for s in state.waiting)
    assert len({s.slot for s in state.running}) == len(state.running) <= state.config.max_num_seqs
    assert sum(chunk.count for chunk in chunks) <= state.config.max_num_batched_tokens
    assert all(chunk.count > 0 for chunk in chunks)
    assert [s.rank for s in state.running] == sorted(s.rank for s in state.running)
    assert [s.rank for s in state.waiting] == sorted(s.rank for s in state.waiting)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, and however the engine is set up, a request gets what it would get alone."""

    @initialize(
        budget=st.integers(1, 40),
        blocks=st.integers(10, 30),
        windows=st.sampled_from([(None,), (None, 6), (6,), (9, None), (17,)]),
        chunk=st.sampled_from([3, 8, 100]),
        mode=st.sampled_from(["plain", "ahead", "speculate"]),
        prefix_cache=st.booleans(),
    )
    def start(
        self, budget: int, blocks: int, windows: tuple[int | None, ...], chunk: int, mode: str, prefix_cache: bool
    ) -> None:
        self.driver = Driver(
            scheduler(
                max_num_batched_tokens=budget,
                num_blocks=blocks,
                windows=windows,
                chunk_tokens=chunk,
                ahead=mode == "ahead",
                speculate=3 if mode == "speculate" else 0,
                prefix_cache=prefix_cache,
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
    def add(self, shared: int, own: list[int], max_tokens: int, priority: int, salt: str, fails: bool) -> None:
        name = str(len(self.asked))
        prompt = [FAILS] * fails + [2 + i % 5 for i in range(shared)][fails:] + own
        self.asked[name], self.got[name] = (prompt, max_tokens), []
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
        assert all(pool.used == 0 for pool in state.pools)
        assert self.ended.keys() == self.asked.keys()
        for name, (prompt, max_tokens) in self.asked.items():
            expected = alone(prompt, max_tokens)
            if self.ended[name] == "cancelled":
                assert self.got[name] == expected[: len(self.got[name])]
                continue
            assert self.got[name] == expected
            reason = "error" if prompt[0] == FAILS else "stop" if expected[-1] == EOS else "length"
            assert self.ended[name] == reason
        assert state.generation_tokens == sum(map(len, self.got.values()))
        assert state.prompt_tokens <= sum(len(prompt) for prompt, _ in self.asked.values())


AnyOrder.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None, derandomize=True)
TestAnyOrder = AnyOrder.TestCase


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "share", "release", "name", "find", "forget"]), st.integers(0, 7)),
        max_size=60,
    )
)
def test_blocks_are_free_cached_or_held(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(9)
    holders: list[list[int]] = []
    for kind, number in operations:
        name = bytes([number])
        if kind == "allocate" and number <= pool.available:
            holders.append(pool.allocate(number))
        elif kind == "share" and holders:
            shared = holders[number % len(holders)]
            pool.share(shared)
            holders.append(list(shared))
        elif kind == "release" and holders:
            pool.release(holders.pop(number % len(holders)))
        elif kind == "name" and holders and (held := holders[number % len(holders)]):
            has_one = held[0] in pool._names
            pool.name(held[0], name)
            assert has_one or pool.find(name) is not None
        elif kind == "find" and (found := pool.find(name)) is not None:
            pool.share([found])
            holders.append([found])
        elif kind == "forget" and (found := pool.find(name)) is not None:
            pool.forget([found])
            assert pool.find(name) is None
        pool.check()
        assert pool.used == len({block for blocks in holders for block in blocks})
        assert pool.available + pool.used == 9
    for blocks in holders:
        pool.release(blocks)
    assert pool.available == 9


def test_free_blocks_are_reused_oldest_first_and_a_tail_before_its_head() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(6) == [*reversed(second), *reversed(first)]


def test_cached_blocks_are_kept_until_no_free_one_is_left() -> None:
    pool = BlockPool(4)
    cached, free = pool.allocate(2), pool.allocate(2)
    pool.name(cached[0], b"head")
    pool.name(cached[1], b"tail")
    pool.release(cached)
    pool.release(free)
    assert (pool.cached, pool.available, pool.used) == (2, 4, 0)
    assert pool.allocate(3) == [*reversed(free), cached[1]]
    assert (pool.find(b"head"), pool.find(b"tail")) == (cached[0], None)


def test_a_block_in_use_can_not_be_taken_and_a_free_one_not_given_back() -> None:
    pool = BlockPool(2)
    taken = pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.allocate(1)
    pool.release(taken)
    with pytest.raises(AssertionError, match="is free"):
        pool.release(taken)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(taken)


def plan(state: Scheduler) -> list[tuple[str, int, int]]:
    """One step with the fake model; which tokens it computed."""
    chunks = state.schedule()
    state.commit(chunks, [[answer([*c.sequence.tokens[: c.start], *c.tokens])] for c in chunks])
    return [(chunk.sequence.request.id, chunk.start, chunk.count) for chunk in chunks]


def test_a_step_advances_decodes_before_prompts_within_its_budget() -> None:
    state = scheduler(max_num_batched_tokens=8)
    state.add(sequence("decoding", [5, 6, 7]))
    plan(state)
    state.add(sequence("long", list(range(2, 22))))
    state.add(sequence("later", [3, 4]))
    assert plan(state) == [("decoding", 3, 1), ("long", 0, 7)]
    assert [s.request.id for s in state.waiting] == ["later"]


def test_a_long_prompt_leaves_room_for_short_ones() -> None:
    state = scheduler(max_num_batched_tokens=16, chunk_tokens=8, max_model_len=100, num_blocks=100)
    state.add(sequence("long", [5] * 60))
    state.add(sequence("short", [6] * 5))
    assert plan(state) == [("long", 0, 11), ("short", 0, 5)], "the share that nobody else wants is the long one's"
    assert plan(state) == [("short", 5, 1), ("long", 11, 15)]


def test_a_request_that_finds_no_room_is_overtaken_but_not_for_ever() -> None:
    state = scheduler(max_model_len=200, num_blocks=20, max_num_batched_tokens=200, max_num_seqs=3)
    state.add(Sequence(Request("holds", [5] * 40, SamplingParams(max_tokens=40, ignore_eos=True)), seed=0))
    plan(state)
    state.add(sequence("large", [6] * 60, 1))
    for index in range(60):
        state.add(sequence(f"small {index}", [7, 8, index + 10], 1))
    order = []
    for _ in range(80):
        order += [name for name, start, _ in plan(state) if start == 0]
    place = order.index("large")
    assert place == OVERTAKEN, "as many as may pass it, and no more"
    assert set(order) >= {f"small {index}" for index in range(60)}


def test_the_most_urgent_goes_first_and_the_least_is_preempted() -> None:
    state = scheduler(num_blocks=10, max_num_batched_tokens=40)
    state.add(sequence("later", [5] * 15, 20, priority=1))
    state.add(sequence("first", [6] * 20, 10, priority=0))
    assert [name for name, _, _ in plan(state)] == ["first", "later"]
    while not state.preemptions:
        plan(state)
    assert [s.request.id for s in state.waiting] == ["later"]


def test_the_newest_is_preempted_and_its_prompt_counted_once() -> None:
    state = scheduler(num_blocks=10, max_num_batched_tokens=12)
    state.add(sequence("old", [5] * 15, 20))
    state.add(sequence("new", [6] * 24, 4))
    while not state.preemptions:
        plan(state)
        assert state.running[0].request.id == "old", "the oldest is never preempted"
    assert [s.request.id for s in state.waiting] == ["new"]
    while state.running or state.waiting:
        plan(state)
    assert state.prompt_tokens == 15 + 24


def test_a_prefix_is_found_again_but_for_its_last_token_and_only_under_its_salt() -> None:
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
        chunks = state.schedule()
        found |= {chunk.sequence.request.id: chunk.start for chunk in chunks if chunk.counter == 0}
        for output in state.commit(chunks, driver.runner.launch(chunks)):
            assert output.cached_tokens == found[output.request_id]
    assert found == {
        "cold": 0,
        "same": 12,  # its fourth block is whole, but its last token is computed again
        "longer": 16,
        "salted": 0,
        "salted again": 12,
        "differs early": 0,
    }
    assert (state.prefix_queries, state.prefix_hits) == (16 * 5 + 18, 12 + 16 + 12)


def test_blocks_that_leave_every_window_are_given_back() -> None:
    state = scheduler(windows=(6,), max_model_len=40, num_blocks=10)
    driver = Driver(state)
    state.add(sequence("a", [2, 3, 4], 37))
    most = 0
    while driver.has_work:
        driver.step()
        most = max(most, state.pools[0].used)
    assert most <= 3, "six tokens touch three blocks of four"


def test_a_step_that_ran_out_of_memory_fails_its_largest_request_only() -> None:
    state = scheduler(max_num_batched_tokens=40, num_blocks=20)
    driver = Driver(state)
    state.add(sequence("small", [2, 3, 4, 5, 6], 6))
    state.add(sequence("large", [7] * 30, 6))
    chunks = state.schedule()
    output = state.give_up(chunks, "no memory")
    assert (output.request_id, output.finish_reason, output.error) == ("large", "error", "no memory")
    check(state, [])
    got = []
    while driver.has_work:
        for _, tokens, _ in driver.step():
            got += tokens
    assert got == alone([2, 3, 4, 5, 6], 6)


def test_what_followed_the_last_time_is_proposed() -> None:
    index = NgramIndex()
    assert index.propose([1, 2, 3, 4], 3) == []
    assert index.propose([1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert index.propose([1, 2, 3, 4, 9, 2, 3, 5, 2, 3], 2) == [5, 2], "the latest place counts"
    assert index.propose([1, 2, 3, 4, 9, 2, 3, 5, 2, 3, 1, 2, 3], 2) == [4, 9], "the longest context counts most"


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_guesses_are_confirmed_up_to_the_first_difference(guesses: list[int], model: list[int]) -> None:
    taken = confirmed(guesses, model[: len(guesses) + 1])
    assert taken == model[: len(taken)]
    assert taken[:-1] == guesses[: len(taken) - 1]
    assert len(taken) == len(guesses) + 1 or taken[-1] != guesses[len(taken) - 1]


def test_the_scheduler_does_not_need_torch() -> None:
    code = "import sys, llmkit.runtime.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
