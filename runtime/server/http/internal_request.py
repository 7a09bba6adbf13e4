"""A request to the ASGI application from within the process, with all checks and limits of HTTP."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[bytes, bytes]]


class InternalRequest:
    """One request and its response, as an asynchronous context.

    Leaving the context early cancels the request, as if the client had disconnected.

    status: of the response, once the context is entered.
    """

    status = 500

    def __init__(
        self, app: ASGIApp, method: str, path: str, headers: Headers, body: bytes = b""
    ) -> None:
        self._app = app
        own_headers = (
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        )
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(errors="replace"),
            "root_path": "",
            "query_string": b"",
            "headers": [*own_headers, *headers],
            "client": None,
            "server": None,
            "state": {},
        }
        self._unread_body = [body]
        self._disconnected = asyncio.Event()
        # Holds one message: the application waits until it is read. None: the response has ended.
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(1)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> InternalRequest:
        self._task = asyncio.create_task(self._run())
        try:
            start = await self._messages.get()
        except BaseException:
            # A context that was not entered is not left, either.
            await self._end(self._task)
            raise
        if start is not None:
            self.status = start["status"]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        await self._end(self._task)

    async def _end(self, task: asyncio.Task[None]) -> None:
        self._disconnected.set()
        task.cancel()
        # The application may go on after the cancellation: it must not wait for a reader.
        if not self._messages.empty():
            self._messages.get_nowait()
        await asyncio.wait([task])

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the parts of the response's body as they arrive."""
        while True:
            message = await self._messages.get()
            if message is None:
                return
            chunk = message.get("body", b"")
            if chunk:
                yield chunk
            if not message.get("more_body"):
                return

    async def read(self) -> bytes:
        """Return the complete body of the response."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except Exception as error:  # the application has sent the 500, or the body is cut off
            traceback.print_exception(error, file=sys.stderr)
        await self._send(None)

    async def _send(self, message: Message | None) -> None:
        """Pass on a message of the application; after the end, drop it."""
        if not self._disconnected.is_set():
            await self._messages.put(message)

    async def _receive(self) -> Message:
        if self._unread_body:
            return {"type": "http.request", "body": self._unread_body.pop(), "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}
