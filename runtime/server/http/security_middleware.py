"""What every request passes before its route: its id, header size, Host, Origin, key, limits."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.runtime.server.http import request_ids
from llmkit.runtime.server.http.api_keys import Admission, Client, find_client
from llmkit.runtime.server.http.assets import PAGE_PATHS
from llmkit.runtime.server.http.hosts import AllowedHosts, name_without_port
from llmkit.runtime.server.http.http_errors import ApiError, is_anthropic
from llmkit.runtime.server.http.origins import (
    AllowedOrigins,
    Headers,
    is_preflight,
    own_origins,
    preflight_headers,
    value_that_allows,
)

MAX_HEADER_BYTES = 64 * 1024
# What load balancers and containers ask, by any name of the machine. The answers hold no secret.
_PROBE_PATHS = frozenset({"/health", "/ready", "/v2/health/live", "/v2/health/ready"})
# Paths that need no API key.
OPEN_PATHS = _PROBE_PATHS | PAGE_PATHS
_ANTHROPIC_ID_HEADER = b"request-id"  # where Anthropic's clients look for the request's id


class SecurityMiddleware:
    """ASGI middleware that answers 431, 403, 401, and 429 for a key's limits.

    Host and Origin: see `AllowedHosts` and `AllowedOrigins`. Health checks may have any Host. A
    key's limits count its POST requests only: other requests are cheap and report the server's
    state. HEAD is answered as GET is, without the body.

    A route finds in its scope "llmkit.cache_salt", which keeps the prefix caches of keys apart,
    "llmkit.admission", the request's Admission (None unless it is a POST), and
    "llmkit.request_id". The last is also the request's only `x-request-id` header there, so that
    it is forwarded.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        clients: Sequence[Client],
        debug: bool,
        open_metrics: bool = False,
        allowed_hosts: Sequence[str] = (),
        allowed_origins: Sequence[str] = (),
    ) -> None:
        """Check requests to `app`, which listens on `host`.

        clients: whose keys are accepted; empty: no key is needed. debug: log each request to
        stderr. open_metrics: /metrics needs no key. allowed_hosts, allowed_origins: accepted
        besides the server's own; see ServeOptions.
        """
        self._app = app
        self._open_paths = OPEN_PATHS | {"/metrics"} if open_metrics else OPEN_PATHS
        self._hosts = AllowedHosts(host, allowed_hosts)
        self._origins = AllowedOrigins(allowed_origins)
        self._clients = clients
        self._anonymous = Client()
        self._debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_ids.request_id(scope["headers"])
        if self._debug:
            send = _with_log(scope, request_id, send)
        response_headers: Headers = [(request_ids.HEADER, request_id), *self._origins.vary]
        if is_anthropic(scope["path"]):
            response_headers.append((_ANTHROPIC_ID_HEADER, request_id))
        send = _with_headers(response_headers, send)
        # A copy: the HTTP server looks at its own, which may say HEAD.
        scope = dict(scope)
        headers = dict(scope["headers"])
        try:
            cors_headers = self._check_source(scope, headers)
            response_headers += cors_headers
            if cors_headers and is_preflight(scope["method"], headers):
                response_headers += preflight_headers(headers)
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
            admission = self._admit(scope, headers)
        except ApiError as error:
            await send_error(error, send, scope["path"])
            return
        scope["llmkit.request_id"] = request_id.decode()
        scope["headers"] = [
            *(pair for pair in scope["headers"] if pair[0] != request_ids.HEADER),
            (request_ids.HEADER, request_id),
        ]
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
            send = _without_body(send)
        try:
            await self._app(scope, receive, send)
        finally:
            if admission is not None:
                admission.client.release(admission)

    def _check_source(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Headers:
        """Check the headers' size, Host and Origin. Raises ApiError for a request that is refused.

        Returns the CORS headers of the response. There are none for the server's own page.
        """
        pairs: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) for name, value in pairs) > MAX_HEADER_BYTES:
            raise headers_too_large()
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if scope["path"] not in _PROBE_PATHS and not self._hosts.accepts(host):
            raise ApiError(
                403,
                f"The Host header {host!r} does not name this server. If it should, start the "
                f"server with --allowed-hosts {name_without_port(host) or 'NAME'}.",
                code="foreign_host",
            )
        if b"origin" not in headers:
            return []
        origin = headers[b"origin"].decode("latin-1")
        cors_headers = self._origins.cors_headers(origin)
        if cors_headers is not None:
            return cors_headers
        if origin.lower() in own_origins(host):
            return []
        raise ApiError(
            403,
            f"Requests from web pages of another origin ({origin!r}) are refused. To allow them, "
            f"start the server with --allowed-origins {value_that_allows(origin)}.",
            code="foreign_origin",
        )

    def _admit(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Admission | None:
        """Check the key and its limits. Raises ApiError for a request that is refused."""
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


def _with_headers(headers: Headers, send: Send) -> Send:
    """Return `send` that adds `headers` to the response, in place of any of the same names."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in headers}
            others = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
            message = {**message, "headers": [*others, *headers]}
        await send(message)

    return send_with_headers


def _without_body(send: Send) -> Send:
    """Return `send` that completes the response to a HEAD with its headers.

    The client may send its next request as soon as it has them.
    """

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b""})

    return send_headers


def _with_log(scope: Scope, request_id: bytes, send: Send) -> Send:
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
            sys.stderr.write(
                f"{scope['method']} {scope['path']!r} {status} {elapsed_ms:.1f} ms "
                f"{request_id.decode()}\n"
            )

    return logging_send
