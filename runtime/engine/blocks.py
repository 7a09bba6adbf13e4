"""The blocks of the paged KV cache: which are free, and how many sequences hold each of the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`count` blocks with reference counts. Free blocks are handed out least recently used first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = OrderedDict.fromkeys(range(count))
        self._references = [0] * count

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many blocks somebody holds."""
        return self.count - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take free blocks, each with one reference. At most `free` may be asked for."""
        assert count <= self.free, f"{count} blocks of {self.free} free ones"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that somebody holds."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up a reference to each block, a sequence's tail first: it is the first to be handed out again."""
        for block in reversed(list(blocks)):
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    def check(self) -> None:
        """Our own invariants; for tests."""
        held = sum(1 for references in self._references if references)
        assert held + len(self._free) == self.count
        assert all(self._references[block] == 0 for block in self._free)
