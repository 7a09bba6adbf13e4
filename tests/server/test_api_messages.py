"""Anthropic's Messages API through the real `anthropic` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.scripted_model import SCRIPTS, start_scripted_server, trigger
from support.server_process import LlmkitServer

anthropic = pytest.importorskip("anthropic")
KEY = "secret"
CITY = {"city": {"enum": ["Oslo"]}}
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "x",
        "input_schema": {
            "type": "object",
            "properties": CITY,
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    {"name": "add", "input_schema": {"type": "object"}},
]


@pytest.fixture(scope="module")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("messages")
    keys = folder / "keys"
    keys.write_text(KEY)
    with start_scripted_server(folder, "thinker", key=KEY, api_key_file=str(keys)) as server:
        yield server


@pytest.fixture(scope="module")
def anthropic_client(scripted_server: LlmkitServer) -> Any:
    return anthropic.Anthropic(base_url=scripted_server.url, api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture
def scripted_http(scripted_server: LlmkitServer) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=scripted_server.url, headers={"x-api-key": KEY}, timeout=60
    ) as client:
        yield client


def request_body(script: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": trigger(script)}]
    return {"model": "said", "messages": messages, "max_tokens": 200, **more}


def answer_both_ways(client: Any, **body: Any) -> Any:
    """The full answer; checks that the streamed one is the same, except for ids."""
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    known = [block.model_dump(exclude={"id"}) for block in whole.content]
    assert [
        block.model_dump(exclude={"id", "parsed_output"}) for block in streamed.content
    ] == known
    assert (streamed.stop_reason, streamed.stop_sequence) == (
        whole.stop_reason,
        whole.stop_sequence,
    )
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    return whole


def test_messages_text_and_usage(anthropic_client: Any) -> None:
    answer = answer_both_ways(anthropic_client, **request_body("plain", system="Be brief."))
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == (
        "message",
        "assistant",
        "said",
        "end_turn",
    )
    assert [(block.type, block.text) for block in answer.content] == [("text", "Just words.")]
    counted = anthropic_client.messages.count_tokens(
        model="said", messages=request_body("plain")["messages"], system="Be brief."
    )
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
    assert (
        anthropic_client.messages.count_tokens(
            model="said", messages=request_body("plain")["messages"]
        ).input_tokens
        < counted.input_tokens
    )
    with_tools = anthropic_client.messages.count_tokens(
        model="said", messages=request_body("plain")["messages"], tools=TOOLS
    )
    assert with_tools.input_tokens > counted.input_tokens


def test_messages_stream_events(scripted_http: httpx.Client) -> None:
    with scripted_http.stream(
        "POST", "/v1/messages", json=request_body("think", tools=TOOLS, stream=True)
    ) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("event: ")]
    names = [line.removeprefix("event: ") for line in lines]
    once = [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert once == ["message_start", *block * 3, "message_delta", "message_stop"]


def test_messages_blocks_for_thinking_text_and_tool_use(anthropic_client: Any) -> None:
    answer = answer_both_ways(anthropic_client, **request_body("think", tools=TOOLS))
    thought, text, call = answer.content
    assert (thought.type, thought.thinking) == ("thinking", "A call?")
    assert (text.type, text.text) == ("text", "Yes:")
    assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 1})
    assert answer.stop_reason == "tool_use"
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": trigger("plain")}],
    }
    sent_back = [block.model_dump(exclude_none=True) for block in answer.content]
    messages = [
        *request_body("think")["messages"],
        {"role": "assistant", "content": sent_back},
        {"role": "user", "content": [result]},
    ]
    again = anthropic_client.messages.create(
        **request_body("plain", messages=messages, tools=TOOLS)
    )
    assert again.content[0].text == "Just words."


def test_messages_tool_choice(anthropic_client: Any) -> None:
    named = anthropic_client.messages.create(
        **request_body("think", tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"})
    )
    assert [(block.name, block.input) for block in named.content if block.type == "tool_use"] == [
        ("get_weather", {"city": "Oslo"})
    ]
    none = anthropic_client.messages.create(
        **request_body("think", tools=TOOLS, tool_choice={"type": "none"})
    )
    assert none.stop_reason == "end_turn" and "<tool_call>" in none.content[-1].text


@pytest.mark.parametrize(("max_tokens", "given"), [(15, {}), (45, {}), (48, {"city": "Oslo"})])
def test_messages_tool_use_cut_by_max_tokens_is_partial(
    anthropic_client: Any, max_tokens: int, given: dict[str, Any]
) -> None:
    forced = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    body = request_body("think", tools=TOOLS, tool_choice=forced, extra_body={"temperature": 0})
    answer = answer_both_ways(anthropic_client, **body | {"max_tokens": max_tokens})
    assert answer.stop_reason == "max_tokens"
    thought, block = answer.content
    assert thought.thinking == "A call?"
    assert (block.type, block.name, block.input) == ("tool_use", "get_weather", given)


def test_messages_output_follows_a_schema(anthropic_client: Any) -> None:
    schema = {
        "type": "object",
        "properties": CITY,
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    answer = anthropic_client.messages.create(**request_body("think", output_config=form))
    assert json.loads(answer.content[-1].text) == {"city": "Oslo"}


def test_messages_report_stop_sequence_and_limit(anthropic_client: Any) -> None:
    stopped = answer_both_ways(
        anthropic_client, **request_body("plain", stop_sequences=["never", "rds"])
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "rds")
    assert stopped.content[0].text == "Just wo"
    short = answer_both_ways(anthropic_client, **request_body("plain", max_tokens=1))
    assert (short.stop_reason, short.stop_sequence, short.usage.output_tokens) == (
        "max_tokens",
        None,
        1,
    )


def test_messages_accept_text_blocks_and_cache_control(anthropic_client: Any) -> None:
    content = [
        {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": trigger("plain")},
    ]
    body = request_body(
        "plain",
        messages=[{"role": "user", "content": content}],
        system=[{"type": "text", "text": "Hi."}],
    )
    assert (
        answer_both_ways(anthropic_client, **body, metadata={"user_id": "me"}).content[0].text
        == SCRIPTS["thinker"]["plain"]
    )


def test_messages_take_reasoning_controls_that_mean_the_default(anthropic_client: Any) -> None:
    raw = anthropic_client.messages.with_raw_response.create(
        **request_body(
            "think",
            thinking={"type": "adaptive"},
            output_config={"effort": "high"},
            extra_body={
                "context_management": {
                    "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]
                }
            },
        )
    )
    # The model's thoughts have no mark of one token: nothing can switch them.
    assert raw.headers["x-llmkit-ignored"] == "output_config.effort, thinking.type"
    assert [block.type for block in raw.parse().content] == ["thinking", "text"]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": None}, "max_tokens", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"temperature": 1.1}, "temperature", "invalid_value"),
    ({"top_k": -1}, "top_k", "invalid_value"),
    ({"stop_sequences": [""]}, "stop_sequences.0", "invalid_value"),
    ({"output_config": {"effort": 5}}, "output_config.effort", "invalid_value"),
    (
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": 0}]}},
        "context_management.edits.0.keep",
        "invalid_value",
    ),
    (
        {"thinking": {"type": "disabled", "budget_tokens": 9}},
        "thinking.budget_tokens",
        "invalid_value",
    ),
    ({"container": "c"}, "container", "unsupported"),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "thinking_token_budget",
        "unsupported",
    ),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role", "invalid_value"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "add", "input": {}}],
                }
            ]
        },
        "messages.0.content",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages.0.content.0",
        "unsupported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
        "invalid_type",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}],
                }
            ]
        },
        "messages.0.content.0",
        "unsupported",
    ),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_type"),
    ({"system": 5}, "system", "invalid_type"),
    (
        {"tools": [{"name": "a", "type": "web_search_20250305"}]},
        "tools.0.input_schema",
        "missing_required_parameter",
    ),
    (
        {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}},
        "tool_choice",
        "invalid_value",
    ),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG)
def test_messages_errors_have_anthropics_format(
    scripted_http: httpx.Client, fields: Any, param: str, code: str
) -> None:
    answer = scripted_http.post("/v1/messages", json=request_body("plain") | fields)
    body = answer.json()
    assert answer.status_code == 400
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)


def test_messages_errors_reach_the_client_as_its_types(
    scripted_server: LlmkitServer, anthropic_client: Any
) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        anthropic_client.messages.create(**request_body("plain") | {"model": "other"})
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as long:
        anthropic_client.messages.create(**request_body("plain") | {"max_tokens": 2**30})
    assert long.value.body["error"]["code"] == "context_length_exceeded"
    stranger = anthropic.Anthropic(base_url=scripted_server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as closed:
        stranger.messages.create(**request_body("plain"))
    assert closed.value.body["type"] == "error"
    with_token = anthropic.Anthropic(base_url=scripted_server.url, auth_token=KEY, max_retries=0)
    assert with_token.messages.create(**request_body("plain")).content[0].text == "Just words."
