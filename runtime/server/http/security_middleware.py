"""Checks of each request before its route: header size, Host, Origin, API key and its limits."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.runtime.server.http.api_keys import Admission, Client, find_client
from llmkit.runtime.server.http.assets import PAGE_PATHS
from llmkit.runtime.server.http.hosts import is_loopback
from llmkit.runtime.server.http.http_errors import ApiError

MAX_HEADER_BYTES = 64 * 1024
# Paths that need no API key.
OPEN_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"}) | PAGE_PATHS
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class SecurityMiddleware:
    """ASGI middleware that answers 431, 403, 401, and 429 for a key's limits.

    A server on a loopback address accepts only loopback names in the Host header. Otherwise a web
    page could let its own name resolve to 127.0.0.1 and use the server. Any port is accepted, so
    that a forwarded port works. Only browsers send an Origin; it must be the server itself. A key's
    limits count its POST requests only: other requests are cheap and report the server's state.

    A route finds in its scope "llmkit.cache_salt", which keeps the prefix caches of keys apart, and
    "llmkit.admission", the request's Admission (None unless it is a POST).
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        clients: Sequence[Client],
        debug: bool,
        open_metrics: bool = False,
    ) -> None:
        """Check requests to `app`, which listens on `host`.

        clients: whose keys are accepted; empty: no key is needed. debug: log each request to
        stderr. open_metrics: /metrics needs no key.
        """
        self._app = app
        self._open_paths = OPEN_PATHS | {"/metrics"} if open_metrics else OPEN_PATHS
        self._allowed_hosts: frozenset[str] | None = None  # None: every Host is accepted
        if is_loopback(host):
            self._allowed_hosts = _LOOPBACK_NAMES | {host.lower(), f"[{host.lower()}]"}
        self._clients = clients
        self._anonymous = Client()
        self._debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._debug:
            send = _with_log(scope, send)
        try:
            admission = self._admit(scope)
        except ApiError as error:
            await send_error(error, send, scope["path"])
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if admission is not None:
                admission.client.release(admission)

    def _admit(self, scope: Scope) -> Admission | None:
        """Check the headers. Raises ApiError for a request that is refused."""
        pairs: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in pairs) > MAX_HEADER_BYTES:
            raise headers_too_large()
        headers = dict(pairs)
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._allowed_hosts is not None and _without_port(host) not in self._allowed_hosts:
            raise ApiError(
                403, f"The Host header {host!r} does not name this server.", code="foreign_host"
            )
        origin = headers.get(b"origin")
        own_origins = (f"http://{host}", f"https://{host}")
        if origin is not None and origin.decode("latin-1").lower() not in own_origins:
            raise ApiError(
                403, "Requests from web pages of another origin are refused.", code="foreign_origin"
            )
        client = self._find_client(
            headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        )
        if self._clients and client is None and scope["path"] not in self._open_paths:
            raise ApiError(
                401,
                "A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        client = client or self._anonymous
        # Each key has its own prefix cache. Otherwise a short response time would show that another
        # client has sent the same prompt.
        scope["llmkit.cache_salt"] = client.digest.hex()
        admission = client.admit() if scope["method"] == "POST" else None
        scope["llmkit.admission"] = admission
        return admission

    def _find_client(self, authorization: bytes, x_api_key: bytes) -> Client | None:
        """Return the client whose key is in OpenAI's header, else in Anthropic's."""
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            key = x_api_key
        return find_client(self._clients, key.strip())


def headers_too_large() -> ApiError:
    """Return the 431."""
    message = f"The headers are larger than the limit of {MAX_HEADER_BYTES} bytes."
    return ApiError(431, message, code="headers_too_large", headers={"connection": "close"})


async def send_error(error: ApiError, send: Send, path: str) -> None:
    """Answer a request to `path` with `error`."""
    body = error.body(path)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    raw_headers = [
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _with_log(scope: Scope, send: Send) -> Send:
    """Return `send` with one line to stderr per complete response. No line has a prompt."""
    start_time = time.perf_counter()
    status = 0

    async def logging_send(message: Message) -> None:
        nonlocal status
        await send(message)
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            elapsed_ms = (time.perf_counter() - start_time) * 1e3
            sys.stderr.write(f"{scope['method']} {scope['path']!r} {status} {elapsed_ms:.1f} ms\n")

    return logging_send
