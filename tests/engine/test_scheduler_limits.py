"""The scheduler at its limits: lengths, blocks, windows, drafts, pipelines, each to the token."""

from __future__ import annotations

import re

import pytest

from llmkit.runtime.engine.drafting import NgramIndex, NgramProposer
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler import Scheduler
from llmkit.runtime.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmkit.runtime.engine.sequence import NULL_BLOCK, Sequence


def scheduler(**sizes: object) -> Scheduler:
    chosen = {
        "max_model_len": 40,
        "num_blocks": 12,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
    }
    config = EngineConfig(device=None, dtype=None, **(chosen | sizes))  # type: ignore[arg-type]
    return Scheduler(config, (), NgramProposer())


def add(state: Scheduler, name: str, prompt: list[int], max_tokens: int = 8) -> Sequence:
    sequence = Sequence(EngineRequest(name, prompt, SamplingParams(max_tokens=max_tokens)), seed=0)
    state.add(sequence)
    return sequence


def scheduled(step: SchedulerOutput) -> list[tuple[str, int, int]]:
    return [(r.sequence.request.request_id, r.start, r.num_tokens) for r in step.requests]


def run_step(state: Scheduler, token: int = 9) -> list[tuple[str, int, int]]:
    """One step in which the model always samples `token`; which tokens it computed."""
    step = state.schedule()
    token_ids = []
    for request in step.requests:
        drafts = request.token_ids[len(request.token_ids) - request.num_draft_tokens :]
        num_accepted = next((i for i, draft in enumerate(drafts) if draft != token), len(drafts))
        token_ids.append([token] * (num_accepted + 1))
    state.update(step, ModelRunnerOutput(token_ids, None, None, {}))
    return scheduled(step)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "blocks", "limit", "param"),
    [
        (30, 10, 12, 40, None),  # just fits in max_model_len
        (30, 11, 12, 40, "max_tokens"),
        (39, 2, 12, 40, "max_tokens"),
        (40, 1, 12, 40, "prompt"),
        (22, 10, 8, 32, None),  # just fits in the KV cache
        (22, 11, 8, 32, "max_tokens"),
        (32, 1, 8, 32, "prompt"),
    ],
)
def test_scheduler_refuses_what_can_never_fit(
    prompt: int, max_tokens: int, blocks: int, limit: int, param: str | None
) -> None:
    state = scheduler(num_blocks=blocks)
    if param is None:
        add(state, "fits", [5] * prompt, max_tokens)
        assert run_step(state) == [("fits", 0, prompt)]
        return
    text = (
        f"the prompt has {prompt} tokens and {max_tokens} were asked for, {prompt + max_tokens}"
        f" together; at most {limit} fit"
    )
    with pytest.raises(RequestError, match=re.escape(text)) as caught:
        add(state, "too long", [5] * prompt, max_tokens)
    assert caught.value.param == param
    assert not state.waiting
    with pytest.raises(RequestError, match="the prompt is empty; at least one token"):
        add(state, "empty", [], 1)


@pytest.mark.parametrize(("others", "admitted"), [(63, True), (64, False)])
def test_scheduler_looks_at_64_waiting_requests(others: int, admitted: bool) -> None:
    state = scheduler()
    add(state, "holds", [5] * 32, 8)
    run_step(state)  # 8 blocks of 12
    for index in range(others):
        add(state, f"large {index}", [6] * 20, 8)
    add(state, "small", [7], 1)
    names = [name for name, _, _ in run_step(state)]
    assert names == (["holds", "small"] if admitted else ["holds"])


@pytest.mark.parametrize(
    ("num_blocks", "second"),
    [(6, []), (7, [("second", 0, 9)])],  # 4 blocks for 16 tokens, 3 for 9
)
def test_scheduler_admits_a_prompt_that_just_fits(num_blocks: int, second: list) -> None:
    state = scheduler(num_blocks=num_blocks)
    add(state, "first", [5] * 16, 1)
    add(state, "second", [6] * 9, 1)
    assert run_step(state) == [("first", 0, 16), *second]


@pytest.mark.parametrize(("num_blocks", "long"), [(3, []), (4, [("long", 0, 8)])])
def test_scheduler_admits_a_prompt_whose_first_chunk_fits_in_the_window(
    num_blocks: int, long: list
) -> None:
    """The blocks behind the window are freed between the chunks of 8."""
    state = scheduler(sliding_windows=(4,), num_window_blocks=num_blocks, prefill_chunk_size=8)
    add(state, "holds", [5] * 4, 8)
    run_step(state)
    add(state, "long", [6] * 16, 8)
    assert run_step(state) == [("holds", 4, 1), *long]  # "holds" has two blocks now


