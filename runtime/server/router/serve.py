"""`run_models`: several models behind one port, from the first line to the exit code."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmkit.runtime.child import Child
from llmkit.runtime.server.http.keys import Client, api_keys
from llmkit.runtime.server.http.tls import event_loop, tls_context
from llmkit.runtime.server.lifecycle import HttpServer, server_url
from llmkit.runtime.server.options import ServeOptions
from llmkit.runtime.server.router.app import Router
from llmkit.runtime.server.router.fleet import Fleet, Model
from llmkit.runtime.server.serve import bind, check_exposure
from llmkit.runtime.server.waiting import StopSignals, first

_STOP_S = 5.0  # for the models' servers to end once no request is under way

Message = Callable[[str], None]
OnReady = Callable[[Mapping[str, Any]], None]


def run_models(
    options: ServeOptions,
    models: Mapping[str, str],
    max_loaded: int,
    idle_s: float,
    message: Message,
    ready: OnReady,
    began: float,
) -> int:
    """Serve until a signal, as `run_server` does. models: by name; `options` are each one's but for its model.

    max_loaded, idle_s: see `Fleet`. began: the perf_counter() at the start.
    """
    keys = api_keys(options)
    check_exposure(options, keys)
    tls_context(options)
    with (
        bind(options.host, options.port) as listener,
        asyncio.Runner(loop_factory=lambda: event_loop(options)) as runner,
    ):
        return runner.run(_serve(options, models, max_loaded, idle_s, keys, listener, message, ready, began))


async def _serve(
    options: ServeOptions,
    models: Mapping[str, str],
    max_loaded: int,
    idle_s: float,
    keys: tuple[Client, ...],
    listener: socket.socket,
    message: Message,
    ready: OnReady,
    began: float,
) -> int:
    def hosted(name: str, reference: str) -> Model:
        own = replace(options, model=reference, served_model_name=name)
        return Model(name, reference, lambda: Child(own, message=lambda text: message(f"{name}: {text}")))

    with StopSignals() as stop:
        fleet = Fleet((hosted(*one) for one in models.items()), max_loaded, idle_s, message)
        router = Router(fleet, options)
        http = HttpServer(router.app(keys), options)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            url, ready_s = server_url(options, listener), round(time.perf_counter() - began, 3)
            message(f"{', '.join(models)}: loaded when asked for; the server is ready at {url} after {ready_s:.1f} s")
            ready({"models": dict(models), "url": url, "ready_s": ready_s})
            await first(stop.first, serving)
            router.draining = True
            idle = asyncio.ensure_future(router.idle())
            await first(idle, stop.second, timeout=options.drain_timeout)
            return 128 + stop.second.result() if stop.second.done() else 0
        finally:
            await fleet.close(0.0 if stop.second.done() else _STOP_S)
            http.should_exit = True
            await serving
