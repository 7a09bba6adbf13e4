"""Streams of tokens over a WebSocket: /v1/stream.

A message is the body of a chat completion (it has `messages`) or of a completion (`prompt`). It is
answered by the JSON chunks of the same stream over HTTP, one a message, then by {"type": "done"}.
{"type": "cancel"} ends the running request, which {"type": "cancelled"} confirms.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import msgspec

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.websockets.socket_session import DONE, SocketSession, take_string

_PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


class StreamSocket(SocketSession):
    """The session of one connection. Its requests run one after another."""

    def error_message(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        return {"type": "error", "status": status, "error": error}

    async def handle(self, message: dict[str, Any]) -> None:
        kind = take_string(message, "type")
        if kind == "cancel":
            if self.cancel_running(None):
                await self.send_json({"type": "cancelled"})
            return
        if kind not in (None, "request"):
            raise invalid("type", "type must be request or cancel.", "unsupported")
        paths = [path for name, path in _PATHS.items() if name in message]
        if len(paths) != 1:
            raise invalid("messages", "A request has either messages or a prompt.")
        self.enqueue(None, functools.partial(self._stream, paths[0], message))

    async def _stream(self, path: str, body: dict[str, Any]) -> None:
        async with contextlib.aclosing(self.events(path, {**body, "stream": True})) as events:
            async for data in events:
                if data != DONE:
                    await self.send_json(msgspec.Raw(data))
        await self.send_json({"type": "done"})
