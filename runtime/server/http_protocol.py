"""uvicorn's httptools protocol with the limits it lacks: how long headers may be, and how long they may take.

Without them one connection could hold any amount of memory before a route is even chosen.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmkit.runtime.server.errors import ApiError
from llmkit.runtime.server.guard import MAX_HEADER_BYTES, headers_too_large

HEADER_TIMEOUT_S = 20.0


class LimitedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to endless headers, 408 to slow ones and 400 in JSON to what is not HTTP."""

    _header_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0  # received since the last message began, while its headers are incomplete
    _in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(headers_too_large())

    def on_message_begin(self) -> None:
        self._in_headers = True
        if self._header_timer is None:
            self._start_header_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_header_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._header_bytes = 0

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._too_slow)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        self._refuse(ApiError(408, f"The headers did not arrive within {HEADER_TIMEOUT_S:g} s.", code="header_timeout"))

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
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
