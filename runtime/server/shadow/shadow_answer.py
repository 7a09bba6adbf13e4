"""The answer in a response of OpenAI's chats and completions, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmkit.common.sse import EventParser
from llmkit.runtime.server.tiers.url_logprobs import CHAT, COMPLETIONS, choices_of, parse_json

PATHS = frozenset({CHAT, COMPLETIONS})  # whose requests have shadows
_END_OF_STREAM = "[DONE]"


@dataclass
class ToolCall:
    """A call that an answer makes."""

    name: str = ""
    arguments: str = ""


@dataclass
class Answer:
    """What a model has answered."""

    text: str = ""
    reasoning: str = ""
    # By index in the answer.
    tool_calls: dict[int, ToolCall] = field(default_factory=dict)
    finish_reason: str | None = None

    def is_same(self, other: Answer) -> bool:
        """Whether the text and the calls are equal; the reasoning may differ."""
        return self.text == other.text and self.tool_calls == other.tool_calls

    def add(self, choice: dict[str, Any]) -> None:
        """Add a choice, or the part of it that a chunk of a stream has."""
        part = choice.get("message") or choice.get("delta") or choice
        if not isinstance(part, dict):
            return
        self.text += _text(part.get("content")) or _text(part.get("text"))
        self.reasoning += _text(part.get("reasoning")) or _text(part.get("reasoning_content"))
        calls = part.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else []):
            if isinstance(call, dict):
                self._add_call(call, position)
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason

    def _add_call(self, call: dict[str, Any], position: int) -> None:
        index = call.get("index")
        added = self.tool_calls.setdefault(index if type(index) is int else position, ToolCall())
        function = call.get("function")
        if isinstance(function, dict):
            added.name += _text(function.get("name"))
            added.arguments += _text(function.get("arguments"))


def read_answer(content: bytes, is_stream: bool) -> Answer | None:
    """The first choice of a response's body; None for an error or a part of a response."""
    documents = list(_events(content)) if is_stream else [parse_json(content)]
    if is_stream and (not documents or documents.pop() is not None):
        return None  # a stream that has broken off
    return _joined(documents)


def _joined(documents: Iterable[Any]) -> Answer | None:
    answer = Answer()
    for document in documents:
        if not isinstance(document, dict) or "error" in document:
            return None
        for choice in choices_of(document):
            if choice.get("index", 0) == 0:
                answer.add(choice)
    return answer if answer.finish_reason is not None else None


def _events(content: bytes) -> Iterator[Any]:
    """The documents of a stream; None stands for its regular end."""
    parser = EventParser()
    for data in [*parser.feed(content), *parser.close()]:
        yield None if data == _END_OF_STREAM else parse_json(data) or {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
