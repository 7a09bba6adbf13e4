"""`run_models`: several models behind one port, from the start to the exit code."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmkit.runtime.server.async_waits import StopSignals, wait_first
from llmkit.runtime.server.http.api_keys import Client, load_api_keys
from llmkit.runtime.server.http.tls import new_event_loop, tls_context
from llmkit.runtime.server.lifecycle import HttpServer, server_url, stopping_text
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.router.router_app import Router
from llmkit.runtime.server.run_server import bind, check_exposure, log_open_doors
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server_files import server_file
from llmkit.runtime.server_process import ServerProcess

_STOP_S = 5.0  # for the models' servers to end, once no request is running

Log = Callable[[str], None]
OnReady = Callable[[Mapping[str, Any]], None]


def run_models(
    options: ServeOptions,
    models: Mapping[str, str],
    max_loaded: int,
    idle_s: float,
    log: Log,
    on_ready: OnReady,
    start_time: float,
    check_models: Callable[[], None],
) -> int:
    """Serve until a signal and return the exit code, as `run_server` does.

    options: for every model; `options.model` is ignored. models: directories or hub ids, by
    name. max_loaded, idle_s: see `ModelPool`. log, on_ready, start_time: see `run_server`.
    check_models: raises the LlmkitError of a wrong model; called before the server listens.
    """
    clients = load_api_keys(options)
    check_exposure(options, clients)
    log_open_doors(options, clients, log)
    tls_context(options)  # reports wrong files at once
    check_models()
    with (
        bind(options.host, options.port) as listener,
        asyncio.Runner(loop_factory=lambda: new_event_loop(options)) as runner,
        server_file() as file,
    ):

        def announce(facts: Mapping[str, Any]) -> None:
            file.write(facts)
            on_ready(facts)

        return runner.run(
            _serve(
                options, models, max_loaded, idle_s, clients, listener, log, announce, start_time
            )
        )


async def _serve(
    options: ServeOptions,
    models: Mapping[str, str],
    max_loaded: int,
    idle_s: float,
    clients: tuple[Client, ...],
    listener: socket.socket,
    log: Log,
    on_ready: OnReady,
    start_time: float,
) -> int:
    def pooled_model(name: str, reference: str) -> PooledModel:
        model_options = replace(options, model=reference, served_model_name=name)

        def start() -> ServerProcess:
            return ServerProcess(model_options, message=lambda text: log(f"{name}: {text}"))

        return PooledModel(name, reference, start)

    with StopSignals() as stop:
        pooled_models = [pooled_model(name, reference) for name, reference in models.items()]
        pool = ModelPool(pooled_models, max_loaded, idle_s, log)
        router = Router(pool, options)
        http_server = HttpServer(router.app(clients), options)
        serving = asyncio.create_task(http_server.serve(sockets=[listener]))
        try:
            url = server_url(options, listener)
            ready_s = round(time.perf_counter() - start_time, 3)
            log(
                f"{', '.join(models)}: loaded when asked for; "
                f"the server is ready at {url} after {ready_s:.1f} s"
            )
            on_ready({"models": dict(models), "url": url, "ready_s": ready_s})
            await wait_first(stop.first, serving)
            router.draining = True
            log(stopping_text(router.num_active_requests))
            idle = asyncio.ensure_future(router.wait_until_idle())
            await wait_first(idle, stop.second, timeout=options.drain_timeout)
            if stop.second.done():
                return 128 + stop.second.result()
            return 0
        finally:
            await pool.close(0.0 if stop.second.done() else _STOP_S)
            http_server.should_exit = True
            await serving
