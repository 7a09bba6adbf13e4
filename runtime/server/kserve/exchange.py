"""A request to our own application from within the process: it passes what one over HTTP passes, limits and all."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[bytes, bytes]]


class Exchange:
    """One request and its answer, as an asynchronous context; leaving it early is the client going away.

    status: of the answer, once the context is entered.
    """

    status = 500

    def __init__(self, app: ASGIApp, method: str, path: str, headers: Headers, body: bytes = b"") -> None:
        self._app = app
        own = ((b"host", b"localhost"), (b"content-type", b"application/json"))
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
            "headers": [*own, (b"content-length", b"%d" % len(body)), *headers],
            "client": None,
            "server": None,
            "state": {},
        }
        self._unread = [body]
        self._gone = asyncio.Event()
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue(1)  # the application waits for who reads it
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Exchange:
        self._task = asyncio.create_task(self._run())
        start = await self._sent.get()
        if start is not None:
            self.status = start["status"]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._gone.set()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body of the answer, as it comes."""
        while (message := await self._sent.get()) is not None:
            if chunk := message.get("body", b""):
                yield chunk
            if not message.get("more_body"):
                return

    async def whole(self) -> bytes:
        """The whole body of the answer."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._sent.put)
        except Exception as error:  # it has been answered, but for the body of what had begun
            traceback.print_exception(error, file=sys.stderr)
        await self._sent.put(None)

    async def _receive(self) -> Message:
        if self._unread:
            return {"type": "http.request", "body": self._unread.pop(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}
