"""Several models behind one port: each request goes to the server of the model that it names.

Requests and responses are forwarded unchanged. The API key, Host and Origin are checked here, and
again by the model's server, which keeps the prefix caches of keys apart.
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

from llmkit.common.errors import LlmkitError
from llmkit.common.version import version
from llmkit.runtime.server.app import new_app
from llmkit.runtime.server.http.api_keys import Client
from llmkit.runtime.server.http.assets import page_routes
from llmkit.runtime.server.http.http_errors import ApiError, unknown_model
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.http.security_middleware import SecurityMiddleware
from llmkit.runtime.server.kserve.kserve_response import VERSION
from llmkit.runtime.server.openapi import REQUEST_SCHEMAS, openapi
from llmkit.runtime.server.router.forward import ForwardedResponse, upstream_request
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.router.router_metrics import merge_metrics
from llmkit.runtime.server.schemas.base_request import BaseRequest, parse_request
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_metrics import CONTENT_TYPE
from llmkit.runtime.server.server_state import SamplingDefaults

# Routes whose body has the model's name.
ROUTED_BY_BODY = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
_STREAMING_PATHS = frozenset(
    path for path in ROUTED_BY_BODY if "stream" in REQUEST_SCHEMAS[path].model_fields
)
# Routes whose path has the model's name, which may contain slashes.
_ROUTED_BY_PATH = "/v2/models/{rest:path}"
_KSERVE_MEDIA_TYPES = frozenset({"", "application/json", "application/octet-stream"})
_SCRAPE_TIMEOUT_S = 5.0


class RoutedRequest(BaseRequest):
    """What the router needs of a request's body. The model's server checks all fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    stream: Any = None


