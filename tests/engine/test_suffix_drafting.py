"""Suffix decoding: counts equal those of a plain search, memory is bounded, clients are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.suffix_drafting import (
    CHAINED_LENGTHS,
    MAX_MATCH,
    MIN_TOKEN_PROB,
    NO_DRAFT,
    SuffixDraft,
    SuffixIndex,
    SuffixProposer,
)

MODEL = {"dtype": "float32"}
TOKENS = st.integers(0, 2)
TEXTS = st.lists(st.lists(TOKENS, max_size=40), min_size=1, max_size=3)
CONTEXT = st.lists(TOKENS, max_size=20)


def searched_draft(
    texts: list[list[int]], context: list[int], max_tokens: int, max_occurrences: int = 1000
) -> SuffixDraft:
    """What `SuffixIndex.find_draft` returns, by a search of all texts for each match length."""
    best = NO_DRAFT
    for match_length in range(min(MAX_MATCH, len(context)), CHAINED_LENGTHS[0] - 1, -1):
        chained = max(length for length in CHAINED_LENGTHS if length <= match_length)
        occurrences = [
            (text, end)
            for text in reversed(texts)
            for end in range(len(text) - 1, chained - 1, -1)
            if text[end - chained : end] == context[-chained:]
        ]
        following = [
            text[end:]
            for text, end in occurrences[:max_occurrences]
            if end >= match_length and text[end - match_length : end] == context[-match_length:]
        ]
        draft = most_frequent(following, min(max_tokens, match_length))
        best = max(best, draft, key=lambda draft: draft.score)
    return best


def most_frequent(following: list[list[int]], max_tokens: int) -> SuffixDraft:
    """The path of the most frequent tokens; of equally frequent ones, the first."""
    token_ids: list[int] = []
    probability = 1.0
    score = 0.0
    while len(token_ids) < max_tokens:
        place = len(token_ids)
        following = [text for text in following if len(text) > place]
        counted = [text[place] for text in following]
        if not counted:
            break
        token_id = max(counted, key=counted.count)
        probability *= counted.count(token_id) / len(counted)
        if probability < MIN_TOKEN_PROB:
            break
        token_ids.append(token_id)
        score += probability
        following = [text for text in following if text[place] == token_id]
    return SuffixDraft(token_ids, score)


def index_of(texts: list[list[int]], max_tokens: int = 1024, **chosen: int) -> SuffixIndex:
    index = SuffixIndex(max_tokens, **chosen)
    for number, text in enumerate(texts):
        if number:
            index.end_text()
        for token_id in text:
            index.extend([token_id])
    return index


@given(TEXTS, CONTEXT, st.integers(1, 8), st.sampled_from([1, 2, 3, 200]))
def test_suffix_index_drafts_what_a_search_of_the_text_finds(
    texts: list[list[int]], context: list[int], max_tokens: int, max_occurrences: int
) -> None:
    index = index_of(texts, max_occurrences=max_occurrences)
    expected = searched_draft(texts, context, max_tokens, max_occurrences)
    assert index.find_draft(context, max_tokens) == expected
    assert len(expected.token_ids) <= max_tokens
    assert len(expected.token_ids) <= max(len(context), 0)


@given(TEXTS, CONTEXT, st.sampled_from([8, 16, 32]))
def test_suffix_index_drops_the_oldest_tokens(
    texts: list[list[int]], context: list[int], max_tokens: int
) -> None:
    index = index_of(texts, max_tokens, max_occurrences=200)
    in_window: list[list[int]] = [[]]
    number_of_ends = len(texts) - 1
    tokens = [token for text in texts for token in (*text, -1)][:-1][-max_tokens:]
    assert number_of_ends + sum(map(len, texts)) == index.num_appended
    for token in tokens:
        if token == -1:
            in_window.append([])
        else:
            in_window[-1].append(token)
    assert index.find_draft(context, 8) == searched_draft(in_window, context, 8)
    assert index.capacity == max_tokens


@pytest.mark.parametrize("step", [1, 700, 5000])
def test_suffix_index_grows_and_finds_the_same(step: int) -> None:
    text = [place * place % 89 for place in range(3000)]  # repeats itself after 89 tokens
    index = SuffixIndex(4096)
    for start in range(0, len(text), step):
        index.extend(text[start : start + step])
    assert (index.capacity, index.num_bytes) == (4096, 52 * 4096)
    for end in (2, 50, 1500, 3000):
        context = text[max(0, end - MAX_MATCH) : end]
        draft = index.find_draft(context, 64)
        assert draft == searched_draft([text], context, 64, 16)
        assert draft.token_ids == [place * place % 89 for place in range(end, end + len(context))]


def test_suffix_index_prefers_frequent_tokens_to_recent_ones() -> None:
    index = SuffixIndex(1024)
    index.extend([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 5, 6, 7])
    assert index.find_draft([1, 2, 3], 3) == SuffixDraft([4, 1, 2], pytest.approx(2.0))
    # After a longer match, 5 is the only token that followed.
    assert index.find_draft([4, 1, 2, 3, 4, 1, 2, 3], 3) == SuffixDraft([5, 6, 7], 3.0)
    assert index.find_draft([9, 2, 3], 3).token_ids == [4, 1]  # a match of 2 allows 2 tokens
    assert index.find_draft([9, 3], 3) == NO_DRAFT


def test_suffix_index_finds_a_long_match_behind_many_short_ones() -> None:
    long_match = [7, 7, 7, 7, 7, 7, 1, 2]
    index = SuffixIndex(1024)
    index.extend([*long_match, 3, *[1, 2, 4] * 50])
    assert index.find_draft(long_match, 1).token_ids == [3]
    assert index.find_draft([8, 1, 2], 1).token_ids == [4]


def sequence(
    prompt: list[int], output: tuple[int, ...] = (), salt: str = "", adapter_id: int = 0
) -> Sequence:
    params = SamplingParams(max_tokens=1000)
    request = EngineRequest("a", prompt, params, cache_salt=salt)
    made = Sequence(request, seed=0, adapter_id=adapter_id)
    made.token_ids += output
    return made


def test_suffix_proposer_reads_the_request_and_earlier_outputs() -> None:
    proposer = SuffixProposer()
    assert proposer.propose(sequence([1, 2, 3, 1, 2]), 4) == [3, 1]
    assert proposer.propose(sequence([8, 9]), 4) == []
    proposer.forget(sequence([5, 6, 7, 8], (9, 10, 11)))
    # The end of the prompt is the context of the first tokens of the output.
    assert proposer.propose(sequence([6, 7, 8]), 4) == [9, 10, 11]
    assert proposer.propose(sequence([5, 6, 8, 9]), 4) == [10, 11]
    # The output of a prompt that ended there, and the request's own text, where it says more.
    assert proposer.propose(sequence([4, 8, 9, 1, 2, 4, 8, 9]), 4) == [1, 2, 4]
    proposer.forget(sequence([1, 2, 3]))  # without an output
    assert proposer.propose(sequence([1, 2]), 4) == []


def test_suffix_proposer_follows_a_growing_sequence_until_it_is_finished() -> None:
    proposer = SuffixProposer()
    growing = sequence([1, 2, 3, 4])
    for token_id in (1, 2):
        assert proposer.propose(growing, 4) == []
        growing.token_ids.append(token_id)
    assert proposer.propose(growing, 4) == [3, 4]
    assert proposer.propose(growing, 1) == [3]
    proposer.forget(growing)
    assert proposer._indexes == {}


@pytest.mark.parametrize("other", [{"salt": "other"}, {"salt": "", "adapter_id": 1}])
def test_suffix_proposer_keeps_clients_and_adapters_apart(other: dict[str, object]) -> None:
    proposer = SuffixProposer()
    proposer.forget(sequence([1], (5, 6, 7, 8)))
    assert proposer.propose(sequence([5, 6]), 4) == [7, 8]
    assert proposer.propose(sequence([5, 6], **other), 4) == []  # type: ignore[arg-type]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 3000)), min_size=1, max_size=20, unique=True
    )
)
def test_suffix_proposer_drops_the_namespaces_that_were_not_used_last(
    finished: list[tuple[int, int]],
) -> None:
    proposer = SuffixProposer(max_total_history_tokens=1 << 13)
    for salt, length in finished:
        proposer.forget(sequence([1, salt], tuple(range(length)), salt=str(salt)))
        assert proposer.num_history_bytes <= 52 << 13
    salt, length = finished[-1]
    expected = [2, 3] if length > 3 else list(range(2, length))
    assert proposer.propose(sequence([0, 1], salt=str(salt)), 4) == expected


def engine(decoder: Decoder, **chosen: Any) -> Engine:
    sizes = {"max_model_len": 256, "num_blocks": 200} | chosen
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **sizes)
    return Engine(decoder, config)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_engine_answers_the_same_with_suffix_decoding(model: Path, temperature: float) -> None:
    decoder = load_model(open_checkpoint(model), torch.float32)
    prompts = [[5, 9, 11, 300] * 6, [7, 8] * 9, [40 + i * i % 7 for i in range(50)]]
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=40, ignore_eos=True)
    expected = engine(decoder).generate(prompts, params)
    suffix = {"num_speculative_tokens": 8, "draft_method": "suffix"}
    drafting = engine(decoder, **suffix)
    accepted = []
    for _ in range(2):
        assert drafting.generate(prompts, params) == expected
        accepted.append(drafting.stats().accepted_total)
    # The second time it knows the whole answers.
    assert 0 < accepted[0] < accepted[1] - accepted[0]
    preempted = engine(decoder, **suffix, num_blocks=9)
    assert preempted.generate(prompts, params) == expected
    assert preempted.stats().preemptions_total > 0
