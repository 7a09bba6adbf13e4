"""The model pool: it loads a model when a request names it, up to a number of loaded models.

A model that must be loaded replaces the loaded model that has been idle for longest. If none is
idle and a model has waited for PATIENCE_S, the least recently used model drains: its running
requests end, its new requests wait, then it is unloaded. Models are loaded and unloaded one at a
time, because each plans its memory from what is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from llmkit.common.errors import LlmkitError, ShortageError
from llmkit.runtime.server.async_waits import run_in_thread, wait_first
from llmkit.runtime.server.ollama.model_facts import ModelFacts

PATIENCE_S = 5.0
_STOP_S = 5.0  # for a server without requests to end by itself
_POLL_S = 0.01
_BUSY_POLL_S = 0.5  # between questions whether a server has work
_MAX_BUSY_ERRORS = 5  # a busy machine may lose one or two answers
_MAX_IDLE_S = 86_400.0 * 365  # an event loop has no timers for longer ones than its clock can hold


IsBusy = Callable[[Any], Awaitable[bool]]


class Server(Protocol):
    """What the pool needs of a `ServerProcess`."""

    ready: Future[Mapping[str, Any]]
    ended: Future[LlmkitError]

    def stop(self, grace_s: float = 0.0) -> None: ...


class PooledModel:
    """A model of the pool. Only the pool changes its fields."""

    def __init__(self, name: str, reference: str, start: Callable[[], Any]) -> None:
        """reference: the directory or hub id. start: starts a server of the model."""
        self.name = name
        self.reference = reference
        self.start = start
        # "unloaded", "loading", "loaded", "unloading", or "failed" after a failed load.
        self.state = "unloaded"
        # The model's Server; None while it is unloaded.
        self.server: Any = None
        # What the server reported when it was ready.
        self.info: Mapping[str, Any] = {}
        self.num_running = 0  # requests that the server answers
        self.num_waiting = 0  # requests that wait for the model
        # Calls of `ModelPool.keep_loaded` whose work may not be done.
        self.num_kept = 0
        # loop.time() when a request last started or ended.
        self.last_used = 0.0
        self.num_loads = 0
        self.num_failures = 0
        # New requests wait, because another model needs the place.
        self.draining = False
        # The load that requests wait for; None while there is none.
        self.load_result: asyncio.Future[None] | None = None
        # Unloads the model when it has been idle for long enough.
        self.idle_timer: asyncio.TimerHandle | None = None
        # How long it stays loaded after its last request, if the request said so.
        self.idle_s: float | None = None
        # What Ollama's API tells of it; None if it was not read.
        self.facts: ModelFacts | None = None


class ModelPool:
    """The models by name."""

    def __init__(
        self,
        models: Iterable[PooledModel],
        max_loaded: int,
        idle_s: float,
        log: Callable[[str], None] = lambda text: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Keep up to `max_loaded` models loaded.

        idle_s: how long an idle model stays loaded; 0: until another model needs its place.
        log: gets lines for the user.
        """
        self.models = {model.name: model for model in models}
        self._leaving: set[PooledModel] = set()  # removed, and not unloaded yet
        self._max_loaded = max_loaded
        self._idle_s = idle_s
        self._patience_s = patience_s
        self._log = log
        # Held while a model is loaded or unloaded.
        self._load_lock = asyncio.Lock()
        # Set when a request ends, or no longer waits.
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: dict[str, asyncio.Task[None]] = {}  # by model; see `keep_loaded`

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait for their model."""
        return sum(model.num_waiting for model in self.models.values())

    @property
    def loaded(self) -> list[PooledModel]:
        """The models that accept requests, the most recently used first."""
        loaded = [model for model in self.models.values() if model.state == "loaded"]
        return sorted(loaded, key=lambda model: -model.last_used)

    def has_place(self, model: PooledModel) -> bool:
        """Whether `acquire` would unload no other model, as things are now."""
        return model.server is not None or self._num_servers() < self._max_loaded

    @contextlib.asynccontextmanager
    async def acquire(self, model: PooledModel, idle_s: float | None = None) -> AsyncIterator[Any]:
        """Yield the model's server, for one request; load the model first if needed.

        idle_s: how long the model then stays loaded without another request; inf: until another
        model needs its place; None: as long as the pool's models do.
        Raises the LlmkitError of a failed load. The next request tries again.
        """
        model.num_waiting += 1
        try:
            while model.state != "loaded" or model.draining:
                if model.load_result is None:
                    model.load_result = asyncio.get_running_loop().create_future()
                    self._start_task(self._load(model, model.load_result))
                await asyncio.shield(model.load_result)
            model.num_running += 1
            model.idle_s = idle_s
        finally:
            model.num_waiting -= 1
            self._changed.set()
        try:
            self._mark_used(model)
            yield model.server
        finally:
            model.num_running -= 1
            self._mark_used(model)
            self._changed.set()

    async def add(self, model: PooledModel) -> None:
        """Add a model and load it. No other model is unloaded for it.

        Raises ShortageError when all places are taken, and the LlmkitError of a failed load. The
        model is not in the pool then.
        """
        num_taken = len(self.models) + len(self._leaving)
        if num_taken >= self._max_loaded:
            raise ShortageError(
                f"all {num_taken} places for models are taken (--max-loaded {self._max_loaded})",
                todo="Unload one first",
            )
        self.models[model.name] = model
        try:
            async with self.acquire(model):
                pass
        except BaseException:
            if self.models.get(model.name) is model:
                del self.models[model.name]
            raise

    async def remove(self, model: PooledModel, timeout_s: float) -> None:
        """Remove a model and unload it, after its running requests or `timeout_s` seconds."""
        del self.models[model.name]
        self._leaving.add(model)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while model.num_running or model.num_waiting:
                        self._changed.clear()
                        await self._changed.wait()
            async with self._load_lock:
                if model.server is not None:
                    await self._unload(model)
        finally:
            self._leaving.discard(model)

    def keep_loaded(self, model: PooledModel, is_busy: IsBusy) -> None:
        """Count `model` as running until its server has no work that goes on without a request.

        Call it within `acquire`. is_busy: asks the server; _MAX_BUSY_ERRORS errors one after the
        other count as False.
        """
        model.num_kept += 1
        if model.num_kept == 1:
            model.num_running += 1
            self._kept[model.name] = self._start_task(self._release_when_done(model, is_busy))

    async def wait_until_done(self) -> None:
        """Wait until no model is kept loaded by `keep_loaded`."""
        while self._kept:
            await asyncio.wait(self._kept.values())

    async def _release_when_done(self, model: PooledModel, is_busy: IsBusy) -> None:
        server = model.server
        num_kept = 0
        try:
            # Work that begins while the server answers may not be in its answer.
            while model.server is server and num_kept != model.num_kept:
                num_kept = model.num_kept
                num_errors = 0
                while model.server is server and num_errors < _MAX_BUSY_ERRORS:
                    try:
                        if not await is_busy(server):
                            break
                        num_errors = 0
                    except Exception:
                        num_errors += 1
                    await asyncio.sleep(_BUSY_POLL_S)
        finally:
            del self._kept[model.name]
            model.num_kept = 0
            model.num_running -= 1
            self._mark_used(model)
            self._changed.set()

    def unload_when_idle(self, model: PooledModel) -> None:
        """Unload `model` once none of its requests runs, unless another one comes."""
        if model.state == "loaded":
            model.idle_s = 0.0
            self._mark_used(model)

    def seconds_to_unload(self, model: PooledModel) -> float | None:
        """Seconds until an idle model is unloaded; None: there is no such time."""
        limit = self._idle_limit(model)
        if limit is None:
            return None
        loop = asyncio.get_running_loop()
        idle_s = 0.0 if model.num_running else loop.time() - model.last_used
        return max(0.0, limit - idle_s)

    async def wait_until_removed(self, model: PooledModel, server: Any) -> None:
        """Wait until the pool has noticed the end of `server`, which refuses connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                while model.server is server:
                    await asyncio.sleep(_POLL_S)

    async def close(self, grace_s: float) -> None:
        """Unload all models. Running requests may take `grace_s` seconds."""
        models = [*self.models.values(), *self._leaving]
        servers = [model.server for model in models if model.server is not None]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            *(run_in_thread(functools.partial(server.stop, grace_s)) for server in servers)
        )

    async def _load(self, model: PooledModel, load_result: asyncio.Future[None]) -> None:
        try:
            async with self._load_lock:
                if model.state != "loaded" and await self._make_room(model):
                    await self._start_server(model)
                model.load_result = None
                load_result.set_result(None)
                # Hold the lock until the waiting requests run, so that no other model replaces
                # this one before.
                while model.state == "loaded" and model.num_waiting:
                    await asyncio.sleep(0)
        except (Exception, asyncio.CancelledError) as error:
            if not load_result.done():
                model.load_result = None
                if isinstance(error, Exception):
                    load_result.set_exception(error)
                else:
                    load_result.set_exception(LlmkitError("the server is shutting down"))
                # Retrieved here in case no request waits for it any more.
                load_result.exception()

    async def _start_server(self, model: PooledModel) -> None:
        start_time = time.perf_counter()
        model.state = "loading"
        model.server = model.start()
        try:
            model.info = await asyncio.shield(asyncio.wrap_future(model.server.ready))
        except LlmkitError as error:
            model.state = "failed"
            model.num_failures += 1
            self._log(f"{model.name} could not be loaded: {error}")
            await self._stop_server(model)
            raise
        model.state = "loaded"
        model.num_loads += 1
        self._start_task(self._watch(model, model.server))
        self._log(f"{model.name} is loaded after {time.perf_counter() - start_time:.1f} s")

    async def _make_room(self, model: PooledModel) -> bool:
        """Unload models until `model` has a place; return whether requests still wait for it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        try:
            while model.num_waiting and self._num_servers() >= self._max_loaded:
                least_recent_first = self.loaded[::-1]
                idle = [loaded for loaded in least_recent_first if not loaded.num_running]
                if idle:
                    await self._unload(idle[0])
                    continue
                remaining_s = deadline - loop.time()
                if remaining_s <= 0 and least_recent_first:
                    least_recent_first[0].draining = True
                self._changed.clear()
                changed = asyncio.ensure_future(self._changed.wait())
                await wait_first(changed, timeout=remaining_s if remaining_s > 0 else None)
                changed.cancel()
        finally:
            for other in self.models.values():
                other.draining = False
        return model.num_waiting > 0

    def _num_servers(self) -> int:
        return sum(model.server is not None for model in self.models.values())

    async def _unload(self, model: PooledModel) -> None:
        model.state = "unloading"
        await self._stop_server(model)
        model.state = "unloaded"
        self._log(f"{model.name} is unloaded")

    async def _stop_server(self, model: PooledModel) -> None:
        server = model.server
        await run_in_thread(lambda: server.stop(_STOP_S))
        model.server = None
        model.draining = False

    def _mark_used(self, model: PooledModel) -> None:
        """Record the time of use, and restart the idle timer."""
        loop = asyncio.get_running_loop()
        model.last_used = loop.time()
        if model.idle_timer is not None:
            model.idle_timer.cancel()
            model.idle_timer = None
        limit = self._idle_limit(model)
        if limit is not None and not model.num_running:
            model.idle_timer = loop.call_later(
                limit, lambda: self._start_task(self._unload_if_idle(model))
            )

    def _idle_limit(self, model: PooledModel) -> float | None:
        """Seconds for which an idle model stays loaded; None: until its place is needed."""
        limit = (self._idle_s or math.inf) if model.idle_s is None else model.idle_s
        return None if math.isinf(limit) else min(limit, _MAX_IDLE_S)

    async def _unload_if_idle(self, model: PooledModel) -> None:
        async with self._load_lock:
            idle_s = asyncio.get_running_loop().time() - model.last_used
            limit = self._idle_limit(model)
            is_idle = not model.num_running and limit is not None and idle_s >= limit
            if model.state == "loaded" and is_idle:
                await self._unload(model)

    async def _watch(self, model: PooledModel, server: Server) -> None:
        """Wait until `server` ends by itself. The next request loads the model again."""
        error = await asyncio.shield(asyncio.wrap_future(server.ended))
        if model.server is server and model.state == "loaded":
            self._log(f"{model.name}: {error}")
            model.state = "failed"
            model.server = None
            model.num_failures += 1
            self._changed.set()
            await run_in_thread(lambda: server.stop())

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._log(f"{type(error).__name__}: {error}")
