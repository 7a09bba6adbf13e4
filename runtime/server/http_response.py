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
from llmkit.runtime.server.responses.response_builder import (
    END_OF_COMMENTS,
    KEEP_ALIVE_COMMENT,
    FullResponseBuilder,
    ResponseBuilder,
)
from llmkit.runtime.server.server_state import ServerState


async def respond(
    state: ServerState,
    request: Request,
    builder: ResponseBuilder,
    choices: list[Choice],
    stream: bool,
    timeout: float | None = None,
) -> Response:
    """Return the response to `request`, built by `builder`, streamed or in full.

    It fails with 504 `timeout` seconds after the request arrived. Raises ApiError when the queue is
    full, or when the engine refuses or fails the request before a stream has begun.
    """
    if not stream:
        return await respond_full(state, request, builder, choices, timeout)
    generation = _new_generation(state, request, choices, timeout)
    events = _stream_events(state, request, builder, generation)
    return EventStreamResponse(events, builder, generation.cached.headers)


async def respond_full(
    state: ServerState,
    request: Request,
    builder: FullResponseBuilder,
    choices: list[Choice],
    timeout: float | None = None,
) -> Response:
    """Return the response to `request` in full; see `respond`."""
    generation = _new_generation(state, request, choices, timeout)
    answers = [Delta(choice.index) for choice in choices]
    with _running(state, request, generation):
        async for deltas in generation.deltas():
            for delta in deltas:
                answers[delta.index].append(delta)
    if generation.disconnected:
        return Response(status_code=400)  # the client is gone: this is never sent
    return Response(
        builder.full_response(choices, answers),
        headers=generation.cached.headers,
        media_type="application/json",
    )


def _new_generation(
    state: ServerState, request: Request, choices: list[Choice], timeout: float | None
) -> Generation:
    """Check the limits of the queue and of the client's key, and create the generation."""
    num_tokens = sum(len(choice.request.prompt_token_ids) for choice in choices)
    state.check_queue_capacity(len(choices), num_tokens)
    admission: Admission = request.scope["llmkit.admission"]
    admission.reserve(choices)
    limits = [limit for limit in (timeout, state.options.request_timeout) if limit is not None]
    return Generation(
        state.engines,
        state.metrics,
        choices,
        state.text.tokenizer.eos_token_ids,
        arrival_time=request.scope["llmkit.arrival_time"],
        timeout=min(limits, default=None),
        cache=state.response_cache,
    )


class EventStreamResponse(Response):
    """Server-sent events.

    The status is sent with the first event or keep-alive comment, so that an error before it has a
    status of its own.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], builder: ResponseBuilder, headers: dict[str, str]
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache"} | headers
        )
        del self.headers["content-length"]
        self._events = events
        self._builder = builder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        end_of_comments = b""
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": self.raw_headers,
                            }
                        )
                    if event == KEEP_ALIVE_COMMENT:
                        end_of_comments = END_OF_COMMENTS
                        await _send_body(send, event)
                    else:
                        await _send_body(send, end_of_comments + event)
                        end_of_comments = b""
        except ApiError as error:
            if not started:
                raise
            await _send_body(send, end_of_comments + self._builder.error_event(error))
        if started:
            await _send_body(send, b"", more=False)


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _stream_events(
    state: ServerState, request: Request, builder: ResponseBuilder, generation: Generation
) -> AsyncGenerator[bytes]:
    keep_alive = _KeepAlive(state.options.stream_keep_alive, generation.wake)
    with _running(state, request, generation), contextlib.closing(keep_alive):
        async for deltas in generation.deltas():
            events = builder.stream_events(generation.choices, deltas) if deltas else b""
            if not events and keep_alive.is_due:
                events = KEEP_ALIVE_COMMENT
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
