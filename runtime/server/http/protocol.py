"""uvicorn's httptools protocol with what it lacks: limits of size and time, and refusals of what two readers of the
same bytes could take for different requests (RFC 9112, sections 3.2, 6 and 11).

Without them one connection could hold any amount of memory before a route is even chosen, or be read in one way by a
proxy and in another one here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.http.guard import MAX_HEADER_BYTES, headers_too_large

HEADER_TIMEOUT_S = 20.0
WRITE_TIMEOUT_S = 30.0
# Headers that are there once or not at all: of two, a proxy could go by one and this server by the other.
_SINGLE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-type", b"transfer-encoding")


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to endless headers, 408 to slow ones and 400 in JSON to what is not HTTP.

    A client that takes less than what was buffered for it (about 48 KiB) within `write_timeout_s` is cut off.
    One request at a time: one that comes before the last is answered is not read, and the connection is closed after
    that answer, which tells the client to send it again. Trailers are dropped: they are no headers.
    """

    write_timeout_s = WRITE_TIMEOUT_S
    _write_timer: asyncio.TimerHandle | None = None  # while more waits for the client than is buffered
    _timer: asyncio.TimerHandle | None = None  # while the client owes the rest of its headers, or of an unread body
    _in_headers = False
    _plain_bytes = 0  # received since the last request or piece of a body
    _last = False  # the answer under way is the connection's last; what comes in is dropped
    _problem: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
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
        if self._last:
            return
        self._plain_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self.transport.is_closing():
            return
        if self._plain_bytes > MAX_HEADER_BYTES:
            self._refuse(headers_too_large())
        elif not self._answering:
            self._start_timer()

    def on_message_begin(self) -> None:
        if self._answering:
            self._answer_no_more()
            raise ValueError("pipelined")  # ends the parsing of these bytes
        self._in_headers = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._problem = self._objection()
        if self._problem is not None:
            raise ValueError(self._problem)
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._plain_bytes = 0
        if not self._last:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._plain_bytes = 0
        self._stop_timer()
        super().on_message_complete()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as stopped:
            self._read_on(data[stopped.args[0] :])
        except HttpParserError as error:
            if not self._last:
                problem = self._problem or f"This is not HTTP that can be read: {error}."
                self._refuse(ApiError(400, problem, code="invalid_http"))

    def _read_on(self, rest: bytes) -> None:
        """Answer a request that asks for another protocol as if it did not, which Java's client counts on.

        The parser has stopped before the body, and reads no more; another one is led to the same place.
        """
        self.cycle.keep_alive = False
        framing = [b"%s: %s" % pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        if not framing:
            self._last = True
            return

        def ended() -> None:
            self.on_message_complete()
            self._last = True

        self.cycle.more_body = True
        self.cycle.message_event.clear()
        self.parser = HttpRequestParser(SimpleNamespace(on_body=self.on_body, on_message_complete=ended))
        self._parse(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]) + rest)

    @property
    def _answering(self) -> bool:
        """Whether a request has come whose answer is not complete."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _answer_no_more(self) -> None:
        self._last, self.cycle.keep_alive = True, False

    def _objection(self) -> str | None:
        """Why a request is refused though it can be parsed."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            return f"HTTP/{version} is not spoken here; use HTTP/1.1."
        names = [name for name, _ in self.headers]
        if twice := [name for name in _SINGLE if names.count(name) > 1]:
            return f"There are two headers {twice[0].decode()}; one is expected."
        fields = dict(self.headers)
        host = fields.get(b"host")
        if host is None and version == "1.1":
            return "The Host header is missing."
        coding = fields.get(b"transfer-encoding", b"chunked")
        if coding.lower() != b"chunked" or (version == "1.0" and b"transfer-encoding" in fields):
            return "The transfer-encoding is not known; chunked is, in HTTP/1.1."
        named = self.url.partition(b"://")[2].partition(b"/")[0]
        if self.url[:1] not in (b"/", b"*") and named.lower() != (host or b"").lower():
            return "The target of the request names another host than its Host header."
        return None

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _too_slow(self) -> None:
        self._timer = None
        if self._in_headers or self.cycle is None:
            message = f"The headers did not arrive within {HEADER_TIMEOUT_S:g} s."
            self._refuse(ApiError(408, message, code="header_timeout"))
        else:  # the rest of a body that was answered before its end, or nothing but line feeds
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer with `error` and close; only close in the middle of an answer."""
        if self.transport.is_closing():
            return
        if self._answering:
            begun = self.cycle.response_started
            self.cycle.disconnected = True  # its route, if it still runs, writes nothing behind this
            self.cycle.message_event.set()
            if begun:
                self.transport.close()
                return
        body = error.body()
        fields: dict[str, Any] = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
        }
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        self.transport.close()
