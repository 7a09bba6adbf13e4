"""What the scheduler records and returns: tokens, errors, log probabilities, prefixes, order."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llmkit.runtime.engine.block_pool import BlockPool
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler import LOGITS_NOT_FINITE, MAX_SKIPS, Scheduler
from llmkit.runtime.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmkit.runtime.engine.sequence import NULL_BLOCK, Sequence


class CountingProposer:
    """Drafts as many tokens as it may, and notes how many that were."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.forgotten: list[Sequence] = []

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        self.asked.append(max_tokens)
        return [7] * max_tokens

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)


def scheduler(proposer: CountingProposer | None = None, **sizes: Any) -> Scheduler:
    chosen: dict[str, Any] = {
        "max_model_len": 40,
        "num_blocks": 12,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
    }
    config = EngineConfig(device=None, dtype=None, **(chosen | sizes))  # type: ignore[arg-type]
    return Scheduler(config, (1,), proposer)


def add(state: Scheduler, name: str, prompt: list[int], max_tokens: int = 8, **more: Any) -> Any:
    params = SamplingParams(max_tokens=max_tokens, **more)
    sequence = Sequence(EngineRequest(name, prompt, params), seed=0)
    state.add(sequence)
    return sequence


def scheduled(step: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(r.sequence.request.request_id, r.start, r.num_tokens) for r in step.requests]


def result(token_ids: list[list[int]], **more: Any) -> ModelRunnerOutput:
    values: dict[str, Any] = {"logprobs": None, "prompt_logprobs": None, "embeddings": {}}
    return ModelRunnerOutput(token_ids, **(values | more))


def run_step(state: Scheduler, token: int = 9) -> list[tuple[str, int, int]]:
    step = state.schedule()
    state.update(step, result([[token]] * len(step.requests)))
    return scheduled(step)


def test_scheduler_puts_requests_with_one_token_first() -> None:
    state = scheduler()
    for name, length in (("two", 2), ("one", 1), ("three", 3), ("also one", 1)):
        add(state, name, [5] * length)
    assert run_step(state) == [("one", 0, 1), ("also one", 0, 1), ("two", 0, 2), ("three", 0, 3)]


def test_scheduler_preempts_the_newest_prompt_when_all_wait_for_blocks() -> None:
    """A window's blocks are allocated chunk by chunk, so that prompts can block each other."""
    state = scheduler(
        sliding_windows=(40,),
        num_window_blocks=6,
        prefill_chunk_size=4,
        max_num_batched_tokens=12,
    )
    add(state, "old", [5] * 20)
    add(state, "new", [6] * 20)
    assert run_step(state) == [("old", 0, 8), ("new", 0, 4)]
    assert run_step(state) == [("old", 8, 8), ("new", 4, 4)]
    assert state.pools[0].num_available_blocks == 0
    urgent = Sequence(EngineRequest("urgent", [7], SamplingParams(), priority=-1), seed=0)
    state.add(urgent)
    add(state, "later", [8])
    assert run_step(state) == [("old", 16, 4)]  # nothing else begins in that step
    assert [s.request.request_id for s in state.waiting] == ["urgent", "new", "later"]
    assert (state.num_preemptions, state.waiting[1].skip_count) == (1, MAX_SKIPS)


@pytest.mark.parametrize("length", [7, 8])  # the next token of 7 has a place, but is newer
def test_scheduler_preempts_the_newest_when_the_oldest_needs_a_block(length: int) -> None:
    state = scheduler(num_blocks=4)
    add(state, "old", [5] * 8, 4)
    add(state, "new", [6] * length, 4)
    assert run_step(state) == [("old", 0, 8), ("new", 0, length)]
    assert run_step(state) == [("old", 8, 1)]
    assert [s.request.request_id for s in state.waiting] == ["new"]
    assert state.num_preemptions == 1
    assert state.pools[0].num_used_blocks == 3


def test_scheduler_preempts_nobody_while_tokens_are_in_flight() -> None:
    state = scheduler(async_scheduling=True)
    add(state, "a", [5], 1)
    add(state, "b", [6], 1)
    step = state.schedule()
    assert len(step.requests) == 2
    assert state.schedule().requests == []  # no token is left, and two are not known yet
    assert (state.num_preemptions, len(state.running)) == (0, 2)
    assert len(state.update(step, result([[9], [9]]))) == 2
    assert not state.running


