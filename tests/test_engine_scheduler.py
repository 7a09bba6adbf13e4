"""The scheduler and its blocks under any order of arrivals, cancellations and steps, without a model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.runtime.engine.blocks import BlockPool
from llmkit.runtime.engine.scheduler import Chunk, Scheduler, Sequence
from llmkit.runtime.engine.types import EngineConfig, Request, SamplingParams

EOS = 1
FAILS = 999  # a prompt that starts so gets logits that are not finite


def scheduler(**sizes: int) -> Scheduler:
    chosen = {"max_model_len": 40, "num_blocks": 12, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    config: EngineConfig = EngineConfig(device=None, dtype=None, **(chosen | sizes))  # type: ignore[arg-type]
    return Scheduler(config, (EOS,))


def sequence(name: str, prompt: list[int], max_tokens: int = 8) -> Sequence:
    return Sequence(Request(name, prompt, SamplingParams(max_tokens=max_tokens)), seed=0)


def answer(tokens: list[int]) -> int:
    """The fake model: the next token depends on all tokens before it, and is at times the end."""
    return -1 if tokens[0] == FAILS else 1 + hash(tuple(tokens)) % 13


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and (token := answer(tokens)) >= 0:
        tokens.append(token)
        if token == EOS:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Computes nothing, but keeps the cache: which token each slot holds, so that a lost or shared block is seen."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}

    def run(self, chunks: list[Chunk]) -> list[int]:
        for chunk in chunks:
            blocks, tokens = chunk.sequence.blocks, chunk.sequence.tokens
            for position in range(chunk.start, chunk.start + chunk.count):
                self.slots[blocks[position // self.block_size], position % self.block_size] = tokens[position]
        results = []
        for chunk in chunks:
            stop = chunk.start + chunk.count
            where = [(chunk.sequence.blocks[p // self.block_size], p % self.block_size) for p in range(stop)]
            context = [self.slots[slot] for slot in where]
            assert context == chunk.sequence.tokens[:stop], "the cache holds the sequence's own tokens"
            results.append(answer(context))
        return results


def check(state: Scheduler, chunks: list[Chunk]) -> None:
    state.pool.check()
    held = [block for s in state.running for block in s.blocks]
    assert len(held) == len(set(held)) == state.pool.used
    assert all(not s.blocks and s.computed == 0 for s in state.waiting)
    assert len(state.running) <= state.config.max_num_seqs
    assert sum(chunk.count for chunk in chunks) <= state.config.max_num_batched_tokens
    assert all(chunk.count > 0 for chunk in chunks)


prompts = st.lists(st.integers(2, 40), min_size=1, max_size=30)
arrivals = st.tuples(st.just("add"), prompts, st.integers(1, 10))
broken = st.tuples(st.just("add"), prompts.map(lambda p: [FAILS, *p[1:]]), st.integers(1, 10))
cancellations = st.tuples(st.just("cancel"), st.integers(0, 12), st.just(0))
steps = st.tuples(st.just("step"), st.integers(1, 4), st.just(0))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(arrivals, broken, cancellations, steps), max_size=40), st.integers(1, 40), st.integers(10, 30)
)
def test_any_order_of_events_gives_each_request_what_it_gets_alone(
    events: list[tuple[str, object, int]], budget: int, blocks: int
) -> None:
    state = scheduler(max_num_batched_tokens=budget, num_blocks=blocks)
    runner = FakeRunner(state.config.block_size)
    asked: dict[str, tuple[list[int], int]] = {}
    got: dict[str, list[int]] = {}
    ended: dict[str, str] = {}

    def step() -> None:
        chunks = state.schedule()
        assert chunks or not (state.running or state.waiting), "work without progress"
        check(state, chunks)
        for output in state.commit(chunks, runner.run(chunks)):
            assert output.request_id not in ended, "an output after the last one"
            got[output.request_id] += output.token_ids
            if output.finish_reason:
                ended[output.request_id] = output.finish_reason
        check(state, chunks)

    for kind, value, extra in events:
        if kind == "add":
            assert isinstance(value, list)
            name = str(len(asked))
            asked[name], got[name] = (value, extra), []
            state.add(sequence(name, value, extra))
        elif kind == "cancel" and str(value) in asked:
            if state.cancel(str(value)):
                ended[str(value)] = "cancelled"
            assert not state.cancel(str(value))
            state.pool.check()
        elif kind == "step":
            assert isinstance(value, int)
            for _ in range(value):
                step()
    while state.running or state.waiting:
        step()

    assert state.pool.used == 0
    assert ended.keys() == asked.keys()
    for name, (prompt, max_tokens) in asked.items():
        expected = alone(prompt, max_tokens)
        if ended[name] == "cancelled":
            assert got[name] == expected[: len(got[name])]
            continue
        assert got[name] == expected
        reason = "error" if prompt[0] == FAILS else "stop" if expected[-1] == EOS else "length"
        assert ended[name] == reason
    assert state.generation_tokens == sum(map(len, got.values()))
    assert state.prompt_tokens <= sum(len(prompt) for prompt, _ in asked.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 7)), max_size=60))
def test_blocks_are_free_or_held(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(9)
    holders: list[list[int]] = []
    for kind, number in operations:
        if kind == "allocate" and number <= pool.free:
            holders.append(pool.allocate(number))
        elif kind == "share" and holders:
            shared = holders[number % len(holders)]
            pool.share(shared)
            holders.append(list(shared))
        elif kind == "release" and holders:
            pool.release(holders.pop(number % len(holders)))
        pool.check()
        assert pool.used == len({block for blocks in holders for block in blocks})
        assert pool.free + pool.used == 9
    for blocks in holders:
        pool.release(blocks)
    assert pool.free == 9


def test_free_blocks_are_reused_oldest_first_and_a_tail_before_its_head() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(6) == [*reversed(second), *reversed(first)]


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


def test_a_step_advances_decodes_before_prompts_within_its_budget() -> None:
    state = scheduler(max_num_batched_tokens=8)
    runner = FakeRunner(4)
    state.add(sequence("decoding", [5, 6, 7]))
    chunks = state.schedule()
    state.commit(chunks, runner.run(chunks))
    state.add(sequence("long", list(range(2, 22))))
    state.add(sequence("later", [3, 4]))
    chunks = state.schedule()
    assert [(c.sequence.request.id, c.start, c.count) for c in chunks] == [("decoding", 3, 1), ("long", 0, 7)]
    assert [c.samples for c in chunks] == [True, False]
    assert [s.request.id for s in state.waiting] == ["later"]


def test_the_newest_is_preempted_and_its_prompt_counted_once() -> None:
    state = scheduler(num_blocks=10, max_num_batched_tokens=12)
    runner = FakeRunner(4)
    state.add(sequence("old", [5] * 15, 20))
    state.add(sequence("new", [6] * 24, 4))
    while not state.preemptions:
        chunks = state.schedule()
        state.commit(chunks, runner.run(chunks))
        assert state.running[0].request.id == "old", "the oldest is never preempted"
    assert [s.request.id for s in state.waiting] == ["new"]
    while state.running or state.waiting:
        chunks = state.schedule()
        state.commit(chunks, runner.run(chunks))
    assert state.prompt_tokens == 15 + 24


def test_the_scheduler_does_not_need_torch() -> None:
    code = "import sys, llmkit.runtime.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
