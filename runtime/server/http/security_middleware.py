"""What every request passes before its route: its id, header size, Host, Origin, key, limits."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.runtime.server.http import request_ids
from llmkit.runtime.server.http.api_keys import Admission, Client, find_client
from llmkit.runtime.server.http.assets import PAGE_PATHS
from llmkit.runtime.server.http.body_writer import without_body_writer
from llmkit.runtime.server.http.hosts import AllowedHosts, name_without_port
from llmkit.runtime.server.http.http_errors import ApiError, is_anthropic
from llmkit.runtime.server.http.key_ring import KeyRing
from llmkit.runtime.server.http.origins import (
    AllowedOrigins,
    Headers,
    is_preflight,
    own_origins,
    preflight_headers,
    value_that_allows,
)
from llmkit.runtime.server.http.socket_paths import HTTP_APP, SOCKET_HEADERS, SUBPROTOCOL

MAX_HEADER_BYTES = 64 * 1024
MAX_SOCKETS = 256  # open WebSockets of a key
KEY_SUBPROTOCOL = "openai-insecure-api-key."
# What load balancers and containers ask, by any name of the machine. The answers hold no secret.
_PROBE_PATHS = frozenset({"/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"})
_ANTHROPIC_ID_HEADER = b"request-id"  # where Anthropic's clients look for the request's id


def needs_no_key(method: str, path: str) -> bool:
    """Whether a request needs no API key: it is a health check, or reads the web page.

    A POST to "/" is no page: it generates, in TGI's API.
    """
    return path in _PROBE_PATHS or (path in PAGE_PATHS and method != "POST")


class SecurityMiddleware:
    """ASGI middleware that answers 431, 403, 401, and 429 for a key's limits.

    Host and Origin: see `AllowedHosts` and `AllowedOrigins`. Health checks may have any Host. A
    key's limits count its POST requests only: other requests are cheap and report the server's
    state. HEAD is answered as GET is, without the body.

    A route finds in its scope "llmkit.is_admin", whether it may change the server: always where no
    key is needed. It also finds "llmkit.cache_salt", which keeps the prefix caches of keys apart,
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
        self._open_metrics = open_metrics
        self._hosts = AllowedHosts(host, allowed_hosts)
        self._origins = AllowedOrigins(allowed_origins)
        self._clients = clients
        self._anonymous = Client()
        self._debug = debug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._open_socket(dict(scope), receive, send)
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
            without_body_writer(scope)
        if admission is not None:
            send = _with_charge(admission, send)
        try:
            await self._app(scope, receive, send)
        finally:
            if admission is not None:
                admission.client.release(admission)

    async def _open_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a WebSocket's handshake. A refused one is answered as an HTTP request is.

        A browser cannot send a header with a key, but a subprotocol of KEY_SUBPROTOCOL and the key.
        """
        headers = dict(scope["headers"])
        offered: list[str] = scope["subprotocols"]
        keys = [name for name in offered if name.startswith(KEY_SUBPROTOCOL)]
        if keys and b"authorization" not in headers:
            key = keys[0].removeprefix(KEY_SUBPROTOCOL).encode("latin-1", "replace")
            headers[b"authorization"] = b"Bearer " + key
        try:
            self._check_source(scope, headers)
            client = self._authenticate(headers)
            if client.num_sockets >= MAX_SOCKETS:
                message = f"A key may have {MAX_SOCKETS} open WebSockets."
                raise ApiError(429, message, code="too_many_connections")
        except ApiError as error:
            await send_error(error, send, scope["path"], "websocket.http.response")
            return
        scope[HTTP_APP] = self
        scope[SOCKET_HEADERS] = [
            (name, headers[name]) for name in (b"authorization", b"x-api-key") if name in headers
        ]
        scope[SUBPROTOCOL] = next((name for name in offered if name not in keys), None)
        client.num_sockets += 1
        try:
            await self._app(scope, receive, send)
        finally:
            client.num_sockets -= 1

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
        path = scope["path"]
        is_open = needs_no_key(scope["method"], path) or (self._open_metrics and path == "/metrics")
        client = self._authenticate(headers, is_open)
        # Each key has its own prefix cache. Otherwise a short response time would show that another
        # client has sent the same prompt.
        scope["llmkit.cache_salt"] = client.digest.hex()
        admission = client.admit() if _is_limited(scope) else None
        scope["llmkit.admission"] = admission
        scope["llmkit.is_admin"] = client.is_admin or not self._clients
        return admission

    def _authenticate(self, headers: Mapping[bytes, bytes], is_open: bool = False) -> Client:
        """Return the client of a request. Raises ApiError 401, unless `is_open`."""
        client = self._find_client(
            headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        )
        if self._clients and client is None and not is_open:
            raise ApiError(
                401,
                "A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return client or self._anonymous

    def _find_client(self, authorization: bytes, x_api_key: bytes) -> Client | None:
        """Return the client whose key is in OpenAI's header, else in Anthropic's."""
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            key = x_api_key
        client = find_client(self._clients, key.strip())
        # The key may be new in the file.
        if client is None and isinstance(self._clients, KeyRing) and self._clients.refresh():
            client = find_client(self._clients, key.strip())
        return client


def _is_limited(scope: Scope) -> bool:
    """Whether a request counts for the limits of its key. One that cancels another does not."""
    path: str = scope["path"]
    cancels = path.startswith("/v1/responses/") and path.endswith("/cancel")
    return scope["method"] == "POST" and not cancels


def headers_too_large() -> ApiError:
    """Return the 431."""
    message = f"The headers are larger than the limit of {MAX_HEADER_BYTES} bytes."
    return ApiError(431, message, code="headers_too_large", headers={"connection": "close"})


async def send_error(
    error: ApiError, send: Send, path: str, message_type: str = "http.response"
) -> None:
    """Answer a request to `path` with `error`. message_type: of the ASGI messages."""
    body = error.body(path)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    raw_headers = [
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
    ]
    await send({"type": f"{message_type}.start", "status": error.status, "headers": raw_headers})
    await send({"type": f"{message_type}.body", "body": body})


def _with_headers(headers: Headers, send: Send) -> Send:
    """Return `send` that adds `headers` to the response, in place of any of the same names."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in headers}
            others = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
            message = {**message, "headers": [*others, *headers]}
        await send(message)

    return send_with_headers


def _with_charge(admission: Admission, send: Send) -> Send:
    """Return `send` that counts a request's tokens before its last byte.

    The client's next request may reach another process of the server.
    """

    async def charging_send(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            admission.client.charge()
        await send(message)

    return charging_send


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
