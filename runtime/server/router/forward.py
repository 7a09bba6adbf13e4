"""Forwarding one request to a model's server, and streaming its response back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import aiohttp
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.responses.response_builder import sse_event
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel

# Headers of one connection only, and headers that aiohttp or the HTTP server sets itself.
_NOT_FORWARDED = frozenset(
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


class ForwardedResponse(Response):
    """The response of a model's server. The model is loaded first, if needed."""

    def __init__(
        self, pool: ModelPool, model: PooledModel, request: Request, data: bytes | None
    ) -> None:
        """data: the body of `request`; None for GET."""
        self._pool = pool
        self._model = model
        self._request = request
        self._data = data
        # What the client has begun to receive.
        self._started: Literal["", "full", "events"] = ""
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
        work = asyncio.ensure_future(self._respond(send))
        try:
            await asyncio.wait((disconnect, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except (aiohttp.ClientError, OSError) as error:
            server_ended = ApiError(
                503,
                f"The server of {self._model.name!r} has ended ({type(error).__name__}).",
                code="lost",
            )
            await self._send_error(server_ended, scope["path"], send)
        except LlmkitError as error:
            message = f"The model {self._model.name!r} could not be loaded: {error}"
            raise ApiError(
                503, message, code="model_failed", headers={"retry-after": "10"}
            ) from None
        finally:
            disconnect.cancel()
            # When the client has disconnected, this closes the connection to the model's server,
            # which then cancels the request.
            work.cancel()
            with contextlib.suppress(BaseException):
                await work

    async def _respond(self, send: Send) -> None:
        server = None
        try:
            async with self._pool.acquire(self._model) as server:
                await self._forward(server, send)
        except aiohttp.ClientConnectionError:
            # The server has ended, and the pool has not noticed yet. A new one can answer.
            if self._started:
                raise
            await self._pool.wait_until_removed(self._model, server)
            async with self._pool.acquire(self._model) as server:
                await self._forward(server, send)

    async def _forward(self, server: Any, send: Send) -> None:
        path = _path_and_query(self._request)
        async with upstream_request(server, self._request, path, self._data) as response:
            is_stream = response.content_type == "text/event-stream"
            headers = [
                (name.lower(), value)
                for name, value in response.raw_headers
                if name.lower() == b"content-length" or name.lower() not in _NOT_FORWARDED
            ]
            await send(
                {"type": "http.response.start", "status": response.status, "headers": headers}
            )
            self._started = "events" if is_stream else "full"
            async for chunk in response.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, error: ApiError, path: str, send: Send) -> None:
        if not self._started:
            raise error
        if self._started == "events":
            anthropic = path.startswith("/v1/messages")
            event = sse_event(error.envelope(anthropic), "error" if anthropic else None)
            await send({"type": "http.response.body", "body": event, "more_body": False})
        # Otherwise the connection closes before the declared length, so the client sees that the
        # response is incomplete.


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _path_and_query(request: Request) -> str:
    """Return the path and the query exactly as the client sent them."""
    raw_path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    target = raw_path.partition(b"?")[0]
    if query:
        target += b"?" + query
    return target.decode("latin-1")


@contextlib.asynccontextmanager
async def upstream_request(
    server: Any, request: Request, path: str, data: bytes | None
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Yield a response of a model's server, to a request with the headers of `request`.

    data: the body of a POST; None for a GET.
    """
    headers = [
        (name.decode("latin-1"), value.decode("utf-8", "replace"))
        for name, value in request.scope["headers"]
        if name not in _NOT_FORWARDED
    ]
    no_default_headers: Mapping[str, Any] = {
        "skip_auto_headers": ("user-agent", "accept", "accept-encoding", "content-type")
    }
    # Each request has its own connection, which closes when the client disconnects. A reused
    # connection could turn out to be closed already.
    connector = aiohttp.UnixConnector(server.socket_path, limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False
    ) as session:
        method = "GET" if data is None else "POST"
        url = URL(server.url + path, encoded=True)
        async with session.request(
            method, url, data=data, headers=headers, allow_redirects=False, **no_default_headers
        ) as response:
            yield response
