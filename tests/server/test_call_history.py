"""Earlier calls as the chat templates of a dialect take them."""

from __future__ import annotations

import json
from typing import Any

from llmkit.runtime.server.text.call_history import messages_for_template, with_arguments_as_text
from llmkit.runtime.server.text.tool_dialects import (
    HARMONY,
    HERMES,
    KIMI_K2,
    LLAMA3_JSON,
    MISTRAL,
    PHI4_MINI,
    ToolDialect,
)


def said(*calls: tuple[str, str], **fields: Any) -> dict[str, Any]:
    """A message with calls, given by id and name."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": {"a": "é"}}}
            for call_id, name in calls
        ],
        **fields,
    }


def result(call_id: str, content: str = "2") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def ids(dialect: ToolDialect, messages: list[dict[str, Any]]) -> list[str]:
    """The ids of calls and results, in their order."""
    found = []
    for message in messages_for_template(messages, dialect, ""):
        found += [call["id"] for call in message.get("tool_calls", [])]
        found += [message["tool_call_id"]] if "tool_call_id" in message else []
    return found


def test_history_keeps_ids_that_fit() -> None:
    mistral = [said(("abc123XYZ", "add")), result("abc123XYZ")]
    assert ids(MISTRAL, mistral) == ["abc123XYZ"] * 2
    kimi = [said(("functions.add:7", "add")), result("functions.add:7")]
    assert ids(KIMI_K2, kimi) == ["functions.add:7"] * 2
    assert ids(HERMES, [said(("any id", "add")), result("any id")]) == ["any id"] * 2


def test_history_replaces_other_ids_in_calls_and_results_alike() -> None:
    messages = [
        said(("call_x", "add"), ("call_y", "get")),
        result("call_y"),
        result("call_x"),
        said(("call_x", "get")),
        result("call_x"),
        result("unheard"),
    ]
    assert ids(KIMI_K2, messages) == [
        "functions.add:0",
        "functions.get:1",
        "functions.get:1",
        "functions.add:0",
        "functions.get:2",
        "functions.get:2",
        "unheard",
    ]
    first, second, *results = ids(MISTRAL, messages)
    assert first != second
    assert {len(first), len(second)} == {9}
    assert results == [second, first, first, first, "unheard"]
    assert messages[0]["tool_calls"][0]["id"] == "call_x"  # unchanged


def test_history_of_harmony_has_one_call_in_a_message() -> None:
    messages = [
        {"role": "user", "content": "x"},
        said(("1", "add"), ("2", "get"), content="Sure.", reasoning_content="Hm."),
        result("2", "second"),
        result("1", "first"),
        {"role": "assistant", "content": "Done.", "reasoning_content": "Both."},
    ]
    shown = messages_for_template(messages, HARMONY, "{{ message.thinking }}")
    assert [message["role"] for message in shown] == [
        *("user", "assistant", "tool", "assistant", "tool", "assistant")
    ]
    assert [len(message.get("tool_calls", ())) for message in shown] == [0, 1, 0, 1, 0, 0]
    assert [message["content"] for message in shown] == ["x", "", "first", "", "second", "Done."]
    thoughts = [message.get("thinking") for message in shown]
    assert thoughts == [None, "Hm.\n\nSure.", None, None, None, "Both."]


def test_history_of_a_template_for_one_call_has_one_call_in_a_message() -> None:
    template = "{% set tool_call = message.tool_calls[0].function %}"
    calls = said(("1", "add"), ("2", "get"), content="Sure.")
    shown = messages_for_template([calls, result("2"), result("1")], LLAMA3_JSON, template)
    assert [message.get("content") for message in shown] == ["Sure.", "2", "", "2"]
    found = [message["tool_calls"][0]["id"] for message in shown if "tool_calls" in message]
    assert found == ["1", "2"]
    assert [m["tool_call_id"] for m in shown if "tool_call_id" in m] == ["1", "2"]
    loop = "{% for call in message.tool_calls %}{{ message.tool_calls[0] }}{% endfor %}"
    assert messages_for_template([calls], LLAMA3_JSON, loop) == [
        {**calls}  # a template with a loop takes all of them
    ]


def test_history_with_arguments_as_text() -> None:
    user = {"role": "user", "content": "x"}
    shown = with_arguments_as_text([user, said(("1", "add"))])
    assert shown[0] == user
    assert shown[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": "é"}'}


def test_history_has_thoughts_under_the_name_of_the_template() -> None:
    messages = [{"role": "assistant", "content": "x", "reasoning_content": "Hm."}]
    for dialect in (HERMES, None):
        assert messages_for_template(messages, dialect, "{{ m.reasoning_content }}") == messages
        (shown,) = messages_for_template(messages, dialect, "{{ m.thinking }} {{ m.reasoning }}")
        assert shown == {**messages[0], "thinking": "Hm.", "reasoning": "Hm."}


def test_history_has_tools_in_the_system_message_where_a_template_looks_for_them() -> None:
    template = "{% if 'tools' in message %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}"
    add = {"name": "add", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": add}]
    user = {"role": "user", "content": "x"}
    system = {"role": "system", "content": "Be brief."}
    for messages, content in (([user], ""), ([system, user], "Be brief.")):
        first, *rest = messages_for_template(messages, PHI4_MINI, template, tools)
        assert (first["role"], first["content"]) == ("system", content)
        assert json.loads(first["tools"]) == [add]
        assert rest == [user]
    assert messages_for_template([user], PHI4_MINI, template) == [user]
    assert messages_for_template([user], PHI4_MINI, "{{ tools }}", tools) == [user]
