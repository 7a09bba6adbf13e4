"""OpenAI's WebSocket mode of the Responses API: /v1/responses.

Each `response.create` is answered by the events of a streamed response. The last response of each
lane is kept in the connection, so that the next request can continue it without any store.
Protocol: https://developers.openai.com/api/docs/guides/websocket-mode
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import msgspec

from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.http.socket_paths import RESPONSES_SOCKET
from llmkit.runtime.server.schemas.responses_request import complete_item
from llmkit.runtime.server.websockets.socket_session import (
    DONE,
    RequestFailedError,
    SocketSession,
    take_string,
)

MAX_HISTORY_BYTES = 16 * 1024 * 1024  # of all lanes of a connection
_ENDS = ("response.completed", "response.incomplete")


@dataclass(frozen=True)
class _Turn:
    """The last response of a lane, and its conversation with it."""

    response_id: str
    items: list[dict[str, Any]]
    size: int  # of the items as JSON, in bytes
    is_stored: bool  # in the server, so that `items` is empty


@dataclass(frozen=True)
class _ResponseRequest:
    """A `response.create`."""

    body: dict[str, Any]
    conversation: list[dict[str, Any]]  # with the items of the turns before, unless stored
    previous_id: str | None
    stream_id: str | None  # its lane


class ResponsesSocket(SocketSession):
    """The session of one connection."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._turns: dict[str | None, _Turn] = {}  # by lane, the newest last

    def error_message(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        return {"type": "error", "status": status, "error": error}

    async def handle(self, message: dict[str, Any]) -> None:
        kind = message.pop("type", None)
        if kind != "response.create":
            raise invalid(
                "type",
                f"Messages of the type {str(kind)[:40]!r} are not supported; send response.create.",
                "unsupported",
            )
        stream_id = take_string(message, "stream_id")
        try:
            job = self._job(message, stream_id)
            self.enqueue(stream_id, job)
        except ApiError as error:
            document = self.error_message(error.status, error.envelope()["error"])
            await self.send_json(_with_stream_id(document, stream_id))

    def _job(self, body: dict[str, Any], stream_id: str | None) -> Any:
        if body.pop("background", None):
            raise invalid(
                "background", "background is not supported over WebSocket.", "unsupported"
            )
        body.pop("stream", None)  # always
        generate = body.pop("generate", None)
        if generate is not None and not isinstance(generate, bool):
            raise invalid("generate", "generate must be true or false.", "invalid_type")
        run = self._warm_up if generate is False else self._respond
        return functools.partial(self._run, run, body, stream_id)

    async def _run(self, run: Any, body: dict[str, Any], stream_id: str | None) -> None:
        previous_id = body.get("previous_response_id")
        turn = next(
            (turn for turn in self._turns.values() if turn.response_id == previous_id), None
        )
        items = body.get("input")
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        conversation: list[dict[str, Any]] = []
        if isinstance(items, list) and all(isinstance(item, dict) for item in items):
            conversation = [complete_item(item) for item in items]
            if turn is not None and not turn.is_stored:
                conversation = [*turn.items, *conversation]
                body["input"] = conversation
                del body["previous_response_id"]
        try:
            await run(_ResponseRequest(body, conversation, previous_id, stream_id))
        except RequestFailedError as failure:
            # A client whose turn has failed begins a new chain.
            for lane in [lane for lane, kept in self._turns.items() if kept is turn]:
                del self._turns[lane]
            error = failure.error
            if error.get("param") == "previous_response_id":
                error["code"] = "previous_response_not_found"
            document = self.error_message(failure.status, error)
            await self.send_json(_with_stream_id(document, stream_id))

    async def _respond(self, request: _ResponseRequest) -> None:
        all_events = self.events(RESPONSES_SOCKET, {**request.body, "stream": True})
        async with contextlib.aclosing(all_events) as events:
            async for data in events:
                if data == DONE:
                    continue
                event = _socket_event(msgspec.json.decode(data))
                response = event.get("response")
                if response is not None:
                    response["previous_response_id"] = request.previous_id
                    if event["type"] in _ENDS:
                        items = [*request.conversation, *response["output"]]
                        self._keep(request.stream_id, response, items)
                await self.send_json(_with_stream_id(event, request.stream_id))

    async def _warm_up(self, request: _ResponseRequest) -> None:
        """Compute a prompt, so that it is in the prefix cache, and drop the answer's one token."""
        body = {**request.body, "max_output_tokens": 1, "store": False}
        response = await self.answer(RESPONSES_SOCKET, body)
        response |= {
            "previous_response_id": request.previous_id,
            "output": [],
            "status": "completed",
            "incomplete_details": None,
            "max_output_tokens": request.body.get("max_output_tokens"),
        }
        if "previous_response_id" not in request.body:
            self._keep(request.stream_id, response, request.conversation)
        started = {**response, "status": "in_progress", "usage": None}
        for number, (kind, document) in enumerate(
            (("response.created", started), ("response.completed", response))
        ):
            event = {"type": kind, "sequence_number": number, "response": document}
            await self.send_json(_with_stream_id(event, request.stream_id))

    def _keep(
        self, lane: str | None, response: dict[str, Any], items: list[dict[str, Any]]
    ) -> None:
        """Keep the last response of a lane, and drop the oldest ones that are too much."""
        is_stored = bool(response.get("store"))
        kept = [] if is_stored else items
        size = len(msgspec.json.encode(kept))
        self._turns.pop(lane, None)
        self._turns[lane] = _Turn(response["id"], kept, size, is_stored)
        while sum(turn.size for turn in self._turns.values()) > MAX_HISTORY_BYTES:
            del self._turns[next(iter(self._turns))]


def _socket_event(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event of a stream over HTTP as it is over a socket.

    Raises RequestFailedError for an error that has no type: a router sends it when a model cannot
    be loaded after keep-alive comments have begun the stream.
    """
    if "type" not in event:
        raise RequestFailedError(503, event["error"])
    if event["type"] != "error":
        return event
    # Other servers, which may be tiers of a route, can leave fields out.
    error = {name: event.get(name) for name in ("message", "code", "param")}
    return {
        "type": "error",
        "sequence_number": event.get("sequence_number"),
        "error": event.get("error") or {"type": "server_error", **error},
    }


def _with_stream_id(event: dict[str, Any], stream_id: str | None) -> dict[str, Any]:
    return event if stream_id is None else {**event, "stream_id": stream_id}
