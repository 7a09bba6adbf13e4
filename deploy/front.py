"""What every request to `llmkit deploy ray` passes: it finds the model's replicas and streams what one answers.

Runs as a Serve deployment of its own. Each version of a model is a Serve application behind it. Which there are, and
their shares of the traffic, one more application knows, which the fronts ask: a change restarts none of them. In an
application out of a file the versions are deployments of the front's own application, and the table is its user_config.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator
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

from llmkit.deploy.table import Routes, Table, Version
from llmkit.runtime.server.http.body import read_json_body
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.http.guard import Guard, send_error
from llmkit.runtime.server.http.keys import api_keys
from llmkit.runtime.server.options import ServeOptions

ATTEMPTS = 3  # while nothing of an answer was sent, another replica can give it
FOLLOW_S = 0.5  # between two looks at the Routes
PREFIX_CHARS = 256
_MAX_BODY_BYTES = 8 * 1024 * 1024
_BODY_TIMEOUT_S = 30.0
HOP_HEADERS = frozenset({"connection", "content-length", "transfer-encoding", "host", "date", "server"})
_OPEN_PATHS = ("/health", "/ready")


class Head(msgspec.Struct, frozen=True):
    """How a replica's answer begins."""

    status: int
    headers: list[tuple[str, str]]


class Keeper:
    """The Serve deployment that keeps the Routes. Another one takes its place where they change."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    async def routes(self) -> dict[str, Any]:
        """The Routes, as builtins."""
        builtins: dict[str, Any] = msgspec.to_builtins(self._routes)
        return builtins


class Front:
    """The Serve deployment.

    host, key_file: see Routes. keeper: the application whose Routes it follows; "" where its user_config is the table,
    and `replicas` has those of each version.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, host: str, key_file: str | None, keeper: str, replicas: dict[str, DeploymentHandle]
    ) -> None:
        keys = api_keys(ServeOptions("", api_key_file=Path(key_file))) if key_file else ()
        self._guard = Guard(self._answer, host, keys, debug=False)
        self._table: Table = {}
        self._replicas = replicas
        self._handles: dict[str, DeploymentHandle] = {}
        self._began = int(time.time())
        if keeper:
            handle = serve.get_app_handle(keeper)
            await self._look(handle)
            self._following = asyncio.create_task(self._follow(handle))

    async def _follow(self, keeper: DeploymentHandle) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            with suppress(RayError, RayServeException):  # another one comes
                await self._look(keeper)

    async def _look(self, keeper: DeploymentHandle) -> None:
        self._table = msgspec.convert(await keeper.routes.remote(), Routes).models

    def reconfigure(self, table: dict[str, Any]) -> None:
        """Take a Table, as builtins: the user_config. Serve calls it before any request and with each change."""
        self._table = msgspec.convert(table, Table)

    async def table(self) -> dict[str, Any]:
        """The Table, as builtins."""
        builtins: dict[str, Any] = msgspec.to_builtins(self._table)
        return builtins

    async def __call__(self, request: Request) -> Response:
        """What Serve sends as the answer."""
        return _Application(self._guard)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if request.url.path in _OPEN_PATHS:
                await Response(status_code=200 if self._table else 503)(scope, receive, send)
            elif request.url.path == "/v1/models":
                await Response(self._models(), media_type="application/json")(scope, receive, send)
            elif request.url.path == "/metrics":
                raise ApiError(
                    404, "Metrics of the replicas are among those of Ray, as ray_llmkit_...", code="not_found"
                )
            else:
                await self._forward(request, send)
        except ApiError as error:
            await send_error(error, send, scope["path"])

    def _models(self) -> bytes:
        data = [{"id": name, "object": "model", "created": self._began, "owned_by": "llmkit"} for name in self._table]
        return msgspec.json.encode({"object": "list", "data": data})

    async def _forward(self, request: Request, send: Send) -> None:
        body = b""
        fields: dict[str, Any] = {}
        if request.method == "POST":
            body = await read_json_body(request, _MAX_BODY_BYTES, _BODY_TIMEOUT_S)
            fields = _fields(body)
        handle = self._handle(self._version(fields.get("model")).app)
        url = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_HEADERS]
        begun = False
        async with aclosing(_attempts(handle, request.method, url, headers, body, prefix_names(fields))) as parts:
            try:
                async for part in parts:
                    if isinstance(part, Head):
                        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in part.headers]
                        await send({"type": "http.response.start", "status": part.status, "headers": raw})
                        begun = True
                    else:
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            except (RayError, RayServeException):
                error = ApiError(503, "The replica that answered is gone.", code="replica_lost")
                if not begun:
                    raise error from None
                await send(
                    {"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n", "more_body": True}
                )
        await send({"type": "http.response.body", "body": b""})

    def _version(self, model: object) -> Version:
        """Of the model that a request names, one by their shares; without a name, of the only one there is."""
        if not self._table:
            raise ApiError(503, "No model is deployed.", code="loading", headers={"retry-after": "1"})
        if model is None and len(self._table) == 1:
            model = next(iter(self._table))
        versions = self._table.get(model) if isinstance(model, str) else None
        if versions is None:
            known = ", ".join(self._table)
            raise ApiError(
                404, f"There is no model {model!r}. There are: {known}.", code="model_not_found", param="model"
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
) -> AsyncGenerator[Head | bytes]:
    """What a replica answers; another one's answer where the first was lost before it began."""
    for attempt in range(ATTEMPTS):
        answer = handle.remote(method, url, headers, body, prefixes=prefixes)
        begun = False
        try:
            async for part in answer:
                begun = True
                yield part
            return
        except (RayError, RayServeException):
            if begun or attempt == ATTEMPTS - 1:
                raise
        finally:
            answer.cancel()  # without effect on one that is complete


def prefix_names(fields: dict[str, Any]) -> list[int]:
    """A name for each PREFIX_CHARS characters of what a request begins with: it stands for all text up to its end.

    Every front has the same name for the same text.
    """
    prompt = fields.get("messages") or fields.get("prompt") or fields.get("input") or ""
    text = json.dumps(
        [fields.get("model"), fields.get("system") or fields.get("instructions"), fields.get("tools"), prompt]
    )
    read, names = blake2b(digest_size=8), []
    for start in range(0, len(text) - PREFIX_CHARS + 1, PREFIX_CHARS):
        read.update(text[start : start + PREFIX_CHARS].encode())
        names.append(int.from_bytes(read.copy().digest()))
    return names


def _fields(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; what is none is the replica's to refuse."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return fields if isinstance(fields, dict) else {}


class _Application(Response):
    """A response that an ASGI application makes."""

    def __init__(self, application: Guard) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._application(scope, receive, send)
