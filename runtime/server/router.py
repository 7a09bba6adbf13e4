"""Several models behind one port: each request goes to the server of the model that it names, which is loaded for it.

Requests and answers pass unchanged. The client's key, Host and Origin are checked here and again by the model's server,
which keeps prefixes apart by key as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import aiohttp
import msgspec
from fastapi import Request, Response
from pydantic import ConfigDict
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from llmkit.checkpoint.errors import LlmkitError
from llmkit.checkpoint.version import version
from llmkit.runtime.server.app import new_app
from llmkit.runtime.server.assets import page_routes
from llmkit.runtime.server.body import read_json_body
from llmkit.runtime.server.errors import ApiError, unknown_model
from llmkit.runtime.server.fleet import Fleet, Model
from llmkit.runtime.server.guard import Guard
from llmkit.runtime.server.keys import Client
from llmkit.runtime.server.metrics import CONTENT_TYPE
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.protocol import Body, parse
from llmkit.runtime.server.router_metrics import merged
from llmkit.runtime.server.shapes import event
from llmkit.runtime.server.state import SamplingDefaults

# What a single model's server answers to by the body's `model`.
BY_BODY = (
    "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/tokenize", "/detokenize",
)  # fmt: skip
_BY_PATH = "/v2/models/{rest:path}"  # a name may have slashes
_BINARY_KINDS = frozenset({"", "application/json", "application/octet-stream"})  # of the bodies there
# Headers of one connection, and those that the other one's client sets itself.
_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect content-length".split()
)
_SCRAPE_S = 5.0


class Named(Body):
    """Any request's body; its model's server looks at the rest."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Router:
    """One method per route."""

    def __init__(self, fleet: Fleet, options: ServeOptions) -> None:
        self.fleet, self._options = fleet, options
        self.draining = False
        self._created = int(time.time())
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def app(self, clients: Sequence[Client]) -> ASGIApp:
        """The ASGI application; with `clients` every route but health needs a key of one of them."""
        app = new_app()
        for path in BY_BODY:
            app.add_api_route(path, self.by_body, methods=["POST"], response_model=None)
        plain: dict[str, Callable[..., Awaitable[Response]]] = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/health": self.health,
            "/ready": self.ready,
            "/v2/health/live": self.health,
            "/v2/health/ready": self.ready,
            "/v2/models/{name:path}/ready": self.model_ready,
            "/metrics": self.metrics,
            "/version": self.version,
            "/info": self.info,
        }
        for path, endpoint in (plain | page_routes()).items():
            app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_api_route(_BY_PATH, self.by_path, methods=["GET", "POST"], response_model=None)

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            self._active += 1
            self._idle.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._active -= 1
                if not self._active:
                    self._idle.set()

        return Guard(counted, self._options.host, clients, self._options.debug, self._options.open_metrics)

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def health(self) -> Response:
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        self._check_ready()
        return _json({"status": "ok"})

    async def version(self) -> Response:
        return _json({"version": version()})

    async def info(self) -> Response:
        models = [self._entry(model) for model in self.fleet.models.values()]
        return _json({"model": None, "models": models, "defaults": vars(SamplingDefaults()), "version": version()})

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._entry(model) for model in self.fleet.models.values()]})

    async def model(self, name: str) -> Response:
        return _json(self._entry(self._find(name)))

    async def model_ready(self, name: str) -> Response:
        """Whether a model is loaded; asking does not load it."""
        if self._find(name).state == "loaded" and not self.draining:
            return _json({"status": "ok"})
        raise ApiError(503, f"The model {name!r} is not loaded.", code="not_loaded")

    async def metrics(self, request: Request) -> Response:
        """Those of every model that is loaded, with its name as a label, and of the fleet itself."""

        async def scrape(model: Model) -> tuple[str, str]:
            with contextlib.suppress(LlmkitError, aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(_SCRAPE_S), _ask(model.server, request, "/metrics", None) as answer:
                    if answer.status == 200:
                        return model.name, await answer.text()
            return model.name, ""

        texts = dict(await asyncio.gather(*map(scrape, self.fleet.loaded)))
        return Response(merged(list(self.fleet.models.values()), texts), media_type=CONTENT_TYPE)

    async def by_body(self, request: Request) -> Response:
        self._check_ready()
        options = self._options
        data = await read_json_body(request, options.max_body_bytes, options.body_timeout)
        return self._forward(request, parse(Named, data).model, data)

    async def by_path(self, request: Request, rest: str) -> Response:
        self._check_ready()
        ends = [place for place, letter in enumerate(rest + "/") if letter == "/"]
        name = next((rest[:end] for end in reversed(ends) if rest[:end] in self.fleet.models), rest)
        self._find(name)
        data, options = None, self._options
        if request.method == "POST":
            data = await read_json_body(request, options.max_body_bytes, options.body_timeout, _BINARY_KINDS)
        return self._forward(request, name, data)

    def _forward(self, request: Request, name: str, data: bytes | None) -> Response:
        model = self._find(name)
        self._check_ready()  # reading the body took a while
        if self.fleet.waiting >= self._options.max_waiting:
            message = f"{self.fleet.waiting} requests wait for their models. Try again later."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
        return Forwarded(self.fleet, model, request, data)

    def _check_ready(self) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="draining", headers={"retry-after": "1"})

    def _find(self, name: str) -> Model:
        if (model := self.fleet.models.get(name)) is None:
            raise unknown_model(name, self.fleet.models)
        return model

    def _entry(self, model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "llmkit",
            "max_model_len": model.facts.get("max_model_len"),
            "root": model.reference,
            "parent": None,
            "state": model.state,
        }


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
        except aiohttp.ClientConnectorError:  # it has ended since it was used last, which nobody knew yet
            await self._fleet.settled(self._model, server)
            async with self._fleet.use(self._model) as server:
                await self._pass_on(server, send)

    async def _pass_on(self, server: Any, send: Send) -> None:
        path = _target(self._request)
        async with _ask(server, self._request, path, self._data) as answer:
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
async def _ask(server: Any, request: Request, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
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


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
