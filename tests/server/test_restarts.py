"""Engine processes that are restarted while clients change their adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from llmkit.common.errors import LlmkitError
from llmkit.runtime.server.engines.engine_client import EngineClient
from llmkit.runtime.server.engines.engine_messages import LoadAdapter, Refused, UnloadAdapter
from llmkit.runtime.server.engines.restarts import supervise_engines
from llmkit.runtime.server.server_state import Phase, ServerState


class FakeEngine:
    """An engine process that calls `during_change` before it answers an adapter change."""

    label = ""

    def __init__(self, dead: bool, during_change: Callable[[str], bool] = lambda _: True) -> None:
        self.dead = asyncio.Event()
        if dead:
            self.dead.set()
        self.ready = asyncio.get_running_loop().create_future()
        self.ready.set_result(None)
        self.adapters: dict[str, str] = {}
        self._during_change = during_change

    def death_error(self) -> LlmkitError:
        return LlmkitError("it died.")

    async def change(self, message: LoadAdapter | UnloadAdapter) -> Refused | None:
        if isinstance(message, UnloadAdapter):
            assert self.adapters.pop(message.name, None) is not None
            return None
        await asyncio.sleep(0)
        if not self._during_change(message.name):
            return Refused(message.id, "invalid_adapter", "its file is gone")
        self.adapters[message.name] = message.path
        return None


class FakeReplicas:
    """One replica that dies once."""

    def __init__(self) -> None:
        self.clients = [FakeEngine(dead=True)]
        self.replaced = asyncio.Event()

    async def wait_for_death(self) -> int:
        if self.replaced.is_set():
            await asyncio.Event().wait()
        return 0

    def replace(self, index: int, engine: FakeEngine) -> None:
        self.clients[index] = engine
        self.replaced.set()

    async def ready(self) -> None:
        return None


def restart(
    loaded: dict[str, str], during_change: Callable[[dict[str, str], str], bool]
) -> tuple[dict[str, str], list[str]]:
    """Restart an engine; return the adapters of the new process and the messages."""

    async def run() -> tuple[dict[str, str], list[str]]:
        replicas = FakeReplicas()
        state = SimpleNamespace(
            engines=replicas,
            options=SimpleNamespace(restart=1),
            phase=Phase.READY,
            loaded_adapters=loaded,
            update_engine_info=lambda info: None,
        )
        messages: list[str] = []

        async def start(_: int) -> EngineClient:
            engine = FakeEngine(dead=False, during_change=lambda name: during_change(loaded, name))
            return cast(EngineClient, engine)

        supervisor = asyncio.create_task(
            supervise_engines(cast(ServerState, state), start, messages.append)
        )
        replaced = asyncio.create_task(replicas.replaced.wait())
        await asyncio.wait((supervisor, replaced), timeout=60, return_when=asyncio.FIRST_COMPLETED)
        replaced.cancel()
        if supervisor.done():
            supervisor.result()  # raises its error
        supervisor.cancel()
        return replicas.clients[0].adapters, messages

    return asyncio.run(run())


def test_restart_loads_the_adapters_again() -> None:
    adapters, messages = restart({"a": "/a", "b": "/b"}, lambda loaded, name: True)
    assert adapters == {"a": "/a", "b": "/b"}
    assert not any("is gone" in line for line in messages)


def test_restart_forgets_an_adapter_that_cannot_be_loaded_again() -> None:
    loaded = {"a": "/a", "b": "/b"}
    adapters, messages = restart(loaded, lambda _, name: name != "a")
    assert adapters == loaded == {"b": "/b"}
    assert "the adapter a is gone: its file is gone" in messages


@pytest.mark.parametrize("loadable", [True, False])
@pytest.mark.parametrize("unloaded", ["a", "b"])
def test_restart_leaves_out_an_adapter_that_a_client_unloads_meanwhile(
    unloaded: str, loadable: bool
) -> None:
    """Whether it is being loaded again ("a") or its turn is still to come ("b")."""

    def unload(loaded: dict[str, str], name: str) -> bool:
        if name == "a":
            del loaded[unloaded]
            return loadable or unloaded != "a"
        return True

    kept = {"a": "/a", "b": "/b"}
    del kept[unloaded]
    loaded = {"a": "/a", "b": "/b"}
    adapters, messages = restart(loaded, unload)
    assert adapters == loaded == kept
    assert not any("is gone" in line for line in messages)
