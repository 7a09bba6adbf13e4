"""The ingress of `llmkit deploy ray`: chooses a model's version and streams a replica's response.

The ingress and the controller are Serve deployments. Each version of a model is a Serve application
behind the ingress. The ingress replicas poll the controller for the rollout table, so that a change
restarts none of them. With a Serve config file the versions are deployments of the ingress's own
application, and the table is its user_config.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmkit.deploy.rollout_table import RolloutTable, Routes, Version
from llmkit.runtime.server.http.api_keys import load_api_keys
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.request_body import read_json_body
from llmkit.runtime.server.http.security_middleware import SecurityMiddleware, send_error
from llmkit.runtime.server.serve_options import ServeOptions

# How many replicas a request is tried on, as long as no part of a response was sent.
MAX_ATTEMPTS = 3
# Seconds between two requests for the Routes.
POLL_INTERVAL_S = 0.5
# Characters of a prompt for each hash of its prefix.
PREFIX_CHARS = 256
_MAX_BODY_BYTES = 8 * 1024 * 1024
_BODY_TIMEOUT_S = 30.0
HOP_HEADERS = frozenset(
    {"connection", "content-length", "transfer-encoding", "host", "date", "server"}
)
# Of a request. The ingress checks where it comes from; a replica knows no such origin.
_NOT_FORWARDED = HOP_HEADERS | {"origin"}
_OPEN_PATHS = ("/health", "/ready")


class ResponseHead(msgspec.Struct, frozen=True):
    """The status and headers of a replica's response."""

    status: int
    headers: list[tuple[str, str]]


class Controller:
    """The Serve deployment that holds the Routes. It is deployed again when they change."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    async def routes(self) -> dict[str, Any]:
        """The Routes, as builtins."""
        builtins: dict[str, Any] = msgspec.to_builtins(self._routes)
        return builtins


class Ingress:
    """The Serve deployment that all requests go through.

    host, key_file, allowed_hosts, allowed_origins: see Routes. controller: the application whose
    Routes it polls; "" when its user_config is the table, and `replicas` has the handle of each
    version.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        host: str,
        key_file: str | None,
        controller: str,
        replicas: dict[str, DeploymentHandle],
        allowed_hosts: Sequence[str],
        allowed_origins: Sequence[str],
    ) -> None:
        keys = load_api_keys(ServeOptions("", api_key_file=Path(key_file))) if key_file else ()
        self._security = SecurityMiddleware(
            self._answer,
            host,
            keys,
            debug=False,
            allowed_hosts=allowed_hosts,
            allowed_origins=allowed_origins,
        )
        self._table: RolloutTable = {}
        self._replicas = replicas
        self._handles: dict[str, DeploymentHandle] = {}
        self._started_at = int(time.time())
        if controller:
            handle = serve.get_app_handle(controller)
            await self._refresh(handle)
            self._polling = asyncio.create_task(self._poll(handle))

    async def _poll(self, controller: DeploymentHandle) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            # The controller may be restarting: the old table holds until the next time.
            with suppress(RayError, RayServeException):
                await self._refresh(controller)

    async def _refresh(self, controller: DeploymentHandle) -> None:
        self._table = msgspec.convert(await controller.routes.remote(), Routes).models

    def reconfigure(self, table: dict[str, Any]) -> None:
        """Set the rollout table from the user_config. Serve calls it before any request and after
        each change.
        """
        self._table = msgspec.convert(table, RolloutTable)

    async def table(self) -> dict[str, Any]:
        """The rollout table, as builtins."""
        builtins: dict[str, Any] = msgspec.to_builtins(self._table)
        return builtins

    async def __call__(self, request: Request) -> Response:
        """The response that Serve sends."""
        return _Application(self._security)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if request.url.path in _OPEN_PATHS:
                await Response(status_code=200 if self._table else 503)(scope, receive, send)
            elif request.url.path == "/v1/models":
                await Response(self._models(), media_type="application/json")(scope, receive, send)
            elif request.url.path == "/metrics":
                raise ApiError(
                    404,
                    "Metrics of the replicas are among those of Ray, as ray_llmkit_...",
                    code="not_found",
                )
            else:
                await self._forward(request, send)
        except ApiError as error:
            await send_error(error, send, scope["path"])

    def _models(self) -> bytes:
        data = [
            {"id": name, "object": "model", "created": self._started_at, "owned_by": "llmkit"}
            for name in self._table
        ]
        return msgspec.json.encode({"object": "list", "data": data})

    async def _forward(self, request: Request, send: Send) -> None:
        body = b""
        fields: dict[str, Any] = {}
        if request.method == "POST":
            body = await read_json_body(request, _MAX_BODY_BYTES, _BODY_TIMEOUT_S)
            fields = _fields(body)
        handle = self._handle(self._version(fields.get("model")).app)
        url = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [
            (name, value) for name, value in request.headers.items() if name not in _NOT_FORWARDED
        ]
        started = False
        async with aclosing(
            _attempts(handle, request.method, url, headers, body, prefix_hashes(fields))
        ) as parts:
            try:
                async for part in parts:
                    if isinstance(part, ResponseHead):
                        raw = [
                            (name.encode("latin-1"), value.encode("latin-1"))
                            for name, value in part.headers
                        ]
                        await send(
                            {"type": "http.response.start", "status": part.status, "headers": raw}
                        )
                        started = True
                    else:
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            except (RayError, RayServeException):
                error = ApiError(503, "The replica that answered is gone.", code="replica_lost")
                if not started:
                    raise error from None
                await send(
                    {
                        "type": "http.response.body",
                        "body": b"data: " + error.body() + b"\n\n",
                        "more_body": True,
                    }
                )
        await send({"type": "http.response.body", "body": b""})

    def _version(self, model: object) -> Version:
        """A version of the requested model, drawn by the shares. No name is the only model's."""
        if not self._table:
            raise ApiError(
                503, "No model is deployed.", code="loading", headers={"retry-after": "1"}
            )
        known = ", ".join(self._table)
        if model in (None, ""):
            if len(self._table) > 1:
                raise ApiError(
                    400,
                    f"model is missing. Name one of {known}.",
                    code="missing_required_parameter",
                    param="model",
                )
            model = next(iter(self._table))
        versions = self._table.get(model) if isinstance(model, str) else None
        if versions is None:
            raise ApiError(
                404,
                f"There is no model {model!r}. There are: {known}.",
                code="model_not_found",
                param="model",
            )
        return random.choices(versions, [version.share for version in versions])[0]  # noqa: S311

    def _handle(self, app: str) -> DeploymentHandle:
        if app not in self._handles:
            handle = self._replicas.get(app) or serve.get_app_handle(app)
            self._handles[app] = handle.options(stream=True, method_name="answer")
        return self._handles[app]


