"""Several models behind one port: each request goes to the server of the model that it names.

Requests and responses are forwarded unchanged. The API key, Host and Origin are checked here, and
again by the model's server, which keeps the prefix caches of keys apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llmkit.common.errors import LlmkitError
from llmkit.common.version import version
from llmkit.runtime.server.app import new_app
from llmkit.runtime.server.http.api_keys import Client
from llmkit.runtime.server.http.assets import page_routes
from llmkit.runtime.server.http.http_errors import (
    TGI_PATHS,
    ApiError,
    unknown_model,
)
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.http.security_middleware import SecurityMiddleware
from llmkit.runtime.server.kserve.kserve_response import VERSION
from llmkit.runtime.server.ollama.keep_alive import keep_alive_seconds
from llmkit.runtime.server.ollama.ollama_response import empty_response
from llmkit.runtime.server.ollama.ollama_routes import ollama_version
from llmkit.runtime.server.openapi import REQUEST_SCHEMAS, openapi
from llmkit.runtime.server.refused_routes import add_refused_routes
from llmkit.runtime.server.router.background_work import starts_background
from llmkit.runtime.server.router.forward import (
    ForwardedResponse,
    path_and_query,
    upstream_request,
)
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.router.ollama_models import running_models, show_model, tags
from llmkit.runtime.server.router.routed_request import (
    RoutedOllamaRequest,
    media_types,
    routed_schema,
)
from llmkit.runtime.server.router.router_metrics import merge_metrics
from llmkit.runtime.server.sagemaker.invocations import add_invocation_routes
from llmkit.runtime.server.sagemaker.multi_model_routes import MultiModelRoutes
from llmkit.runtime.server.schemas.base_request import parse_request
from llmkit.runtime.server.score_routes import SCORE_PATHS
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.server_metrics import CONTENT_TYPE
from llmkit.runtime.server.server_state import SamplingDefaults
from llmkit.runtime.server.shadow.shadow_answer import PATHS as SHADOWED_PATHS
from llmkit.runtime.server.shadow.shadow_options import ShadowOptions
from llmkit.runtime.server.shadow.shadow_queue import Shadows
from llmkit.runtime.server.shadow.shadowed_response import ShadowedResponse
from llmkit.runtime.server.stored_responses.response_routes import (
    CANCEL_PATH,
    INPUT_ITEMS_PATH,
    RESPONSE_PATH,
    response_not_found,
)
from llmkit.runtime.server.stored_responses.response_store import model_hash, model_hash_in
from llmkit.runtime.server.tiers.named_routes import NamedRoutes
from llmkit.runtime.server.tiers.routed_response import RoutedResponse
from llmkit.runtime.server.tiers.tier import TierRequest
from llmkit.runtime.server.websockets.open_sockets import OpenSockets

# Routes whose body has the model's name.
ROUTED_BY_BODY = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    *SCORE_PATHS,
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
    *sorted(TGI_PATHS),
)
_STREAMING_PATHS = frozenset(
    path for path in ROUTED_BY_BODY if "stream" in REQUEST_SCHEMAS[path].model_fields
)
# Routes whose path has the model's name, which may contain slashes.
_ROUTED_BY_PATH = "/v2/models/{rest:path}"
_KSERVE_MEDIA_TYPES = frozenset({"", "application/json", "application/octet-stream"})
_SCRAPE_TIMEOUT_S = 5.0


class Router:
    """One method per route."""

    def __init__(
        self,
        pool: ModelPool,
        options: ServeOptions,
        routes: NamedRoutes | None = None,
        shadows: Shadows | None = None,
        new_model: Callable[[str, str], PooledModel] | None = None,
    ) -> None:
        """routes: names that several models or a URL answer, beside the pool's models.

        shadows: models that get copies of requests. new_model: of a name and a folder, for a pool
        whose models SageMaker loads.
        """
        self.pool = pool
        self.routes = routes or NamedRoutes({}, {}, pool)
        self.shadows = shadows or Shadows(ShadowOptions(), {}, pool)
        self.draining = False  # set by the lifecycle at the first signal
        self._options = options
        self._new_model = new_model
        self._created = int(time.time())
        self._open_sockets = OpenSockets()
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
            "/api/tags": self.ollama_tags,
            "/api/ps": self.ollama_ps,
            "/api/version": ollama_version,
            "/openapi.json": openapi_endpoint,
        }
        for path, endpoint in (get_routes | page_routes()).items():
            app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_api_route(
            _ROUTED_BY_PATH, self.by_path, methods=["GET", "POST"], response_model=None
        )
        for path, methods in (
            (RESPONSE_PATH, ["GET", "DELETE"]),
            (CANCEL_PATH, ["POST"]),
            (INPUT_ITEMS_PATH, ["GET"]),
        ):
            app.add_api_route(path, self.by_response_id, methods=methods, response_model=None)
        add_refused_routes(app)
        add_invocation_routes(app, self._options, self.ready)
        if self._new_model is not None:
            MultiModelRoutes(app, self._options, self.pool, self._new_model).add_to_app()

        async def tracked_app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "websocket":
                await self._open_sockets.serve(scope, receive, send)
                return
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
        """Wait until every response is complete, and all background responses too."""
        await self._idle.wait()
        await self.pool.wait_until_done()

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
        if name in self.routes:
            return _json_response(self._route_entry(name))
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
        models = list(self.pool.models.values())
        merged = merge_metrics(models, texts, self._open_sockets.count)
        own = self.routes.metrics.render() + self.shadows.metrics.render()
        return Response(merged + own, media_type=CONTENT_TYPE)

    async def by_body(self, request: Request) -> Response:
        """Forward a request to the model that its body names."""
        self._check_ready()
        options = self._options
        path = request.scope["path"]
        data = await read_json_body(
            request, options.max_body_bytes, options.body_timeout, media_types(path)
        )
        body = parse_request(routed_schema(path), data)
        name = self._named_or_only(body.model_name(self.pool.models))
        if isinstance(body, RoutedOllamaRequest):
            return self._ollama(request, name, body, data)
        response = self._respond(request, path, name, data, body.stream is True)
        queue = self.shadows.queue_of(name) if path in SHADOWED_PATHS else None
        return response if queue is None else ShadowedResponse(response, queue, request, data)

    def _respond(
        self, request: Request, path: str, name: str, data: bytes, wants_stream: bool
    ) -> Response:
        """The response of the model or of the route `name`."""
        generates = path in _STREAMING_PATHS
        streams = (wants_stream and generates) or path == "/generate_stream"
        if name in self.routes and path not in TGI_PATHS:
            return self._route(request, name, data, streams, generates)
        background = path == "/v1/responses" and starts_background(path, json.loads(data))
        return self._forward(request, name, data, streams, background=background)

    def _ollama(
        self, request: Request, name: str, body: RoutedOllamaRequest, data: bytes
    ) -> Response:
        """The response to a request of Ollama's API, whose `keep_alive` unloads models."""
        path = request.scope["path"]
        model = self._find(name)
        if path == "/api/show" and model.facts is not None:
            return _json_response(show_model(model))
        idle_s = keep_alive_seconds(body.keep_alive)
        if idle_s == 0 and body.is_empty:
            self.pool.unload_when_idle(model)
            return _json_response(empty_response(path, body.model or name, "unload"))
        # Lines of JSON have no keep-alive comments.
        return self._forward(request, name, data, idle_s=idle_s)

    async def ollama_tags(self) -> Response:
        return _json_response({"models": tags(self.pool.models.values(), self._created)})

    async def ollama_ps(self) -> Response:
        return _json_response({"models": running_models(self.pool, self._created)})

    def _route(
        self, request: Request, name: str, data: bytes, streams: bool, generates: bool
    ) -> Response:
        """The response of a route's tiers."""
        self._check_ready()  # again: draining may have begun while the body was read
        self._check_waiting()
        asked = TierRequest(request, path_and_query(request), json.loads(data), streams)
        keep_alive_s = self._options.stream_keep_alive if streams else None
        key_name = request.scope["llmkit.admission"].client.name
        return RoutedResponse(self.routes[name], asked, key_name, generates, keep_alive_s)

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

    async def by_response_id(self, request: Request, response_id: str) -> Response:
        """Forward a request to the model whose response it is about."""
        self._check_ready()
        hashed = model_hash_in(response_id)
        for name in self.pool.models:
            if model_hash(name) == hashed:
                data = b"" if request.method == "POST" else None
                return self._forward(request, name, data)
        raise response_not_found(response_id)

    def _named_or_only(self, name: str) -> str:
        """Return `name`; if it is empty, the name of the only model."""
        known = [*self.pool.models, *self.routes.names]
        if not name and len(known) != 1:
            hint = f"Name one of {', '.join(known)}" if known else "No model is loaded"
            raise ApiError(
                400,
                f"model is missing. {hint}.",
                code="missing_required_parameter",
                param="model",
            )
        return name or known[0]

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
            if name in self.pool.models or name in self.routes:
                return name
        return rest

    def _forward(
        self,
        request: Request,
        name: str,
        data: bytes | None,
        streams: bool = False,
        idle_s: float | None = None,
        background: bool = False,
    ) -> Response:
        """Forward a request. idle_s: see `ModelPool.acquire`. background: its work goes on after
        the response.
        """
        model = self._find(name)
        self._check_ready()  # again: draining may have begun while the body was read
        self._check_waiting()
        keep_alive_s = self._options.stream_keep_alive if streams else None
        return ForwardedResponse(self.pool, model, request, data, keep_alive_s, idle_s, background)

    def _check_waiting(self) -> None:
        num_waiting = self.pool.num_waiting
        if num_waiting >= self._options.max_waiting:
            message = f"{num_waiting} requests wait for their models. Try again later."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})

    def _check_ready(self) -> None:
        if self.draining:
            raise ApiError(
                503, "The server is shutting down.", code="draining", headers={"retry-after": "1"}
            )

    def _find(self, name: str) -> PooledModel:
        model = self.pool.models.get(name)
        if model is None and name in self.routes:
            message = f"{name!r} is a route, and this request needs a model of this server."
            raise ApiError(404, message, code="model_not_found", param="model")
        if model is None:
            raise unknown_model(name, [*self.pool.models, *self.routes.names])
        return model

    def _model_entries(self) -> list[dict[str, Any]]:
        entries = [self._model_entry(model) for model in self.pool.models.values()]
        return entries + [self._route_entry(name) for name in self.routes.names]

    def _route_entry(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "llmkit",
            "max_model_len": None,
            "root": None,
            "parent": None,
            "tiers": [tier.name for tier in self.routes[name].tiers],
        }

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
