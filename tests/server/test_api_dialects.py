"""Calls and thoughts of the newer dialects through the real clients of three APIs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import anthropic
import pytest
from support.dialect_models import (
    ANSWER,
    MODELS,
    SUM,
    TEXT,
    THOUGHT,
    TOOLS,
    WEATHER,
    start_dialect_server,
    written_calls,
)
from support.openai_client import openai_client
from support.scripted_model import trigger
from support.server_process import LlmkitServer

MESSAGES_TOOLS: Any = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in TOOLS
]
RESPONSES_TOOLS: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]


@dataclass
class Answer:
    """What one API answered."""

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments as text
    reason: str = ""
    turn: list[Any] = field(default_factory=list)  # what the client sends back of it
    num_pieces: int = 0  # of arguments, in a stream
    reasoning_tokens: int = 0

    @property
    def content(self) -> tuple[Any, ...]:
        """What must be the same in each API, streamed and not."""
        calls = [(name, json.loads(arguments)) for name, arguments in self.calls]
        return self.text, self.thought, calls


class Clients:
    """The three APIs of one server, with the same questions."""

    def __init__(self, server: LlmkitServer) -> None:
        self.server = server
        self.chats = openai_client(server)
        self.messages = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)

    def chat(self, messages: list[Any], **fields: Any) -> Answer:
        """Answer by /v1/chat/completions, in full."""
        whole = self.chats.chat.completions.create(
            model="said", messages=messages, tools=TOOLS, temperature=0, **fields
        )
        choice = whole.choices[0]
        said: Any = choice.message
        calls = said.tool_calls or []
        assert whole.usage is not None and whole.usage.completion_tokens_details is not None
        return Answer(
            said.content or "",
            getattr(said, "reasoning_content", ""),
            [(call.function.name, call.function.arguments) for call in calls],
            choice.finish_reason,
            [said.model_dump(exclude_none=True)],
            reasoning_tokens=whole.usage.completion_tokens_details.reasoning_tokens or 0,
        )

    def chat_stream(self, messages: list[Any], **fields: Any) -> Answer:
        """Answer by /v1/chat/completions, streamed."""
        answer = Answer()
        for chunk in self.chats.chat.completions.create(
            model="said", messages=messages, tools=TOOLS, temperature=0, stream=True, **fields
        ):
            (choice,) = chunk.choices
            delta: Any = choice.delta
            answer.text += delta.content or ""
            answer.thought += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                if call.id:
                    answer.calls.append((call.function.name, ""))
                name, arguments = answer.calls[call.index]
                answer.calls[call.index] = (name, arguments + call.function.arguments)
                answer.num_pieces += bool(call.function.arguments)
            answer.reason = choice.finish_reason or answer.reason
        return answer

    def message(self, messages: list[Any], **fields: Any) -> Answer:
        """Answer by /v1/messages, in full."""
        whole = self.messages.messages.create(
            model="said",
            messages=messages,
            tools=MESSAGES_TOOLS,
            max_tokens=400,
            extra_body={"temperature": 0},
            **fields,
        )
        return self._of_message(whole)

    def message_stream(self, messages: list[Any], **fields: Any) -> Answer:
        """Answer by /v1/messages, streamed; the client joins the pieces."""
        num_pieces = 0
        with self.messages.messages.stream(
            model="said",
            messages=messages,
            tools=MESSAGES_TOOLS,
            max_tokens=400,
            extra_body={"temperature": 0},
            **fields,
        ) as stream:
            for event in stream:
                num_pieces += event.type == "input_json" and bool(event.partial_json)
            answer = self._of_message(stream.get_final_message())
        answer.num_pieces = num_pieces
        return answer

    def _of_message(self, message: Any) -> Answer:
        blocks = message.content
        return Answer(
            "".join(block.text for block in blocks if block.type == "text"),
            "".join(block.thinking for block in blocks if block.type == "thinking"),
            [(block.name, json.dumps(block.input)) for block in blocks if block.type == "tool_use"],
            message.stop_reason,
            [{"role": "assistant", "content": [block.model_dump() for block in blocks]}],
        )

    def response(self, items: list[Any]) -> Answer:
        """Answer by /v1/responses, in full."""
        return self._of_response(
            self.chats.responses.create(
                model="said", input=items, tools=RESPONSES_TOOLS, temperature=0, store=False
            )
        )

    def response_stream(self, items: list[Any]) -> Answer:
        """Answer by /v1/responses, streamed; checks that the pieces are the arguments."""
        pieces: dict[int, str] = {}
        num_pieces = 0
        with self.chats.responses.stream(
            model="said", input=items, tools=RESPONSES_TOOLS, temperature=0, store=False
        ) as stream:
            for event in stream:
                if event.type == "response.function_call_arguments.delta":
                    pieces[event.output_index] = pieces.get(event.output_index, "") + event.delta
                    num_pieces += bool(event.delta)
            answer = self._of_response(stream.get_final_response())
        answer.num_pieces = num_pieces
        assert list(pieces.values()) == [arguments for _, arguments in answer.calls]
        return answer

    def _of_response(self, response: Any) -> Answer:
        items = response.output
        return Answer(
            response.output_text,
            "".join(item.content[0].text for item in items if item.type == "reasoning"),
            [(item.name, item.arguments) for item in items if item.type == "function_call"],
            response.status,
            [item.model_dump(exclude_none=True) for item in items],
            reasoning_tokens=response.usage.output_tokens_details.reasoning_tokens,
        )

    def prompt(self, messages: list[Any]) -> str:
        """The text of a chat's prompt."""
        with self.server.client() as http:
            body = {"model": "said", "messages": messages, "tools": TOOLS}
            answer = http.post("/tokenize", json=body)
            assert answer.status_code == 200, answer.text
            tokens = answer.json()["tokens"]
            text = http.post("/detokenize", json={"model": "said", "tokens": tokens}).json()
        return str(text["prompt"])


