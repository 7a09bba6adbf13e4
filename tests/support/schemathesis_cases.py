"""Schemathesis on the server's OpenAPI document: valid and invalid requests of each operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from support.attacks import HANG_S, MAX_ERROR_BYTES

MODEL = "tiny"
_TWICE = {"versions", "page"}  # parts of paths whose routes are those of other paths, or all alike
SAY = [{"role": "user", "content": "hello"}]
# What an operation asks for, so that its other fields are what is tried.
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": SAY, "max_tokens": 2},
    "/v1/messages": {"messages": SAY, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": SAY},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "x"},
    "/v2/models/{name}/generate": {"text_input": "x", "max_tokens": 2},
    "/v2/models/{name}/generate_stream": {"text_input": "x", "max_tokens": 2},
    "/v2/models/{name}/infer": {
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}],
        "parameters": {"max_tokens": 2},
    },
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/api/chat": {"messages": SAY, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": "x", "options": {"num_predict": 2}},
    "/api/embed": {"input": "x"},
    "/api/embeddings": {"prompt": "x"},
    "/api/show": {"verbose": True},
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
    "/": {"inputs": "x", "parameters": {"max_new_tokens": 2}},
}


def operations(server: httpx.Client) -> Iterator[tuple[str, Any]]:
    """The name and schemathesis' view of each operation of the description."""
    for found in schemathesis.openapi.from_dict(
        server.get("/openapi.json").raise_for_status().json()
    ).get_all_operations():
        operation = found.ok()
        yield f"{operation.method} {operation.path}", operation


def attack(server: httpx.Client, examples: int, number: int = 0) -> dict[str, Counter[int]]:
    """Send random requests; return how often each status came, by mode and operation.

    Raises AssertionError with the smallest request for a wrong answer.
    """
    statuses: dict[str, Counter[int]] = {}
    with requests.Session() as session:
        session.headers.update(server.headers)
        for name, operation in operations(server):
            for mode in GenerationMode:
                if not _TWICE & {*name.split("/")} and (
                    mode is GenerationMode.POSITIVE or operation.body
                ):
                    came = statuses[f"{mode.value} {name}"] = Counter()
                    _attempts(
                        operation, mode, str(server.base_url), session, examples, number, came
                    )
    return statuses


def _attempts(
    operation: Any,
    mode: GenerationMode,
    url: str,
    session: requests.Session,
    examples: int,
    number: int,
    came: Counter[int],
) -> None:
    base = BASES.get(operation.path, {})

    @seed(number)
    @settings(
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def attempt(case: Any, data: st.DataObject) -> None:
        if isinstance(case.body, dict) and base:
            more = data.draw(
                st.sampled_from([0, 1, 2, 3, None])
            )  # all of a hundred fields hardly ever go together
            if more is not None:
                kept = data.draw(st.permutations(sorted(case.body)))[:more]
                case.body = {**base, **{name: case.body[name] for name in kept}}
                if "/v2/" not in case.path:
                    case.body["model"] = MODEL
        if "name" in case.path_parameters and data.draw(st.booleans()):
            case.path_parameters = {**case.path_parameters, "name": MODEL}
        answer = case.call(base_url=url, session=session, timeout=HANG_S)
        came[answer.status_code] += 1
        assert answer.status_code < 500 or "timeout" in answer.json()["error"]["type"], answer.text
        if answer.status_code >= 400:
            assert len(answer.content) <= MAX_ERROR_BYTES
            error = answer.json()["error"]
            assert {"type", "param", "code"} <= (
                answer.json() if isinstance(error, str) else error
            ).keys()

    attempt()
