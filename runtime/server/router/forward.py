"""Forwarding one request to a model's server, and streaming its response back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import aiohttp
import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.http.http_errors import ApiError, is_anthropic
from llmkit.runtime.server.responses.response_builder import (
    END_OF_COMMENTS,
    KEEP_ALIVE_COMMENT,
    sse_event,
)
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
    """The response of a model's server. The model is loaded first, if needed.

    A stream gets keep-alive comments while it waits for the load. The status 200 is sent with the
    first one, so a later error is an event.
    """

    def __init__(
        self,
        pool: ModelPool,
        model: PooledModel,
        request: Request,
        data: bytes | None,
        keep_alive_s: float | None,
    ) -> None:
        """data: the body of `request`; None for GET.

        keep_alive_s: the interval of comments; None: the response is not a stream.
        """
        self._pool = pool
        self._model = model
        self._request = request
        self._data = data
        self._keep_alive_s = keep_alive_s
        # What the client has begun to receive.
        self._started: Literal["", "full", "events"] = ""
        self._has_answer = False  # the server's response has begun
        self._end_of_comments = b""  # sent before the next part of the body
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
            not_loaded = ApiError(503, message, code="model_failed", headers={"retry-after": "10"})
            await self._send_error(not_loaded, scope["path"], send)
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
            async with self._acquire(send) as server:
                await self._forward(server, send)
        except aiohttp.ClientConnectionError:
            # The server has ended, and the pool has not noticed yet. A new one can answer.
            if self._has_answer:
                raise
            await self._pool.wait_until_removed(self._model, server)
            async with self._acquire(send) as server:
                await self._forward(server, send)

    @contextlib.asynccontextmanager
    async def _acquire(self, send: Send) -> AsyncIterator[Any]:
        """Yield the model's server, as the pool's `acquire` does. Send comments meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            acquired = self._pool.acquire(self._model)
            acquiring = asyncio.ensure_future(stack.enter_async_context(acquired))
            try:
                while not (await asyncio.wait((acquiring,), timeout=self._keep_alive_s))[0]:
                    await self._send_comment(send)
            finally:
                acquiring.cancel()  # has no effect when it is done
                await asyncio.wait((acquiring,))
            yield acquiring.result()

    async def _send_comment(self, send: Send) -> None:
        if not self._started:
            self._started = "events"
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": KEEP_ALIVE_COMMENT, "more_body": True})
        self._end_of_comments = END_OF_COMMENTS

    async def _forward(self, server: Any, send: Send) -> None:
        path = _path_and_query(self._request)
        async with upstream_request(server, self._request, path, self._data) as response:
            is_stream = response.content_type == "text/event-stream"
            if self._started:  # with comments, so the status of an error cannot be sent any more
                await self._forward_events(response, is_stream, send)
                return
            headers = [
                (name.lower(), value)
                for name, value in response.raw_headers
                if name.lower() == b"content-length" or name.lower() not in _NOT_FORWARDED
            ]
            await send(
                {"type": "http.response.start", "status": response.status, "headers": headers}
            )
            self._started = "events" if is_stream else "full"
            await self._forward_body(response, send)

    async def _forward_body(self, response: aiohttp.ClientResponse, send: Send) -> None:
        self._has_answer = True
        async for chunk in response.content.iter_any():
            body = self._end_of_comments + chunk
            self._end_of_comments = b""
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _forward_events(
        self, response: aiohttp.ClientResponse, is_stream: bool, send: Send
    ) -> None:
        """Continue a stream that has begun with comments."""
        if is_stream:
            await self._forward_body(response, send)
            return
        error = await response.read()
        self._has_answer = True
        await self._send_last_event(error, self._request.scope["path"], send)

    async def _send_error(self, error: ApiError, path: str, send: Send) -> None:
        if not self._started:
            raise error
        if self._started == "events":
            await self._send_last_event(error.body(path), path, send)
        # Otherwise the connection closes before the declared length, so the client sees that the
        # response is incomplete.

    async def _send_last_event(self, error: bytes, path: str, send: Send) -> None:
        """End a stream with `error`, the JSON that `path` answers with."""
        name = "error" if is_anthropic(path) else None
        event = self._end_of_comments + sse_event(msgspec.Raw(error), name)
        await send({"type": "http.response.body", "body": event, "more_body": False})


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
