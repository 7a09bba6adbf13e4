"""The API process's handle on an engine process: adds requests, delivers outputs, detects death.

The parent holds one end of a private socket pair. When that end closes, for whatever reason, the
engine process exits by itself, so that none is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

from llmkit.common.errors import LlmkitError
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.process_channel import Failed, FrameReader, end_process, exit_text, frame
from llmkit.runtime.server.engines.engine_messages import (
    AbortRequest,
    AddRequest,
    Change,
    Done,
    EngineOutputs,
    EngineReady,
    Refused,
    StatsUpdate,
    ToEngine,
    from_engine_decoder,
)
from llmkit.runtime.server.process_usage import cpu_seconds

BUSY_FACTOR = 5  # the timeout of a silent engine is multiplied by this while it computes
BUSY_SHARE = 0.01  # share of CPU time above which a process computes; a deadlocked one uses less
_DEAD_MESSAGE = "The engine process has ended."


class OutputReceiver(Protocol):
    """Receives the outputs of a request. Called on the event loop; must not block."""

    def on_outputs(
        self, outputs: Sequence[EngineOutput], queue_times_s: Mapping[str, float]
    ) -> None:
        """New outputs of the receiver's requests: those of an engine step come together.

        queue_times_s: by request id, of the requests whose first output is among them. It may have
        others.
        """

    def on_refused(self, refused: Refused) -> None:
        """The engine refuses the request."""

    def on_engine_dead(self) -> None:
        """The engine process has died; no output follows."""


class EngineClient(asyncio.Protocol):
    """An engine process, as seen from the event loop of the API process.

    `ready` resolves to EngineReady, or fails with the LlmkitError of the start-up. `dead` is set
    once the process has exited or given up. `stats` holds its latest statistics.
    `label` is put before the reason of its death, for example "replica 1: ".
    """

    def __init__(
        self, process: subprocess.Popen[bytes], connection: socket.socket, label: str = ""
    ) -> None:
        self.ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self.dead = asyncio.Event()
        self.failure: Failed | None = None  # set when the process reports why it gives up
        self.stats = EngineStats()
        self.queued_tokens = 0  # prompt tokens of the requests that have no output yet
        # Called with the statistics before and after each step; set by the lifecycle.
        self.on_step: Callable[[EngineStats, EngineStats], None] = lambda before, after: None
        self.label = label
        self.is_retired = False  # its end is intended; set by `Replicas`
        self._process = process
        self._connection = connection
        self._frames = FrameReader()
        self._receivers: dict[str, OutputReceiver] = {}  # by request id
        self._queued: dict[str, int] = {}  # prompt tokens, by id of a request without output
        self._changes: dict[str, asyncio.Future[Refused | None]] = {}  # by message id
        self._received_data = True  # since `_kill_when_hung` last cleared it
        self._transport: asyncio.Transport | None = None
        self._watchdog: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        label: str = "",
        timeout_s: float = 0.0,
    ) -> EngineClient:
        """Take over the socket of a spawned process.

        The process is killed when it hangs for `timeout_s` seconds; 0 disables that.
        """
        client = cls(process, connection, label)
        connection.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: client, sock=connection)
        if timeout_s:
            client._watchdog = asyncio.create_task(client._kill_when_hung(timeout_s))
        return client

    @property
    def serving(self) -> bool:
        """Whether it takes requests: the model is loaded and the process is alive."""
        return self.ready.done() and not self.dead.is_set()

    @property
    def in_flight(self) -> int:
        """Requests that were added and have not finished."""
        return len(self._receivers)

    def add(self, request: EngineRequest, receiver: OutputReceiver) -> None:
        """Queue `request`; its outputs go to `receiver`."""
        num_tokens = len(request.prompt_token_ids)
        self._receivers[request.request_id] = receiver
        self._queued[request.request_id] = num_tokens
        self.queued_tokens += num_tokens
        self._send(AddRequest(request))

    def abort(self, request_id: str) -> None:
        """Drop a request; its receiver gets no more outputs."""
        if self._forget(request_id) is not None:
            self._send(AbortRequest(request_id))

    async def change(self, message: Change) -> Refused | None:
        """Change adapters or sleep between two steps. Returns Refused if the engine refuses."""
        if self.dead.is_set():
            return Refused(message.id, "engine_dead", _DEAD_MESSAGE)
        answer: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        self._changes[message.id] = answer
        self._send(message)
        return await answer

    def close(self) -> None:
        """Close the connection; the process then exits by itself.

        `run_server` waits for its end, and kills it if necessary.
        """
        # abort() takes effect in the event loop's next iteration, shutdown at once.
        with contextlib.suppress(OSError):  # the process has ended already
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """Wait for the end of a process whose connection was closed."""
        end_process(self._process)

    def death_error(self) -> LlmkitError:
        """Wait for the end of a dead process; return why it ended."""
        end_process(self._process)
        failure = self.failure
        if failure is not None:
            return LlmkitError(self.label + failure.what, failure.expected, failure.todo)
        return LlmkitError(f"{self.label}the engine process ended ({exit_text(self._process)})")

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self.dead.is_set():
            self._transport.write(frame(message))

    # Callbacks of asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received_data = True
        received: defaultdict[OutputReceiver, list[EngineOutput]] = defaultdict(list)
        queue_times_s: dict[str, float] = {}
        for body in self._frames.feed(data):
            match from_engine_decoder.decode(body):
                case EngineOutputs(outputs, stats, step_queue_times_s):
                    self.on_step(self.stats, stats)
                    self.stats = stats
                    queue_times_s |= step_queue_times_s
                    for output in outputs:
                        receiver = self._receivers.get(output.request_id)
                        if receiver is not None:  # otherwise it was aborted meanwhile
                            received[receiver].append(output)
                    self._note_progress(outputs)
                case StatsUpdate(stats):
                    self.stats = stats
                case Done(id):
                    self._changes.pop(id).set_result(None)
                case Refused() as refused:
                    self._deliver_refused(refused)
                case EngineReady() as ready:
                    if not self.ready.done():
                        self.ready.set_result(ready)
                case Failed() as failed:
                    self.failure = failed
                    if self._transport is not None:
                        self._transport.abort()  # a process that imported torch exits slowly
        for receiver, new_outputs in received.items():
            receiver.on_outputs(new_outputs, queue_times_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.dead.set()
        self.stats = self.stats.counters()
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self.ready.done():
            self.ready.set_exception(self._startup_error())
            self.ready.exception()  # retrieved here in case nothing awaits it any more
        for message_id, answer in self._changes.items():
            answer.set_result(Refused(message_id, "engine_dead", _DEAD_MESSAGE))
        self._changes.clear()
        for request_id in list(self._receivers):
            # A receiver that is notified may abort its other requests, which are in this list, too.
            receiver = self._forget(request_id)
            if receiver is not None:
                receiver.on_engine_dead()

    def _note_progress(self, outputs: Sequence[EngineOutput]) -> None:
        """The requests of `outputs` are queued no more; finished ones get no more outputs."""
        for output in outputs:
            if self._queued:
                self.queued_tokens -= self._queued.pop(output.request_id, 0)
            if output.finish_reason is not None:
                self._receivers.pop(output.request_id, None)

    def _deliver_refused(self, refused: Refused) -> None:
        answer = self._changes.pop(refused.id, None)
        if answer is not None:
            answer.set_result(refused)
            return
        receiver = self._forget(refused.id)
        if receiver is not None:
            receiver.on_refused(refused)

    def _forget(self, request_id: str) -> OutputReceiver | None:
        self.queued_tokens -= self._queued.pop(request_id, 0)
        return self._receivers.pop(request_id, None)

    async def _kill_when_hung(self, timeout_s: float) -> None:
        """Kill the process when it has work and sends nothing for `timeout_s` seconds.

        While it computes, the limit is BUSY_FACTOR times as long: every step sends a message, but a
        step that compiles kernels or has a long prompt can take long. Time is counted in intervals
        of this loop, so that an API process that was itself suspended reports no false hang.
        """
        interval_s = min(1.0, timeout_s / 4)
        silent_s = 0.0
        cpu_before: float | None = None  # CPU seconds of the process when the silence was noticed
        while True:
            self._received_data = False
            await asyncio.sleep(interval_s)
            has_work = bool(self._receivers or self._changes)
            if has_work and not self._received_data:
                silent_s += interval_s
            else:
                silent_s = 0.0
            if silent_s < timeout_s / 2:
                cpu_before = None
                continue
            cpu_now = await asyncio.to_thread(cpu_seconds, self._process.pid)
            if cpu_before is None:
                cpu_before = cpu_now
            busy = cpu_now - cpu_before > BUSY_SHARE * silent_s
            limit_s = timeout_s * BUSY_FACTOR if busy else timeout_s
            if silent_s >= limit_s:
                break
        self.failure = Failed(
            LlmkitError.exit_code,
            f"the engine process hung: it had requests and said nothing for {silent_s:.0f} s",
            todo="If a step may take so long, allow more with --engine-timeout; "
            "py-spy shows what a process does",
        )
        self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    def _startup_error(self) -> LlmkitError:
        if self.failure is not None:
            return self.failure.error()
        end_process(self._process)
        return LlmkitError(
            f"the engine process ended while it loaded the model ({exit_text(self._process)})"
        )
