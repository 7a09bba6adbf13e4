"""The API process's event loop: it loads, serves, and ends in one of three ways.

It ends gracefully with the first signal, at once with the second, and with an error when an engine
process ends for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llmkit.common.errors import InputError, ShortageError
from llmkit.common.formatting import count_text
from llmkit.runtime.prefix_folder import private_folder
from llmkit.runtime.server.app import build_app
from llmkit.runtime.server.async_waits import StopSignals, run_in_thread, wait_first
from llmkit.runtime.server.engine_changes import EngineChanges
from llmkit.runtime.server.engines.engine_client import EngineClient
from llmkit.runtime.server.engines.engine_messages import EngineReady
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.engines.restarts import supervise_embedder, supervise_engines
from llmkit.runtime.server.http.http_errors import ApiError
from llmkit.runtime.server.http.key_ring import KeyRing
from llmkit.runtime.server.http.protocol import LimitedHttpProtocol
from llmkit.runtime.server.http.tls import tls_context
from llmkit.runtime.server.response_cache import ResponseCache
from llmkit.runtime.server.sandbox import SandboxError
from llmkit.runtime.server.sandbox_process import CheckTemplate
from llmkit.runtime.server.semantic.semantic_options import new_semantic_answers
from llmkit.runtime.server.serve_options import ServeOptions, default_name, template_error
from llmkit.runtime.server.server_metrics import ServerMetrics
from llmkit.runtime.server.server_state import Phase, ServerState, TextResources
from llmkit.runtime.server.state_metrics import StateCollector
from llmkit.runtime.server.stored_responses.response_store import ResponseStore, store_path
from llmkit.runtime.server.tracing import Tracing
from llmkit.runtime.server.websockets.socket_protocol import (
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
    LimitedWebSocketProtocol,
)

# How long /health answers 503 after the engine's death before the process exits, so that a probe
# sees it.
_DEATH_NOTICE_S = 2.0
# How long a shutdown waits until the last error events have reached the clients.
_LAST_BYTES_S = 2
# How long a shutdown waits until the last trace spans are sent.
_LAST_SPANS_S = 2.0
# How long a shutdown waits for the thread that loads the tokenizer: an interpreter should not end
# while a thread imports a module.
_TEXT_WAIT_S = 5.0
# How much of a body that is too large is received, as a multiple of the limit.
_DROP_FACTOR = 16
# Longer than the idle time of common clients and proxies, so that they close first.
_KEEP_ALIVE_S = 75

Log = Callable[[str], None]
OnReady = Callable[[Mapping[str, Any]], None]
EngineProcess = tuple[subprocess.Popen[bytes], socket.socket]


async def serve(
    options: ServeOptions,
    clients: KeyRing,
    listener: socket.socket,
    engines: Sequence[EngineProcess],
    start_embedder: Callable[[], EngineProcess] | None,
    start_engine: Callable[[int, str], EngineProcess],
    start_time: float,
    log: Log,
    on_ready: OnReady,
) -> int:
    """Serve on `listener` and return the exit code; see run_server.

    engines: the started engine processes, each with its socket. start_embedder: starts the process
    of --semantic-cache-model. start_engine: starts a process for a replica whose process has ended.
    start_time: time.perf_counter() at the start.
    """
    api_seconds = {"python and imports": _seconds_since(start_time)}
    with StopSignals() as stop:
        metrics = ServerMetrics(lambda: replicas.stats, gpus=options.engine.device != "cpu")

        async def connect(replica: int, engine: EngineProcess) -> EngineClient:
            who = f"replica {replica}: " if len(engines) > 1 else ""
            client = await EngineClient.connect(*engine, who, options.engine_timeout)
            client.on_step = metrics.record_step
            return client

        engine_clients = [await connect(index, engine) for index, engine in enumerate(engines)]
        replicas = Replicas(engine_clients, options.engine.prefix_cache)
        model_name = options.served_model_name or default_name(options.model)
        state = ServerState(options, replicas, metrics, model_name)
        metrics.register(StateCollector(state))
        if options.response_cache:
            state.response_cache = ResponseCache(options.response_cache, options.engine.adapters)
        embedding_engine = None
        supervising_embedder = None
        if start_embedder is not None:
            connect_embedder = functools.partial(_connect_embedder, start_embedder, options)
            embedding_engine = Replicas([await connect_embedder()])
        state.response_store = _response_store(options, model_name)
        if options.otlp_traces_endpoint is not None:
            state.tracing = Tracing(options.otlp_traces_endpoint)
        app = build_app(state, clients)
        http_server = HttpServer(app, options)
        serving = asyncio.create_task(http_server.serve(sockets=[listener]))
        watching_keys = asyncio.create_task(clients.watch())
        text = run_in_thread(lambda: _load_text(options, options.model, api_seconds))
        # Done when an engine process has ended for good.
        engine_lost: asyncio.Future[EngineClient] | None = None
        grpc_server = None
        try:
            if options.grpc_port is not None:
                grpc_server, grpc_port = await _start_grpc(app, options)
            loaded = asyncio.ensure_future(_load(replicas.ready(), _checked_text(state, text)))
            await wait_first(loaded, stop.first)
            if not loaded.done():
                loaded.cancel()
                return 128 + stop.first.result()
            state.semantic = await new_semantic_answers(
                options, replicas, *loaded.result(), embedding_engine
            )
            if embedding_engine is not None:
                supervising_embedder = asyncio.ensure_future(
                    supervise_embedder(embedding_engine, connect_embedder, log)
                )
            state.engine_changes = EngineChanges(
                state,
                lambda replica, root: connect(replica, start_engine(replica, root)),
                lambda root: _checked_text(
                    state, run_in_thread(lambda: _load_text(options, root, {}))
                ),
                log,
            )
            info = _become_ready(state, *loaded.result(), log)
            info |= {
                "url": server_url(options, listener),
                "ready_s": _seconds_since(start_time),
                "api_seconds": api_seconds,
            }
            log(
                "{model} is ready at {url} after {ready_s:.1f} s ({device}, {dtype}, "
                "context {max_model_len}, KV cache {kv_cache_tokens} tokens)".format(**info)
            )
            if grpc_server is not None:
                log(f"gRPC is at {options.host}, port {grpc_port}")
                info["grpc_port"] = grpc_port
            on_ready(info)
            engine_lost = asyncio.ensure_future(
                supervise_engines(
                    state, lambda replica: connect(replica, start_engine(replica, state.root)), log
                )
            )
            await wait_first(engine_lost, stop.first)
            if engine_lost.done():
                await _raise_engine_death(state, engine_lost.result(), stop)
            state.phase = Phase.DRAINING
            log(stopping_text(state.num_active_requests))
            idle = asyncio.ensure_future(state.wait_until_idle())
            await wait_first(idle, engine_lost, stop.second, timeout=options.drain_timeout)
            if stop.second.done():
                return 128 + stop.second.result()
            return 0
        finally:
            state.fail_all(ApiError(503, "The server is shutting down.", code="shutting_down"))
            if engine_lost is not None:
                engine_lost.cancel()
            watching_keys.cancel()
            if supervising_embedder is not None:
                supervising_embedder.cancel()
            if state.engine_changes is not None:
                state.engine_changes.close()
            http_server.should_exit = True
            await serving
            if grpc_server is not None:
                await grpc_server.stop(_LAST_BYTES_S)
            replicas.close()
            if embedding_engine is not None:
                embedding_engine.close()
            if state.tracing is not None:
                await wait_first(run_in_thread(state.tracing.close), timeout=_LAST_SPANS_S)
            await wait_first(text, timeout=_TEXT_WAIT_S)
            if text.done():
                text.exception()  # read, so that asyncio does not report it as never retrieved
            state.close_sandboxes()
            if state.response_store is not None:
                state.response_store.close()


async def _connect_embedder(
    start: Callable[[], EngineProcess], options: ServeOptions
) -> EngineClient:
    who = "the model of --semantic-cache-model: "
    return await EngineClient.connect(*start(), who, options.engine_timeout)


def _response_store(options: ServeOptions, model_name: str) -> ResponseStore | None:
    if options.response_store is None:
        if not options.store_responses:
            return None
        path = None
    else:
        path = store_path(
            private_folder(str(options.response_store), "the folder of responses"), model_name
        )
    return ResponseStore(path, options.response_store_size, options.response_store_ttl)


def stopping_text(num_requests: int) -> str:
    """The line for the user at the first signal."""
    if not num_requests:
        return "stopping: no requests left"
    what = "it" if num_requests == 1 else "them"
    return f"stopping: {count_text(num_requests, 'requests')} left, Ctrl-C again to cut {what}"


def _become_ready(
    state: ServerState, engine: EngineReady, text: TextResources, log: Log
) -> dict[str, Any]:
    """Accept requests from now on; return the data of the model for `on_ready`.

    Raises InputError when the tokenizer does not fit the model.
    """
    num_tokens = text.tokenizer.vocab_size
    if num_tokens > engine.vocab_size:
        raise InputError(
            f"the tokenizer has {num_tokens} tokens and the model's embedding {engine.vocab_size}",
            "The embedding must have a row for every token",
            "Use the tokenizer that the model was trained with",
        )
    options = state.options.engine
    if options.device == "auto" and engine.device == "cpu":
        log("no CUDA device: running on the CPU")
    model_limit = engine.plan["model_limit"]
    if options.max_model_len is None and engine.max_model_len != model_limit:
        log(
            "the context is what the KV cache holds; the model's own limit is "
            f"{model_limit} (see --kv-cache-memory)"
        )
    state.become_ready(engine, text)
    if text.edit_warning is not None:
        log(f"warning: {text.edit_warning}")
    for setting in text.not_applied:
        log(f"generation_config.json has {setting}, which is not applied")
    if text.dialect.tools is not None or text.dialect.has_reasoning:
        log(text.dialect.description)
    return {
        "model": state.model_name,
        "device": engine.device,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "kv_cache_tokens": engine.kv_cache_tokens,
        "replicas": options.dp,
        "load_s": round(engine.load_s, 3),
        "engine_seconds": {stage: round(spent, 3) for stage, spent in engine.seconds.items()},
        "memory": engine.plan,
        "paths": engine.fast_paths,
    }


def _load_text(options: ServeOptions, model: str, api_seconds: dict[str, float]) -> TextResources:
    start_time = time.perf_counter()
    text = TextResources.load(
        model,
        options.chat_template,
        options.label_tokens,
        options.tool_parser,
        options.reasoning_parser,
    )
    api_seconds["tokenizer"] = _seconds_since(start_time)
    return text


async def _checked_text(state: ServerState, text: asyncio.Future[TextResources]) -> TextResources:
    """Wait for `text`, and check that its chat templates compile. Cancelling does not cancel it.

    This starts the sandbox while the engine still loads, so that the first chat need not wait.
    Raises InputError with the line that does not compile.
    """
    resources = await asyncio.shield(text)
    options = state.options
    for template in resources.tokenizer.chat_templates.values():
        try:
            await state.templates.run(CheckTemplate(template))
        except SandboxError as error:
            files = resources.files
            what = f"the chat template of {options.model if files is None else files.reference}"
            if options.chat_template is not None:
                what = f"--chat-template {options.chat_template}"
            raise template_error(what, error) from None
    return resources


def _seconds_since(start_time: float) -> float:
    return round(time.perf_counter() - start_time, 3)


async def _raise_engine_death(state: ServerState, engine: EngineClient, stop: StopSignals) -> None:
    """Answer /health with 503 for a moment, then raise the LlmkitError of the engine's end.

    All streams have failed by now.
    """
    state.phase = Phase.DEAD
    death = run_in_thread(engine.death_error)
    await wait_first(stop.first, timeout=_DEATH_NOTICE_S)
    raise await death


class HttpServer(uvicorn.Server):
    """uvicorn with the limits of LimitedHttpProtocol. The lifecycle handles signals itself."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        limits = {
            "write_timeout_s": options.write_timeout,
            "max_dropped_bytes": options.max_body_bytes * _DROP_FACTOR,
            "drop_timeout_s": options.body_timeout,
        }
        protocol_class = type("Protocol", (LimitedHttpProtocol,), limits)
        socket_class = type(
            "SocketProtocol",
            (LimitedWebSocketProtocol,),
            {"write_timeout_s": options.write_timeout},
        )
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=protocol_class,
                ws=socket_class,
                ws_max_size=options.max_body_bytes,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_TIMEOUT_S,
                ws_per_message_deflate=False,  # a small message could be a huge one
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
        """Install no signal handlers, in place of uvicorn's."""
        yield


async def _start_grpc(app: ASGIApp, options: ServeOptions) -> tuple[Any, int]:
    try:
        # Imported here, as gRPC is an optional dependency.
        from llmkit.runtime.server.kserve.grpc_server import start_grpc_server
    except ImportError:
        missing = "--grpc-port needs gRPC and Triton's messages, which are not installed"
        raise ShortageError(missing, todo="pip install 'llmkit[grpc]'") from None
    return await start_grpc_server(app, options)


async def _load(
    engine: Awaitable[EngineReady], text: Awaitable[TextResources]
) -> tuple[EngineReady, TextResources]:
    """Return both results, or raise the first error."""
    return await asyncio.gather(engine, text)


def server_url(options: ServeOptions, listener: socket.socket) -> str:
    """Return the URL for clients."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://{host}:{port}"