class Router:
    """One method per route."""

    def __init__(self, pool: ModelPool, options: ServeOptions) -> None:
        self.pool = pool
        self.draining = False  # set by the lifecycle at the first signal
        self._options = options
        self._created = int(time.time())
        self._num_active = 0  # requests without a complete response
        self._idle = asyncio.Event()  # set while there are none
        self._idle.set()

    def app(self, clients: Sequence[Client]) -> ASGIApp:
        """Return the ASGI application.

        With `clients`, every route except the health checks and the web page needs an API key of
        one of them.
        """
        app = new_app()

        async def openapi_endpoint() -> Response:
            document = openapi(app.routes, bool(clients), self._options.strict_fields)
            return _json_response(document)

        for path in ROUTED_BY_BODY:
            app.add_api_route(path, self.by_body, methods=["POST"], response_model=None)
        get_routes: dict[str, Callable[..., Awaitable[Response]]] = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/health": self.health,
            "/ready": self.ready,
            "/v2/health/live": self.health,
            "/v2/health/ready": self.ready,
            "/v2/models/{rest:path}/ready": self.model_ready,
            "/v2/models/{rest:path}/stats": self.model_stats,
            "/tokenizer_info": self.tokenizer_info,
            "/metrics": self.metrics,
            "/version": self.version,
            "/info": self.info,
            "/openapi.json": openapi_endpoint,
        }
        for path, endpoint in (get_routes | page_routes()).items():
            app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_api_route(
            _ROUTED_BY_PATH, self.by_path, methods=["GET", "POST"], response_model=None
        )

        async def tracked_app(scope: Scope, receive: Receive, send: Send) -> None:
            self._num_active += 1
            self._idle.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._num_active -= 1
                if not self._num_active:
                    self._idle.set()

        options = self._options
        return SecurityMiddleware(
            tracked_app,
            options.host,
            clients,
            options.debug,
            options.open_metrics,
            options.allowed_hosts,
            options.allowed_origins,
        )

    @property
    def num_active_requests(self) -> int:
        """HTTP requests without a complete response."""
        return self._num_active

    async def wait_until_idle(self) -> None:
        """Wait until every response is complete."""
        await self._idle.wait()

    async def health(self) -> Response:
        return _json_response({"status": "ok"})

    async def ready(self) -> Response:
        self._check_ready()
        return _json_response({"status": "ok"})

    async def version(self) -> Response:
        return _json_response({"version": version()})

    async def info(self) -> Response:
        return _json_response(
            {
                "model": None,
                "models": self._model_entries(),
                "defaults": vars(SamplingDefaults()),
                "version": version(),
            }
        )

    async def models(self) -> Response:
        return _json_response({"object": "list", "data": self._model_entries()})

    async def model(self, name: str) -> Response:
        return _json_response(self._model_entry(self._find(name)))

    async def model_ready(self, rest: str) -> Response:
        """Report whether a model is loaded. This does not load it."""
        self._find_loaded(rest)
        return _json_response({"status": "ok"})

    async def model_stats(self, request: Request, rest: str) -> Response:
        """Forward a request for a loaded model's statistics. This does not load it."""
        return self._forward(request, self._find_loaded(rest).name, None)

    async def tokenizer_info(self, request: Request, model: str = "") -> Response:
        """Forward the request to the model that the query names."""
        self._check_ready()
        return self._forward(request, self._named_or_only(model), None)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics of every loaded model, with its name as a label, and of the pool."""

        async def scrape(model: PooledModel) -> tuple[str, str]:
            with contextlib.suppress(LlmkitError, aiohttp.ClientError, OSError, TimeoutError):
                async with (
                    asyncio.timeout(_SCRAPE_TIMEOUT_S),
                    upstream_request(model.server, request, "/metrics", None) as response,
                ):
                    if response.status == 200:
                        return model.name, await response.text()
            return model.name, ""

        texts = dict(await asyncio.gather(*map(scrape, self.pool.loaded)))
        merged = merge_metrics(list(self.pool.models.values()), texts)
        return Response(merged, media_type=CONTENT_TYPE)

    async def by_body(self, request: Request) -> Response:
        """Forward a request to the model that its body names."""
        self._check_ready()
        options = self._options
        data = await read_json_body(request, options.max_body_bytes, options.body_timeout)
        body = parse_request(RoutedRequest, data)
        streams = body.stream is True and request.scope["path"] in _STREAMING_PATHS
        return self._forward(request, self._named_or_only(body.model), data, streams)

    async def by_path(self, request: Request, rest: str) -> Response:
        """Forward a request to the model that its path names."""
        self._check_ready()
        name = self._name_in_path(rest)
        self._find(name)
        data = None
        options = self._options
        if request.method == "POST":
            data = await read_json_body(
                request, options.max_body_bytes, options.body_timeout, _KSERVE_MEDIA_TYPES
            )
        return self._forward(request, name, data, streams=rest.endswith("/generate_stream"))

    def _named_or_only(self, name: str) -> str:
        """Return `name`; if it is empty, the name of the only model."""
        if not name and len(self.pool.models) > 1:
            raise ApiError(
                400,
                f"model is missing. Name one of {', '.join(self.pool.models)}.",
                code="missing_required_parameter",
                param="model",
            )
        return name or next(iter(self.pool.models))

    def _find_loaded(self, rest: str) -> PooledModel:
        """Return the loaded model of a path, NAME or NAME/versions/1."""
        name = self._name_in_path(rest)
        model = self._find(name)
        version = rest[len(name) :]
        if version not in ("", f"/versions/{VERSION}"):
            message = f"The model {name!r} has no {version[1:]!r}; its version is {VERSION}."
            raise ApiError(404, message, code="model_not_found", param="version")
        if model.state != "loaded" or self.draining:
            raise ApiError(503, f"The model {name!r} is not loaded.", code="not_loaded")
        return model

    def _name_in_path(self, rest: str) -> str:
        """Return the longest prefix of whole path segments that is a model's name, else `rest`."""
        segments = rest.split("/")
        for count in range(len(segments), 0, -1):
            name = "/".join(segments[:count])
            if name in self.pool.models:
                return name
        return rest

    def _forward(
        self, request: Request, name: str, data: bytes | None, streams: bool = False
    ) -> Response:
        model = self._find(name)
        self._check_ready()  # again: draining may have begun while the body was read
        num_waiting = self.pool.num_waiting
        if num_waiting >= self._options.max_waiting:
            message = f"{num_waiting} requests wait for their models. Try again later."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
        keep_alive_s = self._options.stream_keep_alive if streams else None
        return ForwardedResponse(self.pool, model, request, data, keep_alive_s)

    def _check_ready(self) -> None:
        if self.draining:
            raise ApiError(
                503, "The server is shutting down.", code="draining", headers={"retry-after": "1"}
            )

    def _find(self, name: str) -> PooledModel:
        model = self.pool.models.get(name)
        if model is None:
            raise unknown_model(name, self.pool.models)
        return model

    def _model_entries(self) -> list[dict[str, Any]]:
        return [self._model_entry(model) for model in self.pool.models.values()]

    def _model_entry(self, model: PooledModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "llmkit",
            "max_model_len": model.info.get("max_model_len"),
            "root": model.reference,
            "parent": None,
            "state": model.state,
        }


def _json_response(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
