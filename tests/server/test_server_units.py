"""The server's parts that need no engine: stop strings, frames, request bodies, keys."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_requests import engine_request

from llmkit.common.errors import InputError, LlmkitError, ShortageError, UsageError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.process_channel import Failed, FrameReader, frame
from llmkit.runtime.server.app import build_app
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.engines.engine_messages import AddRequest, to_engine_decoder
from llmkit.runtime.server.generation import MAX_UNREAD, Generation
from llmkit.runtime.server.http.api_keys import find_client, load_api_keys
from llmkit.runtime.server.http.hosts import is_loopback
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.run_server import bind, run_server
from llmkit.runtime.server.schemas.base_request import GenerationRequest, parse_request
from llmkit.runtime.server.schemas.chat_request import ChatCompletionRequest
from llmkit.runtime.server.schemas.completion_request import CompletionRequest
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_metrics import ServerMetrics
from llmkit.runtime.server.server_state import SamplingDefaults, ServerState
from llmkit.runtime.server.text.stop_strings import StopStringBuffer
from llmkit.runtime.server.throughput import Throughput


def test_stop_string_over_three_pieces_is_never_shown() -> None:
    buffer = StopStringBuffer(("STOP",))
    assert [buffer.feed(piece) for piece in ("text S", "TO", "P more", "x")] == [
        "text ",
        "",
        "",
        "",
    ]
    assert buffer.stopped


def test_stop_string_lookalike_is_shown_at_the_end() -> None:
    buffer = StopStringBuffer(("STOP", "\n\n"))
    assert [buffer.feed("a\n"), buffer.feed("b ST"), buffer.feed("O", final=True)] == [
        "a",
        "\nb ",
        "STO",
    ]
    assert not buffer.stopped


@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_stop_string_result_is_independent_of_cuts(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    buffer = StopStringBuffer(tuple(stops))
    edges = [0, *sorted(cuts), len(text)]
    shown = ""
    for start, end in itertools.pairwise(edges):
        shown += buffer.feed(text[start:end])
        held = len(text[:end]) - len(shown)
        assert buffer.stopped or held < max([1, *map(len, stops)])
    shown += buffer.feed("", final=True)
    assert text.startswith(shown)
    assert buffer.stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    assert buffer.stopped or shown == text


@given(st.integers(1, 50))
def test_frames_survive_any_cut(size: int) -> None:
    messages = [
        AddRequest(engine_request(str(index), list(range(index)), 5, seed=2**63 - 1))
        for index in range(5)
    ]
    stream = b"".join(frame(message) for message in messages)
    reader = FrameReader()
    bodies = [
        body
        for start in range(0, len(stream), size)
        for body in reader.feed(stream[start : start + size])
    ]
    assert [to_engine_decoder.decode(body) for body in bodies] == messages


BASE: dict[type[GenerationRequest], dict[str, Any]] = {
    CompletionRequest: {"model": "m", "prompt": "hello"},
    ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
}
WRONG_IN_BOTH = [
    ({"temperature": float("nan")}, "temperature", "invalid_value"),
    ({"temperature": float("inf")}, "temperature", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.01}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_type"),
    ({"min_p": 2}, "min_p", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 1.0}, "seed", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": -2}, "max_tokens", "invalid_value"),
    ({"n_predict": -2}, "n_predict", "invalid_value"),
    ({"max_tokens": 3, "n_predict": 4}, "n_predict", "invalid_value"),
    ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repeat_penalty", "invalid_value"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
    ({"cache_salt": ""}, "cache_salt", "invalid_value"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens", "invalid_type"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ({"bad_words": ["x"]}, "bad_words", "unsupported"),
    ({"use_beam_search": True}, "use_beam_search", "unsupported"),
    ({"grammar": "root ::= x"}, "grammar", "unsupported"),
    ({"max_tokens": 2**64}, "max_tokens", "invalid_value"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": -1, "max_completion_tokens": 4}, "max_completion_tokens", "invalid_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_completion_tokens": -2}, "max_completion_tokens", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": ["a", 1]}, "stop", "invalid_type"),
    ({"stop": {"a": 1}}, "stop", "invalid_type"),
    ({"stop": "x" * 1025}, "stop", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", "invalid_value"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids.0", "invalid_type"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"user": 5}, "user", "invalid_type"),
    ({"model": 5}, "model", "invalid_type"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"best_of": 2}, "best_of", "unsupported"),
    ({"min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"logprobs": "1"}, "logprobs", "invalid_type"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "invalid_value"),
    ({"prompt_logprobs": True}, "prompt_logprobs", "invalid_type"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ({"suffix": "x"}, "suffix", "unsupported"),
    ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty", "invalid_value"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"repetition_penalty": 10.1}, "repetition_penalty", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]", "invalid_value"),
    ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "invalid_value"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "guided_regex",
        "invalid_value",
    ),
    ({"guided_json": "{"}, "guided_json", "invalid_grammar"),
    ({"guided_json": [1]}, "guided_json", "invalid_type"),
    ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json", "invalid_grammar"),
    ({"guided_json": json.loads("[" * 70 + "]" * 70)}, "guided_json", "invalid_type"),
    ({"guided_json": {"a": json.loads("[" * 70 + "]" * 70)}}, "guided_json", "invalid_grammar"),
    ({"guided_choice": []}, "guided_choice", "invalid_value"),
    ({"guided_choice": [""]}, "guided_choice", "invalid_value"),
    ({"guided_choice": ["a", 5]}, "guided_choice.1", "invalid_type"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "unknown_parameter"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs.choice",
        "invalid_value",
    ),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ({"max_token": 5}, "max_token", "unknown_parameter"),
]
WRONG_IN_COMPLETIONS = [
    ({"top_logprobs": 3}, "top_logprobs", "unsupported"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"n": 2, "best_of": 3}, "best_of", "unsupported"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported"),
]
TOOL = {"type": "function", "function": {"name": "f"}}
WRONG_IN_CHATS = [
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"echo": True}, "echo", "unsupported"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
    ({"tools": [{"type": "magic", "function": {"name": "f"}}]}, "tools.0.type", "invalid_value"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name",
        "invalid_value",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "invalid_value"),
    ({"tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "invalid_value",
    ),
    (
        {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"},
        "guided_regex",
        "invalid_value",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
            ]
        },
        "tools.0.function.parameters",
        "invalid_value",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
    (
        {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
        "enable_thinking",
        "invalid_value",
    ),
    ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "invalid_value",
    ),
    ({"chat_template": "x"}, "chat_template", "unsupported"),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs.structural_tag",
        "unsupported",
    ),
]
WRONG_PROMPTS = [
    ("", "invalid_value"),
    ([], "invalid_value"),
    ([[]], "invalid_value"),
    ([[1], []], "invalid_value"),
    (["a", ""], "invalid_value"),
    (["a", 1], "invalid_type"),
    ([1, "a"], "invalid_type"),
    ([1, [2]], "invalid_type"),
    ([1.5], "invalid_type"),
    ([True], "invalid_type"),
    ({"a": 1}, "invalid_type"),
    (5, "invalid_type"),
    (None, "invalid_type"),
]
WRONG_MESSAGES = [
    ([], "messages", "invalid_value"),
    ("hello", "messages", "invalid_type"),
    ([{"role": "robot", "content": "x"}], "messages.0.role", "invalid_value"),
    ([{"content": "x"}], "messages.0.role", "missing_required_parameter"),
    ([{"role": "user"}], "messages.0.content", "missing_required_parameter"),
    ([{"role": "user", "content": None}], "messages.0.content", "invalid_type"),
    ([{"role": "user", "content": []}], "messages.0.content", "invalid_type"),
    ([{"role": "user", "content": ["x"]}], "messages.0.content.0", "invalid_type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0", "invalid_type"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages.0.content.0",
        "unsupported",
    ),
    ([{"role": "user", "content": "x", "colour": 1}], "messages.0.colour", "unknown_parameter"),
    (
        [{"role": "assistant", "tool_calls": [{}]}],
        "messages.0.tool_calls.0.id",
        "missing_required_parameter",
    ),
    ([{"role": "tool", "content": "x"}], "messages.0.tool_call_id", "invalid_value"),
    (
        [{"role": "user", "content": "x", "reasoning_content": "y"}],
        "messages.0.reasoning_content",
        "invalid_value",
    ),
    (
        [{"role": "user", "content": "x", "reasoning": "y"}],
        "messages.0.reasoning",
        "invalid_value",
    ),
    (
        [{"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}],
        "messages.0.reasoning",
        "invalid_value",
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]}],
        "messages.0.content.0.colour",
        "unknown_parameter",
    ),
    ([{"role": "user", "content": "x"}, 5], "messages.1", "invalid_type"),
]


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
@pytest.mark.parametrize(("fields", "param", "code"), WRONG_IN_BOTH)
def test_request_with_a_wrong_field_is_a_400_that_names_it(
    kind: type[GenerationRequest], fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(kind, json.dumps(BASE[kind] | fields).encode())
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@pytest.mark.parametrize(("fields", "param", "code"), WRONG_IN_COMPLETIONS)
def test_completion_request_with_a_wrong_field(
    fields: dict[str, Any], param: str, code: str
) -> None:
    test_request_with_a_wrong_field_is_a_400_that_names_it(CompletionRequest, fields, param, code)


@pytest.mark.parametrize(("fields", "param", "code"), WRONG_IN_CHATS)
def test_chat_request_with_a_wrong_field(fields: dict[str, Any], param: str, code: str) -> None:
    test_request_with_a_wrong_field_is_a_400_that_names_it(
        ChatCompletionRequest, fields, param, code
    )


@pytest.mark.parametrize(("prompt", "code"), WRONG_PROMPTS)
def test_completion_request_with_a_wrong_prompt(prompt: object, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "prompt", code)


@pytest.mark.parametrize(("messages", "param", "code"), WRONG_MESSAGES)
def test_chat_request_with_wrong_messages(messages: object, param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(
            ChatCompletionRequest, json.dumps({"model": "m", "messages": messages}).encode()
        )
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)


@pytest.mark.parametrize("kind", ["image_url", "input_audio"])
def test_chat_request_with_another_medium_names_it(kind: str) -> None:
    messages = [{"role": "user", "content": [{"type": kind, kind: {}}]}]
    with pytest.raises(ApiError) as caught:
        parse_request(
            ChatCompletionRequest, json.dumps({"model": "m", "messages": messages}).encode()
        )
    assert caught.value.message == f"Only text parts are supported, not {kind}."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "\xff"}',
        rb'{"model": "\ud800"}',
        b"[" * 100_000,
        b'{"seed":' + b"9" * 5000,
    ],
)
def test_request_that_is_not_json_is_a_400(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(CompletionRequest, data)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_request_that_is_not_an_object_is_a_400() -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(CompletionRequest, b"[1]")
    assert (caught.value.status, caught.value.code) == (400, "invalid_type")


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_request_accepts_unimplemented_fields_with_neutral_values(
    kind: type[GenerationRequest],
) -> None:
    fields: dict[str, Any] = {
        "n": 1,
        "best_of": 1,
        "top_logprobs": 0,
        "logprobs": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "echo": False,
        "suffix": None,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "top_k": -1,
    }
    assert parse_request(kind, json.dumps(BASE[kind] | fields).encode()).max_new_tokens == 5


def test_chat_request_accepts_an_assistants_message_sent_back() -> None:
    echoed = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
        "id": "msg_1",
    }
    cached = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", **cached}]
    messages = [{"role": "developer", "content": parts, "name": "me"}, echoed]
    body = parse_request(
        ChatCompletionRequest, json.dumps({"model": "m", "messages": messages}).encode()
    )
    assert body.conversation == [
        {"role": "system", "content": "a\nb", "name": "me"},
        {"role": "assistant", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_completion_request_takes_four_kinds_of_prompts(prompt: object, prompts: object) -> None:
    assert (
        parse_request(
            CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode()
        ).prompts
        == prompts
    )


def test_api_error_is_short_for_any_request() -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(
            CompletionRequest,
            json.dumps({"model": "m", "prompt": "x", "\U0001f600" * 100_000: 1}).encode(),
        )
    assert len(caught.value.body()) <= 16 * 1024
    assert caught.value.code == "unknown_parameter"


class FakeEngine:
    """Notes what a Generation asks of the engine process."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.queued_tokens = 0
        self.serving = True

    @property
    def in_flight(self) -> int:
        return len(self.added) - len(self.aborted)

    def add(self, request: EngineRequest, _receiver: Generation) -> None:
        self.added.append(request.request_id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


class Letters:
    """A detokenizer whose tokens are letters."""

    def add(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


def generation(engine: FakeEngine, *stops: str, count: int = 1) -> Generation:
    choices = [
        Choice(engine_request(str(index), [1], 9), index, Letters(), stops)
        for index in range(count)
    ]  # type: ignore[arg-type]
    made = Generation(engine, ServerMetrics(EngineStats), choices, (ord("."),), arrival_time=0.0)
    made.start()
    return made


def output(
    request_id: str, text: str, finish: str | None = None, error: str | None = None
) -> EngineOutput:
    return EngineOutput(request_id, [ord(letter) for letter in text], finish, error, 1, 0)


async def collect(made: Generation) -> list[tuple[int, str, str | None]]:
    collected: list[Delta] = []

    def take(deltas: list[Delta]) -> bool:
        collected.extend(deltas)
        return True

    await made.run(take)
    return [(delta.index, delta.text, delta.finish_reason) for delta in collected]


def test_generation_hides_the_stop_token() -> None:
    async def run() -> None:
        engine = FakeEngine()
        made = generation(engine)
        made.on_outputs([output("0", "ab")], {})
        made.on_outputs([output("0", "c.", "stop")], {})
        assert await collect(made) == [(0, "ab", None), (0, "c", "stop")]
        assert made.choices[0].completion_tokens == 4
        assert engine.aborted == []

    asyncio.run(run())


def test_generation_aborts_the_request_after_a_stop_string() -> None:
    async def run() -> None:
        engine = FakeEngine()
        made = generation(engine, "cd")
        for piece in ("abc", "d", "e"):
            made.on_outputs([output("0", piece)], {})
        assert await collect(made) == [(0, "ab", None), (0, "", "stop")]
        assert engine.aborted == ["0"]
        assert made.choices[0].completion_tokens == 4

    asyncio.run(run())


@pytest.mark.parametrize(
    ("min_tokens", "pieces", "text"),
    [
        (0, "xab", ""),
        (1, "xab", "xab"),
        (1, "xxb", "x"),
        (2, "xxb", "xxb"),
        (2, "xaxb", "xa"),
        (9, "xxxab", "xxxab"),
    ],
)
def test_stop_string_ends_an_answer_after_min_tokens_only(
    min_tokens: int, pieces: str, text: str
) -> None:
    request = engine_request("0", [1], 99, min_tokens=min_tokens)
    choice = Choice(request, 0, Letters(), ("x",))  # type: ignore[arg-type]
    shown = ""
    for piece in pieces:
        shown += choice.process_output(output("0", piece), frozenset()).text
        if choice.finish_reason:
            break
    stops = text != pieces
    assert (shown, choice.finish_reason) == (text, "stop" if stops else None)
    assert choice.completion_tokens == len(text) + stops


def test_generation_fails_with_its_choice_and_aborts_the_others() -> None:
    async def run() -> None:
        engine = FakeEngine()
        made = generation(engine, count=3)
        made.on_outputs([output("0", "a", "length")], {})
        made.on_outputs([output("1", "", "error", "the logits are NaN")], {})
        with pytest.raises(ApiError, match="the logits are NaN") as caught:
            await collect(made)
        assert caught.value.status == 500
        assert engine.aborted == ["1", "2"]

    asyncio.run(run())


def test_generation_ends_when_its_output_is_not_read() -> None:
    async def run() -> None:
        engine = FakeEngine()
        made = generation(engine, count=2)
        for _ in range(MAX_UNREAD):
            made.on_outputs([output("0", "a")], {})
        assert engine.aborted == []
        made.on_outputs([output("1", "b")], {})
        assert engine.aborted == ["0", "1"]
        with pytest.raises(ApiError, match="unread"):
            await collect(made)

    asyncio.run(run())


def test_throughput_forgets_the_past() -> None:
    now = 0.0
    throughput = Throughput(lambda: now)
    assert throughput.estimate_seconds(1) is None
    for _ in range(300):
        now += 1
        throughput.add(2)
    assert throughput.estimate_seconds(10) == pytest.approx(5, rel=0.05)
    for _ in range(120):
        now += 1
        throughput.add(20)
    assert throughput.estimate_seconds(10) == pytest.approx(0.5, rel=0.05)
    throughput.restart()
    assert throughput.estimate_seconds(1) is None


def test_queue_full_error_says_when_to_retry() -> None:
    async def run() -> None:
        engine = FakeEngine()
        options = ServeOptions(
            "m", max_waiting=0, max_waiting_tokens=1000, engine=EngineOptions(max_num_seqs=4)
        )
        state = ServerState(options, engine, ServerMetrics(EngineStats), "m")
        state.check_queue_capacity(4, 10**9)  # one request is always taken
        engine.added = ["a"]
        state.check_queue_capacity(3, 10**9)
        with pytest.raises(ApiError, match="1 requests run or wait") as caught:
            state.check_queue_capacity(4)
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
        engine.queued_tokens = 1
        state.check_queue_capacity(1, 999)
        with pytest.raises(ApiError, match="prompts of 1 tokens wait") as caught:
            state.check_queue_capacity(1, 1000)
        assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
        now = 0.0
        state._finished_requests = Throughput(lambda: now)
        now += 10
        state._finished_requests.add(2)
        with pytest.raises(ApiError) as caught:
            state.check_queue_capacity(4)
        assert caught.value.headers == {"retry-after": "5"}

    asyncio.run(run())


def test_route_with_a_bug_answers_500_without_details() -> None:
    class Broken:
        def render(self) -> bytes:
            raise RuntimeError("inner secret")

    async def run() -> httpx.Response:
        state = ServerState(ServeOptions("m"), FakeEngine(), Broken(), "m")
        transport = httpx.ASGITransport(build_app(state, ()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/metrics")

    answer = asyncio.run(run())
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_sampling_defaults_come_from_the_generation_config() -> None:
    config = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "do_sample": False,
        "repetition_penalty": 1.1,
    }
    assert SamplingDefaults.from_generation_config(config) == SamplingDefaults(
        0.6, 0.9, 50, 0.0, 1.1
    )
    assert (
        SamplingDefaults.from_generation_config({"temperature": None, "top_k": "x", "top_p": True})
        == SamplingDefaults()
    )


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_host_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_api_keys_come_from_the_file_before_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMKIT_API_KEY", "variable")
    clients = load_api_keys(ServeOptions("m"))
    assert find_client(clients, b"variable") is not None and find_client(clients, b"one") is None
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    clients = load_api_keys(ServeOptions("m", api_key_file=keys))
    assert [find_client(clients, key) for key in (b"one", b"two", b"variable")] == [*clients, None]
    keys.write_text("\n")
    with pytest.raises(InputError, match="has no keys"):
        load_api_keys(ServeOptions("m", api_key_file=keys))
    with pytest.raises(InputError, match=r"cannot be read .*absent"):
        load_api_keys(ServeOptions("m", api_key_file=tmp_path / "absent"))


def test_open_address_needs_an_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_API_KEY", raising=False)
    with pytest.raises(
        UsageError, match=r"--host 0\.0\.0\.0.*An address other than loopback needs an API key"
    ):
        run_server(ServeOptions("absent", host="0.0.0.0"))


def test_port_in_use_is_found_before_the_model_is_opened() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ShortageError, match=rf"port {port} on 127\.0\.0\.1 is in use"):
            run_server(ServeOptions("absent", port=port))


@pytest.mark.parametrize(
    ("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70000), ("127.0.0.1", -1)]
)
def test_bad_address_is_a_usage_error(host: str, port: int) -> None:
    with pytest.raises(UsageError):
        bind(host, port)


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UsageError), (3, InputError), (4, ShortageError), (70, LlmkitError)]
)
def test_engine_process_errors_keep_their_type(code: int, kind: type[LlmkitError]) -> None:
    error = Failed(code, "what", "expected", "todo").error()
    assert type(error) is kind
    assert str(error) == "what. expected. todo."
