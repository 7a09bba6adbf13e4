"""The thinking budget: a thought that does not end is closed at exactly its last token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from support.draft_models import similar_decoder

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.thinking_budget import (
    MAX_TOKENS_BEFORE,
    UNLIMITED,
    ThinkingBudget,
    ThinkingState,
)
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine

MODEL = {"dtype": "float32"}
START = 500
END = 501  # the model never writes it by itself in these tests
CLOSING = (17, 18, END)
NUM_TOKENS = 24
PARAMS = [
    SamplingParams(temperature=t, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True)
    for seed, t in enumerate((0.0, 0.7, 1.0, 0.0, 1.3))
]


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32)


@pytest.fixture(scope="module")
def similar(model: Path) -> Decoder:
    return similar_decoder(model)


def engine(decoder: Decoder, draft: Decoder | None = None, **chosen: Any) -> Engine:
    sizes = {"max_model_len": 256, "num_blocks": 400, "block_size": 16} | chosen
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **sizes)
    return Engine(decoder, config, (), draft)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, 490, (n,), generator=generator).tolist() * 2 for n in (3, 11, 18, 30, 7)
    ]


def limited(max_tokens: int, **fields: Any) -> list[SamplingParams]:
    """PARAMS with a thought that is open at the prompt's end and may have `max_tokens`."""
    chosen = {"forced_token_ids": CLOSING, "starts_open": True} | fields
    budget = ThinkingBudget(max_tokens, (START,), END, **chosen)
    return [replace(params, thinking_budget=budget) for params in PARAMS]


@pytest.fixture(scope="module")
def plain(decoder: Decoder) -> list[list[int]]:
    answers = engine(decoder).generate(prompts(), PARAMS)
    assert not any(END in answer for answer in answers)
    return answers


@pytest.fixture(scope="module")
def closed(decoder: Decoder) -> list[list[int]]:
    """Answers whose thoughts are closed after 7 tokens."""
    return engine(decoder).generate(prompts(), limited(7))


def test_thinking_state_closes_further_thoughts_at_once() -> None:
    again = (END, 60, 61)
    state = ThinkingState(ThinkingBudget(2, (START,), END, (END,), True, again))

    def follow(*token_ids: int) -> list[int | None]:
        forced = []
        for token_id in token_ids:
            forced.append(state.forced_token_id)
            state.append(token_id if forced[-1] is None else forced[-1])
        return forced

    assert follow(5, 6, 0) == [None, None, END]
    assert state.num_free_tokens == 1, "the next token may open another thought"
    assert follow(70, START, 0, 0, 0) == [None, None, *again]
    assert follow(71, START, 0) == [None, None, END], "each further thought is closed at once"
    assert follow(0, 0) == [60, 61]
    assert follow(*[72] * MAX_TOKENS_BEFORE) == [None] * MAX_TOKENS_BEFORE
    assert state.num_free_tokens == UNLIMITED, "the answer has begun"


@pytest.mark.parametrize("max_tokens", [0, 1, 7, 20, 30])
def test_thinking_budget_is_exact(
    decoder: Decoder, plain: list[list[int]], max_tokens: int
) -> None:
    answers = engine(decoder).generate(prompts(), limited(max_tokens))
    for prompt, answer, free, params in zip(prompts(), answers, plain, PARAMS, strict=True):
        stop = max_tokens + len(CLOSING)
        assert answer[:max_tokens] == free[:max_tokens]
        assert answer[max_tokens:stop] == list(CLOSING)[: max(0, NUM_TOKENS - max_tokens)]
        assert len(answer) == NUM_TOKENS
        if params.temperature == 0 and stop < NUM_TOKENS:
            # Sampling goes on as usual after the forced tokens.
            rest = replace(params, max_tokens=NUM_TOKENS - stop)
            assert engine(decoder).generate([prompt + answer[:stop]], rest) == [answer[stop:]]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("drafted", [False, True])
def test_thinking_budget_is_exact_with_drafts(
    decoder: Decoder, similar: Decoder, closed: list[list[int]], count: int, drafted: bool
) -> None:
    running = engine(decoder, similar if drafted else None, num_speculative_tokens=count)
    assert running.generate(prompts(), limited(7)) == closed
    assert not drafted or running.stats().accepted_total > 0


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_blocks": 12},
        {"max_num_batched_tokens": 7},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False},
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_thinking_budget_is_exact_however_steps_are_scheduled(
    decoder: Decoder, closed: list[list[int]], sizes: dict[str, Any], ahead: bool
) -> None:
    running = engine(decoder, async_scheduling=ahead, **sizes)
    assert running.generate(prompts(), limited(7)) == closed
    assert ("num_blocks" in sizes) == (running.stats().preemptions_total > 0)


