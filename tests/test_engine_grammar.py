"""Answers that follow a grammar, whatever else the engine does at the same time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import Request, RequestError, SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine
from llmkit.runtime.parallel.lead import LeadEngine

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["fox", "dog"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
COMPACT: Any = {"whitespace_flexible": False}  # a random model would write little else than white space
REGEX = r"(ab|cd){2,3} [0-9]{4}\."
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=120)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "model")


def answers(running: Engine, requests: list[Request]) -> dict[str, tuple[list[int], str | None]]:
    found: dict[str, tuple[list[int], str | None]] = {request.id: ([], None) for request in requests}
    for request in requests:
        running.add(request)
    while running.has_work:
        for output in running.step():
            found[output.request_id] = (found[output.request_id][0] + output.token_ids, output.finish_reason)
    return found


def requests() -> list[Request]:
    schema, regex = LLMatcher.grammar_from_json_schema(SCHEMA, COMPACT), LLMatcher.grammar_from_regex(REGEX)
    kinds = (schema, regex, None)
    return [
        Request(str(i), [5, 6, 7 + i], replace(DRAWN, seed=i, temperature=float(i % 2)), grammar=kinds[i % 3])
        for i in range(9)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "speculative": {"speculate": 3},
    "few tokens a step": {"max_num_batched_tokens": 4},
    "ranks": {"tp": 2, "pp": 2},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_answers_follow_their_grammars(path: Path, options: str) -> None:
    tokenizer = load_tokenizer(open_checkpoint(path))
    running = load_engine(path, EngineOptions(device="cpu", kv_cache_memory=4 << 20, **OPTIONS[options]))
    found = answers(running, requests())
    if isinstance(running, LeadEngine):
        running.close()
    alone = load_engine(path, EngineOptions(device="cpu", kv_cache_memory=4 << 20))
    for request in requests():
        ids, reason = found[request.id]
        assert found[request.id] == answers(alone, [request])[request.id]
        text = tokenizer.decode(ids)
        if int(request.id) % 3 == 0:
            document = json.loads(text)
            assert document["name"] in ("fox", "dog") and 1 <= len(document["sizes"]) <= 2
            assert all(isinstance(size, int) and size <= 99 for size in document["sizes"])
            assert reason == "stop"
        elif int(request.id) % 3 == 1:
            assert re.fullmatch(REGEX, text)
            assert reason == "stop"


def test_what_is_no_grammar_is_refused_and_others_go_on(path: Path) -> None:
    running = load_engine(path, EngineOptions(device="cpu", kv_cache_memory=4 << 20))
    for wrong in (LLMatcher.grammar_from_regex("(a"), "{"):
        with pytest.raises(RequestError) as refused:
            running.add(Request("wrong", [5], DRAWN, grammar=wrong))
        assert refused.value.code == "invalid_grammar"
        assert len(str(refused.value)) < 600
    assert not running.has_work
    (found,) = answers(running, [requests()[1]]).values()
    assert found[1] == "stop"
