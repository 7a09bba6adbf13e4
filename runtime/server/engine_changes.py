"""Sleep, waking up, and other weights: the engine processes end, start, or give way to others.

At level 1 of sleep, the engine processes free their caches and keep the weights, those of a GPU in
host memory. At level 2 they end, so that all memory is free.

Other weights are loaded by new engine processes beside the old ones. The new ones then take all new
requests, while the old ones finish theirs and end. So no request waits or is lost, and no cache of
the old weights is read: caches in memory end with their process, and files of the prefix cache
name the weights that they belong to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast, get_args
from uuid import uuid4

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.async_waits import run_in_thread
from llmkit.runtime.server.engine_control import DROP_WEIGHTS, KEEP_WEIGHTS, SleepLevel
from llmkit.runtime.server.engines.engine_client import EngineClient
from llmkit.runtime.server.engines.engine_messages import EngineReady, Refused, Sleep, WakeUp
from llmkit.runtime.server.engines.restarts import reload_adapters
from llmkit.runtime.server.http.http_errors import ApiError, invalid
from llmkit.runtime.server.server_state import Phase, ServerState, TextResources

SleepMode = Literal["abort", "wait"]  # what happens with running requests
_POLL_S = 0.02

# Facts of a model's card in which new weights may differ. Quantization with rotations adds an
# output projection where the embedding was used for it, which changes the number of parameters.
_MAY_DIFFER = frozenset({"parameters", "quantization", "layout"})
# What comes with the weights and may differ, by the name in the answer of /reload.
_TEXT_PARTS: dict[str, Callable[[TextResources], Any]] = {
    "chat_template": lambda text: text.tokenizer.chat_templates,
    "sampling_defaults": lambda text: text.defaults,
}

LoadText = Callable[[str], Awaitable[TextResources]]
StartEngine = Callable[[int, str], Awaitable[EngineClient]]
Log = Callable[[str], None]


class EngineChanges:
    """Changes of the engine processes that an operator asks for, one after the other."""

    def __init__(
        self, state: ServerState, start: StartEngine, load_text: LoadText, log: Log
    ) -> None:
        """start: starts the process of a replica (by index) that loads a model (a directory).

        load_text: reads the tokenizer of a model, and checks its chat templates.
        """
        self._state = state
        self._start = start
        self._load_text = load_text
        self._log = log
        self._lock = asyncio.Lock()
        self._level: SleepLevel = DROP_WEIGHTS  # of a sleeping server
        self._ending: set[asyncio.Task[None]] = set()

    async def sleep(self, mode: str, level: SleepLevel) -> SleepLevel:
        """Free memory; return the level at which the server then sleeps.

        level: KEEP_WEIGHTS, which is DROP_WEIGHTS where the engines cannot do it, or DROP_WEIGHTS.
        mode: "abort" ends running requests with an error, "wait" waits for them; new ones get 503
        at once. Raises ApiError 400 for another mode. A sleeping server does not become more awake.
        """
        modes = get_args(SleepMode)
        if mode not in modes:
            message = f"mode is {mode!r}; {' or '.join(modes)} was expected."
            raise invalid("mode", message, "invalid_value")
        async with self._lock:
            state = self._state
            if state.phase is Phase.SLEEPING:
                if level > self._level:
                    await self._end_engines()
                return self._level
            self._require_ready()
            state.phase = Phase.SLEEPING
            if cast(SleepMode, mode) == "abort":
                state.fail_all(
                    ApiError(503, "The server was put to sleep.", code=Phase.SLEEPING.value)
                )
            while state.engines.in_flight:
                await asyncio.sleep(_POLL_S)
            if state.phase is not Phase.SLEEPING:  # it stops, or an engine has died
                raise self._unavailable()
            if level == KEEP_WEIGHTS and not await self._change_all(Sleep):
                self._level = KEEP_WEIGHTS
                self._log("the server sleeps: the memory of its KV cache is free")
            else:
                await self._end_engines()
            return self._level

    async def wake_up(self) -> None:
        """Start the engine processes, or wake them up, and accept requests again.

        Raises ApiError 503 when they cannot start; the server sleeps on then.
        """
        async with self._lock:
            state = self._state
            if state.phase is not Phase.SLEEPING:
                self._require_ready()
                return
            started_at = time.monotonic()
            if self._level == KEEP_WEIGHTS:
                refused = await self._change_all(WakeUp)
                if refused:
                    raise _model_failed(f"The engine cannot wake up: {refused[0].message}.")
            else:
                try:
                    clients = await self._start_all(state.root)
                except LlmkitError as error:
                    raise _model_failed(f"The model could not be loaded: {error}") from None
                await self._take_over(clients)
            if state.phase is Phase.SLEEPING:
                state.phase = Phase.READY
            self._log(f"the server is awake after {time.monotonic() - started_at:.1f} s")

    async def reload(self, root: str) -> list[str]:
        """Load the weights of the directory `root`, and serve them from then on.

        Their chat template and sampling defaults are used, too. Returns what differs of these.
        Raises ApiError 400 when they cannot be served in the place of the old ones, which then
        are served as before: the model must have the same architecture, sizes and tokenizer.
        """
        async with self._lock:
            self._require_ready()
            state = self._state
            started_at = time.monotonic()
            try:
                text = await self._load_text(root)
                if text.tokenizer.to_json() != state.text.tokenizer.to_json():
                    raise _reload_failed("The weights have another tokenizer.")
                clients = await self._start_all(root)
            except LlmkitError as error:
                raise _reload_failed(f"The weights could not be loaded: {error}") from None
            differences = _differences(state.engine_info, clients[0].ready.result())
            if differences:
                await asyncio.gather(*map(_end, clients))
                raise _reload_failed(f"The weights are of another model: {differences}.")
            changed = [name for name, read in _TEXT_PARTS.items() if read(text) != read(state.text)]
            old = await self._take_over(clients)
            state.use_weights(root, text)
            # Requests that the old weights still answer fill the old caches.
            if state.response_cache is not None:
                state.response_cache = state.response_cache.emptied()
            if state.semantic is not None:
                state.semantic = state.semantic.emptied()
            for client in old:
                task = asyncio.create_task(self._end_when_idle(client))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)
            seconds = time.monotonic() - started_at
            self._log(f"the weights of {root} are served after {seconds:.1f} s")
            return changed

    def close(self) -> None:
        """End the processes that still finish requests of old weights."""
        for task in self._ending:
            task.cancel()

    async def _end_engines(self) -> None:
        self._level = DROP_WEIGHTS
        await asyncio.gather(*map(_end, self._state.engines.retire_all()))
        self._log("the server sleeps: its engine processes have ended")

    async def _change_all(self, change: type[Sleep | WakeUp]) -> list[Refused]:
        """Let all engines sleep or wake up; return the answers of those that refuse."""
        clients = self._state.engines.clients
        answers = await asyncio.gather(*(client.change(change(uuid4().hex)) for client in clients))
        return [answer for answer in answers if answer is not None]

    async def _start_all(self, root: str) -> list[EngineClient]:
        """Start a process for each replica and wait until all have loaded the model.

        Raises the LlmkitError of the first one that fails, once all have ended.
        """
        indexes = range(len(self._state.engines.clients))
        clients = list(await asyncio.gather(*(self._start(index, root) for index in indexes)))
        try:
            await asyncio.gather(*(asyncio.shield(client.ready) for client in clients))
        except BaseException:
            await asyncio.gather(*map(_end, clients))
            raise
        for client in clients:
            await reload_adapters(self._state, client, self._log)
        return clients

    async def _take_over(self, clients: list[EngineClient]) -> list[EngineClient]:
        """Give all new requests to these processes; return the ones from before."""
        state = self._state
        old = state.engines.retire_all()
        for index, client in enumerate(clients):
            state.engines.replace(index, client)
        state.update_engine_info(await state.engines.ready())
        return old

    async def _end_when_idle(self, client: EngineClient) -> None:
        try:
            while client.in_flight and not client.dead.is_set():
                await asyncio.sleep(_POLL_S)
        finally:
            client.close()
        await run_in_thread(client.end)

    def _require_ready(self) -> None:
        if self._state.phase is not Phase.READY:
            raise self._unavailable()

    def _unavailable(self) -> ApiError:
        error = self._state.unavailable_error
        assert error is not None
        return error


def _differences(old: EngineReady, new: EngineReady) -> str:
    """Say in what two models differ that must be the same; "" if in nothing."""
    pairs = {
        name: (value, new.card.get(name))
        for name, value in old.card.items()
        if name not in _MAY_DIFFER
    }
    pairs["context"] = (old.max_model_len, new.max_model_len)
    return ", ".join(
        f"{name} is {found}, not {wanted}"
        for name, (wanted, found) in pairs.items()
        if wanted != found
    )


def _model_failed(message: str) -> ApiError:
    return ApiError(503, message, code="model_failed", headers={"retry-after": "10"})


def _reload_failed(reason: str) -> ApiError:
    message = f"{reason} The old weights are served."
    return ApiError(400, message, code="reload_failed", param="path")


async def _end(client: EngineClient) -> None:
    client.close()
    await run_in_thread(client.end)
