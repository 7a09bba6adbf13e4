"""The rows of recurrent states: those of running sequences, and snapshots at prefixes' ends.

A recurrent layer keeps one state of a sequence, not one for each token. So a cached prefix can be
used only up to a position whose state was kept: a snapshot. Snapshots are at the ends of
blocks, and are named by the hash of the last block, as blocks are.

A snapshot's row is in one of three states:

- held: a sequence writes it in a step whose tokens are not all known yet, or reads it next;
- cached: it has a hash, and a sequence with that prefix can begin with it;
- free.

A row can be held and cached. The rows that a step reads or writes are not given to another sequence
in the same step.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import chain

from llmkit.runtime.engine.host_cache import HostCache


class StateCache:
    """The snapshots: which rows are in use, and which prefix each belongs to.

    It allocates free rows first, then cached ones that nobody holds, the least recently used first.
    """

    def __init__(self, first_row: int, num_rows: int, host: HostCache | None = None) -> None:
        """first_row: the rows before it belong to running sequences.

        host: where cached states go whose rows are allocated for others; None: nowhere.
        """
        self.num_rows = num_rows
        self.host = host
        self._first_row = first_row
        self._free = dict.fromkeys(range(first_row, first_row + num_rows))
        self._hold_counts: dict[int, int] = {}
        self._hash_of_row: dict[int, bytes] = {}
        self._row_of_hash: OrderedDict[bytes, int] = OrderedDict()  # the last used one last
        self._busy: set[int] = set()  # rows that the step being scheduled reads or writes

    @property
    def num_used_rows(self) -> int:
        """How many rows are held or cached."""
        return self.num_rows - len(self._free)

    @property
    def num_held_rows(self) -> int:
        """How many rows sequences hold."""
        return len(self._hold_counts)

    def is_snapshot(self, row: int) -> bool:
        """Whether the row is one of the cache, and not of a running sequence."""
        return row >= self._first_row

    def begin_step(self) -> None:
        """Another step is scheduled: rows that the last one used may be given away."""
        self._busy.clear()

    def allocate(self) -> int | None:
        """A row, held once; None when all are held or busy. A cached one loses its hash."""
        row = self._next_row()
        if row is None:
            return None
        block_hash = self._hash_of_row.get(row)
        if block_hash is not None:
            if self.host is not None:
                self.host.save(block_hash, row)
            self.evict(block_hash)
        del self._free[row]
        self._busy.add(row)
        self._hold_counts[row] = 1
        return row

    def get(self, block_hash: bytes) -> int | None:
        """The row with the state after this block."""
        return self._row_of_hash.get(block_hash)

    def can_load(self, block_hash: bytes) -> bool:
        """Whether the state is in host memory and there is a row for it."""
        if self.host is None or not self.host.has(block_hash):
            return False
        return self._next_row() is not None

    def load(self, block_hash: bytes) -> int:
        """The row, held once, that has the state from host memory before the next step.

        Only for a state for which `can_load` is true.
        """
        assert self.host is not None
        self.host.lock([block_hash])
        row = self.allocate()
        assert row is not None
        self.cache_row(row, block_hash)
        self.host.load(block_hash, row)
        return row

    def forget(self, block_hash: bytes) -> None:
        """Remove a state everywhere: it may be wrong."""
        self.evict(block_hash)
        if self.host is not None:
            self.host.remove(block_hash)

    def hold(self, row: int) -> None:
        """Add a hold of a held or cached row, for a sequence that reads it next."""
        self._hold_counts[row] = self._hold_counts.get(row, 0) + 1
        self._busy.add(row)
        if row in self._hash_of_row:
            self._row_of_hash.move_to_end(self._hash_of_row[row])

    def release(self, row: int) -> None:
        """Drop one hold of a row."""
        self._busy.add(row)
        self._hold_counts[row] -= 1
        if not self._hold_counts[row]:
            del self._hold_counts[row]
            if row not in self._hash_of_row:
                self._free[row] = None

    def cache_row(self, row: int, block_hash: bytes) -> None:
        """Name a held row by its prefix, unless another row has that prefix already."""
        assert row in self._hold_counts, f"row {row} is not held"
        if block_hash not in self._row_of_hash and row not in self._hash_of_row:
            self._hash_of_row[row] = block_hash
            self._row_of_hash[block_hash] = row

    def evict(self, block_hash: bytes) -> None:
        """Remove the name of a row: no other sequence can find it."""
        row = self._row_of_hash.pop(block_hash, None)
        if row is None:
            return
        del self._hash_of_row[row]
        if row not in self._hold_counts:
            self._free[row] = None

    def _next_row(self) -> int | None:
        candidates = chain(self._free, self._row_of_hash.values())
        return next((row for row in candidates if self._can_take(row)), None)

    def _can_take(self, row: int) -> bool:
        return row not in self._hold_counts and row not in self._busy

    def check_invariants(self) -> None:
        """Assert that every row is in a known state. For tests."""
        rows = set(range(self._first_row, self._first_row + self.num_rows))
        used = self._hold_counts.keys() | self._hash_of_row.keys()
        assert not used & set(self._free) and used | set(self._free) == rows
        assert all(count > 0 for count in self._hold_counts.values())
        inverse = {row: block_hash for block_hash, row in self._row_of_hash.items()}
        assert inverse == self._hash_of_row
        if self.host is not None:
            self.host.check_invariants()
