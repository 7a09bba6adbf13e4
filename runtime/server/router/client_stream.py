"""What a client receives from the router: a server's response, keep-alive comments, or an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import aiohttp
import msgspec
from starlette.types import Send

from llmkit.runtime.server.http.http_errors import ApiError, is_anthropic
from llmkit.runtime.server.responses.response_builder import (
    END_OF_COMMENTS,
    KEEP_ALIVE_COMMENT,
    SERVER_SENT_EVENTS,
    STREAM_FORMATS,
    StreamFormat,
)

# Headers of one connection only, and headers that aiohttp or the HTTP server sets itself.
CONNECTION_HEADERS = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
        b"content-length",
        b"date",
    )
)
Result = TypeVar("Result")


@dataclass
class UpstreamAnswer:
    """A server's response whose body has not been read."""

    status: int
    headers: list[tuple[bytes, bytes]]  # for the client; names are in lower case
    stream_format: StreamFormat | None  # None: the body is one document
    chunks: AsyncIterator[bytes]  # the body

    @staticmethod
    def of(response: aiohttp.ClientResponse) -> UpstreamAnswer:
        """The response of a model's server as it is."""
        headers = [
            (name.lower(), value)
            for name, value in response.raw_headers
            if name.lower() == b"content-length" or name.lower() not in CONNECTION_HEADERS
        ]
        stream_format = STREAM_FORMATS.get(response.content_type)
        return UpstreamAnswer(response.status, headers, stream_format, response.content.iter_any())


class ClientStream:
    """The response to one client.

    While it waits, a stream gets keep-alive comments. The status 200 is sent with the first one, so
    a later error is an event.
    """

    def __init__(self, send: Send, path: str, keep_alive_s: float | None) -> None:
        """keep_alive_s: the interval of comments; None: the response is not a stream."""
        self._send = send
        self._path = path
        self._keep_alive_s = keep_alive_s
        # What the client has begun to receive.
        self._started: Literal["", "full", "events"] = ""
        # Of the stream. One that begins with comments can only be of server-sent events.
        self._format = SERVER_SENT_EVENTS
        self._end_of_comments = b""  # sent before the next part of the body
        self.has_answer = False  # a server's response has begun

    async def wait(self, awaitable: Awaitable[Result]) -> Result:
        """Return the result of `awaitable`. Send comments meanwhile."""
        waiting = asyncio.ensure_future(awaitable)
        try:
            while not (await asyncio.wait((waiting,), timeout=self._keep_alive_s))[0]:
                await self.send_comment(KEEP_ALIVE_COMMENT)
        finally:
            waiting.cancel()  # has no effect when it is done
            await asyncio.wait((waiting,))
        return waiting.result()

    async def send_comment(self, comment: bytes) -> None:
        """Send a comment; the first one starts the stream."""
        if not self._started:
            self._started = "events"
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": comment, "more_body": True})
        self._end_of_comments = END_OF_COMMENTS

    async def forward(
        self, answer: UpstreamAnswer, more_headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """Send a server's response. A stream that has begun gets `more_headers` as comments."""
        if self._started:  # with comments, so the status of an error cannot be sent any more
            for name, value in more_headers:
                await self.send_comment(b": " + name + b": " + value + b"\n\n")
            if answer.stream_format is not None:
                await self._forward_body(answer)
            else:
                error = b"".join([chunk async for chunk in answer.chunks])
                self.has_answer = True
                await self._send_last_event(error)
            return
        headers = [*answer.headers, *more_headers]
        await self._send(
            {"type": "http.response.start", "status": answer.status, "headers": headers}
        )
        self._started = "full" if answer.stream_format is None else "events"
        self._format = answer.stream_format or self._format
        await self._forward_body(answer)

    async def send_error(self, error: ApiError) -> None:
        """End the response with `error`, or raise it if nothing has been sent."""
        if not self._started:
            raise error
        if self._started == "events":
            await self._send_last_event(error.body(self._path))
        # Otherwise the connection closes before the declared length, so the client sees that the
        # response is incomplete.

    async def _forward_body(self, answer: UpstreamAnswer) -> None:
        self.has_answer = True
        async for chunk in answer.chunks:
            body = self._end_of_comments + chunk
            self._end_of_comments = b""
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_last_event(self, error: bytes) -> None:
        """End a stream with `error`, JSON in the form of the path's API."""
        name = "error" if is_anthropic(self._path) else None
        event = self._end_of_comments + self._format.event(msgspec.Raw(error), name)
        await self._send({"type": "http.response.body", "body": event, "more_body": False})
