"""Restarts engine processes that die, until --restart is used up or the server is draining."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from uuid import uuid4

from llmkit.runtime.server.async_waits import run_in_thread
from llmkit.runtime.server.engines.engine_client import EngineClient
from llmkit.runtime.server.engines.engine_messages import LoadAdapter, UnloadAdapter
from llmkit.runtime.server.server_state import Phase, ServerState

WINDOW_S = 3600.0  # deaths within this time count against --restart


async def supervise_engines(
    state: ServerState,
    start: Callable[[int], Awaitable[EngineClient]],
    message: Callable[[str], None],
) -> EngineClient:
    """Replace each engine process that dies; return the one whose death ends the server.

    That is the one that exceeds --restart, or that dies while the server is draining. All other
    engine processes are closed then, and their requests fail too.

    `start` starts the process of the replica with an index. `message` shows a line to the user.
    """
    replicas = state.engines
    max_restarts = state.options.restart
    deaths = deque[float]()  # monotonic times of the deaths within WINDOW_S
    while True:
        index = await replicas.wait_for_death()
        engine = replicas.clients[index]
        while engine.dead.is_set():
            died_at = time.monotonic()
            while deaths and deaths[0] < died_at - WINDOW_S:
                deaths.popleft()
            if len(deaths) >= max_restarts or state.phase is Phase.DRAINING:
                replicas.close()
                return engine
            deaths.append(died_at)
            error = await run_in_thread(engine.death_error)
            message(f"{error} Restarting it ({len(deaths)} of {max_restarts} times in an hour)")
            engine = await start(index)
            try:
                await asyncio.wait([engine.ready])
                await reload_adapters(state, engine, message)
            except asyncio.CancelledError:
                engine.close()
                raise
        replicas.replace(index, engine)
        state.update_engine_info(await replicas.ready())
        seconds = time.monotonic() - died_at
        message(f"{engine.label}the engine process is back after {seconds:.1f} s")


async def reload_adapters(
    state: ServerState, engine: EngineClient, message: Callable[[str], None]
) -> None:
    """Load the adapters into the new process that clients had loaded into the old one.

    Clients may unload adapters meanwhile. Their requests do not reach the new process yet.
    """
    for name, path in list(state.loaded_adapters.items()):
        if name not in state.loaded_adapters:
            continue
        refused = await engine.change(LoadAdapter(uuid4().hex, name, path))
        if name not in state.loaded_adapters:
            if refused is None:
                await engine.change(UnloadAdapter(uuid4().hex, name))
        elif refused is not None and not engine.dead.is_set():
            del state.loaded_adapters[name]
            message(f"the adapter {name} is gone: {refused.message}")