# One with channels, one with a syntax of its own. test_tool_dialects.py reads all.
FEW = ("gemma4", "harmony")


@pytest.fixture(
    scope="module",
    params=[
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(MODELS)
    ],
)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def clients(dialect: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    with start_dialect_server(tmp_path_factory.mktemp(dialect), dialect) as server:
        yield Clients(server)


def user(script: str) -> list[Any]:
    return [{"role": "user", "content": trigger(script)}]


def test_api_dialect_has_the_same_answer_in_every_api(clients: Clients, dialect: str) -> None:
    whole = clients.chat(user("call"))
    assert whole.content == (TEXT, THOUGHT, [WEATHER])
    assert whole.reason == "tool_calls"
    assert 0 < whole.reasoning_tokens < 30
    two = clients.chat(user("two"))
    assert two.content == ("", "", [WEATHER, SUM])
    assert two.reasoning_tokens == 0
    for script, expected in (("call", whole), ("two", two)):
        streamed = clients.chat_stream(user(script))
        assert streamed.content == expected.content
        assert streamed.calls == expected.calls  # as text
        assert streamed.num_pieces > 2 * len(streamed.calls)
        assert streamed.reason == "tool_calls"
        for answer in (clients.message(user(script)), clients.message_stream(user(script))):
            assert answer.content == expected.content
            assert answer.reason == "tool_use"
        for answer in (clients.response(user(script)), clients.response_stream(user(script))):
            assert answer.content == expected.content
            assert answer.calls == expected.calls
            assert answer.reason == "completed"
            assert answer.reasoning_tokens == expected.reasoning_tokens
        assert answer.num_pieces > 2 * len(answer.calls)
    assert clients.message_stream(user("two")).num_pieces > 4


def test_api_dialect_leaves_plain_text(clients: Clients) -> None:
    for answer in (
        clients.chat(user("plain")),
        clients.chat_stream(user("plain")),
        clients.message(user("plain")),
        clients.response_stream(user("plain")),
    ):
        assert answer.content == (ANSWER, "", [])


def test_api_dialect_call_that_the_model_left_is_still_a_call(clients: Clients) -> None:
    """The client got a call, so the finish reason says so; its arguments are incomplete."""
    for answer in (clients.chat(user("cut")), clients.chat_stream(user("cut"))):
        assert answer.reason == "tool_calls"
        ((name, arguments),) = answer.calls
        assert name == "get_weather"
        assert json.loads(arguments + '"}') == {"city": "Oslo by the "}
    (block,) = clients.message(user("cut")).calls
    assert block == ("get_weather", "{}")
    assert clients.message_stream(user("cut")).reason == "tool_use"


def test_api_dialect_second_turn_has_thoughts_calls_and_results(
    clients: Clients, dialect: str
) -> None:
    first = clients.chat(user("call"))
    (call,) = first.turn[0]["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": trigger("plain")}
    chat = [*user("call"), *first.turn, result]
    assert clients.chat(chat).text == ANSWER
    prompt = clients.prompt(chat)
    written = written_calls(dialect, WEATHER).replace("abcdefghi", call["id"])
    assert prompt.index(THOUGHT) < prompt.index(written) < prompt.index(trigger("plain"))
    assert prompt.count(written) == 1

    said = clients.message_stream(user("call"))
    block = said.turn[0]["content"][-1]
    tool_result = {"type": "tool_result", "tool_use_id": block["id"], "content": trigger("plain")}
    messages = [*user("call"), *said.turn, {"role": "user", "content": [tool_result]}]
    assert clients.message(messages).text == ANSWER

    items = clients.response(user("call")).turn
    output = {
        "type": "function_call_output",
        "call_id": items[-1]["call_id"],
        "output": trigger("plain"),
    }
    assert clients.response([*user("call"), *items, output]).text == ANSWER

    counted = [
        clients.chats.chat.completions.create(model="said", messages=chat, tools=TOOLS),
        clients.messages.messages.count_tokens(
            model="said", messages=messages, tools=MESSAGES_TOOLS
        ),
        clients.chats.responses.create(
            model="said", input=[*user("call"), *items, output], tools=RESPONSES_TOOLS
        ),
    ]
    assert counted[0].usage.prompt_tokens == counted[1].input_tokens
    assert counted[0].usage.prompt_tokens == counted[2].usage.input_tokens


def test_api_dialect_takes_calls_with_ids_of_other_servers(clients: Clients, dialect: str) -> None:
    calls = [
        {
            "id": f"toolu_{index}_of_another_server",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for index, (name, arguments) in enumerate((WEATHER, SUM))
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": content}
        for call, content in zip(calls, ("sunny", trigger("plain")), strict=True)
    ]
    assistant = {"role": "assistant", "content": TEXT, "tool_calls": calls}
    messages = [*user("two"), assistant, *results]
    assert clients.chat(messages).text == ANSWER
    prompt = clients.prompt(messages)
    match dialect:
        case "mistral":
            assert "another_server" not in prompt
            written_id = prompt.split("[CALL_ID]")[1][:9]
            assert written_id.isalnum()
            assert f"[TOOL_RESULTS]{written_id}[TOOL_CONTENT]sunny" in prompt
        case "kimi_k2":
            assert "another_server" not in prompt
            assert written_calls(dialect, WEATHER, SUM) in prompt
            assert "## Return of functions.get_weather:0\nsunny" in prompt
        case "harmony":  # a call in a message, each with its result
            first = prompt.index(written_calls(dialect, WEATHER))
            second = prompt.index(written_calls(dialect, SUM))
            assert prompt.index(f"<|message|>{TEXT}<|end|>") < first
            assert first < prompt.index("sunny") < second
        case _:
            assert written_calls(dialect, WEATHER, SUM) in prompt


@pytest.mark.parametrize("dialect", ["harmony"], indirect=True)
def test_api_harmony_is_read_without_tools(clients: Clients) -> None:
    whole: Any = clients.chats.chat.completions.create(
        model="said", messages=user("final"), temperature=0
    )
    said = whole.choices[0].message
    assert (said.content, said.reasoning_content) == (ANSWER, THOUGHT)
    assert whole.choices[0].finish_reason == "stop"
    spent = whole.usage.completion_tokens_details.reasoning_tokens
    assert 0 < spent < whole.usage.completion_tokens
    message = clients.messages.messages.create(
        model="said", messages=user("final"), max_tokens=100, extra_body={"temperature": 0}
    )
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.stop_reason == "end_turn"
    answer = clients.chats.responses.create(model="said", input=user("final"), temperature=0)
    assert answer.output_text == ANSWER
