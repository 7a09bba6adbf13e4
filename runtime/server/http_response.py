"""Runs the choices of a request in the engine and sends the HTTP response, in full or streamed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.http.api_keys import Admission
from llmkit.runtime.server.http.body_writer import BodyWriter
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.request_log import log_request
from llmkit.runtime.server.response_cache import CachedResponses
from llmkit.runtime.server.responses.response_builder import (
    FullResponseBuilder,
    ResponseBuilder,
)
from llmkit.runtime.server.semantic.semantic_question import SemanticQuestion
from llmkit.runtime.server.server_state import ServerState
from llmkit.runtime.server.tiers.uncertainty_gate import UncertaintyGate


async def respond(
    state: ServerState,
    request: Request,
    builder: ResponseBuilder,
    choices: list[Choice],
    stream: bool,
    timeout: float | None = None,
    question: SemanticQuestion | None = None,
) -> Response:
    """Return the response to `request`, built by `builder`, streamed or in full.

    It fails with 504 `timeout` seconds after the request arrived. question: may be answered from
    the semantic cache. Raises ApiError when the queue is full, or when the engine refuses or fails
    the request before a stream has begun.
    """
    gate = UncertaintyGate.of(state.options, request, choices, stream)
    if not stream:
        return await respond_full(state, request, builder, choices, timeout, gate, question)
    # An answer that may be given up is judged by its own tokens.
    generation = await new_generation(
        state, request, choices, timeout, None if gate is not None else question
    )
    return EventStreamResponse(state, request, builder, generation, gate)


async def respond_full(
    state: ServerState,
    request: Request,
    builder: FullResponseBuilder,
    choices: list[Choice],
    timeout: float | None = None,
    gate: UncertaintyGate | None = None,
    question: SemanticQuestion | None = None,
) -> Response:
    """Return the response to `request` in full; see `respond`. gate: may give the answer up."""
    generation = await new_generation(
        state, request, choices, timeout, None if gate is not None else question
    )
    answers = [Delta(choice.index) for choice in choices]

    def take(deltas: list[Delta]) -> bool:
        for delta in deltas:
            answers[delta.index].append(delta)
        if gate is not None:
            gate.update()
        return True

    with _running(state, request, generation):
        await generation.run(take)
    if generation.disconnected:
        return Response(status_code=400)  # the client is gone: this is never sent
    return Response(
        generation.cached.marked(builder.full_response(choices, answers)),
        headers=_headers(generation, gate),
        media_type="application/json",
    )


def _headers(generation: Generation, gate: UncertaintyGate | None) -> dict[str, str]:
    return generation.cached.headers | (gate.headers if gate is not None else {})


async def new_generation(
    state: ServerState,
    request: Request,
    choices: list[Choice],
    timeout: float | None,
    question: SemanticQuestion | None = None,
) -> Generation:
    """Check the limits of the queue and of the client's key, and create the generation."""
    num_tokens = sum(len(choice.request.prompt_token_ids) for choice in choices)
    state.check_queue_capacity(len(choices), num_tokens)
    admission: Admission = request.scope["llmkit.admission"]
    admission.reserve(choices)
    semantic = None
    if question is not None and state.semantic is not None:
        semantic = await state.semantic.look_up(question)
    limits = [limit for limit in (timeout, state.options.request_timeout) if limit is not None]
    return Generation(
        state.engines,
        state.metrics,
        choices,
        state.text.tokenizer.eos_token_ids,
        arrival_time=request.scope["llmkit.arrival_time"],
        timeout=min(limits, default=None),
        cached=CachedResponses(state.response_cache, choices, semantic),
    )


