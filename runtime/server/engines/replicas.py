"""The engine processes of one model behind one interface; chooses the replica for each request.

A request goes to the replica that was sent the longest prefix of its prompt. Among equal replicas,
it goes to the one with the fewest requests in flight, then to the one whose last request is oldest.
A replica with over BALANCE_THRESHOLD requests more than the least busy one is not considered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from llmkit.runtime.engine.engine_outputs import EngineStats
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.server.engines.engine_client import EngineClient, OutputReceiver
from llmkit.runtime.server.engines.engine_messages import EngineReady
from llmkit.runtime.server.engines.prefix_routing import BALANCE_THRESHOLD, RoutedPrefixes

BLOCK_SIZE = 16  # tokens; the engine's KV cache shares blocks of this size


class Replicas:
    """One or more engine processes, with the interface of a single one."""

    def __init__(self, clients: Sequence[EngineClient], prefix_caching: bool = True) -> None:
        """`prefix_caching`: whether the engines cache prefixes of prompts."""
        self._replicas = [_Replica(client) for client in clients]
        self._prefix_caching = prefix_caching and len(clients) > 1
        self._num_requests = 0  # added so far
        self._replaced_stats = EngineStats()  # of engine processes that were replaced
        self._finishing: list[EngineClient] = []  # replaced ones with running requests
        self._changed = asyncio.Event()  # a replica was retired or replaced

    async def ready(self) -> EngineReady:
        """Return what the slowest replica reported, with the capacity of all of them.

        Raises the first LlmkitError of a start-up.
        """
        reports = await asyncio.gather(
            *(asyncio.shield(replica.client.ready) for replica in self._replicas)
        )
        count = len(reports)
        slowest = max(reports, key=lambda report: sum(report.seconds.values()))
        fast_paths = slowest.fast_paths
        if count > 1:
            fast_paths = [*fast_paths, f"replicas: {count}; the table is the slowest one's"]
        return msgspec.structs.replace(
            slowest,
            max_model_len=min(report.max_model_len for report in reports),
            kv_cache_tokens=sum(report.kv_cache_tokens for report in reports),
            fast_paths=fast_paths,
        )

    async def wait_for_death(self) -> int:
        """Wait until a replica has died; return the index of the first one.

        Those that were retired do not count.
        """
        while True:
            self._changed.clear()
            serving = [client for client in self.clients if not client.is_retired]
            events = [self._changed, *(client.dead for client in serving)]
            waits = [asyncio.ensure_future(event.wait()) for event in events]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            for index, client in enumerate(self.clients):
                if client.dead.is_set() and not client.is_retired:
                    return index

    def replace(self, index: int, client: EngineClient) -> None:
        """Put `client` in the place of the replica `index`, which is dead or retired."""
        old = self._replicas[index].client
        if old.in_flight:  # it goes on with them
            self._finishing = [one for one in self._finishing if one.in_flight] + [old]
        self._replaced_stats += old.stats.counters()
        self._replicas[index] = _Replica(client)
        self._changed.set()

    def retire_all(self) -> list[EngineClient]:
        """Expect the end of all replicas; return their clients, which the caller closes."""
        for client in self.clients:
            client.is_retired = True
        self._changed.set()
        return self.clients

    @property
    def serving(self) -> bool:
        """Whether at least one replica takes requests."""
        return any(replica.client.serving for replica in self._replicas)

    @property
    def in_flight(self) -> int:
        """Requests that were added and have not finished."""
        return sum(client.in_flight for client in (*self.clients, *self._finishing))

    @property
    def stats(self) -> EngineStats:
        """The sum of the latest statistics of all replicas."""
        return sum((replica.client.stats for replica in self._replicas), self._replaced_stats)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of the requests that have no output yet."""
        return sum(replica.client.queued_tokens for replica in self._replicas)

    def add(self, request: EngineRequest, receiver: OutputReceiver) -> None:
        """Queue `request` in one replica; its outputs go to `receiver`. Only once ready."""
        serving = [replica for replica in self._replicas if replica.client.serving]
        if not serving:
            receiver.on_engine_dead()
            return
        block_hashes = prefix_hashes(request) if self._prefix_caching else []
        least_busy = min(replica.client.in_flight for replica in serving)
        candidates = [
            replica
            for replica in serving
            if replica.client.in_flight <= least_busy + BALANCE_THRESHOLD
        ]
        chosen = min(
            candidates,
            key=lambda replica: (
                -replica.sent.count_known(block_hashes),
                replica.client.in_flight,
                replica.last_request,
            ),
        )
        self._num_requests += 1
        chosen.last_request = self._num_requests
        chosen.sent.record(block_hashes, chosen.capacity)
        chosen.client.add(request, receiver)

    def abort(self, request_id: str) -> None:
        """Drop a request; its receiver gets no more outputs."""
        for client in (*self.clients, *self._finishing):
            client.abort(request_id)

    @property
    def clients(self) -> list[EngineClient]:
        """The clients of the replicas, by index."""
        return [replica.client for replica in self._replicas]

    def close(self) -> None:
        """Close all connections; see `EngineClient.close`."""
        for client in (*self.clients, *self._finishing):
            client.close()


class _Replica:
    """An engine process and the prefixes that it was sent."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.sent = RoutedPrefixes()
        self.last_request = 0  # number of the last request it was sent; set by `Replicas.add`

    @property
    def capacity(self) -> int:
        """How many blocks its KV cache holds."""
        return self.client.ready.result().kv_cache_tokens // BLOCK_SIZE


def prefix_hashes(request: EngineRequest) -> list[int]:
    """Return a hash for each full block of the prompt.

    A hash covers all tokens up to the end of its block, the adapter and the cache salt.
    """
    prompt = request.prompt_token_ids
    block_hash = hash((request.adapter, request.cache_salt))
    hashes = []
    for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE):
        block_hash = hash((block_hash, *prompt[end - BLOCK_SIZE : end]))
        hashes.append(block_hash)
    return hashes
