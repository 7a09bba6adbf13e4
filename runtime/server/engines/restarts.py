"""What happens when an engine process ends: it is started again, or the server ends with it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from uuid import uuid4

from llmkit.runtime.server.engines.messages import LoadAdapter
from llmkit.runtime.server.engines.process import EngineClient
from llmkit.runtime.server.state import Phase, State
from llmkit.runtime.server.waiting import in_thread

WINDOW_S = 3600.0  # in which --restart counts


async def keep_running(
    state: State, start: Callable[[int], Awaitable[EngineClient]], message: Callable[[str], None]
) -> EngineClient:
    """Put a new engine process in the place of each that ends; the one that ends once too often, or in a drain.

    start: makes the process for a place. All others are hung up in the end, and their requests fail too.
    """
    replicas, most, ends = state.client, state.options.restart, deque[float]()
    while True:
        place = await replicas.lost()
        engine = replicas.clients[place]
        while engine.dead.is_set():
            began = time.monotonic()
            while ends and ends[0] < began - WINDOW_S:
                ends.popleft()
            if len(ends) >= most or state.phase is Phase.DRAINING:
                replicas.close()
                return engine
            ends.append(began)
            message(f"{await in_thread(engine.death)} It is started again ({len(ends)} of {most} times in an hour)")
            engine = await start(place)
            try:
                await asyncio.wait([engine.ready])
                await _load_adapters(state, engine, message)
            except asyncio.CancelledError:
                engine.close()
                raise
        replicas.replace(place, engine)
        state.learn(await replicas.ready())
        message(f"{engine.who}the engine process is back after {time.monotonic() - began:.1f} s")


async def _load_adapters(state: State, engine: EngineClient, message: Callable[[str], None]) -> None:
    """Those that clients had loaded into the one before."""
    for name, path in list(state.loaded_adapters.items()):
        refused = await engine.ask(LoadAdapter(uuid4().hex, name, path))
        if refused is not None and not engine.dead.is_set():
            del state.loaded_adapters[name]
            message(f"the adapter {name} is gone: {refused.message}")
