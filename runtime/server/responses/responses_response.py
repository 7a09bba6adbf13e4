"""Responses of OpenAI's /v1/responses, in full and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.response_builder import sse_event
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.text.output_parser import OutputPart, ReasoningPart
from llmkit.runtime.server.text.tool_calls import ToolCallPart


class ResponsesResponseBuilder:
    """Builds a response of /v1/responses, which has one choice. A ResponseBuilder.

    The items of the output are reasoning, messages and function calls, in the order of the text.
    """

    def __init__(self, request: ResponsesRequest) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open_kind: type[OutputPart] | None = None  # of the last item, while it is open
        self._call_complete = True  # whether the last call's arguments are whole
        self._unsent_events: list[bytes] = []
        self._sequence_number = 0  # of the next event
        self._finish_reason: str | None = None

    def full_response(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        self.stream_events(choices, answers)  # fills the items; the events are not used
        self._close_item()
        return msgspec.json.encode(self._response(choices[0], self._final_status()))

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        for delta in deltas:
            if self._sequence_number == 0:
                for name in ("created", "in_progress"):
                    self._event(
                        f"response.{name}", response=self._response(choices[0], "in_progress")
                    )
            for part in delta.parts:
                self._add_part(part)
            self._finish_reason = delta.finish_reason
        return self._take_events()

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        self._close_item()
        status = self._final_status()
        self._event(f"response.{status}", response=self._response(choices[0], status))
        return self._take_events()

    def error_event(self, error: ApiError) -> bytes:
        fields = error.envelope()["error"]
        self._event("error", message=fields["message"], code=fields["code"], param=fields["param"])
        return self._take_events()

    def _final_status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _add_part(self, part: OutputPart) -> None:
        if isinstance(part, ToolCallPart) or type(part) is not self._open_kind:
            self._close_item()
            self._open_item(part)
        item = self._items[-1]
        if isinstance(part, ToolCallPart):
            item["arguments"] = part.arguments
            self._call_complete = part.complete
            self._event(
                "response.function_call_arguments.delta",
                **self._item_position(),
                delta=part.arguments,
            )
            return
        content = item["content"][0]
        content["text"] += part.text
        logprobs: dict[str, Any] = {} if isinstance(part, ReasoningPart) else {"logprobs": []}
        self._event(
            f"response.{content['type']}.delta",
            **self._content_position(),
            delta=part.text,
            **logprobs,
        )

    def _open_item(self, part: OutputPart) -> None:
        """Start the item that `part` belongs to."""
        self._open_kind = type(part)
        item: dict[str, Any]
        content: dict[str, Any]
        if isinstance(part, ToolCallPart):
            item = {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "call_id": part.id,
                "name": part.name,
                "arguments": "",
            }
        elif isinstance(part, ReasoningPart):
            item = {
                "id": f"rs_{uuid.uuid4().hex}",
                "type": "reasoning",
                "summary": [],
                "content": [],
            }
            content = {"type": "reasoning_text", "text": ""}
        else:
            item = {
                "id": f"msg_{uuid.uuid4().hex}",
                "type": "message",
                "role": "assistant",
                "content": [],
            }
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["status"] = "in_progress"
        self._items.append(item)
        self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        if not isinstance(part, ToolCallPart):
            item["content"].append(content)
            self._event("response.content_part.added", **self._content_position(), part=content)

    def _close_item(self) -> None:
        """End the open item, if there is one."""
        if self._open_kind is None:
            return
        item = self._items[-1]
        item["status"] = self._final_status()
        if self._open_kind is ToolCallPart:
            item["status"] = "completed" if self._call_complete else "incomplete"
            self._event(
                "response.function_call_arguments.done",
                **self._item_position(),
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            content = item["content"][0]
            logprobs: dict[str, Any] = {} if self._open_kind is ReasoningPart else {"logprobs": []}
            self._event(
                f"response.{content['type']}.done",
                **self._content_position(),
                text=content["text"],
                **logprobs,
            )
            self._event("response.content_part.done", **self._content_position(), part=content)
        self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open_kind = None

    def _item_position(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _content_position(self) -> dict[str, Any]:
        return {**self._item_position(), "content_index": 0}

    def _event(self, kind: str, /, **fields: Any) -> None:
        document = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._unsent_events.append(sse_event(document, kind))
        self._sequence_number += 1

    def _take_events(self) -> bytes:
        events = b"".join(self._unsent_events)
        self._unsent_events = []
        return events

    def _response(self, choice: Choice, status: str) -> dict[str, Any]:
        request = self._request
        params = choice.request.sampling_params
        done = status != "in_progress"
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        text: dict[str, Any] = {"format": {"type": "text"}}
        if request.text:
            text = request.text.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": self._items if done else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": text,
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in request.tools or []],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": _usage(choice) if done else None,
            "user": request.user,
        }


def _usage(choice: Choice) -> dict[str, Any]:
    prompt_tokens = len(choice.request.prompt_token_ids)
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": choice.cached_tokens},
        "output_tokens": choice.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
        "total_tokens": prompt_tokens + choice.completion_tokens,
    }