@pytest.mark.parametrize(
    "penalty",
    [{}, {"repetition_penalty": 1.5}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}],
)
def test_scheduler_waits_for_tokens_that_penalties_depend_on(penalty: dict[str, float]) -> None:
    state = scheduler(async_scheduling=True)
    add(state, "a", [5, 6], **penalty)
    first = state.schedule()
    second = state.schedule()
    assert scheduled(second) == ([] if penalty else [("a", 2, 1)])
    state.update(first, result([[9]]))
    assert scheduled(state.schedule()) == [("a", 2, 1) if penalty else ("a", 3, 1)]

    proposer = CountingProposer()
    state = scheduler(proposer, num_speculative_tokens=3)
    add(state, "a", [5, 6], **penalty)
    run_step(state)
    (request,) = state.schedule().requests
    assert request.num_draft_tokens == (0 if penalty else 3)
    assert proposer.asked == ([] if penalty else [3])


def test_scheduler_asks_for_no_draft_where_none_fits() -> None:
    proposer = CountingProposer()
    state = scheduler(proposer, num_speculative_tokens=3)
    add(state, "a", [5, 6], 3)
    run_step(state)  # one of three tokens; after the next one only one is left
    step = state.schedule()
    assert proposer.asked == [1]
    state.update(step, result([[8]]))
    step = state.schedule()
    assert proposer.asked == [1]
    assert [r.num_draft_tokens for r in step.requests] == [0]
    sequence = state.running[0]
    state.update(step, result([[8]]))
    assert proposer.forgotten == [sequence]
    without = scheduler(None, num_speculative_tokens=3)
    add(without, "b", [5, 6])
    run_step(without)
    assert run_step(without) == [("b", 2, 1)]


def test_scheduler_accepts_token_0() -> None:
    state = scheduler(prefill_chunk_size=2, max_num_batched_tokens=2)
    sequence = add(state, "a", [0, 0, 0], 2)
    step = state.schedule()
    assert scheduled(step) == [("a", 0, 2)]
    assert state.update(step, result([[0]])) == []  # the prompt goes on
    for reason in (None, "length"):
        (output,) = state.update(state.schedule(), result([[0]]))
        assert (output.token_ids, output.finish_reason, output.error) == ([0], reason, None)
    assert sequence.token_ids == [0] * 5
    assert (state.num_prompt_tokens, state.num_generation_tokens) == (3, 2)


@pytest.mark.parametrize("stop", [{"stop_token_ids": (6,)}, {}])
def test_scheduler_drops_what_follows_the_last_token(stop: dict[str, Any]) -> None:
    """Of three verified tokens the second ends the request: a stop token or the end token, 1."""
    state = scheduler(CountingProposer(), num_speculative_tokens=2)
    sequence = add(state, "a", [5], 9, logprobs=0, **stop)
    last = 6 if stop else 1
    (first,) = state.update(state.schedule(), result([[9]], logprobs=[[Logprobs(-9.0, [])]]))
    assert first.logprobs == [Logprobs(-9.0, [])]
    logprobs = [Logprobs(-float(number), []) for number in range(3)]
    step = state.schedule()
    (output,) = state.update(step, result([[7, last, 8]], logprobs=[logprobs]))
    assert (output.token_ids, output.finish_reason) == ([7, last], "stop")
    assert output.logprobs == logprobs[:2]
    assert sequence.token_ids == [5, 9, 7, last]
    assert (state.num_generation_tokens, state.num_prompt_tokens) == (3, 1)


def test_scheduler_returns_prompt_logprobs_with_the_first_token() -> None:
    state = scheduler(max_num_batched_tokens=4, prefill_chunk_size=4)
    add(state, "a", list(range(2, 8)), 3, prompt_logprobs=0)
    of_prompt = [Logprobs(-float(number), []) for number in range(5)]
    step = state.schedule()
    assert state.update(step, result([[9]], prompt_logprobs=[of_prompt[:4]])) == []
    step = state.schedule()
    (output,) = state.update(step, result([[9]], prompt_logprobs=[of_prompt[4:]]))
    assert output.prompt_logprobs == of_prompt
    assert output.logprobs is None
    (output,) = state.update(state.schedule(), result([[9]]))
    assert output.prompt_logprobs is None


def test_scheduler_computes_all_of_a_prompt_whose_logprobs_are_wanted() -> None:
    state = scheduler()
    prompt = list(range(2, 14))
    add(state, "cold", prompt, 1)
    assert run_step(state) == [("cold", 0, 12)]
    add(state, "warm", prompt, 1)
    assert run_step(state) == [("warm", 8, 4)]
    reported = add(state, "reported", prompt, 8, prompt_logprobs=0)
    step = state.schedule()
    assert scheduled(step) == [("reported", 0, 12)]
    assert reported.num_hashed_blocks == 3
    state.abort_step(step, "")
    again = add(state, "again", prompt, 8, prompt_logprobs=0)
    run_step(state)
    state._preempt(again)
    assert run_step(state) == [("again", 0, 13)]  # its own cached blocks do not count, either


