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
from llmkit.runtime.server.engines.messages import (
    Add,
    Cancel,
    Done,
    LoadAdapter,
    Output,
    Outputs,
    Ready,
    Refused,
    Stats,
    ToEngine,
    UnloadAdapter,
    from_engine_decoder,
)
from llmkit.runtime.server.usage import cpu_seconds

BUSY_FACTOR = 5  # a silent engine that computes has so many times as long
BUSY_SHARE = 0.01  # of the time on a processor: what waits for ever uses less


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
        self.queued_tokens = 0  # of prompts whose requests have got nothing yet
        self.on_step: Callable[[Stats, Stats], None] = lambda before, after: None
        self._process = process
        self._socket = ours
        self.who = who
        self._frames = FrameReader()
        self._receivers: dict[str, Receiver] = {}
        self._queued: dict[str, int] = {}  # prompt tokens
        self._heard = True  # anything from the process, lately
        self._asked: dict[str, asyncio.Future[Refused | None]] = {}
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, process: subprocess.Popen[bytes], ours: socket.socket, who: str = "", timeout_s: float = 0.0
    ) -> EngineClient:
        """Take over the socket `ours` of a spawned process, which is killed when it hangs for `timeout_s`; 0: never."""
        client = cls(process, ours, who)
        ours.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: client, sock=ours)
        if timeout_s:
            client._watch = asyncio.create_task(client._kill_when_hung(timeout_s))
        return client

    @property
    def serving(self) -> bool:
        """Whether it takes requests: it has loaded the model, and lives."""
        return self.ready.done() and not self.dead.is_set()

    @property
    def in_flight(self) -> int:
        """Requests added and not finished."""
        return len(self._receivers)

    def add(self, request: Add, receiver: Receiver) -> None:
        """Queue `request`; what becomes of it is told to `receiver`."""
        self._receivers[request.id] = receiver
        self._queued[request.id] = len(request.prompt)
        self.queued_tokens += len(request.prompt)
        self._send(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its receiver hears no more of it."""
        if self._forget(request_id) is not None:
            self._send(Cancel(request_id))

    async def ask(self, message: LoadAdapter | UnloadAdapter) -> Refused | None:
        """Have the engine do it, between two steps; why it refuses, if it does."""
        if self.dead.is_set():
            return Refused(message.id, "engine_dead", "The engine process has ended.")
        told: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        self._asked[message.id] = told
        self._send(message)
        return await told

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
            return LlmkitError(self.who + failure.what, failure.expected, failure.todo)
        return LlmkitError(f"{self.who}the engine process ended ({exit_text(self._process)})")

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self.dead.is_set():
            self._transport.write(frame(message))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance

    def data_received(self, data: bytes) -> None:
        self._heard = True
        for body in self._frames.feed(data):
            match from_engine_decoder.decode(body):
                case Outputs(outputs, stats):
                    self.on_step(self.stats, stats)
                    self.stats = stats
                    for output in outputs:
                        self._deliver(output)
                case Stats() as stats:
                    self.stats = stats
                case Done(id):
                    self._asked.pop(id).set_result(None)
                case Refused() as refused if (asked := self._asked.pop(refused.id, None)) is not None:
                    asked.set_result(refused)
                case Refused() as refused:
                    if receiver := self._forget(refused.id):
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
        self.stats = self.stats.counters()
        if self._watch is not None:
            self._watch.cancel()
        if not self.ready.done():
            self.ready.set_exception(self._startup_error())
            self.ready.exception()  # whether anyone still waits for it or not
        for request_id, asked in self._asked.items():
            asked.set_result(Refused(request_id, "engine_dead", "The engine process has ended."))
        self._asked.clear()
        for request_id in list(self._receivers):
            if receiver := self._forget(request_id):  # unless its likes were cancelled by another's end
                receiver.on_dead()

    def _deliver(self, output: Output) -> None:
        receiver = self._receivers.get(output.id)
        if receiver is None:
            return  # cancelled meanwhile
        self.queued_tokens -= self._queued.pop(output.id, 0)
        if output.finish_reason is not None:
            del self._receivers[output.id]
        receiver.on_output(output)

    def _forget(self, request_id: str) -> Receiver | None:
        self.queued_tokens -= self._queued.pop(request_id, 0)
        return self._receivers.pop(request_id, None)

    async def _kill_when_hung(self, timeout_s: float) -> None:
        """Kill the process when it has requests and says nothing for `timeout_s`, or BUSY_FACTOR times that while it
        computes: a step says something, but one that compiles kernels or has a long prompt may take its time.

        Time is counted in turns of this loop, so that one that was stopped itself accuses nobody.
        """
        turn, silent, used = min(1.0, timeout_s / 4), 0.0, None
        while True:
            self._heard = False
            await asyncio.sleep(turn)
            silent = silent + turn if (self._receivers or self._asked) and not self._heard else 0.0
            if silent < timeout_s / 2:
                used = None
                continue
            now = await asyncio.to_thread(cpu_seconds, self._process.pid)
            used = now if used is None else used
            busy = now - used > BUSY_SHARE * silent
            if silent >= timeout_s * (BUSY_FACTOR if busy else 1):
                break
        todo = "If a step may take so long, allow more with --engine-timeout; py-spy shows what a process does"
        what = f"the engine process hung: it had requests and said nothing for {silent:.0f} s"
        self.failure = Failed(LlmkitError.exit_code, what, todo=todo)
        self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    def _startup_error(self) -> LlmkitError:
        if self.failure is not None:
            return self.failure.error()
        end(self._process)
        return LlmkitError(f"the engine process ended while it loaded the model ({exit_text(self._process)})")
