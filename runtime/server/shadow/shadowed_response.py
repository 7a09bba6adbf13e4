"""A response whose request may be copied to a shadow once the client has the answer."""

from __future__ import annotations

import time

from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from llmkit.runtime.server.http import request_ids
from llmkit.runtime.server.shadow.shadow_queue import Copied, ShadowQueue

_LAST_EVENT = b"data: [DONE]\n\n"
_STREAM_TYPE = b"text/event-stream"


class ShadowedResponse(Response):
    """Sends what another response sends, unchanged, and keeps a copy of it."""

    def __init__(
        self, response: Response, queue: ShadowQueue, request: Request, data: bytes
    ) -> None:
        """data: the body of `request`."""
        self._response = response
        self._queue = queue
        self._path = request.scope["path"]
        self._request_id = request.headers.get(request_ids.HEADER.decode(), "")
        self._data = data
        self._start_s = time.perf_counter()
        # What was sent so far; None: there is no room for a copy, or nothing to compare.
        self._chunks: list[bytes] | None = []
        self._num_bytes = 0  # taken from the queue's budget
        self._is_stream = False
        self._is_complete = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_keep(message: Message) -> None:
            await send(message)
            self._keep(message)

        self._take(len(self._data))
        try:
            await self._response(scope, receive, send_and_keep)
        finally:
            self._queue_copy()

    def _keep(self, message: Message) -> None:
        if self._chunks is None:
            return
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._is_stream = headers.get(b"content-type", b"").startswith(_STREAM_TYPE)
            if message["status"] != 200 or b"content-encoding" in headers:
                self._forget()
                self._queue.skip()
        elif message["type"] == "http.response.body":
            chunk = message.get("body", b"")
            # A client may go when it has read the last event, before the end of the response.
            is_last_event = self._is_stream and chunk.endswith(_LAST_EVENT)
            self._is_complete = is_last_event or not message.get("more_body", False)
            if self._take(len(chunk)):
                self._chunks.append(chunk)

    def _take(self, num_bytes: int) -> bool:
        """Reserve memory for a part of the copy; without it the copy is dropped."""
        if self._queue.budget.take(num_bytes):
            self._num_bytes += num_bytes
            return True
        self._forget()
        self._queue.drop()
        return False

    def _forget(self) -> None:
        self._chunks = None
        self._queue.budget.give_back(self._num_bytes)
        self._num_bytes = 0

    def _queue_copy(self) -> None:
        """Queue the copy of a complete answer. The client may have gone before its end."""
        if self._chunks is None:
            return
        if not self._is_complete:
            self._forget()
            self._queue.skip()
            return
        self._queue.add(
            Copied(
                self._path,
                self._request_id,
                self._data,
                b"".join(self._chunks),
                self._is_stream,
                time.perf_counter() - self._start_s,
            )
        )
