"""The engine process as its parent sees it: started, talked to and ended.

The parent holds one end of a private socket pair. When that end closes, for whatever reason, the engine process
exits by itself, so that none is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Callable
from typing import Protocol, cast

from llmkit.checkpoint.errors import LlmkitError
from llmkit.runtime.channel import Failed, FrameReader, end, exit_text, frame
from llmkit.runtime.server.messages import (
    Add,
    Cancel,
    Output,
    Outputs,
    Ready,
    Refused,
    Stats,
    ToEngine,
    from_engine_decoder,
)


class Receiver(Protocol):
    """Who waits for the outputs of a request. Called on the event loop; must not block."""

    def on_output(self, output: Output) -> None: ...

    def on_refused(self, refused: Refused) -> None: ...

    def on_dead(self) -> None: ...


class EngineClient(asyncio.Protocol):
    """An engine process, from inside the event loop. who: what to put before the reason of its end.

    `ready` resolves to Ready, or fails with the LlmkitError of the start-up. `dead` is set once the process is
    gone or has given up; `stats` are its latest figures.
    """

    def __init__(self, process: subprocess.Popen[bytes], ours: socket.socket, who: str = "") -> None:
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.dead = asyncio.Event()
        self.failure: Failed | None = None
        self.stats = Stats()
        self.on_step: Callable[[Stats, Stats], None] = lambda before, after: None
        self._process = process
        self._socket = ours
        self._who = who
        self._frames = FrameReader()
        self._receivers: dict[str, Receiver] = {}
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, process: subprocess.Popen[bytes], ours: socket.socket, who: str = "") -> EngineClient:
        """Take over the socket `ours` of a spawned process."""
        client = cls(process, ours, who)
        ours.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: client, sock=ours)
        return client

    @property
    def in_flight(self) -> int:
        """Requests added and not finished."""
        return len(self._receivers)

    def add(self, request: Add, receiver: Receiver) -> None:
        """Queue `request`; what becomes of it is told to `receiver`."""
        self._receivers[request.id] = receiver
        self._send(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its receiver hears no more of it."""
        if self._receivers.pop(request_id, None) is not None:
            self._send(Cancel(request_id))

    def close(self) -> None:
        """Hang up; the process then exits by itself. The caller makes sure of that with `end`."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)  # at once, while abort() waits for the event loop
        if self._transport is not None:
            self._transport.abort()

    def death(self) -> LlmkitError:
        """Wait for the end of a dead process; why it ended."""
        end(self._process)
        if (failure := self.failure) is not None:
            return LlmkitError(self._who + failure.what, failure.expected, failure.todo)
        return LlmkitError(f"{self._who}the engine process ended ({exit_text(self._process)})")

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self.dead.is_set():
            self._transport.write(frame(message))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            match from_engine_decoder.decode(body):
                case Outputs(outputs, stats):
                    self.on_step(self.stats, stats)
                    self.stats = stats
                    for output in outputs:
                        self._deliver(output)
                case Stats() as stats:
                    self.stats = stats
                case Refused() as refused:
                    if receiver := self._receivers.pop(refused.id, None):
                        receiver.on_refused(refused)
                case Ready() as ready:
                    if not self.ready.done():
                        self.ready.set_result(ready)
                case Failed() as failed:
                    self.failure = failed
                    if self._transport is not None:
                        self._transport.abort()  # a process with torch in it takes a while to exit

    def connection_lost(self, exc: Exception | None) -> None:
        self.dead.set()
        if not self.ready.done():
            self.ready.set_exception(self._startup_error())
            self.ready.exception()  # whether anyone still waits for it or not
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.on_dead()

    def _deliver(self, output: Output) -> None:
        receiver = self._receivers.get(output.id)
        if receiver is None:
            return  # cancelled meanwhile
        if output.finish_reason is not None:
            del self._receivers[output.id]
        receiver.on_output(output)

    def _startup_error(self) -> LlmkitError:
        if self.failure is not None:
            return self.failure.error()
        end(self._process)
        return LlmkitError(f"the engine process ended while it loaded the model ({exit_text(self._process)})")
