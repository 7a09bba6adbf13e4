"""Answers that follow a grammar, whatever else the engine does at the same time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.grammar_compiler import compile_grammar
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.runtime.server.schemas.structured_output import (
    OutputConstraint,
    combined_grammar,
    constraint_grammar,
)
from llmkit.runtime.server.text.lark_grammar import lark_string

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["fox", "dog"]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "maximum": 99},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
COMPACT: Any = {
    "whitespace_flexible": False
}  # a random model would write little else than white space
REGEX = r"(ab|cd){2,3} [0-9]{4}\."
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=120)


def answers(
    running: Engine, requests: list[EngineRequest]
) -> dict[str, tuple[list[int], str | None]]:
    found: dict[str, tuple[list[int], str | None]] = {
        request.request_id: ([], None) for request in requests
    }
    for request in requests:
        running.add(request)
    while running.has_work:
        for output in running.step():
            found[output.request_id] = (
                found[output.request_id][0] + output.token_ids,
                output.finish_reason,
            )
    return found


def requests() -> list[EngineRequest]:
    schema = LLMatcher.grammar_from_json_schema(SCHEMA, COMPACT)
    regex = LLMatcher.grammar_from_regex(REGEX)
    kinds = (schema, regex, None)
    return [
        EngineRequest(
            str(i),
            [5, 6, 7 + i],
            replace(DRAWN, seed=i, temperature=float(i % 2)),
            grammar=kinds[i % 3],
        )
        for i in range(9)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "speculative": {"speculate": 3},
    "few tokens a step": {"max_num_batched_tokens": 4},
    "ranks": {"tp": 2, "pp": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_follow_their_grammars(model: Path, options: str) -> None:
    tokenizer = load_tokenizer(open_checkpoint(model))
    running = load_engine(
        model, EngineOptions(device="cpu", kv_cache_memory=4 << 20, **OPTIONS[options])
    )
    found = answers(running, requests())
    if isinstance(running, LeadEngine):
        running.close()
    alone = load_engine(model, EngineOptions(device="cpu", kv_cache_memory=4 << 20))
    for request in requests():
        ids, reason = found[request.request_id]
        assert found[request.request_id] == answers(alone, [request])[request.request_id]
        text = tokenizer.decode(ids)
        if int(request.request_id) % 3 == 0:
            document = json.loads(text)
            assert document["name"] in ("fox", "dog") and 1 <= len(document["sizes"]) <= 2
            assert all(isinstance(size, int) and size <= 99 for size in document["sizes"])
            assert reason == "stop"
        elif int(request.request_id) % 3 == 1:
            assert re.fullmatch(REGEX, text)
            assert reason == "stop"


def test_invalid_grammar_is_refused_and_other_requests_continue(model: Path) -> None:
    running = load_engine(model, EngineOptions(device="cpu", kv_cache_memory=4 << 20))
    for wrong in (LLMatcher.grammar_from_regex("(a"), "{"):
        with pytest.raises(RequestError) as refused:
            running.add(EngineRequest("wrong", [5], DRAWN, grammar=wrong))
        assert refused.value.code == "invalid_grammar"
        assert len(str(refused.value)) < 600
    assert not running.has_work
    (found,) = answers(running, [requests()[1]]).values()
    assert found[1] == "stop"


def json_grammar() -> str:
    """The grammar of a request whose answer follows SCHEMA."""
    answer = constraint_grammar(OutputConstraint("json", SCHEMA, "guided_json"))
    return combined_grammar(answer, None, None, starts_in_reasoning=False, mark=lark_string)


@pytest.fixture(scope="module")
def byte_tokenizer() -> LLTokenizer:
    """Token ids are the bytes of the text."""
    return LLTokenizer("byte")


def follows(tokenizer: LLTokenizer, text: str) -> bool:
    tokens = list(text.encode())
    matcher = compile_grammar(tokenizer, json_grammar())
    return bool(matcher.validate_tokens(tokens) == len(tokens))


GAPS = st.sampled_from(["", " ", "\n", "\n  ", "\n\t\t", "\n" + " " * 16])
WASTE = ["  ", "\n\n", " \n", "\n \n", "\t", "\r\n", "\n" + " " * 17, "\n\t \t"]


@given(st.lists(GAPS, min_size=11, max_size=11), st.integers(0, 10), st.sampled_from(WASTE))
@settings(max_examples=60)
def test_json_answers_have_one_line_feed_between_tokens(
    byte_tokenizer: LLTokenizer, gaps: list[str], place: int, waste: str
) -> None:
    def written(gaps: list[str]) -> str:
        words = ["{", '"name"', ":", '"fox"', ",", '"sizes"', ":", "[", "7", ",", "8", "]}"]
        return "".join(word + gap for word, gap in zip(words, [*gaps, ""], strict=True))

    assert json.loads(written(gaps)) == {"name": "fox", "sizes": [7, 8]}
    assert follows(byte_tokenizer, written(gaps))
    gaps[place] = waste
    assert not follows(byte_tokenizer, written(gaps))
