"""Whatever a request's fields hold, the answer is 200 or a 400 with its shape: nothing fails or hangs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import TOOLS, start, trigger

from llmkit.runtime.server.chat_body import ChatBody
from llmkit.runtime.server.completion_body import CompletionBody
from llmkit.runtime.server.messages_body import MessagesBody
from llmkit.runtime.server.protocol import Body
from llmkit.runtime.server.responses_body import ResponsesBody
from llmkit.runtime.server.token_body import DetokenizeBody, TokenizeBody

SAY: list[Any] = [{"role": "user", "content": trigger("call")}]
ENDPOINTS: list[tuple[str, type[Body], dict[str, Any]]] = [
    ("/v1/completions", CompletionBody, {"prompt": "x", "max_tokens": 3}),
    ("/v1/chat/completions", ChatBody, {"messages": SAY, "max_tokens": 12, "tools": TOOLS}),
    ("/v1/messages", MessagesBody, {"messages": SAY, "max_tokens": 12}),
    ("/v1/responses", ResponsesBody, {"input": trigger("call"), "max_output_tokens": 12}),
    ("/tokenize", TokenizeBody, {"prompt": "x"}),
    ("/detokenize", DetokenizeBody, {"tokens": [5]}),
]
TEXTS = ["", "\x00", "x", "a\ud7ff\U0010ffff", "auto", "required", "json_object", "(", "{", "start: x", "]" * 3000]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 5, 20, 21, 128, 2**31, 2**63, 2**64, 10**400]),
    st.sampled_from([-0.1, 0.0, 0.5, 1.0, 1e-30, 2.0, 1e300]),
    st.sampled_from(TEXTS),
)
KEYS = st.sampled_from(
    ["type", "name", "function", "json_schema", "schema", "content", "role", "text", "5", "x", "choice"]
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with start(tmp_path_factory.mktemp("fuzz"), "hermes") as server, server.client() as client:
        yield client
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("path", "kind", "base"), ENDPOINTS, ids=[path for path, _, _ in ENDPOINTS])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_field(
    http: httpx.Client, path: str, kind: type[Body], base: dict[str, Any], data: st.DataObject
) -> None:
    names = sorted((kind.model_fields.keys() | kind.harmless.keys() | kind.no_effect) - {"model"})
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    answer = http.post(path, json={"model": "said", **base, **fields})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert len(answer.content) <= 16 * 1024
        assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()
    elif fields.get("stream"):
        assert '"error"' not in answer.text
