"""uvicorn's httptools protocol, with limits of size and time and with stricter parsing.

Without the limits, one connection could use any amount of memory before a route is chosen. The
stricter parsing (RFC 9112, sections 3.2, 6 and 11) refuses bytes that a proxy and this server could
read as different requests.

This module uses uvicorn's undocumented classes. `pyproject.toml` pins uvicorn's minor version, and
`tests/server/test_uvicorn_internals.py` checks everything that is used here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llmkit.runtime.server.http import request_ids
from llmkit.runtime.server.http.body_writer import BodyWriter
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.security_middleware import MAX_HEADER_BYTES, headers_too_large
from llmkit.runtime.server.http.socket_paths import SOCKET_PATHS

HEADER_TIMEOUT_S = 20.0
WRITE_TIMEOUT_S = 30.0
# After an answer to a body that is still arriving. A client that does not read while it sends, such
# as Python's urllib, gets the answer if it sends no more than this.
MAX_DROPPED_BYTES = 128 * 1024 * 1024
DROP_TIMEOUT_S = 30.0
# After an answer to bytes that are no request: nothing says how many follow.
_MAX_DROPPED_AFTER_REFUSAL = 1024 * 1024
_DROP_CHECKS = 6  # a client that is silent for a sixth of DROP_TIMEOUT_S sends no more
# Headers that may occur once only. Of two, a proxy could use one and this server the other.
_SINGLE_HEADERS = (
    b"host",
    b"origin",
    b"authorization",
    b"x-api-key",
    b"content-type",
    b"transfer-encoding",
)


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to endless headers, 408 to slow headers, and 400 in JSON to invalid HTTP.

    The connection is aborted when the client does not read its write buffer (about 48 KiB) within
    `write_timeout_s`. Requests are not pipelined: a request that arrives before the last response
    is complete is not read. The connection closes after that response, so the client sends the
    request again. Trailers are dropped: they are not headers.

    A response may be complete before its request is. Then the rest of the request is received and
    dropped, up to `max_dropped_bytes` and `drop_timeout_s`, and the connection is closed. A
    connection that is closed with unread data is reset, and its client could lose the response.

    An HTTP/1.0 client gets no chunked encoding. The end of the connection ends a response without a
    length.
    """

    write_timeout_s = WRITE_TIMEOUT_S
    max_dropped_bytes = MAX_DROPPED_BYTES
    drop_timeout_s = DROP_TIMEOUT_S
    # Runs while the write buffer is full.
    _write_timer: asyncio.TimerHandle | None = None
    # Runs while headers are incomplete.
    _header_timer: asyncio.TimerHandle | None = None
    _in_headers = False
    # Received since the last complete request or part of a body.
    _num_header_bytes = 0
    # The current response is the last one of the connection. Everything received is dropped.
    _last_response = False
    _num_dropped_bytes = 0
    _drop_deadline = 0.0  # loop.time(); set when the response is complete
    # Runs while the rest of a request is dropped.
    _drop_timer: asyncio.TimerHandle | None = None
    # The current response began before its request was complete.
    _is_early = False
    # Why a request is refused although it parses.
    _refusal: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        if self._drop_timer is not None:
            self._drop_timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._last_response:
            self._drop(data)
            return
        self._num_header_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._last_response or self.transport.is_closing():
            return
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._refuse(headers_too_large())
        elif not self._is_responding:
            self._start_header_timer()

    def on_message_begin(self) -> None:
        if self._is_responding:
            self._make_response_last()
            raise ValueError("pipelined")  # stops the parser
        self._in_headers = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._refusal = self._check_headers()
        if self._refusal is not None:
            raise ValueError(self._refusal)  # stops the parser
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0
        if not self._last_response:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_header_bytes = 0
        self._stop_header_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.headers = []  # a later refusal is not about this request
        if self._is_early and not self.transport.is_closing():
            if self.cycle.more_body:
                self._close_after_rest(self.max_dropped_bytes)
            else:
                self.transport.close()

    def _start_asgi_task(  # type: ignore[override]
        self, cycle: RequestResponseCycle, app: ASGIApp
    ) -> None:
        super()._start_asgi_task(cycle, self._with_framing(cycle, app))  # type: ignore[arg-type]

    def _with_framing(self, cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
        """Return `app`, whose response says where it ends in a way that suits its request."""
        ends_with_connection = False
        writer = BodyWriter(cycle)

        async def framed_app(scope: Scope, receive: Receive, send: Send) -> None:
            async def framed_send(message: Message) -> None:
                nonlocal ends_with_connection
                if message["type"] == "http.response.start":
                    headers = list(message.get("headers", ()))
                    has_length = any(name == b"content-length" for name, _ in headers)
                    if scope["http_version"] == "1.0" and not has_length:
                        ends_with_connection = True
                        cycle.chunked_encoding = False
                    if not cycle.more_body:
                        await send(message)
                        return
                    self._is_early = True
                    headers.append((b"connection", b"close"))
                    await send({**message, "headers": headers})
                    # Otherwise the cycle closes the connection with the response's last byte.
                    cycle.keep_alive = True
                    return
                if ends_with_connection:
                    cycle.expected_content_length = len(message.get("body", b""))
                await send(message)

            writer.offer(scope)
            await app(scope, receive, framed_send)

        return framed_app

    def _drop(self, data: bytes) -> None:
        self._num_dropped_bytes += len(data)
        if self._num_dropped_bytes > self.max_dropped_bytes:
            self.transport.abort()

    def _close_after_rest(self, max_bytes: int) -> None:
        """Receive and drop what the client still sends, within limits, then close."""
        self._last_response = True
        self.max_dropped_bytes = max_bytes
        self._num_dropped_bytes = 0
        self._drop_deadline = self.loop.time() + self.drop_timeout_s
        self._unset_keepalive_if_required()
        self._stop_header_timer()
        self._check_rest_later()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _check_rest_later(self) -> None:
        self._drop_timer = self.loop.call_later(
            self.drop_timeout_s / _DROP_CHECKS, self._check_rest, self._num_dropped_bytes
        )

    def _check_rest(self, num_dropped_before: int) -> None:
        is_silent = self._num_dropped_bytes == num_dropped_before
        if is_silent or self.loop.time() >= self._drop_deadline:
            self.transport.close()
        else:
            self._check_rest_later()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self._last_response = True
                self._stop_header_timer()
                self.handle_websocket_upgrade()
                return
            offset = upgrade.args[0]
            self._ignore_upgrade(data[offset:])
        except HttpParserError as error:
            if not self._last_response:
                message = self._refusal or f"The request is not valid HTTP: {error}."
                self._refuse(ApiError(400, message, code="invalid_http"))

    def _should_upgrade(self) -> bool:
        """Whether the request opens a WebSocket where there is one."""
        return (
            super()._should_upgrade()
            and self.scope["method"] == "GET"
            and self.url.partition(b"?")[0].decode("latin-1") in SOCKET_PATHS
        )

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Answer a request with an Upgrade header as if it had none; Java's client sends them.

        The old parser stops before the body and parses nothing more. So a new parser reads the
        body. It is given the headers that describe the body first.
        """
        self.cycle.keep_alive = False
        body_headers = [
            b"%s: %s" % (name, value)
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        if not body_headers:
            self._last_response = True
            return

        def on_message_complete() -> None:
            self.on_message_complete()
            self._last_response = True

        self.cycle.more_body = True
        self.cycle.message_event.clear()
        self.parser = HttpRequestParser(
            SimpleNamespace(on_body=self.on_body, on_message_complete=on_message_complete)
        )
        self._parse(b"\r\n".join([b"POST / HTTP/1.1", *body_headers, b"", b""]) + rest)

    @property
    def _is_responding(self) -> bool:
        """Whether a request has arrived whose response is not complete."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _make_response_last(self) -> None:
        self._last_response = True
        self.cycle.keep_alive = False

    def _check_headers(self) -> str | None:
        """Return why a request is refused although it parses, or None."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return f"HTTP/{version} is not supported; use HTTP/1.1."
        names = [name for name, _ in self.headers]
        for name in _SINGLE_HEADERS:
            if names.count(name) > 1:
                return f"There are two headers {name.decode()}; one is expected."
        headers = dict(self.headers)
        host = headers.get(b"host")
        if host is None and version == "1.1":
            return "The Host header is missing."
        coding = headers.get(b"transfer-encoding", b"chunked")
        if coding.lower() != b"chunked" or (version == "1.0" and b"transfer-encoding" in headers):
            return "The transfer-encoding is not known; chunked is, in HTTP/1.1."
        target_host = self.url.partition(b"://")[2].partition(b"/")[0]
        is_absolute = self.url[:1] not in (b"/", b"*")
        if is_absolute and target_host.lower() != (host or b"").lower():
            return "The target of the request names another host than its Host header."
        return None

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._on_header_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if self._in_headers or self.cycle is None:
            message = f"The headers did not arrive within {HEADER_TIMEOUT_S:g} s."
            self._refuse(ApiError(408, message, code="header_timeout"))
        else:
            self.transport.close()  # line feeds only

    def _refuse(self, error: ApiError) -> None:
        """Answer with `error` and close; after a started response, only close."""
        if self.transport.is_closing():
            return
        if self._is_responding:
            response_started = self.cycle.response_started
            # The route, if it still runs, writes nothing after this.
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
            if response_started:
                self.transport.close()
                return
        body = error.body()
        headers: dict[str, Any] = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
            request_ids.HEADER.decode(): request_ids.request_id(self.headers or ()).decode(),
        }
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self._close_after_rest(_MAX_DROPPED_AFTER_REFUSAL)
