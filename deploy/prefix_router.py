"""Which replica of a Serve deployment gets a request: the one that was sent the longest beginning of its text."""

from __future__ import annotations

from collections import Counter
from typing import Any
from zlib import crc32

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from llmkit.runtime.server.engines.prefixes import AHEAD, Sent

_LAST = 2**32
MOST_NAMES = 65_536  # of a replica's last prompts


class PrefixRouter(RequestRouter):
    """Ray Serve's interface for what `runtime/server/engines/replicas.py` does in one server.

    A call's keyword `prefixes` names the beginnings of its text, shortest first. A replica with over AHEAD requests
    more than the least busy one gets none for its prefixes. Each front has a router of its own: what none of the
    replicas was sent by this one goes, while they are about as busy, where any other would send it, by the name.
    """

    def initialize_state(self, **_: Any) -> None:
        self._sent: dict[ReplicaID, Sent] = {}
        self._load: Counter[ReplicaID] = Counter()  # requests routed and not completed
        self._turns: dict[ReplicaID, int] = {}  # when each was the best one last: several are chosen before one counts
        self._turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in ranks of one, the best first; Serve takes the first that has room."""
        present = {replica.replica_id for replica in candidate_replicas}
        self._sent = {one: self._sent.get(one) or Sent() for one in present}
        names = pending_request.kwargs.get("prefixes", []) if pending_request is not None else []
        load = self._load
        least = min((load[one] for one in present), default=0)
        known = {one: self._sent[one].known(names) if load[one] <= least + AHEAD else 0 for one in present}
        new = names[max(known.values(), default=0) :][:1]

        def rank(replica: RunningReplica) -> tuple[int, int, int, int]:
            one = replica.replica_id
            drawn = crc32(f"{new[0]} {one.unique_id}".encode()) if new and load[one] <= least + 1 else _LAST
            return -known[one], drawn, load[one], self._turns.get(one, 0)

        ranked = sorted(candidate_replicas, key=rank)
        self._turn += 1
        for best in ranked[:1]:
            self._turns[best.replica_id] = self._turn
        return [[replica] for replica in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        if replica_id in self._sent:
            self._sent[replica_id].note(pending_request.kwargs.get("prefixes", []), MOST_NAMES)
            self._load[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._load[replica_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._sent.pop(replica_id, None)
        self._load.pop(replica_id, None)
