"""From choices to an HTTP answer, whole or streamed, in whatever shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from llmkit.runtime.server.generation import Choice, Delta, Generation
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.http.keys import Visit
from llmkit.runtime.server.request_log import log_request
from llmkit.runtime.server.shapes.openai import Shape, Whole
from llmkit.runtime.server.state import State


async def answer(
    state: State, request: Request, shape: Shape, choices: list[Choice], stream: bool, timeout: float | None = None
) -> Response:
    """The answer to `request`. ApiError when there is no room, or the engine refuses or fails before it begins.

    timeout: seconds since it arrived, after which it fails with 504.
    """
    if not stream:
        return await answer_whole(state, request, shape, choices, timeout)
    generation = _generation(state, request, choices, timeout)
    return EventStream(_stream(state, request, shape, generation), shape, generation.remembered.headers)


async def answer_whole(
    state: State, request: Request, shape: Whole, choices: list[Choice], timeout: float | None = None
) -> Response:
    """`answer` of what is not streamed."""
    return await _whole(state, request, shape, _generation(state, request, choices, timeout))


def _generation(state: State, request: Request, choices: list[Choice], timeout: float | None) -> Generation:
    state.check_room(len(choices), sum(len(choice.request.prompt) for choice in choices))
    visit: Visit = request.scope["llmkit.visit"]
    visit.take(choices)
    arrived: float = request.scope["llmkit.arrived"]
    timeout = min((one for one in (timeout, state.options.request_timeout) if one is not None), default=None)
    eos_ids, cache = state.text.tokenizer.eos_ids, state.responses
    return Generation(state.client, state.metrics, choices, eos_ids, arrived, timeout, cache)


class EventStream(Response):
    """Server-sent events. The status waits for the first event, so that an error before it has a status."""

    def __init__(self, chunks: AsyncGenerator[bytes], shape: Shape, headers: dict[str, str]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"} | headers)
        del self.headers["content-length"]
        self._chunks = chunks
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": self._shape.failed(error), "more_body": True})
        if started:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _stream(state: State, request: Request, shape: Shape, generation: Generation) -> AsyncGenerator[bytes]:
    with _running(state, request, generation):
        async for deltas in generation.deltas():
            if chunk := shape.chunks(generation.choices, deltas):
                yield chunk
        if not generation.disconnected:
            yield shape.last(generation.choices)


async def _whole(state: State, request: Request, shape: Whole, generation: Generation) -> Response:
    answers = [Delta(choice.index) for choice in generation.choices]
    with _running(state, request, generation):
        async for deltas in generation.deltas():
            for delta in deltas:
                answers[delta.index].add(delta)
    if generation.disconnected:
        return Response(status_code=400)  # nobody reads it
    document = shape.whole(generation.choices, answers)
    return Response(document, headers=generation.remembered.headers, media_type="application/json")


@contextlib.contextmanager
def _running(state: State, request: Request, generation: Generation) -> Iterator[None]:
    """The generation is in the engine, and leaves it when the client goes away."""
    watch = asyncio.create_task(_watch_for_disconnect(request.receive, generation))
    state.began(generation)
    try:
        generation.start()
        yield
    finally:
        generation.cancel()
        state.ended(generation)
        model = generation.choices[0].request.adapter or state.model_name
        if state.options.log_requests:
            visit: Visit = request.scope["llmkit.visit"]
            log_request(model, generation.choices, generation.ended, visit.client.name)
        if state.tracing is not None:
            state.tracing.record(request.scope, model, generation)
        watch.cancel()


async def _watch_for_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.disconnect()
