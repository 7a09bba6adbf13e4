"""The blocks of the paged KV cache: who holds them, and which named ones can be shared again.

A block is in one of three states: free (nobody holds it and nothing in it is of use), cached (nobody holds it, but it
has a name and whoever asks for that name gets it) or used (somebody holds it).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`count` blocks with reference counts. Free blocks are handed out first, then cached ones, oldest first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = OrderedDict.fromkeys(range(count))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * count
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """How many blocks nobody holds and somebody may ask for by name."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """How many blocks somebody holds."""
        return self.count - self.available

    def allocate(self, count: int) -> list[int]:
        """Take blocks, each with one reference; cached ones lose their names. At most `available`."""
        assert count <= self.available, f"{count} blocks of {self.available}"
        taken = [(self._free or self._cached).popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        self.forget(taken)
        return taken

    def find(self, name: bytes) -> int | None:
        """The block of this name."""
        return self._named.get(name)

    def is_cached(self, block: int) -> bool:
        """Whether nobody holds this named block, so that sharing it takes one from the available ones."""
        return block in self._cached

    def name(self, block: int, name: bytes) -> None:
        """Name a block that somebody holds, unless another one has this name already."""
        assert self._references[block] > 0, f"block {block} is free"
        if name not in self._named and block not in self._names:
            self._names[block], self._named[name] = name, block

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the names of blocks away."""
        for block in blocks:
            if (name := self._names.pop(block, None)) is not None:
                del self._named[name]
            if block in self._cached:
                del self._cached[block]
                self._free[block] = None

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are used or cached."""
        for block in blocks:
            assert block not in self._free, f"block {block} is free"
            self._cached.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Give up a reference to each block, a sequence's tail first: it is the first to be handed out again.

        Returns the blocks that nobody holds any more.
        """
        left = []
        for block in reversed(list(blocks)):
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] -= 1
            if not self._references[block]:
                (self._cached if block in self._names else self._free)[block] = None
                left.append(block)
        return left

    def check(self) -> None:
        """Our own invariants; for tests."""
        held = {block for block in range(self.count) if self._references[block]}
        assert not held & self._free.keys() and not held & self._cached.keys()
        assert not self._free.keys() & self._cached.keys()
        assert len(held) + len(self._free) + len(self._cached) == self.count
        assert self._cached.keys() <= self._names.keys() and not self._free.keys() & self._names.keys()
        assert {name: block for block, name in self._names.items()} == self._named
