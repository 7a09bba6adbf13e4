"""Several models behind one port: each request goes to the server of the model that it names, which is loaded for it.

Requests and answers pass unchanged. The client's key, Host and Origin are checked here and again by the model's server,
which keeps prefixes apart by key as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from fastapi import Request, Response
from pydantic import ConfigDict
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.checkpoint.errors import LlmkitError
from llmkit.checkpoint.version import version
from llmkit.runtime.server.app import new_app
from llmkit.runtime.server.bodies.base import Body, parse
from llmkit.runtime.server.http.assets import page_routes
from llmkit.runtime.server.http.body import read_json_body
from llmkit.runtime.server.http.errors import ApiError, unknown_model
from llmkit.runtime.server.http.guard import Guard
from llmkit.runtime.server.http.keys import Client
from llmkit.runtime.server.metrics import CONTENT_TYPE
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.router.fleet import Fleet, Model
from llmkit.runtime.server.router.forward import Forwarded, ask
from llmkit.runtime.server.router.metrics import merged
from llmkit.runtime.server.state import SamplingDefaults

# What a single model's server answers to by the body's `model`.
BY_BODY = (
    "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/tokenize", "/detokenize",
)  # fmt: skip
_BY_PATH = "/v2/models/{rest:path}"  # a name may have slashes
_BINARY_KINDS = frozenset({"", "application/json", "application/octet-stream"})  # of the bodies there
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
                async with asyncio.timeout(_SCRAPE_S), ask(model.server, request, "/metrics", None) as answer:
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


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
