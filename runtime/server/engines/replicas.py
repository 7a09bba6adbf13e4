"""Engine processes of one model, seen as one: which of them gets a request, and what they are together.

A request goes to the replica that was sent the longest beginning of its prompt, among equals to the one with the
fewest requests in flight, then to the one that has waited longest for one. A replica with over AHEAD requests more than
the least busy one gets none for its prefixes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from llmkit.runtime.server.engines.messages import Add, Ready, Stats
from llmkit.runtime.server.engines.prefixes import AHEAD, Sent
from llmkit.runtime.server.engines.process import EngineClient, Receiver

BLOCK_TOKENS = 16  # as the engine's blocks, which are what it shares


class Replicas:
    """One or more engine processes behind what one alone would offer."""

    def __init__(self, clients: Sequence[EngineClient], prefixes: bool = True) -> None:
        """prefixes: whether the engines keep what prompts begin with."""
        self._replicas = [_Replica(client) for client in clients]
        self._prefixes = prefixes and len(clients) > 1
        self._turn = 0
        self._past = Stats()  # of those that were replaced

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

    async def lost(self) -> int:
        """The place of the first that is gone, as soon as it is."""
        waits = [asyncio.ensure_future(client.dead.wait()) for client in self.clients]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return next(index for index, client in enumerate(self.clients) if client.dead.is_set())

    def replace(self, index: int, fresh: EngineClient) -> None:
        """`fresh` takes the place of one that is gone."""
        self._past += self._replicas[index].client.stats
        self._replicas[index] = _Replica(fresh)

    @property
    def serving(self) -> bool:
        """Whether one of them takes requests."""
        return any(one.client.serving for one in self._replicas)

    @property
    def in_flight(self) -> int:
        """Requests added and not finished."""
        return sum(one.client.in_flight for one in self._replicas)

    @property
    def stats(self) -> Stats:
        """The latest figures, summed up."""
        return sum((one.client.stats for one in self._replicas), self._past)

    @property
    def queued_tokens(self) -> int:
        """Of prompts whose requests have got nothing yet."""
        return sum(one.client.queued_tokens for one in self._replicas)

    def add(self, request: Add, receiver: Receiver) -> None:
        """Queue `request` in one of them; what becomes of it is told to `receiver`. Only once ready."""
        serving = [one for one in self._replicas if one.client.serving]
        if not serving:
            receiver.on_dead()
            return
        names = prefix_names(request) if self._prefixes else []
        most = min(one.client.in_flight for one in serving) + AHEAD
        near = (one for one in serving if one.client.in_flight <= most)
        chosen = min(near, key=lambda one: (-one.known(names), one.client.in_flight, one.turn))
        self._turn += 1
        chosen.turn = self._turn
        chosen.note(names, chosen.room)
        chosen.client.add(request, receiver)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its receiver hears no more of it."""
        for one in self._replicas:
            one.client.cancel(request_id)

    @property
    def clients(self) -> list[EngineClient]:
        """Each of them."""
        return [one.client for one in self._replicas]

    def close(self) -> None:
        """Hang up; see `EngineClient.close`."""
        for one in self._replicas:
            one.client.close()


class _Replica(Sent):
    """A process and the blocks that it was sent."""

    def __init__(self, client: EngineClient) -> None:
        super().__init__()
        self.client = client
        self.turn = 0  # of the last request it got

    @property
    def room(self) -> int:
        """How many names it can keep."""
        return self.client.ready.result().kv_cache_tokens // BLOCK_TOKENS


def prefix_names(request: Add) -> list[int]:
    """A name for each full block of the prompt: it stands for all tokens up to its end, the adapter and the salt."""
    name, names = hash((request.adapter, request.salt)), []
    for stop in range(BLOCK_TOKENS, len(request.prompt) + 1, BLOCK_TOKENS):
        name = hash((name, *request.prompt[stop - BLOCK_TOKENS : stop]))
        names.append(name)
    return names
