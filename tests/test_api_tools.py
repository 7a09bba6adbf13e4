"""Tools, thoughts and structured answers through the real `openai` client, by models that say what is wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from scripted import SCRIPTS, TOOLS, start, trigger

PARIS, ADD = ("get_weather", {"city": "Paris"}), ("add", {"a": 1})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with start(tmp_path_factory.mktemp("hermes"), "hermes") as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(script: str, **more: Any) -> dict[str, Any]:
    return {"model": "said", "messages": [{"role": "user", "content": trigger(script)}], "temperature": 0, **more}


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def told(client: openai.OpenAI, **asked: Any) -> tuple[str, str, list[tuple[str, Any]], str]:
    """Text, thought, calls and reason of an answer, which are the same streamed and whole."""
    whole = client.chat.completions.create(**asked).choices[0]
    text, thought, reason = "", "", None
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
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
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == calls_of(whole.message)
    assert list(calls) == list(range(len(calls)))
    assert reason == whole.finish_reason
    return text, thought, calls_of(whole.message), whole.finish_reason


def test_an_answer_without_calls_is_text(client: openai.OpenAI) -> None:
    assert told(client, **ask("plain", tools=TOOLS)) == ("Just words.", "", [], "stop")
    assert client.chat.completions.create(**ask("plain", tools=TOOLS)).choices[0].message.tool_calls is None


def test_a_call_and_the_text_before_it(client: openai.OpenAI) -> None:
    assert told(client, **ask("call", tools=TOOLS)) == ("Sure.", "", [PARIS], "tool_calls")


def test_parallel_calls_have_ids_of_their_own(client: openai.OpenAI) -> None:
    assert told(client, **ask("two", tools=TOOLS)) == ("", "", [PARIS, ADD], "tool_calls")
    message = client.chat.completions.create(**ask("two", tools=TOOLS, tool_choice="auto")).choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert len({call.id for call in message.tool_calls}) == 2


def test_one_call_only_where_no_parallel_ones_are_wanted(client: openai.OpenAI) -> None:
    asked = ask("two", tools=TOOLS, parallel_tool_calls=False)
    assert told(client, **asked) == ("", "", [PARIS], "tool_calls")


def test_what_only_looks_like_a_call_is_text(client: openai.OpenAI) -> None:
    text = SCRIPTS["hermes"]["almost"].replace("KEY", "arguments")
    assert told(client, **ask("almost", tools=TOOLS)) == (text, "", [], "stop")


def test_without_tools_or_with_none_to_be_called_calls_are_text(client: openai.OpenAI) -> None:
    text = SCRIPTS["hermes"]["two"].replace("KEY", "arguments")
    assert told(client, **ask("two")) == (text, "", [], "stop")
    assert told(client, **ask("two", tools=TOOLS, tool_choice="none")) == (text, "", [], "stop")


def test_a_thought_is_told_apart(tmp_path: Path) -> None:
    with start(tmp_path, "thinker") as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        assert told(client, **ask("think", tools=TOOLS)) == ("Yes:", "A call?", [ADD], "tool_calls")
        assert told(client, **ask("plain")) == ("Just words.", "", [], "stop")
        begun = ask("plain", messages=[{"role": "user", "content": f"<think>{trigger('plain')}"}])
        assert told(client, **begun) == ("Just words.", "", [], "stop")  # the prompt ends with something else
        forced = told(client, **ask("think", tools=TOOLS[:1], tool_choice="required", max_tokens=400))
        assert forced[1] == "A call?"
        assert [name for name, _ in forced[2]][:1] == ["get_weather"]
        shaped = told(client, **ask("think", extra_body={"guided_choice": ["left", "right"]}))
        assert shaped[0] in ("left", "right") and shaped[1] == "A call?"


def test_the_variables_of_a_template_can_be_set(client: openai.OpenAI) -> None:
    more = {"chat_template_kwargs": {"remark": "Be brief. "}}
    plain = client.chat.completions.create(**ask("plain"))
    longer = client.chat.completions.create(**ask("plain"), extra_body=more)
    assert plain.usage is not None and longer.usage is not None
    assert longer.usage.prompt_tokens > plain.usage.prompt_tokens


def test_tools_and_calls_reach_the_template(client: openai.OpenAI) -> None:
    def size(**fields: Any) -> int:
        answer = client.post("/../tokenize", body={"model": "said", **fields}, cast_to=object)
        return int(answer["count"])  # type: ignore[index]

    question = [{"role": "user", "content": "x"}]
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    given = [{"role": "tool", "tool_call_id": "call_1", "content": "2"}]
    assert size(messages=question, tools=TOOLS) > size(messages=question) + 100
    text = f"<|im_start|>assistant\nCALL add {json.dumps({'a': 1})}<|im_end|>\n"
    assert size(messages=question + asked) - size(messages=question) == size(prompt=text) - 1  # "x" ends the longer one
    assert size(messages=question + asked + given) > size(messages=question + asked)
    answer = client.chat.completions.create(
        model="said", temperature=0, tools=TOOLS,
        messages=question + asked + [given[0] | {"content": trigger("plain")}],  # type: ignore[arg-type]
    )  # fmt: skip
    assert answer.choices[0].message.content == "Just words."


@pytest.mark.parametrize("arguments", ["{", "[]", "null", "[" * 100_000])
def test_a_call_sent_back_must_have_an_object_of_arguments(client: openai.OpenAI, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="said", messages=[{"role": "assistant", "tool_calls": [call]}])  # type: ignore[list-item, misc]
    assert caught.value.param == "messages.0.tool_calls.0.function.arguments"


@pytest.mark.parametrize("script", ["plain", "two"])
def test_a_call_that_is_required_comes_whatever_the_model_would_say(client: openai.OpenAI, script: str) -> None:
    _, _, calls, reason = told(
        client, **ask(script, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False, max_tokens=400)
    )
    assert reason == "tool_calls"
    assert {name for name, _ in calls} == {"get_weather"}
    assert all(arguments["city"] in ("Paris", "Oslo") for _, arguments in calls)


def test_a_named_call_is_the_one_that_comes(client: openai.OpenAI) -> None:
    for name in ("get_weather", "add"):
        choice = {"type": "function", "function": {"name": name}}
        _, _, calls, _ = told(client, **ask("plain", tools=TOOLS, tool_choice=choice, max_tokens=400))
        assert [called for called, _ in calls] == [name]


def test_a_strict_tool_is_called_as_its_schema_says_or_not_at_all(client: openai.OpenAI) -> None:
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    assert told(client, **ask("plain", tools=strict)) == ("Just words.", "", [], "stop")
    for script in ("call", "almost"):  # one of them would call another tool
        asked = ask(script, tools=strict, parallel_tool_calls=False, max_tokens=400)
        text, _, ((name, arguments),), reason = told(client, **asked)
        assert (text, reason) == ("Sure." if script == "call" else "", "tool_calls")
        assert name == "get_weather" and arguments["city"] in ("Paris", "Oslo")


def test_an_answer_is_a_call_or_of_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    form = {"guided_choice": ["left", "right"]}
    for script in ("two", "plain"):
        asked = ask(script, tools=TOOLS, extra_body=form, parallel_tool_calls=False, max_tokens=400)
        text, _, calls, _ = told(client, **asked)
        assert calls if script == "two" else text in ("left", "right") or calls


def test_an_answer_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for script in ("plain", "json"):
        text, _, _, reason = told(client, **ask(script, response_format=form, max_tokens=200))
        assert json.loads(text)["colour"] in ("red", "blue")
        assert reason == "stop"
    assert json.loads(text)["colour"] == "blue"
    text, *_ = told(client, **ask("json", response_format={"type": "json_object"}, max_tokens=200))
    assert json.loads(text) == {"colour": "blue"}


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
def test_vllms_ways_to_ask_for_a_form(client: openai.OpenAI, endpoint: str, fields: Any, pattern: str) -> None:
    if endpoint == "chat":
        text = (
            client.chat.completions.create(**ask("plain"), extra_body=fields, max_tokens=60).choices[0].message.content
        )
    else:
        text = client.completions.create(model="said", prompt="x", extra_body=fields, max_tokens=60).choices[0].text
    assert re.fullmatch(pattern, text or "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_grammar": "start: b"}, "guided_grammar"),
        ({"guided_json": {"type": "strin"}}, "guided_json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 5}}}}],
          "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_kept_is_refused(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask("plain"), extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, "invalid_grammar")


@pytest.mark.parametrize("form", ["mistral", "llama"])
def test_other_formats(tmp_path: Path, form: str) -> None:
    with start(tmp_path, form) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        assert told(client, **ask("call", tools=TOOLS)) == ("", "", [PARIS, ADD], "tool_calls")
        plain = SCRIPTS[form]["plain"]
        assert told(client, **ask("plain", tools=TOOLS)) == (plain, "", [], "stop")
        asked = ask("plain", tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False, max_tokens=300)
        strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, TOOLS[1]]
        text, _, calls, reason = told(client, **ask("call", tools=strict, parallel_tool_calls=False, max_tokens=300))
        assert (text, len(calls), reason) == ("", 1, "tool_calls")
        if form == "mistral":
            assert told(client, **ask("plain", tools=strict)) == (plain, "", [], "stop")
        ((name, arguments),) = told(client, **asked)[2]
        assert name == "get_weather" and arguments["city"] in ("Paris", "Oslo")
        (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
        assert len(call.id) == 9 if form == "mistral" else call.id.startswith("call_")
