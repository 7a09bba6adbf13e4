"""One route that answers by another route of the same application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.runtime.server.http.request_body import JSON_MEDIA_TYPE

Headers = Sequence[tuple[bytes, bytes]]

# What Starlette and FastAPI put into a scope about the route that they found.
_ROUTING_KEYS = frozenset({"app", "endpoint", "path_params", "route", "router"})
_FASTAPI_PREFIX = "fastapi_"


class InnerResponse(Response):
    """The response of the application's route `path` to a POST of `data`, which is JSON.

    The request was checked already: it does not pass the security middleware again.
    """

    def __init__(
        self, app: ASGIApp, request: Request, path: str, data: bytes, headers: Headers = ()
    ) -> None:
        """app: with the routes only. request: whose headers are sent. headers: of the response."""
        self._app = app
        self._request = request
        self._path = path
        self._data = data
        self._more_headers = headers
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = [self._data]

        async def receive_data() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._more_headers]}
            await send(message)

        await self._app(self._inner_scope(), receive_data, send_with_headers)

    def _inner_scope(self) -> dict[str, Any]:
        scope = {
            key: value
            for key, value in self._request.scope.items()
            if key not in _ROUTING_KEYS and not key.startswith(_FASTAPI_PREFIX)
        }
        own_headers = [
            (b"content-type", JSON_MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % len(self._data)),
        ]
        names = {name for name, _ in own_headers}
        others = [pair for pair in scope["headers"] if pair[0] not in names]
        return scope | {
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [*others, *own_headers],
        }
