"""Writes parts of a streamed body straight to the connection.

As ASGI messages, the parts would pass a dozen functions each: one of every middleware that looks at
the first or the last message of a response. None changes what is between them.
"""

from __future__ import annotations

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_KEY = "llmkit.body_writer"


class BodyWriter:
    """The body of one response, between its first and its last ASGI message."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow

    @classmethod
    def of(cls, scope: Scope) -> BodyWriter | None:
        """The writer of the response to a request; None where only ASGI messages can be sent."""
        writer: BodyWriter | None = scope.get(_KEY)
        return writer

    def offer(self, scope: Scope) -> None:
        """Let the application that gets `scope` find this writer."""
        scope[_KEY] = self

    async def drain(self) -> None:
        """Wait until the client has read, or is gone."""
        await self._flow.drain()

    def write(self, part: bytes) -> bool:
        """Write a part of the body, which is not empty, in the response's transfer encoding.

        Nothing is written when the client is gone. Returns False when the client does not read:
        `drain` must be awaited.
        """
        cycle = self._cycle
        if not cycle.disconnected:  # otherwise uvicorn has not even sent the headers
            assert cycle.response_started, "the headers come before the body"
            if cycle.chunked_encoding:
                part = b"%x\r\n%b\r\n" % (len(part), part)
            cycle.transport.write(part)
        return not self._flow.write_paused


def without_body_writer(scope: Scope) -> None:
    """Leave only ASGI messages to the application that gets `scope`."""
    scope.pop(_KEY, None)
