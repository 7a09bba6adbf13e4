"""One request passed on to a model's server, and its answer passed back as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import aiohttp
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from llmkit.checkpoint.errors import LlmkitError
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.router.fleet import Fleet, Model
from llmkit.runtime.server.shapes.openai import event

# Headers of one connection, and those that the other one's client sets itself.
_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect content-length".split()
)


class Forwarded(Response):
    """The answer of a model's server, as it comes. The model is loaded first, where it is not."""

    def __init__(self, fleet: Fleet, model: Model, request: Request, data: bytes | None) -> None:
        self._fleet, self._model, self._request, self._data = fleet, model, request, data
        self._started: Literal["", "whole", "events"] = ""
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(_left(receive))
        work = asyncio.ensure_future(self._answer(send))
        try:
            await asyncio.wait((left, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except (aiohttp.ClientError, OSError) as error:
            lost = ApiError(503, f"The server of {self._model.name!r} has ended ({type(error).__name__}).", code="lost")
            await self._fail(lost, scope["path"], send)
        except LlmkitError as error:
            message = f"The model {self._model.name!r} could not be loaded: {error}"
            raise ApiError(503, message, code="model_failed", headers={"retry-after": "10"}) from None
        finally:
            left.cancel()
            work.cancel()  # the client is gone: so is the connection to the model's server, which then stops
            with contextlib.suppress(BaseException):
                await work

    async def _answer(self, send: Send) -> None:
        server = None
        try:
            async with self._fleet.use(self._model) as server:
                await self._pass_on(server, send)
        except aiohttp.ClientConnectionError:  # it has ended, which nobody knew yet: another one can give the answer
            if self._started:
                raise
            await self._fleet.settled(self._model, server)
            async with self._fleet.use(self._model) as server:
                await self._pass_on(server, send)

    async def _pass_on(self, server: Any, send: Send) -> None:
        path = _target(self._request)
        async with ask(server, self._request, path, self._data) as answer:
            events = answer.content_type == "text/event-stream"
            headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in _HOP - {b"content-length"}]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            self._started = "events" if events else "whole"
            async for chunk in answer.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, error: ApiError, path: str, send: Send) -> None:
        if not self._started:
            raise error
        if self._started == "events":
            anthropic = path.startswith("/v1/messages")
            said = event(error.envelope(anthropic), "error" if anthropic else None)
            await send({"type": "http.response.body", "body": said, "more_body": False})
        # Else the client sees that the answer is cut: the connection is closed before its length is reached.


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _target(request: Request) -> str:
    """The path and the query as the client sent them."""
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    return (raw.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")


@contextlib.asynccontextmanager
async def ask(server: Any, request: Request, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
    """A request to a model's server with the headers of a client's, as it came."""
    headers = [
        (name.decode("latin-1"), value.decode("utf-8", "replace"))
        for name, value in request.scope["headers"]
        if name not in _HOP
    ]
    skip: Mapping[str, Any] = {"skip_auto_headers": ("user-agent", "accept", "accept-encoding", "content-type")}
    # A connection for each request: it is closed when the client goes away, and none is found dead.
    connector = aiohttp.UnixConnector(server.unix, limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        method = "GET" if data is None else "POST"
        url = URL(server.url + path, encoded=True)
        async with session.request(method, url, data=data, headers=headers, allow_redirects=False, **skip) as answer:
            yield answer
