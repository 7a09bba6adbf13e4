"""Which of several models are loaded: each when a request names it, as many as may be at a time.

A model that is needed takes the place of the one that was idle for longest. Where none is idle, the one that was asked
longest ago takes no new requests once another has waited for PATIENCE_S, and makes way when those under way have ended;
its new requests wait their turn. Models are loaded and unloaded one at a time: what each may use of the memory is
planned from what is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from llmkit.checkpoint.errors import LlmkitError
from llmkit.runtime.server.waiting import first, in_thread

PATIENCE_S = 5.0
_STOP_S = 5.0  # for a server without requests to end by itself


class Server(Protocol):
    """What the fleet needs of a `Child`."""

    ready: Future[Mapping[str, Any]]
    gone: Future[LlmkitError]

    def stop(self, grace_s: float = 0.0) -> None: ...


class Model:
    """One of the fleet's. `state`: "unloaded", "loading", "loaded", "unloading", or "failed" as the last load did."""

    def __init__(self, name: str, reference: str, start: Callable[[], Any]) -> None:
        self.name, self.reference, self.start = name, reference, start
        self.state = "unloaded"
        self.server: Any = None  # while it is not unloaded
        self.facts: Mapping[str, Any] = {}  # of the server, once it was loaded
        self.users = self.waiting = 0  # requests that it answers, and that wait for it
        self.used = 0.0  # the event loop's time when a request came or ended last
        self.loads = self.failures = 0
        self.leaving = False  # makes way for another
        self.outcome: asyncio.Future[None] | None = None  # of the load that requests wait for
        self.timer: asyncio.TimerHandle | None = None


class Fleet:
    """The models by name. idle_s: how long one without requests stays loaded; 0: until another needs its place."""

    def __init__(
        self,
        models: Iterable[Model],
        max_loaded: int,
        idle_s: float,
        message: Callable[[str], None] = lambda text: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.models = {model.name: model for model in models}
        self._max_loaded, self._idle_s, self._patience_s, self._message = max_loaded, idle_s, patience_s, message
        self._turn = asyncio.Lock()  # held while a model is loaded or unloaded
        self._change = asyncio.Event()  # a request has ended, or one does not wait any more
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests that wait for their model."""
        return sum(model.waiting for model in self.models.values())

    @property
    def loaded(self) -> list[Model]:
        """The models that take requests, the one asked last first."""
        return sorted((m for m in self.models.values() if m.state == "loaded"), key=lambda m: -m.used)

    @contextlib.asynccontextmanager
    async def use(self, model: Model) -> AsyncIterator[Any]:
        """Around one request: the model's server. Raises the LlmkitError of a load; the next request tries again."""
        model.waiting += 1
        try:
            while model.state != "loaded" or model.leaving:
                if model.outcome is None:
                    model.outcome = asyncio.get_running_loop().create_future()
                    self._task(self._load(model, model.outcome))
                await asyncio.shield(model.outcome)
            model.users += 1
        finally:
            model.waiting -= 1
            self._change.set()
        try:
            self._touch(model)
            yield model.server
        finally:
            model.users -= 1
            self._touch(model)
            self._change.set()

    async def settled(self, model: Model, server: Any) -> None:
        """Wait, not for long, until it is known that `server`, which cannot be reached, has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                while model.server is server:
                    await asyncio.sleep(0.01)

    async def close(self, grace_s: float) -> None:
        """Unload all; requests under way may take `grace_s` seconds."""
        servers = [model.server for model in self.models.values() if model.server is not None]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(in_thread(functools.partial(server.stop, grace_s)) for server in servers))

    async def _load(self, model: Model, outcome: asyncio.Future[None]) -> None:
        try:
            async with self._turn:
                if model.state != "loaded" and await self._make_room(model):
                    await self._start(model)
                model.outcome = None
                outcome.set_result(None)
                while model.state == "loaded" and model.waiting:  # nobody may take its place before they have it
                    await asyncio.sleep(0)
        except (Exception, asyncio.CancelledError) as error:
            if not outcome.done():
                model.outcome = None
                told = error if isinstance(error, Exception) else LlmkitError("the server is shutting down")
                outcome.set_exception(told)
                outcome.exception()  # whether anyone still waits for it or not

    async def _start(self, model: Model) -> None:
        began = time.perf_counter()
        model.state, model.server = "loading", model.start()
        try:
            model.facts = await asyncio.shield(asyncio.wrap_future(model.server.ready))
        except LlmkitError as error:
            model.state, model.failures = "failed", model.failures + 1
            self._message(f"{model.name} could not be loaded: {error}")
            await self._stop(model)
            raise
        model.state, model.loads = "loaded", model.loads + 1
        self._task(self._watch(model, model.server))
        self._message(f"{model.name} is loaded after {time.perf_counter() - began:.1f} s")

    async def _make_room(self, model: Model) -> bool:
        """Have fewer models loaded than may be; False when nobody waits for `model` any more."""
        patience = asyncio.get_running_loop().time() + self._patience_s
        try:
            while model.waiting and sum(one.server is not None for one in self.models.values()) >= self._max_loaded:
                oldest = self.loaded[::-1]
                idle = [one for one in oldest if not one.users]
                left = patience - asyncio.get_running_loop().time()
                if idle:
                    await self._unload(idle[0])
                    continue
                if left <= 0 and oldest:
                    oldest[0].leaving = True
                self._change.clear()
                waiting = asyncio.ensure_future(self._change.wait())
                await first(waiting, timeout=left if left > 0 else None)
                waiting.cancel()
        finally:
            for one in self.models.values():
                one.leaving = False
        return model.waiting > 0

    async def _unload(self, model: Model) -> None:
        model.state = "unloading"
        await self._stop(model)
        model.state = "unloaded"
        self._message(f"{model.name} is unloaded")

    async def _stop(self, model: Model) -> None:
        server = model.server
        await in_thread(lambda: server.stop(_STOP_S))
        model.server, model.leaving = None, False

    def _touch(self, model: Model) -> None:
        loop = asyncio.get_running_loop()
        model.used = loop.time()
        if model.timer is not None:
            model.timer.cancel()
            model.timer = None
        if self._idle_s > 0 and not model.users:
            model.timer = loop.call_later(self._idle_s, lambda: self._task(self._expire(model)))

    async def _expire(self, model: Model) -> None:
        async with self._turn:
            idle_s = asyncio.get_running_loop().time() - model.used
            if model.state == "loaded" and not model.users and idle_s >= self._idle_s:
                await self._unload(model)

    async def _watch(self, model: Model, server: Server) -> None:
        """See a server that ends by itself: its model is loaded again by the next request."""
        error = await asyncio.shield(asyncio.wrap_future(server.gone))
        if model.server is server and model.state == "loaded":
            self._message(f"{model.name}: {error}")
            model.state, model.server, model.failures = "failed", None, model.failures + 1
            self._change.set()
            await in_thread(lambda: server.stop())

    def _task(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._message(f"{type(error).__name__}: {error}")
