"""Where the tokens of a step stand: their slots in the KV cache, and the blocks that each query sees.

Everything is found on the host, with numpy, once per step and window; layers of one window share it.
Legend: S sequences, T tokens of this step over all of them, L tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch

from llmkit.kernels.jit import sent

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Places = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # see `Group.on_device`


class AttentionBatch:
    """Which tokens of a step belong to which sequence, and where their keys and values lie."""

    def __init__(
        self, query_lens: Numbers, context_lens: Numbers, tables: dict[int | None, Table], block_size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.query_lens, self.context_lens = query_lens, context_lens  # int64 [S]
        self.block_size, self.device = block_size, device
        self._tables = tables
        self._groups: dict[int | None, Group] = {}

    @classmethod
    def build(
        cls, query_lens: Sequence[int], context_lens: Sequence[int],
        block_tables: Mapping[int | None, Sequence[Sequence[int]]], block_size: int, device: torch.device | str = "cpu",
    ) -> AttentionBatch:  # fmt: skip
        """From plain lists; a sequence's tokens are side by side.

        query_lens: new tokens of each sequence. context_lens: its tokens in the cache after this step, the new ones
        included. block_tables: for each window of the model (None: the whole context) the sequences' blocks, enough
        for their contexts; -1 where one was freed because it left the window. A window without tables has None's.
        """
        new, context = np.array(query_lens, dtype=np.int64), np.array(context_lens, dtype=np.int64)
        tables = {window: Table.of(rows) for window, rows in block_tables.items()}
        return cls(new, context, tables, block_size, torch.device(device))

    @classmethod
    def for_sequences(
        cls, lengths: list[int], block_size: int = 16, device: torch.device | str = "cpu"
    ) -> AttentionBatch:
        """Complete sequences, one after the other, in blocks 0, 1, 2, ...: calibration and evaluation."""
        ends = list(accumulate(-(-length // block_size) for length in lengths))
        tables = [range(first, end) for first, end in pairwise([0, *ends])]
        return cls.build(lengths, lengths, {None: tables}, block_size, device)

    @property
    def blocks(self) -> int:
        """How many blocks a cache must have for `for_sequences`."""
        return int((-(-self.context_lens // self.block_size)).sum())

    def of(self, window: int | None) -> Group:
        """What the layers of a window share."""
        if window not in self._groups:
            self._groups[window] = Group(self, window, self._tables.get(window) or self._tables[None])
        return self._groups[window]


@dataclass(frozen=True)
class Table:
    """Block tables of several sequences, one after the other."""

    blocks: Numbers
    starts: Numbers  # [S]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Table:
        """From lists of their own."""
        sizes = np.array([len(row) for row in rows], dtype=np.int64)
        blocks = np.fromiter(chain.from_iterable(rows), np.int64, int(sizes.sum()))
        return cls(blocks, sizes.cumsum() - sizes)


class Group:
    """The layers of one window: where they put new keys and values, and what their queries see."""

    def __init__(self, batch: AttentionBatch, window: int | None, table: Table) -> None:
        self.batch, self.window, self.table = batch, window, table
        self._places: Places | None = None

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [T]: block * block_size + offset of each new token."""
        new, size = self.batch.query_lens, self.batch.block_size
        starts = new.cumsum() - new
        position = _spread(self.batch.context_lens - new - starts, new) + np.arange(new.sum())
        slots = self.table.blocks[_spread(self.table.starts, new) + position // size] * size + position % size
        assert slots.min() >= 0, "a new token in a block that was freed"
        return self._device(slots)

    @cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """How many sequences there are, and where their lengths, blocks and starts lie, for the compiled kernel."""
        arrays = self.batch.query_lens, self.batch.context_lens, self.table.blocks, self.table.starts
        queries, contexts, blocks, starts = (array.ctypes.data for array in arrays)
        return len(arrays[0]), queries, contexts, blocks, starts

    def on_device(self, queries: int) -> Places:
        """For tiles of so many queries, in int32; made by the first layer, for all that follow.

        Block table [S, W or more], -1 where one was freed or there is none; contexts [S]; the first query of each
        sequence [S + 1]; tiles [any, 2], sequence and first query of it, those first that see most, or None if every
        sequence has one query.
        """
        if self._places is None:
            new, context, blocks = self.batch.query_lens, self.batch.context_lens, self.table.blocks
            starts, sizes = self.table.starts, np.diff(self.table.starts, append=len(blocks))
            low = np.maximum(0, context - new + 1 - (self.window or 1 << 62)) // self.batch.block_size
            assert blocks[starts + low].min() >= 0, "a freed block within the window"
            width = -(-int(sizes.max()) // 16) * 16  # kernels are compiled anew for other remainders
            table = np.full(len(new) * width, -1, np.int32)
            table[np.repeat(np.arange(len(new)) * width - starts, sizes) + np.arange(len(blocks))] = blocks
            counts = -(-new // queries)
            owner, begin = np.repeat(np.arange(len(new)), counts), np.repeat(counts.cumsum() - counts, counts)
            tiles = np.stack((owner, (np.arange(len(owner)) - begin) * queries), 1)
            tiles = tiles[np.argsort(-(context - new)[owner] - tiles[:, 1], kind="stable")]
            parts = table, context, np.append(0, new.cumsum()), tiles.ravel()
            padded = [np.pad(part, (0, -len(part) % 4)) for part in parts]  # aligned to 16 bytes, for the same reason
            found = self._device(np.concatenate(padded, dtype=np.int32)).split([*map(len, padded)])
            tile = None if new.max() == 1 else found[3][: tiles.size].view(-1, 2)
            self._places = found[0].view(-1, width), found[1][: len(new)], found[2][: len(new) + 1], tile
        return self._places

    def refresh(self, blocks: torch.Tensor, contexts: torch.Tensor) -> None:
        """Other blocks [S, up to W] and contexts [S] for a step of one query each that is replayed, on its device."""
        self.on_device(1)[0][:, : blocks.shape[1]] = blocks
        self.on_device(1)[1].copy_(contexts)
        self.__dict__.pop("sequences", None)

    @cached_property
    def sequences(self) -> list[tuple[int, torch.Tensor | slice, slice, torch.Tensor | None]]:
        """For the reference, of each sequence: its queries, the blocks they see, the tokens of these up to the last
        query, and which of them each query sees, bool [queries, tokens], None for all."""
        size, window, found = self.batch.block_size, self.window or 1 << 62, []
        lengths = zip(self.batch.query_lens.tolist(), self.batch.context_lens.tolist(), self.table.starts, strict=True)
        for new, context, start in lengths:
            low = max(0, context - new + 1 - window) // size
            blocks = self.table.blocks[start + low : start - (-context // size)]
            assert blocks.min() >= 0, "a freed block within the window"
            run = slice(int(blocks[0]), int(blocks[0]) + len(blocks))
            side_by_side = (blocks == np.arange(run.start, run.stop)).all()
            token, query = np.arange(low * size, context), np.arange(context - new, context)[:, None]
            seen = (token <= query) & (token > query - window)
            found.append(
                (new, run if side_by_side else self._device(blocks), slice(context - low * size),
                 None if seen.all() else self._device(seen))
            )  # fmt: skip
        return found

    def _device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return sent(torch.from_numpy(values), self.batch.device)


def _spread(values: Numbers, counts: Numbers) -> Numbers:
    """values[i], counts[i] times."""
    return values if len(counts) == counts.sum() else np.repeat(values, counts)
