"""`run_models`: several models behind one port, from the start to the exit code."""

from __future__ import annotations

import asyncio
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmkit.runtime.gpu_sharing import mps_environment
from llmkit.runtime.server.async_waits import StopSignals, wait_first
from llmkit.runtime.server.http.key_ring import KeyRing
from llmkit.runtime.server.http.tls import new_event_loop, tls_context
from llmkit.runtime.server.lifecycle import HttpServer, server_url, stopping_text
from llmkit.runtime.server.ollama.model_facts import ModelFacts
from llmkit.runtime.server.router.model_pool import ModelPool, PooledModel
from llmkit.runtime.server.router.router_app import Router
from llmkit.runtime.server.run_server import bind, check_exposure, log_open_doors
from llmkit.runtime.server.serve_options import ServeOptions
from llmkit.runtime.server.shadow.shadow_options import ShadowOptions
from llmkit.runtime.server.shadow.shadow_queue import Shadows
from llmkit.runtime.server.tiers.named_routes import NamedRoutes
from llmkit.runtime.server.tiers.route_config import Route, Routing
from llmkit.runtime.server.tiers.url_tier import UrlTier
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
    check_models: Callable[[], Mapping[str, ModelFacts]],
    routing: Routing | None = None,
    shadows: ShadowOptions | None = None,
    mps_shares: Mapping[str, int] | None = None,
) -> int:
    """Serve until a signal and return the exit code, as `run_server` does.

    options: for every model. `options.model` is ignored, unless `options.sagemaker` is
    "multi-model": then it is the folder of the models that requests load, and `models` is empty.
    models: directories or hub ids, by name. max_loaded, idle_s: see `ModelPool`. log, on_ready,
    start_time: see `run_server`.
    check_models: returns the facts about models, by name, and raises the LlmkitError of a wrong
    one; called before the server listens.
    routing: names that several models or URLs answer. Raises InputError when a key or a
    certificate of a URL is not there. shadows: None: none; raises ShortageError when their log
    cannot be written. mps_shares: percent of the GPU's threads by model; others may use all.
    """
    folder = tempfile.TemporaryDirectory(prefix="llmkit-")
    # The router and the models' servers count what keys use of their limits together.
    options = replace(options, usage_file=f"{folder.name}/key-usage")
    clients = KeyRing(options, log)
    check_exposure(options, clients)
    log_open_doors(options, clients, log)
    tls_context(options)  # reports wrong files at once
    routing = routing or Routing({}, {})
    url_tiers = [UrlTier(name, upstream) for name, upstream in routing.upstreams.items()]
    facts_of_models = check_models()
    with (
        folder,
        bind(options.host, options.port) as listener,
        asyncio.Runner(loop_factory=lambda: new_event_loop(options)) as runner,
        server_file() as file,
    ):

        def announce(facts: Mapping[str, Any]) -> None:
            file.write(facts)
            on_ready(facts)

        return runner.run(
            _serve(
                options,
                models,
                max_loaded,
                idle_s,
                clients,
                listener,
                log,
                announce,
                start_time,
                routing.routes,
                url_tiers,
                facts_of_models,
                shadows or ShadowOptions(),
                mps_shares or {},
            )
        )


async def _serve(
    options: ServeOptions,
    models: Mapping[str, str],
    max_loaded: int,
    idle_s: float,
    clients: KeyRing,
    listener: socket.socket,
    log: Log,
    on_ready: OnReady,
    start_time: float,
    routes: Mapping[str, Route],
    url_tiers: Sequence[UrlTier],
    facts_of_models: Mapping[str, ModelFacts],
    shadow_options: ShadowOptions,
    mps_shares: Mapping[str, int],
) -> int:
    router_key = secrets.token_urlsafe(32) if shadow_options.shadows and clients else None

    def pooled_model(name: str, reference: str) -> PooledModel:
        model_options = replace(
            options,
            model=reference,
            served_model_name=name,
            behind_router=True,
            sagemaker=options.sagemaker and "single-model",
        )

        def start() -> ServerProcess:
            return ServerProcess(
                model_options,
                message=lambda text: log(f"{name}: {text}"),
                router_key=router_key,
                environment=mps_environment(mps_shares.get(name)),
            )

        return PooledModel(name, reference, start)

    with StopSignals() as stop:
        pooled_models = [pooled_model(name, reference) for name, reference in models.items()]
        for model in pooled_models:
            model.facts = facts_of_models.get(model.name)
        pool = ModelPool(pooled_models, max_loaded, idle_s, log)
        named_routes = NamedRoutes(routes, {tier.name: tier for tier in url_tiers}, pool)
        shadows = Shadows(shadow_options, named_routes.tiers, pool, router_key)
        loads_on_request = options.sagemaker == "multi-model"
        new_model = pooled_model if loads_on_request else None
        router = Router(pool, options, named_routes, shadows, new_model)
        http_server = HttpServer(router.app(clients), options)
        serving = asyncio.create_task(http_server.serve(sockets=[listener]))
        watching_keys = asyncio.create_task(clients.watch())
        try:
            url = server_url(options, listener)
            ready_s = round(time.perf_counter() - start_time, 3)
            served = ", ".join([*models, *named_routes.names])
            if loads_on_request:
                served = f"the models of {options.model}"
            log(
                f"{served}: loaded when asked for; "
                f"the server is ready at {url} after {ready_s:.1f} s"
            )
            facts = {"models": dict(models), "url": url, "ready_s": ready_s}
            if routes:
                facts["routes"] = {name: route.tiers for name, route in routes.items()}
            on_ready(facts)
            await wait_first(stop.first, serving)
            router.draining = True
            log(stopping_text(router.num_active_requests))
            idle = asyncio.ensure_future(router.wait_until_idle())
            await wait_first(idle, stop.second, timeout=options.drain_timeout)
            if stop.second.done():
                return 128 + stop.second.result()
            return 0
        finally:
            watching_keys.cancel()
            await shadows.close()
            await pool.close(0.0 if stop.second.done() else _STOP_S)
            for tier in url_tiers:
                await tier.close()
            http_server.should_exit = True
            await serving