def test_scheduler_without_prefix_cache_computes_every_prompt() -> None:
    state = scheduler(enable_prefix_caching=False)
    for name in ("first", "second"):
        add(state, name, [5] * 12, 1)
        assert run_step(state) == [(name, 0, 12)]
    assert state.pools[0].num_cached_blocks == 0
    assert (state.num_prefix_queries, state.num_prefix_hits) == (24, 0)


def test_scheduler_caches_the_blocks_after_a_cached_prefix() -> None:
    state = scheduler()
    prompt = list(range(2, 22))
    for name, length, start in (("first", 8, 0), ("longer", 17, 8), ("longest", 20, 16)):
        sequence = add(state, name, prompt[:length], 1)
        step = state.schedule()
        assert scheduled(step) == [(name, start, length - start)]
        assert sequence.num_hashed_blocks == length // 4
        (output,) = state.update(step, result([[9]]))
        assert (output.prompt_tokens, output.cached_tokens) == (length, start)
    assert state.num_prefix_hits == 8 + 16


def test_scheduler_counts_a_preempted_prompt_once() -> None:
    state = scheduler()
    sequence = add(state, "a", [5] * 9, 4)
    run_step(state)
    state._preempt(sequence)
    assert (sequence.num_computed_tokens, sequence.num_draft_computed_tokens) == (0, 0)
    assert (sequence.num_hashed_blocks, sequence.slot, sequence.block_tables) == (0, -1, [])
    assert run_step(state) == [("a", 8, 2)]  # two cached blocks, and the token that was sampled
    assert sequence.num_draft_computed_tokens == 10
    assert (state.num_prefix_queries, state.num_prefix_hits, sequence.num_cached_tokens) == (
        9,
        0,
        0,
    )
    assert (state.num_prompt_tokens, state.num_preemptions) == (9, 1)


def test_scheduler_skips_a_block_that_one_window_has_lost_and_none_needs() -> None:
    """Full attention has the whole prefix; the window has lost a block that it no longer sees."""
    state = scheduler(sliding_windows=(None, 5))
    prompt = list(range(2, 18))
    first = add(state, "first", prompt, 1)
    run_step(state)
    full, window = state.pools
    hashes = first.block_hashes(4, 4)
    block = window.get_cached_block(hashes[1])
    assert block is not None
    window.evict([block])
    again = add(state, "again", [*prompt, 30], 2)
    assert scheduled(state.schedule()) == [("again", 16, 1)]
    assert again.block_tables[1][:3] == [NULL_BLOCK] * 3
    assert NULL_BLOCK not in again.block_tables[0] + again.block_tables[1][3:]
    assert full.num_used_blocks == 5
    assert window.num_used_blocks == 2


def test_scheduler_frees_only_the_blocks_of_windows() -> None:
    state = scheduler(sliding_windows=(4, None, 8))
    sequence = add(state, "a", [5] * 12)
    run_step(state)
    run_step(state)
    # Twelve tokens are in the cache when the next one is scheduled.
    assert [[block == NULL_BLOCK for block in table] for table in sequence.block_tables] == [
        [True, True, False, False], [False] * 4, [True, False, False, False]
    ]  # fmt: skip
    assert [pool.num_used_blocks for pool in state.pools] == [2, 4, 3]


@pytest.mark.parametrize("is_taken", [False, True])
def test_scheduler_counts_a_chunk_behind_the_cached_prefix(is_taken: bool) -> None:
    """One cached block is reused, and the next eight tokens need two more."""
    state = scheduler(
        sliding_windows=(4,),
        num_window_blocks=8,
        prefill_chunk_size=8,
        max_num_batched_tokens=8,
    )
    prompt = list(range(2, 18))
    first = add(state, "first", prompt, 1)
    run_step(state)
    run_step(state)
    add(state, "holds", [30] * 4)
    run_step(state)
    pool = state.pools[0]
    pool.allocate(3)  # its second block will be a cached one, and three are left
    if is_taken:
        block = pool.get_cached_block(first.block_hashes(4, 4)[2])
        assert block is not None
        pool.touch([block])
    add(state, "again", [*prompt, *range(40, 48)], 2)
    assert run_step(state) == [("holds", 4, 1), *([] if is_taken else [("again", 16, 7)])]
    assert pool.num_available_blocks == (2 if is_taken else 0)