@pytest.mark.parametrize("options", [{"tp": 2}, {"pp": 2}])
def test_thinking_budget_is_exact_on_several_ranks(
    model: Path, closed: list[list[int]], options: dict[str, Any]
) -> None:
    running = load_engine(
        model, EngineOptions(device="cpu", kv_cache_memory=4 << 20, dtype="float32", **options)
    )
    assert isinstance(running, LeadEngine)
    try:
        for index, (prompt, params) in enumerate(zip(prompts(), limited(7), strict=True)):
            running.add(EngineRequest(str(index), prompt, params))
        answers: dict[str, list[int]] = {str(index): [] for index in range(5)}
        while running.has_work:
            for output in running.step():
                answers[output.request_id] += output.token_ids
    finally:
        running.close()
    assert list(answers.values()) == closed


def test_thinking_budget_counts_from_the_opening_mark(
    decoder: Decoder, plain: list[list[int]]
) -> None:
    for index, answer in enumerate(plain):
        budget = ThinkingBudget(3, tuple(answer[2:4]), END, (END,))
        params = replace(PARAMS[index], thinking_budget=budget)
        found = engine(decoder, async_scheduling=True).generate([prompts()[index]], params)[0]
        begin = next(
            place for place in range(2, NUM_TOKENS) if answer[place - 1 : place + 1] == answer[2:4]
        )
        stop = begin + 1 + 3
        assert found[:stop] == answer[:stop]
        assert found[stop] == END


def test_thinking_budget_counts_penalties_logprobs_and_bias(decoder: Decoder) -> None:
    options = replace(
        limited(4)[0], presence_penalty=1.5, logprobs=2, logit_bias={CLOSING[0]: -100.0}
    )
    running = engine(decoder)
    running.add(EngineRequest("a", prompts()[0], options))
    token_ids: list[int] = []
    logprobs = []
    while running.has_work:
        for output in running.step():
            token_ids += output.token_ids
            logprobs += output.logprobs or []
    assert tuple(token_ids[4:7]) == CLOSING
    # A forced token has the log probability that the model gives it.
    assert len(logprobs) == NUM_TOKENS
    assert all(entry.logprob < 0 for entry in logprobs)
    assert logprobs[4].logprob < logprobs[4].top[-1][1]


def test_thinking_budget_leaves_the_grammar_of_the_answer(model: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(model))
    mark = next(index for index in sorted(tokenizer.special_ids, reverse=True))
    grammar = LLMatcher.grammar_from_lark(f"start: /(.|\\n)*/ <[{mark}]> /[0-9]{{5}}x/")
    running = load_engine(model, EngineOptions(device="cpu", kv_cache_memory=4 << 20))
    budget = ThinkingBudget(6, (START,), mark, (mark,), starts_open=True)
    bias = {mark: -100.0}  # the model would not end its thought
    running.add(
        EngineRequest(
            "a",
            [5, 6, 7],
            SamplingParams(
                seed=1, max_tokens=60, thinking_budget=budget, logit_bias=bias, ignore_eos=True
            ),
            grammar=grammar,
        )
    )
    token_ids: list[int] = []
    while running.has_work:
        for output in running.step():
            token_ids += output.token_ids
    assert token_ids.index(mark) == 6
    answer = tokenizer.decode(token_ids[7:])
    assert len(answer) == 6 and answer[:5].isdigit() and answer[5] == "x"


def test_thinking_state_ends() -> None:
    budget = ThinkingBudget(2, (START, 9), END, (END,))
    state = ThinkingState(budget)
    for token_id in (START, START, 9):
        assert state.num_free_tokens == 3 and state.forced_token_id is None
        state.append(token_id)
    assert state.num_free_tokens == 2
    state.append(4)
    state.append(END)  # by itself: one thinking token is left for another thought
    assert state.num_free_tokens == 2
    for token_id in (START, 9, 4):
        state.append(token_id)
    assert state.forced_token_id == END and state.num_free_tokens == 0
    state.append(END)
    assert state.num_free_tokens == UNLIMITED and state.forced_token_id is None
    # No thought at all is allowed, and none begins.
    none = ThinkingState(replace(budget, max_tokens=0))
    for _ in range(MAX_TOKENS_BEFORE):
        assert none.num_free_tokens == 1
        none.append(4)
    assert none.num_free_tokens == UNLIMITED