class EventStreamResponse(Response):
    """A stream of events, in the format of its builder.

    The status is sent with the first event or keep-alive, so that an error before it has a status
    of its own.
    """

    def __init__(
        self,
        state: ServerState,
        request: Request,
        builder: ResponseBuilder,
        generation: Generation,
        gate: UncertaintyGate | None,
    ) -> None:
        super().__init__(
            media_type=builder.stream_format.media_type, headers={"cache-control": "no-cache"}
        )
        del self.headers["content-length"]
        self._state = state
        self._request = request
        self._builder = builder
        self._generation = generation
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_part(part: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                self.headers.update(_headers(self._generation, self._gate))
                start = {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": self.raw_headers,
                }
                await send(start)
            await send({"type": "http.response.body", "body": part, "more_body": more})

        events = StreamEvents(
            self._state, self._builder, self._generation, send_part, BodyWriter.of(scope)
        )
        try:
            last_events = await events.run(self._request, self._gate)
        except ApiError as error:
            if not started:
                raise
            last_events = events.error_event(error)
        if started or not self._generation.disconnected:
            await send_part(last_events, more=False)


class StreamEvents:
    """The events of a stream, from the deltas of a generation.

    The first events are sent by a coroutine. Later ones are written to the connection in the call
    in which their tokens arrive, where there is a BodyWriter and while the client reads.
    """

    def __init__(
        self,
        state: ServerState,
        builder: ResponseBuilder,
        generation: Generation,
        send: Callable[[bytes], Awaitable[None]],
        writer: BodyWriter | None = None,
    ) -> None:
        """send: sends a part of the body. writer: takes parts after the first one."""
        self._state = state
        self._builder = builder
        self._generation = generation
        self._send = send
        self._writer = writer
        self._has_sent = False
        self._unsent = b""  # waits for `_drain`
        self._keep_alive = _KeepAlive(state.options.stream_keep_alive, generation.wake)
        self._head = b""  # goes before the next event, in the same part

    async def run(self, request: Request, gate: UncertaintyGate | None = None) -> bytes:
        """Run the generation and send its events, until the client of `request` disconnects.

        Returns the events that end the stream, which are not sent yet.
        """
        take = self._take if gate is None else gate.hold(self._take)
        with (
            _running(self._state, request, self._generation),
            contextlib.closing(self._keep_alive),
        ):
            await self._generation.run(take, self._drain)
            if self._generation.disconnected:
                return b""
            return self._head + self._builder.final_events(self._generation.choices)

    def error_event(self, error: ApiError) -> bytes:
        """Return the event that ends the stream with `error`."""
        return self._head + self._builder.error_event(error)

    def _take(self, deltas: list[Delta]) -> bool:
        """Send the events of `deltas` at once if possible; otherwise return False."""
        events = b""
        if deltas:
            events = self._builder.stream_events(self._generation.choices, deltas)
        if events:
            if self._head:
                events = self._head + events
                self._head = b""
        elif self._keep_alive.is_due:
            events = self._builder.stream_format.keep_alive
            self._head = self._builder.stream_format.end_of_keep_alive
        if not events:
            return True
        self._keep_alive.restart()
        if self._writer is not None and self._has_sent:
            return self._writer.write(events)
        self._unsent = events
        return False

    async def _drain(self) -> None:
        """Send what `_take` has not sent, and wait for a client that does not read."""
        if self._unsent:
            await self._send(self._unsent)
            self._unsent = b""
            self._has_sent = True
        if self._writer is not None:
            await self._writer.drain()


class _KeepAlive:
    """Calls `on_due` whenever `interval_s` seconds have passed since the last `restart`.

    Proxies and clients close a stream that is silent for long, for example while a long prompt is
    computed.
    """

    def __init__(self, interval_s: float, on_due: Callable[[], None]) -> None:
        self.is_due = False
        self._interval_s = interval_s
        self._on_due = on_due
        self._loop = asyncio.get_running_loop()
        self._restart_time = self._loop.time()
        self._timer = self._loop.call_later(interval_s, self._check)

    def restart(self) -> None:
        """Count from now. The timer is not set again here, because this runs for every event."""
        self.is_due = False
        self._restart_time = self._loop.time()

    def close(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        remaining_s = self._restart_time + self._interval_s - self._loop.time()
        if remaining_s <= 0:
            self.is_due = True
            self._on_due()
            remaining_s = self._interval_s
        self._timer = self._loop.call_later(remaining_s, self._check)


@contextlib.contextmanager
def _running(state: ServerState, request: Request, generation: Generation) -> Iterator[None]:
    """Run `generation` in the engine; abort it when the client disconnects, log it at the end."""
    watch = asyncio.create_task(_watch_for_disconnect(request.receive, generation))
    state.generation_started(generation)
    try:
        generation.start()
        yield
    finally:
        generation.abort()
        state.generation_ended(generation)
        model = generation.choices[0].request.adapter or state.model_name
        if state.options.log_requests:
            admission: Admission = request.scope["llmkit.admission"]
            log_request(
                model,
                generation.choices,
                generation.outcome,
                admission.client.name,
                request.scope["llmkit.request_id"],
            )
        if state.tracing is not None:
            state.tracing.record(request.scope, model, generation)
        watch.cancel()


async def _watch_for_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.disconnect()
