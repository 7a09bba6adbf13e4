"""Random values of request fields: the answer is 200 or a well-formed 400; nothing hangs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.scripted_model import TOOLS, start_scripted_server, trigger

from llmkit.runtime.server.ollama.ollama_request import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from llmkit.runtime.server.schemas.base_request import BaseRequest
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.schemas.embedding_request import EmbeddingRequest
from llmkit.runtime.server.schemas.messages_request import MessagesRequest
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.schemas.score_request import RerankRequest, ScoreRequest
from llmkit.runtime.server.schemas.tokenize_request import DetokenizeRequest, TokenizeRequest
from llmkit.runtime.server.tgi.tgi_request import TgiCompatRequest, TgiGenerateRequest

SAY: list[Any] = [{"role": "user", "content": trigger("call")}]
OLLAMA_LIMIT = {"num_predict": 12}
ENDPOINTS: list[tuple[str, type[BaseRequest], dict[str, Any]]] = [
    ("/v1/completions", CompletionRequest, {"prompt": "x", "max_tokens": 3}),
    (
        "/v1/chat/completions",
        ChatCompletionRequest,
        {"messages": SAY, "max_tokens": 12, "tools": TOOLS},
    ),
    ("/v1/messages", MessagesRequest, {"messages": SAY, "max_tokens": 12}),
    ("/v1/responses", ResponsesRequest, {"input": trigger("call"), "max_output_tokens": 12}),
    ("/v1/embeddings", EmbeddingRequest, {"input": "x"}),
    ("/rerank", RerankRequest, {"query": "x", "documents": ["y", "z"]}),
    ("/score", ScoreRequest, {"text_1": "x", "text_2": "y"}),
    ("/tokenize", TokenizeRequest, {"prompt": "x"}),
    ("/detokenize", DetokenizeRequest, {"tokens": [5]}),
    ("/api/chat", OllamaChatRequest, {"messages": SAY, "options": OLLAMA_LIMIT, "tools": TOOLS}),
    ("/api/generate", OllamaGenerateRequest, {"prompt": "x", "options": OLLAMA_LIMIT}),
    ("/api/embed", OllamaEmbedRequest, {"input": "x"}),
    ("/api/embeddings", OllamaEmbeddingsRequest, {"prompt": "x"}),
    ("/api/show", OllamaShowRequest, {}),
    ("/generate", TgiGenerateRequest, {"inputs": "x", "parameters": {"max_new_tokens": 3}}),
    ("/", TgiCompatRequest, {"inputs": "x", "parameters": {"max_new_tokens": 3}}),
]
TEXTS = [
    "",
    "\x00",
    "x",
    "a\ud7ff\U0010ffff",
    "auto",
    "required",
    "json_object",
    "(",
    "{",
    "start: x",
    "]" * 3000,
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 5, 20, 21, 128, 2**31, 2**63, 2**64, 10**400]),
    st.sampled_from([-0.1, 0.0, 0.5, 1.0, 1e-30, 2.0, 1e300]),
    st.sampled_from(TEXTS),
)
KEYS = st.sampled_from(
    [
        "type",
        "name",
        "function",
        "json_schema",
        "schema",
        "content",
        "role",
        "text",
        "5",
        "x",
        "choice",
    ]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fuzzed_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        start_scripted_server(tmp_path_factory.mktemp("fuzz"), "hermes") as server,
        server.client() as client,
    ):
        yield client
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "kind", "base"), ENDPOINTS, ids=[path for path, _, _ in ENDPOINTS]
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_any_value_of_any_field(
    fuzzed_http: httpx.Client,
    path: str,
    kind: type[BaseRequest],
    base: dict[str, Any],
    data: st.DataObject,
) -> None:
    names = sorted(
        (kind.model_fields.keys() | kind.neutral_values.keys() | kind.no_effect_fields) - {"model"}
    )
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    answer = fuzzed_http.post(path, json={"model": "said", **base, **fields})
    assert answer.status_code in (200, 400, 504 if "timeout" in fields else 200), answer.text
    if answer.status_code == 400:
        assert len(answer.content) <= 16 * 1024
        assert {"type", "param", "code"} <= error_of(answer).keys()
    elif fields.get("stream") and "timeout" not in fields:
        assert '"error"' not in answer.text


# JSON that no client library writes, as the value of whatever field.
LITERALS = {
    "-0.0": "-0.0",
    "1e308": "1e308",
    "-1e308": "-1e308",
    "1e309": "1e309",
    "5e-324": "5e-324",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "2^63-1": str(2**63 - 1),
    "2^63": str(2**63),
    "-2^63": str(-(2**63)),
    "2^64": str(2**64),
    "400 digits": "1" * 400,
    "5000 digits": "1" * 5000,
    "a fraction": "1.0",
    "high surrogate": r'"\ud800"',
    "low surrogate": r'"x\udfff"',
    "a pair": r'"\ud83d\ude00"',
    "NUL": r'"\u0000"',
    "raw NUL": '"\x00"',
    "ids": "[" + "5," * 99_999 + "5]",
    "texts": "[" + '"",' * 99_999 + '""]',
    "deep": "[" * 100 + "]" * 100,
    "too deep": "[" * 9999 + "]" * 9999,
    "deep object": '{"a":' * 9999 + "1" + "}" * 9999,
    "keys": "{" + ",".join(f'"{i}":""' for i in range(20_000)) + "}",
    "twice": '{"type":"text","type":"json_object"}',
    "long": '"' + "a" * 300_000 + '"',
    "empty": "[]",
    "nulls": "[null,null]",
}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The object with the code and the parameter, in any form of errors."""
    document: dict[str, Any] = answer.json()
    error = document["error"]
    return document if isinstance(error, str) else error


