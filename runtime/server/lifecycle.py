"""The API process's event loop: load, serve, and the three ways to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.runtime.server.app import build_app
from llmkit.runtime.server.engines.messages import Ready
from llmkit.runtime.server.engines.process import EngineClient
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.engines.restarts import keep_running
from llmkit.runtime.server.http.errors import ApiError
from llmkit.runtime.server.http.keys import Client
from llmkit.runtime.server.http.protocol import LimitedHttpProtocol
from llmkit.runtime.server.http.tls import tls_context
from llmkit.runtime.server.metrics import Metrics
from llmkit.runtime.server.options import ServeOptions, default_name
from llmkit.runtime.server.response_cache import ResponseCache
from llmkit.runtime.server.state import Phase, State, TextSide
from llmkit.runtime.server.tracing import Tracing
from llmkit.runtime.server.waiting import StopSignals, first, in_thread

# After the engine's death, health answers 503 for so long before the process exits: probes get to see it.
_DEATH_NOTICE_S = 2.0
_LAST_BYTES_S = 2  # for error events to leave once nothing is waited for any more
_LAST_SPANS_S = 2.0
_TEXT_WAIT_S = 5.0  # an interpreter should not end while a thread is in the middle of an import
_KEEP_ALIVE_S = 75  # longer than the idle time of common clients and proxies, so that they close first

Message = Callable[[str], None]
OnReady = Callable[[Mapping[str, Any]], None]
EngineProcess = tuple[subprocess.Popen[bytes], socket.socket]


async def serve(
    options: ServeOptions,
    keys: tuple[Client, ...],
    listener: socket.socket,
    engines: Sequence[EngineProcess],
    start: Callable[[int], EngineProcess],
    began: float,
    message: Message,
    ready: OnReady,
) -> int:
    """Serve on `listener` with engine processes, each behind its socket; see run_server.

    start: makes one that takes the place of one that has ended. began: perf_counter at the start, for the ready line.
    """
    seconds = {"python and imports": _since(began)}
    with StopSignals() as stop:
        metrics = Metrics(lambda: client.stats, gpus=options.engine.device != "cpu")

        async def connect(place: int, engine: EngineProcess) -> EngineClient:
            who = f"replica {place}: " if len(engines) > 1 else ""
            one = await EngineClient.connect(*engine, who, options.engine_timeout)
            one.on_step = metrics.stepped
            return one

        client = Replicas([await connect(*one) for one in enumerate(engines)], options.engine.prefix_cache)
        state = State(options, client, metrics, options.served_model_name or default_name(options.model))
        metrics.watch(state)
        if options.response_cache:
            state.responses = ResponseCache(options.response_cache, options.engine.adapters)
        if options.otlp_traces_endpoint is not None:
            state.tracing = Tracing(options.otlp_traces_endpoint)
        app = build_app(state, keys)
        http = HttpServer(app, options)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        text = in_thread(lambda: _load_text(options.model, seconds))
        text.add_done_callback(lambda _: _start_templates(state, text))
        lost: asyncio.Future[EngineClient] | None = None
        grpc = None
        try:
            if options.grpc_port is not None:
                grpc, grpc_port = await _start_grpc(app, options)
            loaded = asyncio.ensure_future(_both(client.ready(), text))
            await first(loaded, stop.first)
            if not loaded.done():
                loaded.cancel()
                return 128 + stop.first.result()
            facts = _open_for_requests(state, *loaded.result(), message)
            facts |= {"url": server_url(options, listener), "ready_s": _since(began), "api_seconds": seconds}
            message(
                "{model} is ready at {url} after {ready_s:.1f} s ({device}, {dtype}, context {max_model_len}, KV "
                "cache {kv_cache_tokens} tokens)".format(**facts)
            )
            if grpc is not None:
                message(f"gRPC is at {options.host}, port {grpc_port}")
                facts["grpc_port"] = grpc_port
            ready(facts)
            lost = asyncio.ensure_future(keep_running(state, lambda place: connect(place, start(place)), message))
            await first(lost, stop.first)
            if lost.done():
                await _announce_death(state, lost.result(), stop)
            state.phase = Phase.DRAINING
            idle = asyncio.ensure_future(state.idle())
            await first(idle, lost, stop.second, timeout=options.drain_timeout)
            return 128 + stop.second.result() if stop.second.done() else 0
        finally:
            state.fail_all(ApiError(503, "The server is shutting down.", code="shutting_down"))
            if lost is not None:
                lost.cancel()
            http.should_exit = True
            await serving
            if grpc is not None:
                await grpc.stop(_LAST_BYTES_S)
            client.close()
            if state.tracing is not None:
                await first(in_thread(state.tracing.close), timeout=_LAST_SPANS_S)
            await first(text, timeout=_TEXT_WAIT_S)
            if text.done():
                text.exception()  # known, or of no interest any more
            state.close_sandboxes()


def _open_for_requests(state: State, facts: Ready, text: TextSide, message: Message) -> dict[str, Any]:
    """Take requests from now on; what there is to say of the model. InputError when its parts do not fit."""
    known, rows = text.tokenizer.vocab_size, facts.vocab_size
    if known > rows:
        raise InputError(
            f"the tokenizer has {known} tokens and the model's embedding {rows}",
            "The embedding must have a row for every token",
            "Use the tokenizer that the model was trained with",
        )
    if state.options.engine.device == "auto" and facts.device == "cpu":
        message("no CUDA device: running on the CPU")
    if state.options.engine.max_model_len is None and facts.max_model_len != facts.plan["model_limit"]:
        limit = facts.plan["model_limit"]
        message(f"the context is what the KV cache holds; the model's own limit is {limit} (see --kv-cache-memory)")
    state.become_ready(facts, text)
    for ignored in text.not_applied:
        message(f"generation_config.json has {ignored}, which is not applied")
    return {
        "model": state.model_name,
        "device": facts.device,
        "dtype": facts.dtype,
        "max_model_len": facts.max_model_len,
        "kv_cache_tokens": facts.kv_cache_tokens,
        "replicas": state.options.engine.dp,
        "load_s": round(facts.load_s, 3),
        "engine_seconds": {stage: round(spent, 3) for stage, spent in facts.seconds.items()},
        "memory": facts.plan,
        "paths": facts.paths,
    }


def _load_text(model: str, seconds: dict[str, float]) -> TextSide:
    began = time.perf_counter()
    text = TextSide.load(model)
    seconds["tokenizer"] = _since(began)
    return text


def _start_templates(state: State, text: asyncio.Future[TextSide]) -> None:
    """Now, while the engine still loads, so that it is there for the first chat."""
    if not text.cancelled() and text.exception() is None and text.result().tokenizer.chat_template is not None:
        state.templates.start()


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


async def _announce_death(state: State, engine: EngineClient, stop: StopSignals) -> None:
    """The streams have failed by now; let health tell it for a moment, then raise LlmkitError."""
    state.phase = Phase.DEAD
    death = in_thread(engine.death)
    await first(stop.first, timeout=_DEATH_NOTICE_S)
    raise await death


class HttpServer(uvicorn.Server):
    """uvicorn with our limits; signals are the lifecycle's."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=type("Protocol", (LimitedHttpProtocol,), {"write_timeout_s": options.write_timeout}),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self.config.load()
        self.config.ssl = tls_context(options)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _start_grpc(app: ASGIApp, options: ServeOptions) -> tuple[Any, int]:
    try:
        from llmkit.runtime.server.kserve.grpc_server import start
    except ImportError:
        missing = "--grpc-port needs gRPC and Triton's messages, which are not installed"
        raise ShortageError(missing, todo="pip install 'llmkit[grpc]'") from None
    return await start(app, options)


async def _both(engine: Awaitable[Ready], text: asyncio.Future[TextSide]) -> tuple[Ready, TextSide]:
    """Both results, or the first error; `text` is not cancelled with this."""
    return await asyncio.gather(engine, asyncio.shield(text))


def server_url(options: ServeOptions, listener: socket.socket) -> str:
    """What a client is told to ask."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{'http' if options.ssl_certfile is None else 'https'}://{host}:{port}"
