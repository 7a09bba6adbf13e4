"""Compiles the grammars of requests in a background thread, so that no running stream waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from llmkit.runtime.engine.engine_request import EngineRequest


class PendingGrammars:
    """Holds requests back from the engine until their grammar is compiled.

    `compile_grammar` compiles a grammar's text and caches the result for the engine.
    """

    def __init__(self, compile_grammar: Callable[[str], object]) -> None:
        self._compile_grammar = compile_grammar
        self._executor = ThreadPoolExecutor(1, "grammars")
        self._pending: dict[str, tuple[EngineRequest, Future[object]]] = {}

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, request: EngineRequest) -> None:
        """Begin to compile the grammar of `request`."""
        assert request.grammar is not None
        future = self._executor.submit(self._compile_grammar, request.grammar)
        self._pending[request.request_id] = request, future

    def remove(self, request_id: str) -> None:
        """Drop an aborted request; unknown ids are ignored."""
        self._pending.pop(request_id, None)

    def pop_ready(self, block: bool) -> list[EngineRequest]:
        """Remove and return the requests whose grammars are compiled.

        With `block`, wait until there is at least one, if any is pending.
        """
        if block:
            futures = [future for _, future in self._pending.values()]
            wait(futures, return_when=FIRST_COMPLETED)
        ready = [request for request, future in self._pending.values() if future.done()]
        for request in ready:
            del self._pending[request.request_id]
        return ready
