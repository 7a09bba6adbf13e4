"""Responses that are computed without a connection: `background: true`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request

from llmkit.runtime.server.choice import Choice
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.http.api_keys import Admission
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http_response import StreamEvents, new_generation
from llmkit.runtime.server.responses.responses_response import ResponsesResponseBuilder
from llmkit.runtime.server.server_state import ServerState

# Ended runs whose events can still be read.
BACKGROUND_HEADER = "x-llmkit-background"  # of /health behind a router: how many responses run
_MAX_ENDED = 64
_MAX_ENDED_BYTES = 64 * 1024 * 1024  # of their events; a request's metadata can be large


class BackgroundRun:
    """One response that is being computed, or was lately, and its events so far."""

    def __init__(self, owner: str, builder: ResponsesResponseBuilder, choice: Choice) -> None:
        self.owner = owner
        self.ended = False
        self.removed = False  # the client has deleted it
        self.id = builder.id
        self.num_bytes = 0  # of the events so far
        # With the request, until the run has ended.
        self._source: tuple[ResponsesResponseBuilder, Choice] | None = (builder, choice)
        self._events: list[bytes] = []  # the index of an event is its sequence number
        self._changed = asyncio.Condition()
        self._cancelled = asyncio.Event()
        self._final: dict[str, Any] | None = None  # the document of an ended run

    @property
    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        if self._final is not None:
            return self._final
        assert self._source is not None, "a run that has ended has its document"
        builder, choice = self._source
        return builder.running_response(choice) if self._events else builder.queued_response(choice)

    def cancel(self) -> None:
        """End the computation; `wait` returns when it has ended."""
        self._cancelled.set()

    async def wait(self) -> None:
        """Wait until the run has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.ended)

    async def events(self, starting_after: int = -1) -> AsyncIterator[bytes]:
        """Yield the events behind number `starting_after`, until the run has ended."""
        position = starting_after + 1
        while True:
            async with self._changed:
                while not self.ended and len(self._events) <= position:
                    await self._changed.wait()
            if position >= len(self._events):
                return
            new = self._events[position:]
            position += len(new)
            yield b"".join(new)

    async def run(self, state: ServerState, request: Request, generation: Generation) -> None:
        """Compute the response. request: its receive is replaced by this run's cancellation."""

        async def receive() -> dict[str, Any]:
            await self._cancelled.wait()
            return {"type": "http.disconnect"}

        assert self._source is not None, "a run runs once"
        builder, choice = self._source
        detached = Request(request.scope, receive)
        error: ApiError | None = None
        try:
            events = StreamEvents(state, builder, generation, self._add)
            await self._add(await events.run(detached))
        except ApiError as failure:
            error = failure
        except Exception:
            error = ApiError(500, "The server failed; its log says why.", code="server_error")
            raise
        finally:
            status = "cancelled" if self._cancelled.is_set() else "failed"
            if error is not None:
                await self._add(builder.failed_events(choice, error))
            if self._final is None:
                self._final = builder.ended_response(choice, status, error)
            self._source = None
            self.ended = True
            async with self._changed:
                self._changed.notify_all()

    def complete(self, response: dict[str, Any]) -> None:
        """Note the document of the complete response."""
        self._final = response

    async def _add(self, events: bytes) -> None:
        for event in events.split(b"\n\n"):
            if event and not event.startswith(b":"):  # not a keep-alive comment
                self._events.append(event + b"\n\n")
                self.num_bytes += len(event)
        async with self._changed:
            self._changed.notify_all()


class BackgroundRuns:
    """The background responses that run, and the last ones that have ended."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._runs: OrderedDict[str, BackgroundRun] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, owner: str, response_id: str) -> BackgroundRun | None:
        """Return a run of `owner`."""
        run = self._runs.get(response_id)
        return run if run is not None and run.owner == owner else None

    def remove(self, response_id: str) -> None:
        """Forget a run; it is cancelled if it has not ended."""
        run = self._runs.pop(response_id, None)
        if run is not None:
            run.removed = True
            run.cancel()

    async def start(
        self,
        request: Request,
        run: BackgroundRun,
        choices: list[Choice],
        timeout: float | None,
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        """Begin to compute a response, which counts for the key of `request` until it has ended.

        on_end: gets the document of the ended response. Raises ApiError when the queue is full.
        """
        generation = await new_generation(self._state, request, choices, timeout)
        admission: Admission = request.scope["llmkit.admission"]
        client = admission.client
        successor = client.hand_over(admission)
        request = Request({**request.scope, "llmkit.admission": successor})
        self._runs[run.id] = run
        self._state.num_background_responses += 1

        async def work() -> None:
            try:
                # A graceful stop waits for it.
                with self._state.track_request():
                    await run.run(self._state, request, generation)
            finally:
                self._state.num_background_responses -= 1
                client.release(successor)
                if not run.removed:
                    on_end(run.response)
                self._forget_old()

        task = asyncio.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget_old(self) -> None:
        num_bytes = 0
        ended = [run for run in self._runs.values() if run.ended]
        for count, run in enumerate(reversed(ended), 1):
            num_bytes += run.num_bytes
            if count > _MAX_ENDED or num_bytes > _MAX_ENDED_BYTES:
                del self._runs[run.id]
