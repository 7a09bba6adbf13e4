"""Engine processes of one model, seen as one: which of them gets a request, and what they are together.

A request goes to the replica that was sent the longest beginning of its prompt, among equals to the one with the
fewest requests in flight, then to the one that has waited longest for one. A replica with over AHEAD requests more than
the least busy one gets none for its prefixes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

import msgspec

from llmkit.runtime.server.messages import Add, Ready, Stats
from llmkit.runtime.server.process import EngineClient, Receiver

AHEAD = 4
BLOCK_TOKENS = 16  # as the engine's blocks, which are what it shares


class Replicas:
    """One or more engine processes behind what one alone would offer."""

    def __init__(self, clients: Sequence[EngineClient], prefixes: bool = True) -> None:
        """prefixes: whether the engines keep what prompts begin with."""
        self._replicas = [_Replica(client) for client in clients]
        self._prefixes = prefixes and len(clients) > 1
        self._turn = 0

    async def ready(self) -> Ready:
        """What the slowest said, with what all can do together. Raises the first LlmkitError of a start-up."""
        told = await asyncio.gather(*(asyncio.shield(one.client.ready) for one in self._replicas))
        slowest = max(told, key=lambda one: sum(one.seconds.values()))
        count = len(told)
        return msgspec.structs.replace(
            slowest,
            max_model_len=min(one.max_model_len for one in told),
            kv_cache_tokens=sum(one.kv_cache_tokens for one in told),
            paths=[*slowest.paths, *([f"replicas: {count}; the table is the slowest one's"] if count > 1 else [])],
        )

    async def lost(self) -> EngineClient:
        """The first that is gone, as soon as it is. The others are hung up then, and their requests fail too."""
        waits = {asyncio.ensure_future(one.client.dead.wait()): one.client for one in self._replicas}
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self.close()
        return waits[done.pop()]

    @property
    def in_flight(self) -> int:
        """Requests added and not finished."""
        return sum(one.client.in_flight for one in self._replicas)

    @property
    def stats(self) -> Stats:
        """The latest figures, summed up."""
        told = [msgspec.structs.astuple(one.client.stats) for one in self._replicas]
        return Stats(*map(sum, zip(*told, strict=True)))

    def add(self, request: Add, receiver: Receiver) -> None:
        """Queue `request` in one of them; what becomes of it is told to `receiver`. Only once ready."""
        names = prefix_names(request) if self._prefixes else []
        most = min(one.client.in_flight for one in self._replicas) + AHEAD
        near = (one for one in self._replicas if one.client.in_flight <= most)
        chosen = min(near, key=lambda one: (-one.known(names), one.client.in_flight, one.turn))
        self._turn += 1
        chosen.turn = self._turn
        chosen.note(names)
        chosen.client.add(request, receiver)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its receiver hears no more of it."""
        for one in self._replicas:
            one.client.cancel(request_id)

    def close(self) -> None:
        """Hang up; see `EngineClient.close`."""
        for one in self._replicas:
            one.client.close()


class _Replica:
    """A process and the names of the blocks that it was sent last, as many as it can keep."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.turn = 0  # of the last request it got
        self._names: OrderedDict[int, None] = OrderedDict()

    def known(self, names: Sequence[int]) -> int:
        """How many of the first `names` it was sent."""
        return sum(1 for _ in takewhile(self._names.__contains__, names))

    def note(self, names: Sequence[int]) -> None:
        """It is being sent these. The ends of prompts are forgotten first, as the engine does."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        most = self.client.ready.result().kv_cache_tokens // BLOCK_TOKENS
        while len(self._names) > most:
            self._names.popitem(last=False)


def prefix_names(request: Add) -> list[int]:
    """A name for each full block of the prompt: it stands for all tokens up to its end, the adapter and the salt."""
    name, names = hash((request.adapter, request.salt)), []
    for stop in range(BLOCK_TOKENS, len(request.prompt) + 1, BLOCK_TOKENS):
        name = hash((name, *request.prompt[stop - BLOCK_TOKENS : stop]))
        names.append(name)
    return names
