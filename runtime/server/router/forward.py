"""Forwarding one request to a model's server, and streaming its response back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any

import aiohttp
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.router.background_work import has_background_work
from llmkit.runtime.server.router.client_stream import (
    CONNECTION_HEADERS,
    ClientStream,
    UpstreamAnswer,
)
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.tiers.confidence import GATE_HEADER

# Orders to a model's server, which clients may not give.
_ORDERS = frozenset({GATE_HEADER.encode()})


class ForwardedResponse(Response):
    """The response of a model's server. The model is loaded first, if needed."""

    def __init__(
        self,
        pool: ModelPool,
        model: PooledModel,
        request: Request,
        data: bytes | None,
        keep_alive_s: float | None,
        idle_s: float | None = None,
        starts_background: bool = False,
    ) -> None:
        """data: the body of `request`; None for GET.

        keep_alive_s: see `ClientStream`. idle_s: see `ModelPool.acquire`. starts_background: work
        goes on after the response.
        """
        self._pool = pool
        self._model = model
        self._request = request
        self._data = data
        self._keep_alive_s = keep_alive_s
        self._idle_s = idle_s
        self._starts_background = starts_background
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientStream(send, scope["path"], self._keep_alive_s)
        try:
            await until_disconnect(self._respond(client), receive)
        except (aiohttp.ClientError, OSError) as error:
            await client.send_error(server_ended(self._model.name, error))
        except LlmkitError as error:
            await client.send_error(not_loaded(self._model.name, error))

    async def _respond(self, client: ClientStream) -> None:
        server = None
        try:
            async with self._acquire(client) as server:
                await self._forward(server, client)
        except aiohttp.ClientConnectionError:
            # The server has ended, and the pool has not noticed yet. A new one can answer.
            if client.has_answer:
                raise
            await self._pool.wait_until_removed(self._model, server)
            async with self._acquire(client) as server:
                await self._forward(server, client)

    @contextlib.asynccontextmanager
    async def _acquire(self, client: ClientStream) -> AsyncIterator[Any]:
        """Yield the model's server, as the pool's `acquire` does. Send comments meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            acquired = self._pool.acquire(self._model, self._idle_s)
            yield await client.wait(stack.enter_async_context(acquired))

    async def _forward(self, server: Any, client: ClientStream) -> None:
        path = path_and_query(self._request)
        async with upstream_request(server, self._request, path, self._data) as response:
            if self._starts_background and response.status == 200:
                self._pool.keep_loaded(self._model, has_background_work)
            await client.forward(UpstreamAnswer.of(response))


def server_ended(name: str, error: Exception) -> ApiError:
    """The 503 for a model whose server has ended."""
    message = f"The server of {name!r} has ended ({type(error).__name__})."
    return ApiError(503, message, code="lost")


def not_loaded(name: str, error: LlmkitError) -> ApiError:
    """The 503 for a model that could not be loaded."""
    message = f"The model {name!r} could not be loaded: {error}"
    return ApiError(503, message, code="model_failed", headers={"retry-after": "10"})


async def until_disconnect(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, and cancel it when the client disconnects.

    That closes the connection to the model's server, which then cancels the request.
    """
    disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((disconnect, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        disconnect.cancel()
        task.cancel()
        with contextlib.suppress(BaseException):
            await task


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def path_and_query(request: Request) -> str:
    """Return the path and the query exactly as the client sent them."""
    raw_path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    target = raw_path.partition(b"?")[0]
    if query:
        target += b"?" + query
    return target.decode("latin-1")


@contextlib.asynccontextmanager
async def upstream_request(
    server: Any,
    request: Request,
    path: str,
    data: bytes | None,
    orders: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Yield a response of a model's server, to a request with the headers of `request`.

    data: the body of a POST; None for a GET. orders: more headers, which clients may not send.
    """
    headers = [
        (name.decode("latin-1"), value.decode("utf-8", "replace"))
        for name, value in request.scope["headers"]
        if name not in CONNECTION_HEADERS and name not in _ORDERS
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
        method = "POST"
        if data is None:
            method = "DELETE" if request.method == "DELETE" else "GET"
        url = URL(server.url + path, encoded=True)
        async with session.request(
            method,
            url,
            data=data,
            headers=[*headers, *orders],
            allow_redirects=False,
            **no_default_headers,
        ) as response:
            yield response
