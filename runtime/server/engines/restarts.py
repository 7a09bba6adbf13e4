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
from llmkit.runtime.server.engines.replicas import Replicas
from llmkit.runtime.server.server_state import Phase, ServerState

WINDOW_S = 3600.0  # deaths within this time count against --restart
# Of the model that embeds questions. Without it, answers are computed, so its end ends nothing.
EMBEDDER_RESTARTS = 3


class _RecentDeaths:
    """Counts the deaths of processes within WINDOW_S against a limit of restarts."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._times = deque[float]()  # monotonic

    def count(self) -> bool:
        """Count a death, and return whether the process may be restarted."""
        now = time.monotonic()
        while self._times and self._times[0] < now - WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self._max_restarts:
            return False
        self._times.append(now)
        return True

    def __str__(self) -> str:
        return f"{len(self._times)} of {self._max_restarts} times in an hour"


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
    deaths = _RecentDeaths(state.options.restart)
    while True:
        index = await replicas.wait_for_death()
        engine = replicas.clients[index]
        while engine.dead.is_set():
            died_at = time.monotonic()
            if state.phase is Phase.DRAINING or not deaths.count():
                replicas.close()
                return engine
            error = await run_in_thread(engine.death_error)
            message(f"{error} Restarting it ({deaths})")
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


async def supervise_embedder(
    engines: Replicas,
    start: Callable[[], Awaitable[EngineClient]],
    message: Callable[[str], None],
) -> None:
    """Replace the process that embeds questions when it dies, up to EMBEDDER_RESTARTS times.

    Without one, the semantic cache finds nothing. `start` starts a process.
    """
    deaths = _RecentDeaths(EMBEDDER_RESTARTS)
    while True:
        await engines.wait_for_death()
        (engine,) = engines.clients
        while engine.dead.is_set():
            error = await run_in_thread(engine.death_error)
            if not deaths.count():
                message(f"{error} The semantic cache is off: it was restarted {deaths}")
                return
            message(f"{error} Restarting it ({deaths})")
            engine = await start()
            try:
                await asyncio.wait([engine.ready])
            except asyncio.CancelledError:
                engine.close()
                raise
        engines.replace(0, engine)
        message(f"{engine.label}it is back")


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
