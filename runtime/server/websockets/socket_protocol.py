"""uvicorn's WebSocket protocol, with limits of memory and time.

Like `http/protocol.py`, this uses uvicorn's undocumented classes.
`tests/server/test_uvicorn_internals.py` checks what is used here.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

PING_INTERVAL_S = 20.0
PING_TIMEOUT_S = 20.0
MAX_FRAGMENTS = 1024  # of one message; empty ones would not count for its size
WRITE_TIMEOUT_S = 30.0
DROP_TIMEOUT_S = 5.0
MAX_DROPPED_BYTES = 128 * 1024 * 1024


class LimitedWebSocketProtocol(WebSocketsSansIOProtocol):
    """Closes with 1009 after too many fragments, and aborts when the client does not read.

    Nothing is read from a client that does not read: otherwise the answers to its pings would
    fill the memory.
    """

    write_timeout_s = WRITE_TIMEOUT_S
    # Runs while the write buffer is full.
    _write_timer: asyncio.TimerHandle | None = None
    # The connection has failed, and what the client still sends is dropped.
    _is_dropping = False
    _num_dropped_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()
        super().resume_writing()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self.frames = []
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, f"more than {MAX_FRAGMENTS} fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_parser_exception(self) -> None:
        """Close after wrong frames, and drop what the client still sends for a while.

        A connection that is closed with unread data is reset, and its client could lose the reason.
        """
        assert self.conn.close_sent is not None
        code = self.conn.close_sent.code
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self._is_dropping = True
        self.close_timer = self.loop.call_later(DROP_TIMEOUT_S, self.transport.abort)
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def data_received(self, data: bytes) -> None:
        if self._is_dropping:
            self._num_dropped_bytes += len(data)
            if self._num_dropped_bytes > MAX_DROPPED_BYTES:
                self.transport.abort()
            return
        super().data_received(data)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
