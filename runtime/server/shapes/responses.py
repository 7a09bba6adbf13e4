"""Answers of OpenAI's /v1/responses, whole and as its sequence of events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmkit.runtime.server.bodies.responses import ResponsesBody
from llmkit.runtime.server.generation import Choice, Delta
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.shapes.openai import event
from llmkit.runtime.server.text.calls import Call
from llmkit.runtime.server.text.parts import Part, Reasoning


class ResponsesShape:
    """One answer; there is one choice only. Items are the thought, the text and the calls, in their order."""

    def __init__(self, body: ResponsesBody) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._body = body
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: type[Part] | None = None  # of the last item, while more may come for it
        self._events: list[bytes] = []  # that are not sent yet
        self._number = 0
        self._finish: str | None = None

    def whole(self, choices: Sequence[Choice], answers: Sequence[Delta]) -> bytes:
        """See Shape."""
        self.chunks(choices, answers)
        self._close()
        return msgspec.json.encode(self._response(choices[0], self._status()))

    def chunks(self, choices: Sequence[Choice], deltas: Iterable[Delta]) -> bytes:
        """See Shape."""
        for delta in deltas:
            if self._number == 0:
                for name in ("created", "in_progress"):
                    self._event(f"response.{name}", response=self._response(choices[0], "in_progress"))
            for part in delta.parts:
                self._part(part)
            self._finish = delta.finish_reason
        return self._sent()

    def last(self, choices: Sequence[Choice]) -> bytes:
        """See Shape."""
        self._close()
        status = self._status()
        self._event(f"response.{status}", response=self._response(choices[0], status))
        return self._sent()

    def failed(self, error: ApiError) -> bytes:
        """See Shape."""
        told = error.envelope()["error"]
        self._event("error", message=told["message"], code=told["code"], param=told["param"])
        return self._sent()

    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _part(self, part: Part) -> None:
        if isinstance(part, Call) or type(part) is not self._open:
            self._close()
            self._begin(part)
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        if isinstance(part, Call):
            self._items[-1]["arguments"] = part.arguments
            self._event("response.function_call_arguments.delta", **place, delta=part.arguments)
            return
        content = self._items[-1]["content"][0]
        content["text"] += part.text
        more: dict[str, Any] = {} if isinstance(part, Reasoning) else {"logprobs": []}
        self._event(f"response.{content['type']}.delta", **place, content_index=0, delta=part.text, **more)

    def _begin(self, part: Part) -> None:
        self._open = type(part)
        if isinstance(part, Call):
            more = {"call_id": part.id, "name": part.name, "arguments": ""}
            self._items.append({"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", **more})
        elif isinstance(part, Reasoning):
            self._items.append({"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": [], "content": []})
        else:
            self._items.append({"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": []})
        item = self._items[-1]
        item["status"] = "in_progress"
        self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)
        if isinstance(part, Call):
            return
        if isinstance(part, Reasoning):
            item["content"].append({"type": "reasoning_text", "text": ""})
        else:
            item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
        self._event("response.content_part.added", **self._place(), part=item["content"][0])

    def _close(self) -> None:
        if self._open is None:
            return
        item = self._items[-1]
        item["status"] = "incomplete" if self._finish == "length" else "completed"
        if self._open is Call:
            place = {"item_id": item["id"], "output_index": len(self._items) - 1, "name": item["name"]}
            self._event("response.function_call_arguments.done", **place, arguments=item["arguments"])
        else:
            content = item["content"][0]
            more: dict[str, Any] = {} if self._open is Reasoning else {"logprobs": []}
            self._event(f"response.{content['type']}.done", **self._place(), text=content["text"], **more)
            self._event("response.content_part.done", **self._place(), part=content)
        self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, kind: str, /, **fields: Any) -> None:
        self._events.append(event({"type": kind, "sequence_number": self._number, **fields}, kind))
        self._number += 1

    def _sent(self) -> bytes:
        events, self._events = b"".join(self._events), []
        return events

    def _response(self, choice: Choice, status: str) -> dict[str, Any]:
        body, done = self._body, status != "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._items if done else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": choice.request.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True)
            if body.text
            else {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": choice.request.top_p,
            "truncation": "disabled",
            "usage": _usage(choice) if done else None,
            "user": body.user,
        }


def _usage(choice: Choice) -> dict[str, Any]:
    prompt, completion = len(choice.request.prompt), choice.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": choice.cached_tokens},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
        "total_tokens": prompt + completion,
    }
