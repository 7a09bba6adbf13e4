"""Prefix-aware routing: remembers which prompt prefixes were sent to a replica."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

# A replica with over this many requests more than the least busy replica gets no new request, even
# when it has the longest prefix.
BALANCE_THRESHOLD = 4


class RoutedPrefixes:
    """The hashes of the prompt blocks that were sent to a replica, up to its capacity."""

    def __init__(self) -> None:
        self._block_hashes: OrderedDict[int, None] = OrderedDict()  # the oldest first

    def count_known(self, block_hashes: Sequence[int]) -> int:
        """Return how many of the leading `block_hashes` of a prompt the replica was sent."""
        known = 0
        for block_hash in block_hashes:
            if block_hash not in self._block_hashes:
                break
            known += 1
        return known

    def record(self, block_hashes: Sequence[int], capacity: int) -> None:
        """Record that the replica is sent a prompt; it keeps `capacity` blocks.

        The ends of prompts are forgotten first, as the engine's prefix cache evicts them first.
        """
        for block_hash in reversed(block_hashes):
            self._block_hashes[block_hash] = None
            self._block_hashes.move_to_end(block_hash)
        while len(self._block_hashes) > capacity:
            self._block_hashes.popitem(last=False)
