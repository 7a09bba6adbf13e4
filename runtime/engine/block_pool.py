"""The blocks of the paged KV cache: which are in use, and which hold a shareable prefix.

A block is in one of three states:

- used: one or more sequences hold it;
- cached: no sequence holds it, but it has a hash, and a sequence with that prefix can reuse it;
- free: no sequence holds it and it has no hash.

A cached block that is allocated for something else may go on in host memory; see host_cache.py.

Block 0 is the null block: no pool allocates it and no step writes it, so that its values stay zero.
Kernels read it where a block was freed; FlashAttention-3 multiplies what it masks there by 0, and 0
times NaN is NaN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from llmkit.runtime.engine.host_cache import HostCache

FIRST_BLOCK = 1  # after the null block


class BlockPool:
    """Blocks with reference counts, from FIRST_BLOCK on.

    It allocates free blocks first, then cached ones, oldest first.
    """

    def __init__(self, num_blocks: int, host: HostCache | None = None) -> None:
        """host: where blocks go that leave the cache; None: nowhere."""
        self.num_blocks = num_blocks
        self.host = host
        self._free = OrderedDict.fromkeys(range(FIRST_BLOCK, FIRST_BLOCK + num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * (FIRST_BLOCK + num_blocks)
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_available_blocks(self) -> int:
        """How many blocks can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """How many blocks are cached: no sequence holds them, and a later one may reuse them."""
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """How many blocks sequences hold."""
        return self.num_blocks - self.num_available_blocks

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, with one reference each; at most `num_available_blocks`.

        Blocks that were cached lose their hashes.
        """
        assert count <= self.num_available_blocks, f"{count} blocks of {self.num_available_blocks}"
        blocks = []
        for _ in range(count):
            block, _ = (self._free or self._cached).popitem(last=False)
            self._ref_counts[block] = 1
            blocks.append(block)
            if self.host is not None and block in self._hash_of_block:
                self.host.save(self._hash_of_block[block], block)
        self.evict(blocks)
        return blocks

    def get_cached_block(self, block_hash: bytes) -> int | None:
        """The used or cached block with this hash."""
        return self._block_of_hash.get(block_hash)

    def has_block(self, block_hash: bytes) -> bool:
        """Whether a block with this hash is used or cached, or in host memory."""
        if block_hash in self._block_of_hash:
            return True
        return self.host is not None and self.host.has(block_hash)

    def load_block(self, block: int, block_hash: bytes) -> None:
        """Fill a block that was just allocated from host memory, before the next step."""
        assert self.host is not None
        self.cache_block(block, block_hash)
        self.host.load(block_hash, block)

    def is_cached(self, block: int) -> bool:
        """Whether no sequence holds this block, so that `touch` makes one block less available."""
        return block in self._cached

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Give a used block a hash, unless another block has it already."""
        assert self._ref_counts[block] > 0, f"block {block} is free"
        if block_hash not in self._block_of_hash and block not in self._hash_of_block:
            self._hash_of_block[block] = block_hash
            self._block_of_hash[block_hash] = block

    def evict(self, blocks: Iterable[int]) -> None:
        """Remove the hashes of blocks: no other sequence can find them."""
        for block in blocks:
            block_hash = self._hash_of_block.pop(block, None)
            if block_hash is not None:
                del self._block_of_hash[block_hash]
            if block in self._cached:
                del self._cached[block]
                self._free[block] = None

    def forget(self, block_hashes: Iterable[bytes]) -> None:
        """Remove these blocks from host memory: their values may be wrong."""
        if self.host is not None:
            for block_hash in block_hashes:
                self.host.remove(block_hash)

    def touch(self, blocks: Iterable[int]) -> None:
        """Add a reference to used or cached blocks."""
        for block in blocks:
            assert block not in self._free, f"block {block} is free"
            self._cached.pop(block, None)
            self._ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> list[int]:
        """Drop a reference to each block of a sequence; return the blocks that are unused now.

        The last block goes first, so that the tail of a prefix is reallocated before its head.
        """
        unused = []
        for block in reversed(list(blocks)):
            assert self._ref_counts[block] > 0, f"block {block} is free"
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if block in self._hash_of_block:
                self._cached[block] = None
            else:
                self._free[block] = None
            unused.append(block)
        return unused

    def check_invariants(self) -> None:
        """Assert that every block is in exactly one state. For tests."""
        used = {block for block, count in enumerate(self._ref_counts) if count}
        assert not any(block < FIRST_BLOCK for block in (*used, *self._free, *self._cached))
        assert not used & self._free.keys() and not used & self._cached.keys()
        assert not self._free.keys() & self._cached.keys()
        assert len(used) + len(self._free) + len(self._cached) == self.num_blocks
        assert self._cached.keys() <= self._hash_of_block.keys()
        assert not self._free.keys() & self._hash_of_block.keys()
        inverse = {block_hash: block for block, block_hash in self._hash_of_block.items()}
        assert inverse == self._block_of_hash
        if self.host is not None:
            self.host.check_invariants()
