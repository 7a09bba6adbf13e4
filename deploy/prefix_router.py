"""Routes a request to the replica that received the longest prefix of its text before."""

from __future__ import annotations

from collections import Counter
from typing import Any
from zlib import crc32

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from llmkit.runtime.server.engines.prefix_routing import BALANCE_THRESHOLD, RoutedPrefixes

# Sorts behind every crc32.
_NO_HASH = 2**32
# Hashes of a replica's last prompts that are remembered.
MAX_HASHES = 65_536


class PrefixRouter(RequestRouter):
    """Prefix routing, as `runtime/server/engines/replicas.py` does it in one server, for Ray Serve.

    A call's keyword `prefixes` has the hashes of its text's prefixes, shortest first. The prefixes
    of a replica with over BALANCE_THRESHOLD requests more than the least busy one do not count.
    Each ingress replica has its own router. While the replicas are about equally busy, a hash
    chooses the replica of a new prefix, so that all routers choose the same one.
    """

    def initialize_state(self, **_: Any) -> None:
        self._sent: dict[ReplicaID, RoutedPrefixes] = {}
        # Requests that were routed and are not completed.
        self._load: Counter[ReplicaID] = Counter()
        # The number of the choice that each replica last won. It breaks ties, because several
        # choices are made before `_load` counts the first one.
        self._last_chosen: dict[ReplicaID, int] = {}
        self._choices = 0

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica alone in its group, the best first. Serve takes the first with room."""
        ids = {replica.replica_id for replica in candidate_replicas}
        self._sent = {replica: self._sent.get(replica) or RoutedPrefixes() for replica in ids}
        hashes = pending_request.kwargs.get("prefixes", []) if pending_request is not None else []
        load = self._load
        lowest_load = min((load[replica] for replica in ids), default=0)
        known = {}
        for replica in ids:
            overloaded = load[replica] > lowest_load + BALANCE_THRESHOLD
            known[replica] = 0 if overloaded else self._sent[replica].count_known(hashes)
        # The first prefix that no replica got from this router.
        new_hashes = hashes[max(known.values(), default=0) :][:1]

        def rank(candidate: RunningReplica) -> tuple[int, int, int, int]:
            replica = candidate.replica_id
            order = _NO_HASH
            if new_hashes and load[replica] <= lowest_load + 1:
                order = crc32(f"{new_hashes[0]} {replica.unique_id}".encode())
            return -known[replica], order, load[replica], self._last_chosen.get(replica, 0)

        ranked = sorted(candidate_replicas, key=rank)
        self._choices += 1
        if ranked:
            self._last_chosen[ranked[0].replica_id] = self._choices
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        if replica_id in self._sent:
            self._sent[replica_id].record(pending_request.kwargs.get("prefixes", []), MAX_HASHES)
            self._load[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._load[replica_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._sent.pop(replica_id, None)
        self._load.pop(replica_id, None)