def past_the_limits(schema: dict[str, Any]) -> Iterator[str]:
    """Numbers and texts at the limits of a field's JSON schema, and one step beyond."""
    for kind in schema.get("anyOf", [schema]):
        for word, value in kind.items():
            step = 1 if kind.get("type") == "integer" else 1e-9
            if word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
                yield from (json.dumps(edge) for edge in (value - step, value, value + step))
            elif word in ("minLength", "maxLength"):
                yield from (
                    json.dumps("x" * size) for size in (value - 1, value, value + 1) if size >= 0
                )
            elif word in ("minItems", "maxItems"):
                yield from (
                    json.dumps([5] * size) for size in (value - 1, value, value + 1) if size >= 0
                )


@pytest.mark.parametrize("share", [0.02, pytest.param(1.0, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("path", "kind", "base"), ENDPOINTS, ids=[path for path, _, _ in ENDPOINTS]
)
def test_fuzz_every_field_at_and_past_its_limits(
    fuzzed_http: httpx.Client,
    path: str,
    kind: type[BaseRequest],
    base: dict[str, Any],
    share: float,
) -> None:
    schema = kind.model_json_schema()["properties"]
    cases = [(name, edge) for name in schema for edge in past_the_limits(schema[name])]
    fields = sorted(schema.keys() | kind.neutral_values.keys() | kind.no_effect_fields)
    pairs = [(name, literal) for name in fields for literal in LITERALS.values()]
    cases += random.Random(path).sample(pairs, int(len(pairs) * share))
    for name, literal in cases:
        rest = json.dumps(
            {key: value for key, value in {"model": "said", **base}.items() if key != name}
        )
        content = f'{{"{name}":{literal},{rest[1:]}'.encode("utf-8", "surrogatepass")
        answer = fuzzed_http.post(
            path, content=content, headers={"content-type": "application/json"}
        )
        said = f"{name}={literal[:80]}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code in (
            200,
            400,
            {"model": 404, "name": 404, "timeout": 504}.get(name),
        ), said
        if answer.status_code in (400, 404):
            assert len(answer.content) <= 16 * 1024, said
            error = error_of(answer)
            assert error["code"] in ("invalid_json", "too_many_errors") or error["param"], said
    assert fuzzed_http.get("/health").status_code == 200


def test_fuzz_last_duplicate_key_counts(fuzzed_http: httpx.Client) -> None:
    content = b'{"model":"said","prompt":"x","n":2,"max_tokens":9,"n":1,"max_tokens":1}'
    answer = fuzzed_http.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    ).json()
    assert (len(answer["choices"]), answer["usage"]["completion_tokens"]) == (1, 1)
