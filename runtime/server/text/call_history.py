"""Brings earlier calls of a conversation into the shape that a dialect's chat templates take.

Ids that a dialect's models would not write, for example those of another server's answers, are
replaced in calls and results alike. Templates of gpt-oss and Llama 3 have one call in a message,
with its result after it. Thoughts, which are `reasoning_content` here, have other names in some
templates, and Phi-4-mini's template looks for tools in the system message.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from llmkit.runtime.server.text.tool_dialects import SHORT_ID, ToolDialect

_THOUGHT = "reasoning_content"
_TOOLS_IN_MESSAGE = re.compile(r"""['"]tools['"] in message\b""")
_FIRST_CALL = re.compile(r"""tool_calls(['"]\])?\[0\]""")
_ALL_CALLS = re.compile(r"""\bfor \w+ in \w+(\.|\[['"])tool_calls""")
_FITTING_IDS = {
    "short": SHORT_ID,
    "indexed": re.compile(r"functions\.[\w.-]+:[0-9]+"),
}


def messages_for_template(
    conversation: Sequence[dict[str, Any]],
    dialect: ToolDialect | None,
    template: str,
    tools: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return the messages of `conversation` as `template`, of a model of `dialect`, takes them.

    tools: those that are offered, as in requests.
    """
    messages = list(conversation)
    if dialect is not None:
        messages = _with_fitting_ids(messages, dialect)
    is_harmony = dialect is not None and dialect.channels is not None
    takes_one_call = _FIRST_CALL.search(template) and not _ALL_CALLS.search(template)
    if is_harmony or takes_one_call:
        messages = _one_call_each(messages, joins_text=is_harmony)
    if _THOUGHT not in template:
        messages = [_with_other_names(message) for message in messages]
    if tools and _TOOLS_IN_MESSAGE.search(template):
        messages = _with_tools_in_system(messages, tools)
    return messages


def has_calls(conversation: Sequence[dict[str, Any]]) -> bool:
    """Whether a message of `conversation` has calls."""
    return any(message.get("tool_calls") for message in conversation)


def with_arguments_as_text(conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of calls as JSON text.

    Templates that do not convert them themselves, as DeepSeek's, join them to other text.
    """
    return [
        {**message, "tool_calls": [_call_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in conversation
    ]


def _with_other_names(message: dict[str, Any]) -> dict[str, Any]:
    """Return `message` with its thought under the names that templates have for it, too."""
    if _THOUGHT not in message:
        return message
    return {**message, "thinking": message[_THOUGHT], "reasoning": message[_THOUGHT]}


def _with_tools_in_system(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return `messages` with the JSON of the tools' functions in the system message."""
    system = {"role": "system", "content": ""}
    if messages and messages[0]["role"] == "system":
        system, *messages = messages
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**system, "tools": functions}, *messages]


def _call_with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _with_fitting_ids(
    messages: Sequence[dict[str, Any]], dialect: ToolDialect
) -> list[dict[str, Any]]:
    """Return `messages` with ids that the dialect's templates take.

    A result belongs to the last call before it that has its id.
    """
    fitting = _FITTING_IDS.get(dialect.ids)
    if fitting is None:
        return list(messages)
    new_ids: dict[str, str] = {}
    num_calls = 0
    changed = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                if fitting.fullmatch(call["id"]):
                    new_ids[call["id"]] = call["id"]
                elif dialect.ids == "short":
                    new_ids[call["id"]] = hashlib.sha256(call["id"].encode()).hexdigest()[:9]
                else:
                    new_ids[call["id"]] = f"functions.{call['function']['name']}:{num_calls}"
                num_calls += 1
                calls.append({**call, "id": new_ids[call["id"]]})
            message = {**message, "tool_calls": calls}
        elif message.get("tool_call_id") in new_ids:
            message = {**message, "tool_call_id": new_ids[message["tool_call_id"]]}
        changed.append(message)
    return changed


def _one_call_each(messages: Sequence[dict[str, Any]], joins_text: bool) -> list[dict[str, Any]]:
    """Return `messages` with one call in each, followed by its result.

    joins_text: text before a call becomes part of its thought, as the template has no other place
    for both. Otherwise it stays in the message of the first call.
    """
    split: list[dict[str, Any]] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        if not message.get("tool_calls"):
            split.append(message)
            continue
        results = []
        while index < len(messages) and messages[index]["role"] == "tool":
            results.append(messages[index])
            index += 1
        if joins_text:
            thoughts = [text for text in (message.get(_THOUGHT), message.get("content")) if text]
            message = {**message, "content": "", _THOUGHT: "\n\n".join(thoughts)}
        for call in message["tool_calls"]:
            split.append({**message, "tool_calls": [call]})
            message = {**message, "content": "", _THOUGHT: ""}
            answer = next((r for r in results if r.get("tool_call_id") == call["id"]), None)
            if answer is not None:
                results.remove(answer)
                split.append(answer)
        split += results
    return [_without_empty_thought(message) for message in split]


def _without_empty_thought(message: dict[str, Any]) -> dict[str, Any]:
    if message.get(_THOUGHT):
        return message
    return {name: value for name, value in message.items() if name != _THOUGHT}
