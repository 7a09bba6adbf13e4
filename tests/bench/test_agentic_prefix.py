"""The ideal prefix hits of a run: by hand, and against an implementation that compares tokens."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llmkit.bench.agentic.ideal_prefix_cache import SentRequest, ideal_cached_tokens
from llmkit.bench.agentic.run_sessions import server_block_size


def test_next_turn_finds_prompt_and_answer_in_full_blocks() -> None:
    prompt = list(range(10))
    answer = [50, 51, 52]
    following = [*prompt, *answer, 60, 61]
    requests = [SentRequest(0.0, 1.0, prompt, answer), SentRequest(2.0, 3.0, following, [70])]
    # 12 tokens were computed: the last one of the answer was not.
    assert ideal_cached_tokens(requests, 4) == 12
    assert ideal_cached_tokens(requests, 5) == 10
    assert ideal_cached_tokens(requests, 13) == 0


def test_last_prompt_token_is_always_computed() -> None:
    same = [SentRequest(0.0, 1.0, [1, 2, 3, 4], [9]), SentRequest(2.0, 3.0, [1, 2, 3, 4], [9])]
    assert ideal_cached_tokens(same, 2) == 2
    assert ideal_cached_tokens(same, 1) == 3


def test_answer_counts_from_its_end_and_a_prompt_from_its_sending() -> None:
    first = SentRequest(0.0, 5.0, [1, 2], [3, 4, 5])
    early = SentRequest(1.0, 6.0, [1, 2, 3, 4, 0], [9])
    late = SentRequest(5.0, 7.0, [1, 2, 3, 4, 0], [9])
    assert ideal_cached_tokens([first, early], 2) == 2
    assert ideal_cached_tokens([first, late], 2) == 4
    assert ideal_cached_tokens([late, first], 2) == 4, "the order of the list says nothing"


def test_equal_blocks_after_other_tokens_are_no_hits() -> None:
    requests = [
        SentRequest(0.0, 1.0, [1, 2, 7, 8, 0], [9]),
        SentRequest(2.0, 3.0, [3, 4, 7, 8, 0], [9]),
    ]
    assert ideal_cached_tokens(requests, 2) == 0


def naive_cached_tokens(requests: Sequence[SentRequest], block_size: int) -> int:
    """Compares each prompt with all that was computed before, token by token."""
    total = 0
    for index, request in enumerate(requests):
        best = 0
        for other_index, other in enumerate(requests):
            computed: list[int] = []
            if (other.sent_s, other_index) < (request.sent_s, index):
                computed = list(other.prompt)
            if other.answered_s <= request.sent_s:
                computed = [*other.prompt, *other.answer[:-1]]
            common = 0
            for left, right in zip(request.prompt[:-1], computed, strict=False):
                if left != right:
                    break
                common += 1
            best = max(best, common // block_size * block_size)
        total += best
    return total


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@st.composite
def sent_requests(draw: st.DrawFn) -> list[SentRequest]:
    sent = sorted(draw(st.lists(st.integers(0, 8), min_size=1, max_size=7)))
    return [
        SentRequest(time, time + draw(st.integers(1, 4)), draw(TOKENS), draw(TOKENS))
        for time in sent
    ]


@given(sent_requests(), st.integers(1, 4))
def test_ideal_cached_tokens_equals_a_comparison_of_tokens(
    requests: list[SentRequest], block_size: int
) -> None:
    assert ideal_cached_tokens(requests, block_size) == naive_cached_tokens(requests, block_size)


def test_block_size_of_a_server() -> None:
    vllm = (
        "# TYPE vllm:cache_config_info gauge\n"
        'vllm:cache_config_info{cache_dtype="auto",block_size="128",enable="True"} 1.0\n'
    )
    assert server_block_size(vllm) == 128
    assert server_block_size('vllm:cache_config_info{block_size="None"} 1.0\n') == 16
    assert server_block_size("llmkit:num_requests_running 0\n") == 16
    assert server_block_size(None) == 16
