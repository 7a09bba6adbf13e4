"""Requests that wait, outside the engine, for another thread to compile their grammar: no stream waits with them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from llmkit.runtime.server.engines.messages import Add


class Held:
    """compile: makes a grammar's text what the engine reads it by, and keeps that for when it asks itself."""

    def __init__(self, compile: Callable[[str], object]) -> None:
        self._compile = compile
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._requests: dict[str, tuple[Add, Future[object]]] = {}

    def __bool__(self) -> bool:
        return bool(self._requests)

    def hold(self, request: Add) -> None:
        """Compile its grammar."""
        assert request.grammar is not None
        self._requests[request.id] = request, self._thread.submit(self._compile, request.grammar)

    def forget(self, request_id: str) -> None:
        """It is cancelled."""
        self._requests.pop(request_id, None)

    def ready(self, block: bool) -> list[Add]:
        """Those whose grammars are compiled, or none at all; with `block` at least one, if there is any."""
        if block:
            wait([future for _, future in self._requests.values()], return_when=FIRST_COMPLETED)
        ready = [request for request, future in self._requests.values() if future.done()]
        for request in ready:
            del self._requests[request.id]
        return ready