def test_scheduler_zeroes_the_blocks_of_values_that_are_not_finite() -> None:
    state = scheduler(sliding_windows=(None, 6))
    good = add(state, "good", [5] * 8, 8)
    run_step(state)
    bad = add(state, "bad", [5] * 4 + [6] * 6, 8)
    step = state.schedule()
    assert scheduled(step) == [("good", 8, 1), ("bad", 4, 6)]
    assert bad.block_tables[0][0] == good.block_tables[0][0]  # shared, and still in use
    own = [
        [block for block in table if block not in other and block != NULL_BLOCK]
        for table, other in zip(bad.block_tables, good.block_tables, strict=True)
    ]
    assert state.take_blocks_to_zero() is None
    kept, failed = state.update(step, result([[9], [-1]]))
    assert (kept.error, failed.error) == (None, LOGITS_NOT_FINITE)
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    blocks = state.take_blocks_to_zero()
    assert blocks is not None
    assert [sorted(of_pool) for of_pool in blocks] == [sorted(table) for table in own]
    assert state.take_blocks_to_zero() is None
    add(state, "also bad", [6, 7], 1)
    step = state.schedule()
    state.update(step, result([[9], [-1]]))
    assert [len(of_pool) for of_pool in state.take_blocks_to_zero() or []] == [1, 1]


def test_scheduler_fails_a_prompt_at_its_first_chunk_that_is_not_finite() -> None:
    state = scheduler(max_num_batched_tokens=4, prefill_chunk_size=4)
    add(state, "a", [5] * 12)
    (output,) = state.update(state.schedule(), result([[-1]]))
    assert (output.finish_reason, output.prompt_tokens, output.cached_tokens) == ("error", 12, 0)
    assert state.num_prompt_tokens == 0
    assert not state.running
    add(state, "b", [5] * 12)
    assert scheduled(state.schedule()) == [("b", 0, 4)]  # nothing of it is cached


@pytest.mark.parametrize("token", [0, 9, -1])
def test_scheduler_returns_an_embedding_in_place_of_tokens(token: int) -> None:
    state = scheduler()
    request = EngineRequest("a", [5, 6], SamplingParams(max_tokens=1), pooling="last")
    state.add(Sequence(request, seed=0))
    step = state.schedule()
    assert step.requests[0].returns_embedding
    (output,) = state.update(step, result([[token]], embeddings={"a": b"1234"}))
    expected = (b"1234", "stop", None) if token >= 0 else (None, "error", LOGITS_NOT_FINITE)
    assert (output.embedding, output.finish_reason, output.error) == expected
    assert output.token_ids == []
    assert state.num_generation_tokens == 0
    assert not state.running
    plain = add(state, "b", [5], 1)
    (output,) = state.update(state.schedule(), result([[9]], embeddings={"b": b"1234"}))
    assert (output.embedding, output.finish_reason) == (None, "length")
    assert plain.is_finished


def test_scheduler_preempts_the_others_of_an_aborted_step_once() -> None:
    state = scheduler()
    small = add(state, "small", [5] * 8)
    large = add(state, "large", [6] * 12)
    output = state.abort_step(state.schedule(), "no memory")
    assert (output.request_id, output.error, output.token_ids) == ("large", "no memory", [])
    assert (state.num_preemptions, large.is_finished) == (1, True)
    assert (small.num_in_flight, large.num_in_flight) == (0, 0)
    assert not state.cancel("large")
    assert run_step(state) == [("small", 0, 8)]  # nothing that the step wrote is cached
    assert state.cancel("small")
    assert not state.running
    assert state.take_blocks_to_zero() is None


def test_scheduler_takes_held_requests_out_of_its_queue() -> None:
    state = scheduler()
    first = add(state, "first", [5])
    add(state, "second", [6])
    state.hold(first)
    assert run_step(state) == [("second", 0, 1)]
    state.release(first)
    assert run_step(state) == [("second", 1, 1), ("first", 0, 1)]


def test_scheduler_ignores_the_results_of_a_cancelled_request() -> None:
    state = scheduler(async_scheduling=True)
    add(state, "a", [5], 8)
    kept = add(state, "b", [6], 8)
    step = state.schedule()
    assert state.cancel("a")
    assert state.take_blocks_to_zero() is None
    (output,) = state.update(step, result([[9], [8]]))
    assert (output.request_id, output.token_ids) == ("b", [8])
    assert kept.num_in_flight == 0
    assert (state.num_prompt_tokens, state.num_generation_tokens) == (1, 1)


