"""Tools, reasoning and structured output through the `openai` client, by scripted models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.openai_client import openai_client
from support.scripted_model import SCRIPTS, TOOLS, start_scripted_server, trigger

PARIS = ("get_weather", {"city": "Paris"})
ADD = ("add", {"a": 1})


@pytest.fixture(scope="module")
def scripted_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with start_scripted_server(tmp_path_factory.mktemp("hermes"), "hermes") as server:
        yield openai_client(server)


def request_body(script: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "said",
        "messages": [{"role": "user", "content": trigger(script)}],
        "temperature": 0,
        **more,
    }


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or []
    ]


def answer_both_ways(
    client: openai.OpenAI, **body: Any
) -> tuple[str, str, list[tuple[str, Any]], str]:
    """Text, reasoning, calls and finish reason; checks that the streamed answer has the same."""
    whole = client.chat.completions.create(**body).choices[0]
    text = ""
    thought = ""
    reason = None
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**body, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        thought += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.function is not None and call.type == "function"
                calls[call.index] = [call.function.name or "", ""]
            assert call.function is not None
            calls[call.index][1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    assert text == (whole.message.content or "")
    assert thought == getattr(whole.message, "reasoning_content", "")
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == calls_of(
        whole.message
    )
    assert list(calls) == list(range(len(calls)))
    assert reason == whole.finish_reason
    return text, thought, calls_of(whole.message), whole.finish_reason


def test_tools_answer_without_calls_is_text(scripted_client: openai.OpenAI) -> None:
    assert answer_both_ways(scripted_client, **request_body("plain", tools=TOOLS)) == (
        "Just words.",
        "",
        [],
        "stop",
    )
    assert (
        scripted_client.chat.completions.create(**request_body("plain", tools=TOOLS))
        .choices[0]
        .message.tool_calls
        is None
    )


def test_tool_call_after_text(scripted_client: openai.OpenAI) -> None:
    assert answer_both_ways(scripted_client, **request_body("call", tools=TOOLS)) == (
        "Sure.",
        "",
        [PARIS],
        "tool_calls",
    )


def test_tool_calls_in_parallel_have_own_ids(scripted_client: openai.OpenAI) -> None:
    assert answer_both_ways(scripted_client, **request_body("two", tools=TOOLS)) == (
        "",
        "",
        [PARIS, ADD],
        "tool_calls",
    )
    message = (
        scripted_client.chat.completions.create(
            **request_body("two", tools=TOOLS, tool_choice="auto")
        )
        .choices[0]
        .message
    )
    assert message.content is None
    assert message.tool_calls is not None
    assert len({call.id for call in message.tool_calls}) == 2


def test_tool_calls_are_limited_to_one_without_parallel(scripted_client: openai.OpenAI) -> None:
    body = request_body("two", tools=TOOLS, parallel_tool_calls=False)
    assert answer_both_ways(scripted_client, **body) == ("", "", [PARIS], "tool_calls")


def test_tool_call_lookalike_is_text(scripted_client: openai.OpenAI) -> None:
    text = SCRIPTS["hermes"]["almost"].replace("KEY", "arguments")
    assert answer_both_ways(scripted_client, **request_body("almost", tools=TOOLS)) == (
        text,
        "",
        [],
        "stop",
    )


def test_tool_calls_are_text_without_tools(scripted_client: openai.OpenAI) -> None:
    text = SCRIPTS["hermes"]["two"].replace("KEY", "arguments")
    assert answer_both_ways(scripted_client, **request_body("two")) == (text, "", [], "stop")
    assert answer_both_ways(
        scripted_client, **request_body("two", tools=TOOLS, tool_choice="none")
    ) == (
        text,
        "",
        [],
        "stop",
    )


def test_reasoning_is_separate_from_the_answer(tmp_path: Path) -> None:
    with (
        start_scripted_server(tmp_path, "thinker") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        assert answer_both_ways(client, **request_body("think", tools=TOOLS)) == (
            "Yes:",
            "A call?",
            [ADD],
            "tool_calls",
        )
        assert answer_both_ways(client, **request_body("plain")) == ("Just words.", "", [], "stop")
        begun = request_body(
            "plain", messages=[{"role": "user", "content": f"<think>{trigger('plain')}"}]
        )
        assert answer_both_ways(client, **begun) == (
            "Just words.",
            "",
            [],
            "stop",
        )  # the prompt ends with something else
        forced = answer_both_ways(
            client, **request_body("think", tools=TOOLS[:1], tool_choice="required", max_tokens=400)
        )
        assert forced[1] == "A call?"
        assert [name for name, _ in forced[2]][:1] == ["get_weather"]
        shaped = answer_both_ways(
            client, **request_body("think", extra_body={"guided_choice": ["left", "right"]})
        )
        assert shaped[0] in ("left", "right") and shaped[1] == "A call?"


def test_chat_template_kwargs_reach_the_template(scripted_client: openai.OpenAI) -> None:
    more = {"chat_template_kwargs": {"remark": "Be brief. "}}
    plain = scripted_client.chat.completions.create(**request_body("plain"))
    longer = scripted_client.chat.completions.create(**request_body("plain"), extra_body=more)
    assert plain.usage is not None and longer.usage is not None
    assert longer.usage.prompt_tokens > plain.usage.prompt_tokens


def test_chat_template_gets_tools_and_calls(scripted_client: openai.OpenAI) -> None:
    def size(**fields: Any) -> int:
        answer = scripted_client.post(
            "/../tokenize", body={"model": "said", **fields}, cast_to=object
        )
        return int(answer["count"])  # type: ignore[index]

    question = [{"role": "user", "content": "x"}]
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    body = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    given = [{"role": "tool", "tool_call_id": "call_1", "content": "2"}]
    assert size(messages=question, tools=TOOLS) > size(messages=question) + 100
    text = f"<|im_start|>assistant\nCALL add {json.dumps({'a': 1})}<|im_end|>\n"
    assert (
        size(messages=question + body) - size(messages=question) == size(prompt=text) - 1
    )  # "x" ends the longer one
    assert size(messages=question + body + given) > size(messages=question + body)
    answer = scripted_client.chat.completions.create(
        model="said",
        temperature=0,
        tools=TOOLS,
        messages=question + body + [given[0] | {"content": trigger("plain")}],
    )
    assert answer.choices[0].message.content == "Just words."


@pytest.mark.parametrize("arguments", ["{", "[]", "null", "[" * 100_000])
def test_tool_call_sent_back_must_have_object_arguments(
    scripted_client: openai.OpenAI, arguments: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    with pytest.raises(openai.BadRequestError) as caught:
        scripted_client.chat.completions.create(
            model="said", messages=[{"role": "assistant", "tool_calls": [call]}]
        )  # type: ignore[list-item, misc]
    assert caught.value.param == "messages.0.tool_calls.0.function.arguments"


@pytest.mark.parametrize("script", ["plain", "two"])
def test_tool_choice_required_forces_a_call(scripted_client: openai.OpenAI, script: str) -> None:
    _, _, calls, reason = answer_both_ways(
        scripted_client,
        **request_body(
            script,
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=400,
        ),
    )
    assert reason == "tool_calls"
    assert {name for name, _ in calls} == {"get_weather"}
    assert all(arguments["city"] in ("Paris", "Oslo") for _, arguments in calls)


def test_tool_choice_forces_the_named_tool(scripted_client: openai.OpenAI) -> None:
    for name in ("get_weather", "add"):
        choice = {"type": "function", "function": {"name": name}}
        _, _, calls, _ = answer_both_ways(
            scripted_client,
            **request_body("plain", tools=TOOLS, tool_choice=choice, max_tokens=400),
        )
        assert [called for called, _ in calls] == [name]


def cut_arguments(client: openai.OpenAI, max_tokens: int, **body: Any) -> str | None:
    """The arguments of a required call that `max_tokens` cuts, if there is a call.

    Checks that the answer, streamed and not, has nothing else.
    """
    body |= {"tools": TOOLS[:1], "parallel_tool_calls": False, "max_tokens": max_tokens}
    body = request_body("plain", **body)
    whole = client.chat.completions.create(**body).choices[0]
    assert whole.finish_reason == "length"
    assert not whole.message.content
    calls = whole.message.tool_calls or []
    pieces = [chunk.choices[0] for chunk in client.chat.completions.create(**body, stream=True)]
    assert not any(piece.delta.content for piece in pieces)
    assert pieces[-1].finish_reason == "length"
    streamed = [call for piece in pieces for call in piece.delta.tool_calls or []]
    if not calls:
        assert not streamed
        return None
    (call,) = calls
    assert [piece.function.name for piece in streamed if piece.function.name] == ["get_weather"]
    assert "".join(piece.function.arguments for piece in streamed) == call.function.arguments
    assert call.function.name == "get_weather"
    assert call.id
    return str(call.function.arguments)


def test_required_tool_call_cut_by_max_tokens_is_partial(scripted_client: openai.OpenAI) -> None:
    forced = {"type": "function", "function": {"name": "get_weather"}}
    found = [
        cut_arguments(scripted_client, max_tokens, tool_choice=choice)
        for max_tokens, choice in ((1, "required"), (10, forced), (20, "required"), (22, forced))
    ]
    assert found[:2] == ["", ""]
    for arguments in found[2:]:
        assert arguments and '{"city": "Paris"}'.startswith(arguments)


def test_optional_tool_call_cut_by_max_tokens_is_text(scripted_client: openai.OpenAI) -> None:
    body = request_body("two", tools=TOOLS, max_tokens=10)
    text, _, calls, reason = answer_both_ways(scripted_client, **body)
    assert text.startswith("<tool_call>") and not calls
    assert reason == "length"


@pytest.mark.parametrize("offered", [1, 2])
def test_strict_tool_call_cut_by_max_tokens_is_partial(
    scripted_client: openai.OpenAI, offered: int
) -> None:
    """With `tool_choice: auto`: what follows the opener can only be a call."""
    strict = [
        {"type": "function", "function": tool["function"] | {"strict": True}}
        for tool in TOOLS[:offered]
    ]
    body = request_body("call", tools=strict, parallel_tool_calls=False)
    shown = set()
    for max_tokens in range(2, 26, 3):
        whole = scripted_client.chat.completions.create(**body, max_tokens=max_tokens).choices[0]
        assert whole.finish_reason == "length"
        # Where the opener is not complete, text may still follow.
        content = whole.message.content or ""
        assert "Sure. \n<tool_call".startswith(content)
        for call in whole.message.tool_calls or []:
            assert content == "Sure."
            assert call.function.name == "get_weather"
            assert '{"city": "Paris"}'.startswith(call.function.arguments)
            shown.add(call.function.arguments)
        stream = scripted_client.chat.completions.create(**body, max_tokens=max_tokens, stream=True)
        deltas = [chunk.choices[0].delta for chunk in stream]
        assert "".join(delta.content or "" for delta in deltas) == content
        streamed = [call for delta in deltas for call in delta.tool_calls or []]
        assert "".join(call.function.arguments for call in streamed) == "".join(
            call.function.arguments for call in whole.message.tool_calls or []
        )
    assert "" in shown
    assert any(arguments for arguments in shown)


def test_required_tool_call_cut_by_a_stop_string_is_partial(
    scripted_client: openai.OpenAI,
) -> None:
    body = request_body("plain", tools=TOOLS[:1], tool_choice="required", max_tokens=400)
    for stop, include, arguments in (
        ("city", False, '{"'),
        ("city", True, '{"city'),
        ("weather", False, ""),
    ):
        answer = scripted_client.chat.completions.create(
            **body, stop=[stop], extra_body={"include_stop_str_in_output": include}
        ).choices[0]
        # The stop string was met, and the call is not complete: not "tool_calls".
        assert answer.finish_reason == "stop"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls or []
        assert (call.function.name, call.function.arguments) == ("get_weather", arguments)
        stream = scripted_client.chat.completions.create(
            **body,
            stop=[stop],
            stream=True,
            extra_body={"include_stop_str_in_output": include},
        )
        choices = [chunk.choices[0] for chunk in stream]
        assert not any(choice.delta.content for choice in choices)
        assert choices[-1].finish_reason == "stop"
        pieces = [call for choice in choices for call in choice.delta.tool_calls or []]
        assert "".join(call.function.arguments or "" for call in pieces if call.function) == (
            arguments
        )


def test_strict_tool_calls_follow_the_schema(scripted_client: openai.OpenAI) -> None:
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    assert answer_both_ways(scripted_client, **request_body("plain", tools=strict)) == (
        "Just words.",
        "",
        [],
        "stop",
    )
    for script in ("call", "almost"):  # one of them would call another tool
        body = request_body(script, tools=strict, parallel_tool_calls=False, max_tokens=400)
        text, _, ((name, arguments),), reason = answer_both_ways(scripted_client, **body)
        assert (text, reason) == ("Sure." if script == "call" else "", "tool_calls")
        assert name == "get_weather" and arguments["city"] in ("Paris", "Oslo")


def test_structured_output_or_a_tool_call(scripted_client: openai.OpenAI) -> None:
    form = {"guided_choice": ["left", "right"]}
    for script in ("two", "plain"):
        body = request_body(
            script, tools=TOOLS, extra_body=form, parallel_tool_calls=False, max_tokens=400
        )
        text, _, calls, _ = answer_both_ways(scripted_client, **body)
        assert calls if script == "two" else text in ("left", "right") or calls


def test_structured_output_follows_response_format(scripted_client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    for script in ("plain", "json"):
        text, _, _, reason = answer_both_ways(
            scripted_client, **request_body(script, response_format=form, max_tokens=200)
        )
        assert json.loads(text)["colour"] in ("red", "blue")
        assert reason == "stop"
    assert json.loads(text)["colour"] == "blue"
    text, *_ = answer_both_ways(
        scripted_client,
        **request_body("json", response_format={"type": "json_object"}, max_tokens=200),
    )
    assert json.loads(text) == {"colour": "blue"}


def test_structured_output_has_one_line_feed_between_tokens(
    scripted_client: openai.OpenAI,
) -> None:
    """A model that prefers white space to everything else still finishes its answer."""
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 3, "maxItems": 3}
    space = {
        str(token): 100
        for text in (" ", "\n", "\t")
        for token in scripted_client.post(
            "/../tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object
        )["tokens"]  # type: ignore[index]
    }
    answer = scripted_client.chat.completions.create(
        **request_body("plain", logit_bias=space, max_tokens=200),
        extra_body={"guided_json": schema},
    ).choices[0]
    assert answer.finish_reason == "stop"
    text = answer.message.content or ""
    assert json.loads(text) == [1, 1, 1]
    gaps = re.findall(r"\s+", text)
    assert len(gaps) == 6
    assert all(re.fullmatch(r" |\n( {0,16}|\t{0,8})", gap) for gap in gaps)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "a/b[0-9]{3}"}, r"a/b[0-9]{3}"),
        ({"guided_regex": r"a\/b\\[0-9]\""}, r"a/b\\[0-9]\""),
        ({"guided_regex": "a\n/é"}, "a\n/é"),
        ({"guided_choice": ["yes\n", 'no "x"']}, r'yes\n|no "x"'),
        ({"guided_choice": ["é\U0001f600", "\x01ü"]}, "é\U0001f600|\x01ü"),
        ({"guided_json": {"enum": ["a", "b"]}}, r'"[ab]"'),
        ({"guided_json": '{"const": 5}'}, r"5"),
        ({"guided_grammar": 'start: "x" ("y" | "z") "!"'}, r"x[yz]!"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, r"left|right"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, r"true|false"),
        ({"structured_outputs": {"regex": "[xy]{5}"}}, r"[xy]{5}"),
    ],
)
def test_structured_output_takes_vllms_fields(
    scripted_client: openai.OpenAI, endpoint: str, fields: Any, pattern: str
) -> None:
    if endpoint == "chat":
        text = (
            scripted_client.chat.completions.create(
                **request_body("plain"), extra_body=fields, max_tokens=60
            )
            .choices[0]
            .message.content
        )
    else:
        text = (
            scripted_client.completions.create(
                model="said", prompt="x", extra_body=fields, max_tokens=60
            )
            .choices[0]
            .text
        )
    assert re.fullmatch(pattern, text or "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_grammar": "start: b"}, "guided_grammar"),
        ({"guided_json": {"type": "strin"}}, "guided_json"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"not": {}}},
                }
            },
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": 5}}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_structured_output_refuses_invalid_constraints(
    scripted_client: openai.OpenAI, fields: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        scripted_client.chat.completions.create(**request_body("plain"), extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, "invalid_grammar")


@pytest.mark.parametrize("form", ["mistral", pytest.param("llama", marks=pytest.mark.slow)])
def test_tool_calls_in_other_formats(tmp_path: Path, form: str) -> None:
    with (
        start_scripted_server(tmp_path, form) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        assert answer_both_ways(client, **request_body("call", tools=TOOLS)) == (
            "",
            "",
            [PARIS, ADD],
            "tool_calls",
        )
        plain = SCRIPTS[form]["plain"]
        assert answer_both_ways(client, **request_body("plain", tools=TOOLS)) == (
            plain,
            "",
            [],
            "stop",
        )
        body = request_body(
            "plain",
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=300,
        )
        strict = [
            {"type": "function", "function": TOOLS[0]["function"] | {"strict": True}},
            TOOLS[1],
        ]
        text, _, calls, reason = answer_both_ways(
            client, **request_body("call", tools=strict, parallel_tool_calls=False, max_tokens=300)
        )
        assert (text, len(calls), reason) == ("", 1, "tool_calls")
        if form == "mistral":
            assert answer_both_ways(client, **request_body("plain", tools=strict)) == (
                plain,
                "",
                [],
                "stop",
            )
        assert cut_arguments(client, 2, tool_choice="required") == ""
        cut = cut_arguments(client, 25, tool_choice="required")
        assert cut
        ((name, arguments),) = answer_both_ways(client, **body)[2]
        assert name == "get_weather" and arguments["city"] in ("Paris", "Oslo")
        (call,) = client.chat.completions.create(**body).choices[0].message.tool_calls or []
        assert call.function.arguments.startswith(cut)
        assert len(call.id) == 9 if form == "mistral" else call.id.startswith("call_")
