"""Which recurrent states are kept, and which requests begin with them."""

from __future__ import annotations

from llmkit.kernels import recurrent_state
from llmkit.runtime.engine import engine_config, state_scheduler
from llmkit.runtime.engine.drafting import DraftProposer
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler import Scheduler
from llmkit.runtime.engine.scheduler_output import ModelRunnerOutput
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.state_cache import StateCache

BLOCK = 4
NEXT_TOKEN = 7  # what the model always samples


class WrongDrafts:
    """Proposes tokens that the model does not sample, after the first one."""

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        return [NEXT_TOKEN, 3, 3, 3][:max_tokens]

    def forget(self, sequence: Sequence) -> None:
        pass


def scheduler(draft_proposer: DraftProposer | None = None, **sizes: object) -> Scheduler:
    chosen: dict[str, object] = {
        "max_model_len": 100,
        "num_blocks": 100,
        "block_size": BLOCK,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "has_recurrent_states": True,
        "num_state_snapshots": 20,
    }
    config: EngineConfig = EngineConfig(device=None, dtype=None, **(chosen | sizes))
    return Scheduler(config, (), draft_proposer)


Rows = dict[int, tuple[int, ...]]  # the tokens before the state in each row


def run(
    state: Scheduler,
    name: str,
    prompt: list[int],
    max_tokens: int = 1,
    rows: Rows | None = None,
    num_shared_tokens: int = 0,
) -> Sequence:
    """Run a request to its end."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = EngineRequest(name, prompt, sampling, num_shared_tokens=num_shared_tokens)
    sequence = Sequence(request, seed=0)
    state.add(sequence)
    while not sequence.is_finished:
        step(state, rows=rows)
    return sequence


def step(state: Scheduler, sampled: int = NEXT_TOKEN, rows: Rows | None = None) -> None:
    """Run a step, and note in `rows` what it writes there."""
    scheduled = state.schedule()
    token_ids = []
    for request in scheduled.requests:
        tokens = [*request.sequence.token_ids[: request.start], *request.token_ids]
        for end, row in request.state_rows.writes:
            if rows is not None:
                rows[row] = tuple(tokens[: request.start + end])
        drafts = request.token_ids[request.num_tokens - request.num_draft_tokens :]
        num_right = next(
            (index for index, token in enumerate(drafts) if token != NEXT_TOKEN), len(drafts)
        )
        token_ids.append([sampled] * (1 + num_right))
    state.update(scheduled, ModelRunnerOutput(token_ids, None, None, {}))


def cached(sequence: Sequence) -> int:
    assert sequence.num_cached_tokens is not None
    return sequence.num_cached_tokens


def test_constants_are_those_of_the_kernels() -> None:
    assert engine_config.GPU_STATE_CHUNK == recurrent_state.CHUNK_TOKENS
    assert state_scheduler.NO_ROW == recurrent_state.NO_ROW


def test_the_same_prompt_begins_at_its_last_block_boundary() -> None:
    state = scheduler()
    prompt = list(range(10, 33))  # 23 tokens
    assert cached(run(state, "a", prompt)) == 0
    assert cached(run(state, "b", prompt)) == 20
    assert cached(run(state, "c", prompt[:21])) == 20, "the last token is computed again"
    assert cached(run(state, "d", prompt[:20])) == 0, "no state was kept after 16 tokens"


def test_the_second_turn_of_a_conversation_computes_only_what_is_new() -> None:
    state = scheduler()
    first = run(state, "first", list(range(10, 23)), max_tokens=12)
    second_turn = [*first.token_ids, 90, 91, 92]
    possible = (len(first.token_ids) - 1) // BLOCK * BLOCK
    assert cached(run(state, "second", second_turn)) == possible == 24


def test_requests_part_after_a_shared_system_prompt_whose_state_is_kept_with_the_second() -> None:
    state = scheduler()
    system = list(range(10, 26))
    assert cached(run(state, "a", [*system, *[50] * 9])) == 0
    assert cached(run(state, "b", [*system, *[51] * 9])) == 0, "it keeps the state where they part"
    assert cached(run(state, "c", [*system, *[52] * 9])) == 16


def test_the_state_after_a_shared_part_of_the_prompt_is_kept_with_the_first_request() -> None:
    state = scheduler()
    system = list(range(10, 28))  # 18 tokens: 16 in whole blocks
    rows: Rows = {}
    first = run(state, "a", [*system, *[50] * 9], rows=rows, num_shared_tokens=18)
    assert cached(first) == 0
    assert tuple(system[:16]) in rows.values()
    assert cached(run(state, "b", [*system, *[51] * 9], num_shared_tokens=18)) == 16
    assert cached(run(state, "c", [*system, *[52] * 9])) == 16
    # More than the prompt has, as after a client's truncation, does no harm.
    assert cached(run(state, "d", [*system, 53], num_shared_tokens=90)) == 16


def test_a_state_after_rejected_draft_tokens_is_never_found() -> None:
    """Of the drafts 7, 3, 3, 3 the first is right. So a step that begins after 9 tokens knows 12.

    The state that it has written after 12 tokens is that of a wrong one.
    """
    state = scheduler(WrongDrafts(), num_speculative_tokens=4)
    rows: Rows = {}
    first = run(state, "a", list(range(10, 19)), max_tokens=12, rows=rows)
    assert first.token_ids[9:] == [NEXT_TOKEN] * 12
    assert state.states is not None
    state.states.begin_step()
    assert state.states.cache.num_held_rows == 0
    kept = []
    for count, block_hash in enumerate(first.block_hashes(5, BLOCK), start=1):
        row = state.states.find_snapshot(block_hash)
        if row is not None:
            kept.append(count * BLOCK)
            assert rows[row] == tuple(first.token_ids[: count * BLOCK])
    assert 8 in kept


def test_states_of_a_sequence_whose_logits_are_not_finite_are_forgotten() -> None:
    state = scheduler()
    prompt = list(range(10, 30))
    failing = Sequence(EngineRequest("a", prompt, SamplingParams(max_tokens=3)), seed=0)
    state.add(failing)
    step(state, sampled=-1)
    assert failing.is_finished
    assert cached(run(state, "b", prompt)) == 0
    assert state.states is not None
    state.states.cache.check_invariants()


def test_snapshots_of_answers_do_not_push_out_those_of_prompts() -> None:
    state = scheduler(num_state_snapshots=1)
    prompt = list(range(10, 23))
    run(state, "a", prompt, max_tokens=20)
    assert cached(run(state, "b", prompt)) == 12, "one row, and it still has the prompt's state"


def test_without_a_prefix_cache_no_state_is_kept() -> None:
    state = scheduler(enable_prefix_caching=False)
    prompt = list(range(10, 33))
    run(state, "a", prompt, max_tokens=9)
    assert cached(run(state, "b", prompt)) == 0
    assert state.states is not None and state.states.cache.num_rows == 0


def test_state_cache_gives_away_the_least_recently_used_row_that_no_step_reads() -> None:
    cache = StateCache(first_row=10, num_rows=3)
    for name in (b"a", b"b", b"c"):
        row = cache.allocate()
        assert row is not None
        cache.cache_row(row, name)
        cache.release(row)
    assert cache.allocate() is None, "all are written in this step"
    cache.begin_step()
    first = cache.get(b"a")
    assert first == 10
    cache.hold(first)
    assert cache.allocate() == 11, "a was used last, so b goes first"
    assert cache.get(b"b") is None
    cache.release(first)
    assert cache.allocate() == 12
    assert cache.allocate() is None, "this step still reads a"
    cache.begin_step()
    assert cache.allocate() == 10
    cache.check_invariants()


def test_a_step_with_drafts_that_is_undone_drops_each_hold_once() -> None:
    """As when it runs out of memory, after a step that ended at a snapshot."""
    for undo in ("abort", "cancel"):
        state = scheduler(WrongDrafts(), num_speculative_tokens=3)
        sequence = Sequence(
            EngineRequest("a", list(range(10, 18)), SamplingParams(max_tokens=40, ignore_eos=True)),
            seed=0,
        )
        state.add(sequence)
        assert state.states is not None
        for _ in range(9):
            step(state)
            scheduled = state.schedule()
            states = state.states._states[sequence]
            assert states.draft_rows
            if state.states.cache.is_snapshot(scheduled.requests[0].state_rows.initial_row):
                break
            state.update(scheduled, ModelRunnerOutput([[NEXT_TOKEN] * 2], None, None, {}))
        else:
            raise AssertionError("no step began at a snapshot")
        if undo == "abort":
            state.abort_step(scheduled, "out of memory")
        else:
            state.cancel("a")
        state.states.begin_step()
        state.states.cache.check_invariants()
        assert state.states.cache.num_held_rows == 0


def test_verified_drafts_of_a_preempted_sequence_change_nothing() -> None:
    """With several pipeline stages, a sequence may be preempted while its step is in flight."""
    state = scheduler(WrongDrafts(), num_speculative_tokens=3, pipeline_parallel_size=2)
    sequence = Sequence(
        EngineRequest("a", list(range(10, 17)), SamplingParams(max_tokens=40)), seed=0
    )
    state.add(sequence)
    step(state)
    scheduled = state.schedule()
    assert scheduled.requests[0].num_draft_tokens
    state._preempt(sequence)
    state.update(scheduled, ModelRunnerOutput([[NEXT_TOKEN] * 2], None, None, {}))
    assert state.states is not None
    state.states.begin_step()
    assert state.states.cache.num_held_rows == 0


def test_snapshots_of_a_step_whose_result_never_comes_are_dropped() -> None:
    state = scheduler(async_scheduling=True)
    sequence = Sequence(
        EngineRequest("a", list(range(10, 17)), SamplingParams(max_tokens=9)), seed=0
    )
    state.add(sequence)
    for _ in range(3):
        state.schedule()
    state.cancel("a")
    state.schedule()
    assert state.states is not None and state.states.cache.num_held_rows == 0
