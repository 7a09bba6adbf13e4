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
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.security_middleware import MAX_HEADER_BYTES, headers_too_large

HEADER_TIMEOUT_S = 20.0
WRITE_TIMEOUT_S = 30.0
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
    """

    write_timeout_s = WRITE_TIMEOUT_S
    # Runs while the write buffer is full.
    _write_timer: asyncio.TimerHandle | None = None
    # Runs while headers, or the rest of an unread body, are incomplete.
    _header_timer: asyncio.TimerHandle | None = None
    _in_headers = False
    # Received since the last complete request or part of a body.
    _num_header_bytes = 0
    # The current response is the last one of the connection. Everything received is dropped.
    _last_response = False
    # Why a request is refused although it parses.
    _refusal: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
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
            return
        self._num_header_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self.transport.is_closing():
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

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            offset = upgrade.args[0]
            self._ignore_upgrade(data[offset:])
        except HttpParserError as error:
            if not self._last_response:
                message = self._refusal or f"The request is not valid HTTP: {error}."
                self._refuse(ApiError(400, message, code="invalid_http"))

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
            # The rest of a body that is already answered, or line feeds only.
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer with `error` and close; after a started response, only close."""
        if self.transport.is_closing():
            return
        if self._is_responding:
            response_started = self.cycle.response_started
            # The route, if it still runs, writes nothing after this.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if response_started:
                self.transport.close()
                return
        body = error.body()
        headers: dict[str, Any] = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
        }
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self.transport.close()
