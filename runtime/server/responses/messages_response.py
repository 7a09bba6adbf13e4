"""Responses of Anthropic's /v1/messages, in full and streamed."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.call_arguments import whole_arguments
from llmkit.runtime.server.responses.response_builder import SERVER_SENT_EVENTS, sse_event
from llmkit.runtime.server.text.output_parts import (
    OutputPart,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    join_parts,
)

# Clients drop thinking without a signature instead of sending it back. It says nothing more.
THINKING_SIGNATURE = "bGxta2l0LnRoaW5raW5nLjE="
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesResponseBuilder:
    """Builds a response of /v1/messages, which has one choice. A ResponseBuilder."""

    stream_format = SERVER_SENT_EVENTS

    def __init__(self, model: str) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._block_index = -1  # of the last content block that was started
        self._open_kind: type[OutputPart] | None = None  # of the content block that is open
        self._finish_reason: str | None = None
        self._started = False

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        blocks: list[dict[str, Any]] = []
        for part in join_parts(answers[0].parts):
            block, text = _new_block(part)
            if isinstance(part, ToolCallPart):
                block["input"] = msgspec.Raw(whole_arguments(part))
            else:
                block[block["type"]] = text
            if isinstance(part, ReasoningPart):
                block["signature"] = THINKING_SIGNATURE
            blocks.append(block)
        return msgspec.json.encode(self._message(choices[0], blocks, answers[0].finish_reason))

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        events: list[bytes] = []
        for delta in deltas:
            if not self._started:
                self._started = True
                message = self._message(choices[0], [], None)
                message["usage"]["output_tokens"] = 0
                events.append(_event("message_start", message=message))
            for part in delta.parts:
                events += self._part_events(part)
            self._finish_reason = delta.finish_reason
        return b"".join(events)

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        stop = self._stop_fields(choices[0], self._finish_reason)
        events = [
            *self._close_block(),
            _event("message_delta", delta=stop, usage=_usage(choices[0])),
            _event("message_stop"),
        ]
        return b"".join(events)

    def error_event(self, error: ApiError) -> bytes:
        return sse_event(error.envelope(anthropic=True), "error")

    def _part_events(self, part: OutputPart) -> list[bytes]:
        block, text = _new_block(part)
        events: list[bytes] = []
        begins_call = isinstance(part, ToolCallPart) and part.is_first
        if begins_call or type(part) is not self._open_kind:
            events = self._close_block()
            self._block_index += 1
            self._open_kind = type(part)
            events.append(
                _event("content_block_start", index=self._block_index, content_block=block)
            )
        if isinstance(part, ToolCallPart):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        else:
            delta = {"type": f"{block['type']}_delta", block["type"]: text}
        return [*events, _event("content_block_delta", index=self._block_index, delta=delta)]

    def _close_block(self) -> list[bytes]:
        if self._open_kind is None:
            return []
        events = []
        if self._open_kind is ReasoningPart:
            delta = {"type": "signature_delta", "signature": THINKING_SIGNATURE}
            events.append(_event("content_block_delta", index=self._block_index, delta=delta))
        self._open_kind = None
        return [*events, _event("content_block_stop", index=self._block_index)]

    def _message(
        self, choice: Choice, content: list[dict[str, Any]], finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **self._stop_fields(choice, finish_reason),
            "usage": _usage(choice),
        }

    def _stop_fields(self, choice: Choice, finish_reason: str | None) -> dict[str, Any]:
        stop_reason = None if finish_reason is None else _STOP_REASONS[finish_reason]
        stop_sequence = None
        if stop_reason == "end_turn" and choice.matched_stop_string is not None:
            stop_reason = "stop_sequence"
            stop_sequence = choice.matched_stop_string
        return {"stop_reason": stop_reason, "stop_sequence": stop_sequence}


def _new_block(part: OutputPart) -> tuple[dict[str, Any], str]:
    """Return the empty content block for a part, and the text that goes into it."""
    match part:
        case TextPart(text):
            return {"type": "text", "text": ""}, text
        case ReasoningPart(text):
            return {"type": "thinking", "thinking": "", "signature": ""}, text
        case ToolCallPart(id=call_id, name=name):
            return {"type": "tool_use", "id": call_id, "name": name, "input": {}}, ""


def _usage(choice: Choice) -> dict[str, int]:
    return {
        "input_tokens": len(choice.request.prompt_token_ids) - choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.cached_tokens,
        "output_tokens": choice.completion_tokens,
    }


def _event(name: str, **fields: Any) -> bytes:
    return sse_event({"type": name, **fields}, name)
