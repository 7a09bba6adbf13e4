"""Answers of Anthropic's /v1/messages, whole and as its sequence of events."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.generation import Choice, Delta
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.shapes.openai import event
from llmkit.runtime.server.text.calls import Call, Text
from llmkit.runtime.server.text.parts import Part, Reasoning

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesShape:
    """One answer; there is one choice only."""

    def __init__(self, model: str) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._blocks = -1  # the number of the last block begun
        self._kind: type[Part] | None = None  # of the block that is open
        self._finish: str | None = None
        self._begun = False

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        """See Shape."""
        blocks: list[dict[str, Any]] = []
        for part in answers[0].parts:
            block, text = _block(part)
            if not blocks or isinstance(part, Call) or blocks[-1]["type"] != block["type"]:
                blocks.append(block)
            if isinstance(part, Call):
                block["input"] = msgspec.Raw(part.arguments.encode())
            else:
                blocks[-1][block["type"]] += text
        return msgspec.json.encode(self._message(choices[0], blocks, answers[0].finish_reason))

    def chunks(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        """See Shape."""
        events: list[bytes] = []
        for delta in deltas:
            if not self._begun:
                self._begun = True
                message = self._message(choices[0], [], None)
                message["usage"]["output_tokens"] = 0
                events.append(_event("message_start", message=message))
            for part in delta.parts:
                events += self._part(part)
            self._finish = delta.finish_reason
        return b"".join(events)

    def last(self, choices: Sequence[Choice]) -> bytes:
        """See Shape."""
        ending = self._ending(choices[0], self._finish)
        return b"".join(
            [
                *self._close(),
                _event("message_delta", delta=ending, usage=_usage(choices[0])),
                _event("message_stop"),
            ]
        )

    def failed(self, error: ApiError) -> bytes:
        """See Shape."""
        return event(error.envelope(anthropic=True), "error")

    def _part(self, part: Part) -> list[bytes]:
        block, text = _block(part)
        events: list[bytes] = []
        if isinstance(part, Call) or type(part) is not self._kind:
            events = self._close()
            self._blocks += 1
            self._kind = type(part)
            events.append(_event("content_block_start", index=self._blocks, content_block=block))
        if isinstance(part, Call):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        else:
            delta = {"type": f"{block['type']}_delta", block["type"]: text}
        return [*events, _event("content_block_delta", index=self._blocks, delta=delta)]

    def _close(self) -> list[bytes]:
        if self._kind is None:
            return []
        self._kind = None
        return [_event("content_block_stop", index=self._blocks)]

    def _message(self, choice: Choice, content: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return head | self._ending(choice, finish) | {"usage": _usage(choice)}

    def _ending(self, choice: Choice, finish: str | None) -> dict[str, Any]:
        reason = None if finish is None else _REASONS[finish]
        if reason == "end_turn" and choice.stop_string is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": choice.stop_string if reason == "stop_sequence" else None}


def _block(part: Part) -> tuple[dict[str, Any], str]:
    """How a part's block begins, and the text to put into it."""
    match part:
        case Text(text):
            return {"type": "text", "text": ""}, text
        case Reasoning(text):
            return {"type": "thinking", "thinking": "", "signature": ""}, text
        case Call(id=call_id, name=name):
            return {"type": "tool_use", "id": call_id, "name": name, "input": {}}, ""


def _usage(choice: Choice) -> dict[str, int]:
    cached = choice.cached_tokens
    return {
        "input_tokens": len(choice.request.prompt) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": choice.completion_tokens,
    }


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
