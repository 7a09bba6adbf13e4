"""Runs the choices of a request in the engine and sends the HTTP response, in full or streamed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from llmkit.runtime.server.choice import Choice, Delta
from llmkit.runtime.server.generation import Generation
from llmkit.runtime.server.http.api_keys import Admission
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
    events = stream_events(state, request, builder, generation, gate)
    return EventStreamResponse(events, builder, lambda: _headers(generation, gate))


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
    with _running(state, request, generation):
        async for deltas in generation.deltas():
            for delta in deltas:
                answers[delta.index].append(delta)
            if gate is not None:
                gate.update()
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
        events: AsyncGenerator[bytes],
        builder: ResponseBuilder,
        more_headers: Callable[[], dict[str, str]],
    ) -> None:
        """more_headers: called when the status is sent."""
        self._format = builder.stream_format
        super().__init__(media_type=self._format.media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._more_headers = more_headers
        self._events = events
        self._builder = builder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        keep_alive = self._format.keep_alive
        end_of_keep_alive = b""
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    if not started:
                        started = True
                        self.headers.update(self._more_headers())
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": self.raw_headers,
                            }
                        )
                    if event == keep_alive:
                        end_of_keep_alive = self._format.end_of_keep_alive
                        await _send_body(send, event)
                    else:
                        await _send_body(send, end_of_keep_alive + event)
                        end_of_keep_alive = b""
        except ApiError as error:
            if not started:
                raise
            await _send_body(send, end_of_keep_alive + self._builder.error_event(error))
        if started:
            await _send_body(send, b"", more=False)


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def stream_events(
    state: ServerState,
    request: Request,
    builder: ResponseBuilder,
    generation: Generation,
    gate: UncertaintyGate | None = None,
) -> AsyncGenerator[bytes]:
    """Run `generation` and yield its events, until the client of `request` disconnects."""
    keep_alive = _KeepAlive(state.options.stream_keep_alive, generation.wake)
    with _running(state, request, generation), contextlib.closing(keep_alive):
        all_deltas = generation.deltas()
        async for deltas in all_deltas if gate is None else gate.hold(all_deltas):
            events = builder.stream_events(generation.choices, deltas) if deltas else b""
            if not events and keep_alive.is_due:
                events = builder.stream_format.keep_alive
            if events:
                keep_alive.restart()
                yield events
        if not generation.disconnected:
            yield builder.final_events(generation.choices)


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
