"""The history of a session: what the prompt of its next turn begins with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.bench.answer_stream import StreamedAnswer

Message = dict[str, Any]


@dataclass
class TokenHistory:
    """Token ids of all prompts and answers."""

    token_ids: list[int] = field(default_factory=list)

    def copy(self) -> TokenHistory:
        """A history that goes its own way from here on."""
        return TokenHistory(list(self.token_ids))


@dataclass
class ChatHistory:
    """Messages, the last answer apart: what is made of it depends on the turn that follows."""

    messages: list[Message] = field(default_factory=list)
    tools: Sequence[Mapping[str, Any]] | None = None
    answer: Message | None = None  # of the last turn; None: there was none
    recorded: Mapping[str, Any] | None = None  # the trace's answer of that turn

    def copy(self) -> ChatHistory:
        """A history that goes its own way from here on."""
        return ChatHistory(list(self.messages), self.tools, self.answer, self.recorded)

    def add(self, messages: Sequence[Message]) -> None:
        """Add the answer of the last turn and the messages of the next one.

        Tool results get the ids of the calls that they answer.
        """
        results = _leading_results(messages)
        if self.answer is not None:
            answer = _matching_answer(self.answer, self.recorded, results, self.tools)
            self.messages.append(answer)
            calls = answer.get("tool_calls") or []
            bound = [
                result | {"tool_call_id": call["id"]}
                for result, call in zip(results, calls, strict=True)
            ]
            messages = [*bound, *messages[len(results) :]]
        self.messages += messages
        self.answer = None

    def end_turn(self, answer: Message, recorded: Mapping[str, Any] | None) -> None:
        """Keep the answer of a turn. recorded: the trace's."""
        self.answer = answer
        self.recorded = recorded


def served_answer(answer: StreamedAnswer) -> Message:
    """The assistant message of a server's answer. Reasoning is not sent back."""
    message: Message = {"role": "assistant", "content": answer.text}
    if answer.tool_calls:
        message["tool_calls"] = answer.tool_calls
    return message


def _leading_results(messages: Sequence[Message]) -> list[Message]:
    """The tool results that a turn begins with."""
    results: list[Message] = []
    for message in messages:
        if message["role"] != "tool":
            break
        results.append(message)
    return results


def _matching_answer(
    answer: Message,
    recorded: Mapping[str, Any] | None,
    results: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
) -> Message:
    """The answer with one tool call for each result.

    A replay goes on as its trace does, whatever the model answers. Its own calls are kept when
    there is one for each result and their arguments are JSON objects; otherwise the trace's calls,
    or calls made for the results, replace them.
    """
    calls: list[Mapping[str, Any]] = answer.get("tool_calls") or []
    if len(calls) != len(results) or not all(map(_has_arguments, calls)):
        calls = (recorded or {}).get("tool_calls") or []
    if len(calls) != len(results):
        calls = [_call_for(result, index, tools) for index, result in enumerate(results)]
    kept = {name: value for name, value in answer.items() if name != "tool_calls"}
    return kept | {"tool_calls": [dict(call) for call in calls]} if calls else kept


def _has_arguments(call: Mapping[str, Any]) -> bool:
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return False
    return isinstance(arguments, dict) and bool(call["id"]) and bool(call["function"]["name"])


def _call_for(
    result: Message, index: int, tools: Sequence[Mapping[str, Any]] | None
) -> Mapping[str, Any]:
    name = result.get("name") or (tools[0]["function"]["name"] if tools else "tool")
    return {
        "id": result.get("tool_call_id") or f"call_{index}",
        "type": "function",
        "function": {"name": name, "arguments": "{}"},
    }