def test_scheduler_counts_cached_blocks_that_it_reuses_once() -> None:
    state = scheduler(num_blocks=6)
    add(state, "first", [5, 6, 7, 8] * 4, 1)
    run_step(state)
    assert state.pools[0].num_available_blocks == 6
    assert state.pools[0].num_cached_blocks == 4
    add(state, "holds", [9] * 8, 4)
    add(state, "again", [5, 6, 7, 8] * 4, 1)  # 3 cached blocks and the one that is left
    assert run_step(state) == [("holds", 0, 8), ("again", 12, 4)]
    assert state.pools[0].num_available_blocks == 4


@pytest.mark.parametrize("window", [4, 5, 6, 8, 9])
def test_scheduler_frees_each_block_when_it_leaves_the_window(window: int) -> None:
    state = scheduler(sliding_windows=(window,))
    sequence = add(state, "a", [2, 3, 4], 37)
    while True:
        step = state.schedule()
        # The next token, at position n, attends to positions from n - window + 1 on.
        (request,) = step.requests
        num_freed = max(0, request.start - window + 1) // 4
        table = sequence.block_tables[0]
        assert [block == NULL_BLOCK for block in table[:num_freed]] == [True] * num_freed
        assert NULL_BLOCK not in table[num_freed:]
        assert state.pools[0].num_used_blocks == len(table) - num_freed
        state.update(step, ModelRunnerOutput([[9]], None, None, {}))
        if sequence.is_finished:
            break
    assert state.pools[0].num_used_blocks == 0


@pytest.mark.parametrize(
    ("window", "lost", "start"),
    [
        # The last token of 17 attends to the 4, 5 or 9 tokens up to itself. Its cached prefix has
        # four blocks, of which the window sees one, one or two.
        (4, [0, 1, 2], 16),
        (5, [0, 1, 2], 16),
        (6, [0, 1, 2], 0),
        (9, [0, 1], 16),
        (10, [0, 1], 0),
        (10, [0], 16),
        (4, [3], 12),
        (5, [3], 12),
        (None, [0], 0),
        (None, [3], 12),
    ],
)
def test_scheduler_needs_the_cached_blocks_that_a_window_sees(
    window: int | None, lost: list[int], start: int
) -> None:
    state = scheduler(sliding_windows=(window,), prefill_chunk_size=8)
    prompt = list(range(2, 18))
    first = add(state, "first", prompt, 1)
    while not first.is_finished:
        run_step(state)
    pool = state.pools[0]
    hashes = first.block_hashes(4, 4)
    for index in lost:
        block = pool.get_cached_block(hashes[index])
        assert block is not None
        pool.evict([block])
    again = add(state, "again", [*prompt, 30], 2)
    step = state.schedule()
    assert scheduled(step) == [("again", start, 17 - start)]
    assert (state.num_prefix_queries, state.num_prefix_hits) == (16 + 17, start)
    # Blocks that no token from `start` on attends to are not held.
    num_behind = 0 if window is None else max(0, start - window + 1) // 4
    assert [block == NULL_BLOCK for block in again.block_tables[0]] == [
        index < num_behind for index in range(5)
    ]


PROMPT = [8, 9, 7, 6, 5, 8]  # once the model samples 9, the draft is 7, 6, 5


@pytest.mark.parametrize(
    ("speculative", "max_tokens", "budget", "expected"),
    [
        (3, 20, 64, [7, 6, 5]),
        (2, 20, 64, [7, 6]),
        (3, 3, 64, [7]),  # one of three tokens is known, and one is sampled after the draft
        (3, 2, 64, []),
        (3, 20, 3, [7, 6]),
        (3, 20, 1, []),
        (0, 20, 64, []),
    ],
)
def test_scheduler_drafts_as_many_tokens_as_fit(
    speculative: int, max_tokens: int, budget: int, expected: list[int]
) -> None:
    state = scheduler(num_speculative_tokens=speculative, max_num_batched_tokens=budget)
    add(state, "a", PROMPT, max_tokens)
    while state.num_generation_tokens == 0:
        run_step(state)
    (request,) = state.schedule().requests
    assert request.num_draft_tokens == len(expected)
    assert request.token_ids == [9, *expected]
    assert (request.start, request.num_tokens) == (6, 1 + len(expected))
    assert request.num_sampled_rows == 1 + len(expected)


