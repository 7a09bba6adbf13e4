"""Answers to requests that ask for the same answer every time: the same request gets the one it got before.

Only what leaves nothing to chance is kept: greedy answers, and those with a seed of the request's own. An entry is what
the engine said to one prompt, so it serves every endpoint and shape, streamed or not, and `usage` is what it was then.
Its name is a hash of all that the engine was asked for, the client's salt among it: no client is given another's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import msgspec

from llmkit.runtime.server.engines.messages import Add, Output

if TYPE_CHECKING:
    from llmkit.runtime.server.generation import Choice

HEADER = "x-llmkit-cache"
_ENTRY_BYTES = 256  # of an entry besides what was said, about
_decoder = msgspec.msgpack.Decoder(list[Output])


class ResponseCache:
    """Answers in memory, those asked for last, in at most so many bytes. adapters: those that stay what they are."""

    def __init__(self, limit_bytes: int, adapters: Container[str] = ()) -> None:
        self.limit_bytes, self._adapters = limit_bytes, adapters
        self.bytes = self.queries = self.hits = 0
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()

    def key(self, request: Add, stops: Sequence[str]) -> bytes | None:
        """What an answer is found by; None when it may be another one the next time."""
        greedy = request.temperature == 0
        if not (greedy or request.seed is not None) or not (
            request.adapter is None or request.adapter in self._adapters
        ):
            return None
        asked = msgspec.structs.replace(request, id="", priority=0, seed=None if greedy else request.seed)
        return hashlib.sha256(msgspec.msgpack.encode((asked, stops))).digest()

    def get(self, key: bytes) -> list[Output] | None:
        """What the engine said, step by step."""
        self.queries += 1
        if (found := self._answers.get(key)) is None:
            return None
        self.hits += 1
        self._answers.move_to_end(key)
        return _decoder.decode(found)

    def put(self, key: bytes, outputs: Sequence[Output]) -> None:
        """Keep a complete answer; what was not asked for longest makes room. One larger than all of it is not kept."""
        data = msgspec.msgpack.encode(outputs)
        if len(data) + _ENTRY_BYTES > self.limit_bytes or key in self._answers:
            return
        self._answers[key] = data
        self.bytes += len(data) + _ENTRY_BYTES
        while self.bytes > self.limit_bytes:
            self.bytes -= len(self._answers.popitem(last=False)[1]) + _ENTRY_BYTES


class Remembered:
    """What one HTTP request's choices have in a cache, and what they put there. Without one: nothing."""

    def __init__(self, cache: ResponseCache | None, choices: Sequence[Choice]) -> None:
        self._cache = cache
        self._keys: dict[str, bytes] = {}
        self._said: dict[str, list[Output]] = {}
        self.found: dict[str, list[Output]] = {}  # by the ids of their requests
        for choice in choices if cache is not None else ():
            assert cache is not None
            request = choice.request
            if (key := cache.key(request, choice.stops)) is None:
                continue
            self._keys[request.id], self._said[request.id] = key, []
            if (outputs := cache.get(key)) is not None:
                self.found[request.id] = [msgspec.structs.replace(one, id=request.id, queued_s=None) for one in outputs]
        all_found = len(self.found) == len(choices)
        self.headers = {HEADER: "hit" if all_found else "miss"} if self._keys else {}

    def note(self, output: Output, choice: Choice) -> None:
        """The engine has said something, which the choice has taken in."""
        if self._cache is None or output.id in self.found or (said := self._said.get(output.id)) is None:
            return
        said.append(output)
        # An answer that something else has cut short, like the end of the only call, is not known to be whole.
        if output.finish_reason is not None or choice.stop_string is not None:
            self._cache.put(self._keys[output.id], said)
