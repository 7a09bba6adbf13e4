"""Responses of OpenAI's /v1/responses, in full and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.logprobs_response import TextLogprobs
from llmkit.runtime.server.responses.response_builder import SERVER_SENT_EVENTS, sse_event
from llmkit.runtime.server.schemas.carried_reasoning import carry_reasoning
from llmkit.runtime.server.schemas.responses_request import ResponsesRequest
from llmkit.runtime.server.text.output_parts import OutputPart, ReasoningPart, ToolCallPart

OnComplete = Callable[[dict[str, Any]], None]


class ResponsesResponseBuilder:
    """Builds a response of /v1/responses, which has one choice. A ResponseBuilder.

    The items of the output are reasoning, messages and function calls, in the order of the text.
    """

    stream_format = SERVER_SENT_EVENTS

    def __init__(
        self,
        request: ResponsesRequest,
        response_id: str = "",
        logprobs: TextLogprobs | None = None,
    ) -> None:
        """response_id: the id; a new one by default. logprobs: set if the request includes them."""
        self.id = response_id or f"resp_{uuid.uuid4().hex}"
        self._request = request
        self._logprobs = logprobs
        # Gets the complete document. With it the response says that it is stored.
        self.on_complete: OnComplete | None = None
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
        return msgspec.json.encode(self._completed(choices[0]))

    def stream_events(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        for delta in deltas:
            if self._sequence_number == 0:
                for name in ("created", "in_progress"):
                    self._event(
                        f"response.{name}", response=self._response(choices[0], "in_progress")
                    )
            if self._logprobs is not None:
                self._logprobs.add(delta.tokens)
            for part in delta.parts:
                self._add_part(part)
            self._finish_reason = delta.finish_reason
        return self._take_events()

    def final_events(self, choices: Sequence[Choice]) -> bytes:
        self._close_item()
        response = self._completed(choices[0])
        self._event(f"response.{response['status']}", response=response)
        return self._take_events()

    def error_event(self, error: ApiError) -> bytes:
        fields = error.envelope()["error"]
        self._event("error", message=fields["message"], code=fields["code"], param=fields["param"])
        return self._take_events()

    def queued_response(self, choice: Choice) -> dict[str, Any]:
        """Return the document of a background response that waits for its turn."""
        return self._response(choice, "queued")

    def running_response(self, choice: Choice) -> dict[str, Any]:
        """Return the document of a background response that is being computed."""
        return self._response(choice, "in_progress")

    def failed_events(self, choice: Choice, error: ApiError) -> bytes:
        """Return the events that end the stream of a background response with `error`."""
        self._event("response.failed", response=self.ended_response(choice, "failed", error))
        return self._take_events()

    def ended_response(
        self, choice: Choice, status: str, error: ApiError | None = None
    ) -> dict[str, Any]:
        """Return the document of a background response that ended early, with its output so far."""
        self._finish_reason = "length"  # so that an open item is incomplete
        self._close_item()
        response = self._response(choice, status)
        if error is not None:
            fields = error.envelope()["error"]
            response["error"] = {"code": fields["code"], "message": fields["message"]}
        return response

    def _completed(self, choice: Choice) -> dict[str, Any]:
        response = self._response(choice, self._final_status())
        if self.on_complete is not None:
            self.on_complete(response)
        return response

    def _final_status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _add_part(self, part: OutputPart) -> None:
        if type(part) is not self._open_kind or _begins_call(part):
            self._close_item()
            self._open_item(part)
        item = self._items[-1]
        if isinstance(part, ToolCallPart):
            item["arguments"] += part.arguments
            self._call_complete = part.is_complete
            if self._logprobs is not None:
                self._logprobs.skip(part.arguments)
            self._event(
                "response.function_call_arguments.delta",
                **self._item_position(),
                delta=part.arguments,
            )
            return
        content = item["content"][0]
        content["text"] += part.text
        logprobs: dict[str, Any] = {}
        if not isinstance(part, ReasoningPart):
            new = [] if self._logprobs is None else self._logprobs.take(part.text)
            content["logprobs"] += new
            logprobs = {"logprobs": new}
        elif self._logprobs is not None:
            self._logprobs.skip(part.text)
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
        if self._open_kind is ReasoningPart and self._request.includes_encrypted_reasoning:
            item["encrypted_content"] = carry_reasoning(item["content"][0]["text"])
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
            logprobs = {}
            if self._open_kind is not ReasoningPart:
                logprobs = {"logprobs": content["logprobs"]}
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
        done = status not in ("queued", "in_progress")
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        text: dict[str, Any] = {"format": {"type": "text"}}
        if request.text:
            text = request.text.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": bool(request.background),
            "error": None,
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": self._items if done else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "store": self.on_complete is not None,
            "temperature": params.temperature,
            "text": text,
            "tool_choice": request.tool_choice or "auto",
            "top_logprobs": request.top_logprobs or 0,
            "tools": [tool.model_dump() for tool in request.tools or []],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": _usage(choice) if done else None,
            "user": request.user,
        }


def _begins_call(part: OutputPart) -> bool:
    return isinstance(part, ToolCallPart) and part.is_first


def _usage(choice: Choice) -> dict[str, Any]:
    prompt_tokens = len(choice.request.prompt_token_ids)
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": choice.cached_tokens},
        "output_tokens": choice.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
        "total_tokens": prompt_tokens + choice.completion_tokens,
    }
