"""Which evicted blocks, or recurrent states, are kept in host memory (`--kv-offload`).

A row of host memory holds a block of the KV cache, or the recurrent states after one, named by the
same hash as on the device. A block that leaves the device's prefix cache is saved, unless host
memory has it already. It is loaded when a request with that prefix is admitted, and stays in host
memory: when it is evicted again, nothing needs to be copied.

Here are only the decisions, without torch, so that all ranks take the same ones; the copies are
made by host_block_store.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class HostCopies:
    """The copies that must be made before the next step, first all saves and then all loads.

    Saves are in order: a later one may overwrite the row of an earlier one.
    """

    saves: list[tuple[int, int]] = field(default_factory=list)  # (row of the device, of the host)
    loads: list[tuple[int, int]] = field(default_factory=list)  # (row of the host, of the device)

    def __bool__(self) -> bool:
        return bool(self.saves or self.loads)


class HostCache:
    """The rows of host memory, by hash; the least recently used are given away first."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))
        self._row_of_hash: OrderedDict[bytes, int] = OrderedDict()  # the last used one last
        self._locked: set[bytes] = set()  # loaded before the next step
        self._copies = HostCopies()
        # Counters since the start
        self.num_saves = 0
        self.num_loads = 0

    @property
    def num_used_rows(self) -> int:
        """How many rows hold something."""
        return len(self._row_of_hash)

    def has(self, block_hash: bytes) -> bool:
        """Whether host memory has this block."""
        return block_hash in self._row_of_hash

    def save(self, block_hash: bytes, device_row: int) -> None:
        """A block leaves the device: copy it before its row there is written again.

        Nothing is copied when host memory has it, or when all rows are being loaded.
        """
        if block_hash in self._row_of_hash:
            self._row_of_hash.move_to_end(block_hash)
            return
        row = self._take_row()
        if row is None:
            return
        self._row_of_hash[block_hash] = row
        self._copies.saves.append((device_row, row))
        self.num_saves += 1

    def lock(self, block_hashes: Iterable[bytes]) -> None:
        """Keep these blocks until `take_copies`, those of them that host memory has.

        They count as used, the first one last: the tail of a prefix is given away before its head.
        """
        for block_hash in reversed(list(block_hashes)):
            if block_hash in self._row_of_hash:
                self._row_of_hash.move_to_end(block_hash)
                self._locked.add(block_hash)

    def load(self, block_hash: bytes, device_row: int) -> None:
        """Copy a block that was locked to this row of the device."""
        assert block_hash in self._locked, "a block is loaded that may be overwritten"
        self._copies.loads.append((self._row_of_hash[block_hash], device_row))
        self.num_loads += 1

    def remove(self, block_hash: bytes) -> None:
        """Forget a block whose values may be wrong."""
        assert not self._copies.loads, "copies were not made"
        row = self._row_of_hash.pop(block_hash, None)
        if row is not None:
            self._free.append(row)

    def clear(self) -> None:
        """Forget all blocks, and the copies that were not made."""
        self._row_of_hash.clear()
        self._locked.clear()
        self._free = list(range(self.num_rows))
        self._copies = HostCopies()

    def take_copies(self) -> HostCopies:
        """The copies to make now."""
        copies = self._copies
        self._copies = HostCopies()
        self._locked.clear()
        return copies

    def _take_row(self) -> int | None:
        if self._free:
            return self._free.pop()
        oldest = next((name for name in self._row_of_hash if name not in self._locked), None)
        return None if oldest is None else self._row_of_hash.pop(oldest)

    def check_invariants(self) -> None:
        """Assert that every row is free or has one hash. For tests."""
        used = list(self._row_of_hash.values())
        assert sorted([*used, *self._free]) == list(range(self.num_rows))
        assert self._locked <= self._row_of_hash.keys()