@pytest.mark.parametrize(("num_blocks", "num_drafts"), [(4, 1), (5, 3)])
def test_scheduler_preempts_nobody_for_drafts(num_blocks: int, num_drafts: int) -> None:
    state = scheduler(num_speculative_tokens=3, num_blocks=num_blocks)
    add(state, "a", PROMPT, 8)
    add(state, "b", [6] * 5, 3)
    run_step(state)  # two blocks each, and "a" has 7 tokens
    first, second = state.schedule().requests
    assert (first.num_draft_tokens, second.num_draft_tokens) in ((num_drafts, 0), (0, num_drafts))
    assert state.num_preemptions == 0


@pytest.mark.parametrize(
    ("sampled", "draft_computed"),
    [([4], 1), ([7, 4], 2), ([7, 6, 4], 3), ([7, 6, 5, 4], 3)],
)
def test_scheduler_counts_drafts_and_accepted_ones(sampled: list[int], draft_computed: int) -> None:
    state = scheduler(num_speculative_tokens=3)
    sequence = add(state, "a", PROMPT, 20)
    run_step(state)
    assert sequence.num_draft_computed_tokens == 6
    for tokens in (sampled, [3]):
        step = state.schedule()
        state.update(step, ModelRunnerOutput([tokens], None, None, {}))
        if tokens == sampled:
            assert sequence.num_computed_tokens == 6 + len(sampled)
            # The draft model has computed what it knew, 9, and all drafts but the last.
            assert sequence.num_draft_computed_tokens == 6 + draft_computed
    assert (state.num_draft_tokens, state.num_accepted_tokens) == (3, len(sampled) - 1)
    assert sequence.token_ids == [*PROMPT, 9, *sampled, 3]
    assert sequence.num_draft_computed_tokens == 6 + 1 + len(sampled)


@pytest.mark.parametrize(("stages", "counts"), [(1, [5, 5]), (2, [3, 2, 3]), (3, [2, 2, 1, 2])])
def test_scheduler_divides_decodes_among_the_steps_in_flight(
    stages: int, counts: list[int]
) -> None:
    state = scheduler(pipeline_parallel_size=stages, max_num_seqs=5)
    for index in range(5):
        add(state, f"{index}", [5, 6], 20)
    run_step(state)
    in_flight: list[SchedulerOutput] = []
    found = []
    for _ in counts:
        in_flight.append(state.schedule())
        found.append(len(in_flight[-1].requests))
        if len(in_flight) == stages:
            oldest = in_flight.pop(0)
            tokens = [[9] for _ in oldest.requests]
            state.update(oldest, ModelRunnerOutput(tokens, None, None, {}))
    assert found == counts


def test_scheduler_divides_its_budget_to_the_token() -> None:
    state = scheduler(max_num_batched_tokens=10, prefill_chunk_size=4, max_num_seqs=3)
    for token, name in enumerate("abcd"):
        add(state, name, [token] * 9, 2)
    # A chunk of 4 for each, as far as the 10 reach.
    assert run_step(state) == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]
    assert [s.request.request_id for s in state.waiting] == ["d"]  # three sequences run at most
    assert run_step(state) == [("a", 4, 4), ("b", 4, 4), ("c", 2, 2)]
    # The last tokens of "a" and "b"; "c" gets a chunk, and then what is left.
    assert run_step(state) == [("a", 8, 1), ("b", 8, 1), ("c", 4, 5)]


def test_ngram_index_looks_up_two_to_four_tokens() -> None:
    assert NgramIndex().find_continuation([7, 8, 7], 3) == []  # one token is too little
    assert NgramIndex().find_continuation([6, 7, 8, 6, 7], 3) == [8, 6, 7]
    assert NgramIndex().find_continuation([6, 7], 3) == NgramIndex().find_continuation([], 3) == []
    # The last four tokens decide, not the last five.
    later = [1, 2, 3, 4, 5, 30, 9, 2, 3, 4, 5, 40, 1, 2, 3, 4, 5]
    assert NgramIndex().find_continuation(later, 1) == [40]
    # ... and four count more than three.
    earlier = [2, 3, 4, 5, 30, 9, 3, 4, 5, 40, 2, 3, 4, 5]
    assert NgramIndex().find_continuation(earlier, 1) == [30]
    index = NgramIndex()  # told more and more of one sequence
    tokens = [5, 6, 7, 5, 6, 8, 5, 6]
    assert [index.find_continuation(tokens[:stop], 1) for stop in range(9)] == [
        [], [], [], [], [], [7], [], [], [8]
    ]  # fmt: skip
