"""One HTTP request in the engine: adds its choices, and turns their outputs into deltas.

Most outputs become deltas, and bytes on the connection, in the call that delivers them. So a token
costs no turn of the event loop and wakes no task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.engines.engine_messages import Refused
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.request_times import RequestTimes
from llmkit.runtime.server.response_cache import CachedResponses
from llmkit.runtime.server.server_metrics import ServerMetrics

ENGINE_DEAD = "The engine process has ended."
MAX_UNREAD = 8192  # outputs that a client may leave unread before its request is aborted

# Takes new deltas, possibly none; called on the event loop, must not block. Returns whether it can
# take more; if not, outputs wait until `Generation.run` has awaited `drain`.
Take = Callable[[list[Delta]], bool]


async def _no_drain() -> None:
    """The `drain` of a `take` that always returns True."""


class Generation:
    """The choices of one HTTP request, in the engine from `start` until `run` ends.

    It is the `OutputReceiver` of its choices' requests.
    """

    def __init__(
        self,
        engines: Replicas,
        metrics: ServerMetrics,
        choices: Sequence[Choice],
        eos_token_ids: Sequence[int],
        arrival_time: float,
        timeout: float | None = None,
        cached: CachedResponses | None = None,
    ) -> None:
        """Create the generation of a request that arrived at `arrival_time` (perf_counter).

        It fails `timeout` seconds after its arrival. Answers in `cached` are not computed again.
        """
        self.choices = choices
        self.disconnected = False  # the client is gone
        self.cached = cached or CachedResponses(None, choices)
        self._engines = engines
        self._metrics = metrics
        self._unfinished = {choice.request.request_id: choice for choice in choices}
        params = choices[0].request.sampling_params  # all choices have the same stop tokens
        self._stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_token_ids |= frozenset(eos_token_ids)
        self._inbox: list[EngineOutput] = []  # outputs that are not processed
        self._take: Take | None = None  # set by `run`
        self._can_take = True  # what `_take` has returned
        self._waits = False  # `run` waits for outputs, which are processed where they arrive
        self._wake_up = asyncio.Event()  # set when `run` has something to do
        self._error: ApiError | None = None
        self._failure: Exception | None = None  # what `_take` or a choice has raised
        self._arrival_time = arrival_time
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None

    @property
    def outcome(self) -> str:
        """How it ended: "finished", "cancelled", or the code of its error."""
        if self._error is not None:
            return self._error.code or "error"
        return "finished" if all(choice.finish_reason for choice in self.choices) else "cancelled"

    @property
    def _is_over(self) -> bool:
        """Whether no delta follows."""
        return not self._unfinished or self._failure is not None

    # Callbacks of OutputReceiver

    def on_outputs(
        self, outputs: Sequence[EngineOutput], queue_times_s: Mapping[str, float]
    ) -> None:
        if queue_times_s:
            for request_id, choice in self._unfinished.items():
                choice.times.queue_s = queue_times_s.get(request_id, choice.times.queue_s)
        self._inbox += outputs
        if self._waits:
            self._process_inbox()
        elif len(self._inbox) > MAX_UNREAD:
            self.fail(ApiError(408, "The answer was left unread for too long.", code="slow_reader"))

    def on_refused(self, refused: Refused) -> None:
        self.fail(ApiError(400, refused.message, code=refused.code, param=refused.param))

    def on_engine_dead(self) -> None:
        self.fail(ApiError(503, ENGINE_DEAD, code="engine_dead"))

    # Called by the HTTP side

    def start(self) -> None:
        """Add all choices to the engine, except those whose answers are cached."""
        for choice in self.choices:
            choice.times = RequestTimes(self._arrival_time, sent=time.perf_counter())
            outputs = self.cached.outputs.get(choice.request.request_id)
            if outputs is None:
                self._engines.add(choice.request, self)
            else:
                self._inbox += outputs
                self._wake_up.set()
        if self._timeout is not None:
            remaining = max(0.0, self._arrival_time + self._timeout - time.perf_counter())
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(remaining, self._expire, self._timeout)

    async def run(self, take: Take, drain: Callable[[], Awaitable[None]] = _no_drain) -> None:
        """Pass the new deltas to `take` until every choice is finished or the client is gone.

        drain: awaited before `take` is called again after it has returned False.

        Raises ApiError when the engine refuses or fails the request, or dies, and what `take`
        raises.
        """
        self._take = take
        try:
            self._process_inbox()
            while not self._is_over or not self._can_take:
                if not self._can_take:
                    await drain()
                    self._process_inbox()
                    continue
                self._waits = True
                await self._wake_up.wait()
                self._waits = False
                self._wake_up.clear()
                if self._can_take and not self._is_over:
                    self._process_inbox()
            if self._failure is not None:
                raise self._failure
            if self._error is not None:
                raise self._error
        finally:
            self._waits = False
            self.abort()

    def wake(self) -> None:
        """Call `take`, even if there is nothing new."""
        self._wake_up.set()

    def fail(self, error: ApiError) -> None:
        """End the request with `error`; it is aborted in the engine at once."""
        self._error = error
        self._inbox.clear()
        self.abort()
        self._wake_up.set()

    def disconnect(self) -> None:
        """The client is gone: `run` ends, and the request is aborted in the engine."""
        self.disconnected = True
        self.abort()
        self._wake_up.set()

    def abort(self) -> None:
        """Abort unfinished choices in the engine; has no effect on a finished request."""
        if self._timer is not None:
            self._timer.cancel()
        for request_id in self._unfinished:
            self._engines.abort(request_id)
            self._metrics.record_finished("error" if self._error else "cancelled")
        self._unfinished.clear()

    def _expire(self, timeout: float) -> None:
        message = f"The request took longer than its time limit of {timeout:g} s."
        self.fail(ApiError(504, message, code="timeout", headers={"x-should-retry": "false"}))

    def _process_inbox(self) -> None:
        """Process the outputs that have arrived; `run` raises what that raises."""
        assert self._take is not None, "only within `run`"
        inbox = self._inbox
        self._inbox = []
        try:
            self._can_take = self._take(
                [delta for delta in map(self._process, inbox) if delta is not None]
            )
        except Exception as failure:
            self._failure = failure
            self._can_take = True
        if self._waits and (self._is_over or not self._can_take):
            self._waits = False
            self._wake_up.set()

    def _process(self, output: EngineOutput) -> Delta | None:
        """Pass an output to its choice and return the delta.

        Returns None when the choice has finished already, or when the request fails now.
        """
        choice = self._unfinished.get(output.request_id)
        if choice is None:
            # The engine's output after a stop string, or after another choice failed.
            return None
        if output.finish_reason == "error":
            message = output.error or "The engine ended the request (error)."
            self.fail(ApiError(500, message, code="generation_failed"))
            return None
        computed = output.request_id not in self.cached.outputs
        if computed:
            self._metrics.record_tokens(choice.times, len(output.token_ids))
        delta = choice.process_output(output, self._stop_token_ids)
        self.cached.record(output, choice)
        if choice.finish_reason is not None:
            del self._unfinished[output.request_id]
            if output.finish_reason is None:
                self._engines.abort(output.request_id)
            self._metrics.record_finished(choice.finish_reason, choice.times if computed else None)
        return delta