async def _attempts(
    handle: DeploymentHandle,
    method: str,
    url: str,
    headers: list[tuple[str, str]],
    body: bytes,
    prefixes: list[int],
) -> AsyncGenerator[ResponseHead | bytes]:
    """The parts of a replica's response.

    When a replica is lost before its response starts, the request is tried on another one.
    """
    for attempt in range(MAX_ATTEMPTS):
        response = handle.remote(method, url, headers, body, prefixes=prefixes)
        started = False
        try:
            async for part in response:
                started = True
                yield part
            return
        except (RayError, RayServeException):
            if started or attempt == MAX_ATTEMPTS - 1:
                raise
        finally:
            # This has no effect on a complete response.
            response.cancel()


def prefix_hashes(fields: dict[str, Any]) -> list[int]:
    """Hashes of a request's prefixes, the shortest first. Lengths are multiples of PREFIX_CHARS.

    All ingress replicas compute the same hash for the same text.
    """
    prompt = fields.get("messages") or fields.get("prompt") or fields.get("input") or ""
    text = json.dumps(
        [
            fields.get("model"),
            fields.get("system") or fields.get("instructions"),
            fields.get("tools"),
            prompt,
        ]
    )
    digest = blake2b(digest_size=8)
    hashes = []
    for start in range(0, len(text) - PREFIX_CHARS + 1, PREFIX_CHARS):
        digest.update(text[start : start + PREFIX_CHARS].encode())
        hashes.append(int.from_bytes(digest.copy().digest()))
    return hashes


def _fields(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; empty for any other body, which the replica then refuses."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return fields if isinstance(fields, dict) else {}


class _Application(Response):
    """A Starlette response that calls an ASGI application."""

    def __init__(self, application: SecurityMiddleware) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._application(scope, receive, send)
