"""What every request passes before it reaches a route: header size, Host, Origin, API key and its limits."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.runtime.server.http.assets import PAGE_PATHS
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.http.hosts import is_loopback
from llmkit.runtime.server.http.keys import Client, Visit, known_client

MAX_HEADER_BYTES = 64 * 1024
OPEN_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"}) | PAGE_PATHS
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guard:
    """ASGI middleware that answers 431, 403, 401 and a key's 429 itself.

    On a loopback address only loopback names are taken for Host: a web page that has its own name resolve to
    127.0.0.1 would otherwise be able to use the server. Any port will do, so that a forwarded one works. An
    Origin, which only browsers send, must be the server itself. A key's limits are those of its POST requests: others
    cost next to nothing, and tell how the server is.
    """

    def __init__(
        self, app: ASGIApp, host: str, clients: Sequence[Client], debug: bool, open_metrics: bool = False
    ) -> None:
        self._app = app
        self._open = OPEN_PATHS | {"/metrics"} if open_metrics else OPEN_PATHS
        self._hosts = _LOOPBACK_NAMES | {host.lower(), f"[{host.lower()}]"} if is_loopback(host) else None
        self._clients = clients
        self._anyone = Client()
        self._debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._debug:
            send = _logged(scope, send)
        try:
            visit = self._admit(scope)
        except ApiError as error:
            await send_error(error, send, scope["path"])
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if visit is not None:
                visit.client.leave(visit)

    def _admit(self, scope: Scope) -> Visit | None:
        """Raises ApiError for what is to go no further."""
        pairs: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in pairs) > MAX_HEADER_BYTES:
            raise headers_too_large()
        headers = dict(pairs)
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _without_port(host) not in self._hosts:
            raise ApiError(403, f"The Host header {host!r} does not name this server.", code="foreign_host")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "Requests from web pages of another origin are refused.", code="foreign_origin")
        client = self._client(headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))
        if self._clients and client is None and scope["path"] not in self._open:
            raise ApiError(
                401,
                "A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        client = client or self._anyone
        # Prefixes are cached apart for each key: how long an answer takes must not tell what others have asked.
        scope["llmkit.salt"] = client.digest.hex()
        visit = scope["llmkit.visit"] = client.enter() if scope["method"] == "POST" else None
        return visit

    def _client(self, authorization: bytes, plain: bytes) -> Client | None:
        """Whose key one of the headers gives: OpenAI's, else Anthropic's."""
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            given = plain
        return known_client(self._clients, given.strip())


def headers_too_large() -> ApiError:
    """The 431."""
    message = f"The headers are larger than the limit of {MAX_HEADER_BYTES} bytes."
    return ApiError(431, message, code="headers_too_large", headers={"connection": "close"})


async def send_error(error: ApiError, send: Send, path: str) -> None:
    """Answer a request to `path` with `error`."""
    body = error.body(path)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _logged(scope: Scope, send: Send) -> Send:
    """`send` that writes one line to stderr when the answer is complete; a request's text is never logged."""
    began = time.perf_counter()
    status = 0

    async def logging_send(message: Message) -> None:
        nonlocal status
        await send(message)
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            elapsed_ms = (time.perf_counter() - began) * 1e3
            sys.stderr.write(f"{scope['method']} {scope['path']!r} {status} {elapsed_ms:.1f} ms\n")

    return logging_send