def test_block_pool_checks_that_each_block_is_in_one_state() -> None:
    pool = BlockPool(5)
    cached = pool.allocate(2)
    used = pool.allocate(1)
    for block in (*cached, *used):
        pool.cache_block(block, bytes([block]))
    pool.free(cached)
    pool.check_invariants()
    assert (pool.num_cached_blocks, pool.num_used_blocks, pool.num_available_blocks) == (2, 1, 4)
    assert [pool.is_cached(block) for block in (*cached, *used)] == [True, True, False]
    pool.touch(cached[:1])
    pool.touch(used)
    assert pool.free(used) == []  # another sequence holds it
    assert pool.free(used) == used
    pool.cache_block(cached[0], b"other")  # it keeps its first hash
    assert pool.get_cached_block(b"other") is None
    (same,) = pool.allocate(1)
    pool.cache_block(same, bytes(cached[:1]))  # the first block with a hash keeps it
    assert pool.get_cached_block(bytes(cached[:1])) == cached[0]
    pool.free([same])
    pool.evict([cached[1], 4])
    assert (pool.num_cached_blocks, pool.num_used_blocks) == (1, 1)
    pool.check_invariants()
    for break_it in (
        lambda: pool._free.update({cached[0]: None}),  # used and free
        lambda: pool._cached.update({cached[0]: None}),  # used and cached
        lambda: pool._free.update({used[0]: None}),  # cached and free
        lambda: pool._free.pop(4),  # in no state
        lambda: pool._hash_of_block.pop(used[0]),  # cached without a hash
        lambda: pool._hash_of_block.update({4: b"4"}),  # free with a hash
        lambda: pool._block_of_hash.update({b"4": 4}),
    ):
        before = copy.deepcopy(vars(pool))
        break_it()
        with pytest.raises(AssertionError):
            pool.check_invariants()
        vars(pool).update(before)
        pool.check_invariants()


def test_sequence_starts_with_nothing_computed() -> None:
    request = EngineRequest("a", [5, 6, 7], SamplingParams(max_tokens=4))
    sequence = Sequence(request, seed=3)
    assert (sequence.adapter_id, sequence.rope_offset, sequence.slot) == (0, 0, -1)
    assert (sequence.num_computed_tokens, sequence.num_draft_computed_tokens) == (0, 0)
    assert (sequence.num_in_flight, sequence.num_hashed_blocks, sequence.skip_count) == (0, 0, 0)
    assert (sequence.num_output_tokens, sequence.num_uncomputed_tokens) == (0, 3)
    assert (sequence.num_tokens, sequence.max_num_tokens) == (3, 7)
    assert sequence.arrival == 0
    assert not sequence.is_finished
    assert not sequence.needs_known_tokens
    sequence.token_ids += [8, 9, 8]
    sequence.num_computed_tokens = 5
    assert (sequence.num_output_tokens, sequence.num_uncomputed_tokens) == (3, 1)
    sequence.num_in_flight = 1  # the last of the four tokens
    assert (sequence.num_tokens, sequence.num_uncomputed_tokens) == (7, 0)
    assert request.prompt_token_ids == [5, 6, 7]


def test_sequence_that_is_pooled_has_no_output() -> None:
    request = EngineRequest("a", [5, 6], SamplingParams(max_tokens=1), pooling="last")
    assert Sequence(request, seed=0).max_num_tokens == 2


def test_sequence_block_hashes_depend_on_all_that_precedes() -> None:
    def hashes(prompt: list[int], salt: str = "", **more: Any) -> list[bytes]:
        request = EngineRequest("a", prompt, SamplingParams(), cache_salt=salt)
        return Sequence(request, seed=0, **more).block_hashes(len(prompt) // 4, 4)

    prompt = list(range(12))
    whole = hashes(prompt)
    assert len(set(whole)) == 3
    assert hashes([*prompt, 5]) == whole
    assert hashes([*prompt[:11], 99])[:2] == whole[:2]
    assert hashes([*prompt[:11], 99])[2] != whole[2]
    others = [
        hashes([99, *prompt[1:]]),
        hashes(prompt, "salt"),
        hashes(prompt, adapter_id=1),
        hashes(prompt, rope_offset=1),
        hashes(prompt, rope_offset=2),
        hashes(prompt, adapter_id=1, rope_offset=1),
        hashes(prompt, adapter_id=11),
    ]
    assert len({one for each in [whole, *others] for one in each}) == 3 * 8

    request = EngineRequest("a", prompt, SamplingParams())
    step_by_step = Sequence(request, seed=0)
    assert step_by_step.block_hashes(1, 4) == whole[:1]
    assert step_by_step.block_hashes(3, 4) == whole
    assert step_by_step.block_hashes(2, 4) == whole[:2]
