"""Where the tokens of a step stand: their slots in the KV cache, and the blocks that each query sees.

Everything is found on the host, with numpy, once per step and window; layers of one window share it.
Legend: S sequences, T tokens of this step over all of them, L tokens of context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

PIECE = 512  # query tokens of one sequence that share a mask
SHORT = 16  # queries of up to so many tokens are computed side by side


@dataclass(frozen=True)
class Part:
    """Queries that are answered together: the last `new` tokens of each of `count` contexts, padded to the longest."""

    rows: slice  # of the step's queries, in the plan's order
    count: int
    new: int
    blocks: torch.Tensor | slice  # int64 [count * blocks of the longest], context by context; a slice is read in place
    span: slice  # which tokens of the blocks of a context any query sees
    mask: (
        torch.Tensor | None
    )  # [count, 1, new, L]: 0 or True where a query sees one of these tokens, else -inf or False
    causal: bool = False  # each query sees the tokens up to its own; there is no mask then


@dataclass(frozen=True)
class Plan:
    """All queries of a step. order, back: int64 [T], from the step's order to that of the parts and back."""

    parts: list[Part]
    order: torch.Tensor | None
    back: torch.Tensor | None


@dataclass(frozen=True)
class Places:
    """Where a kernel on the device finds contexts and queries; int32."""

    table: torch.Tensor  # [S, W or more]: blocks, -1 where one was freed or there is none
    contexts: torch.Tensor  # [S]: tokens in the cache
    starts: torch.Tensor  # [S + 1]: the first query of each
    tiles: torch.Tensor | None  # [tiles, 2]: sequence and first query of it; None where each has one query


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
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Mapping[int | None, Sequence[Sequence[int]]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
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

    @cached_property
    def longest(self) -> int:
        """The most queries of a sequence."""
        return int(self.query_lens.max())

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


@dataclass(frozen=True)
class Pieces:
    """Up to PIECE consecutive queries of one sequence each, in the order in which they are computed."""

    new: list[int]  # queries
    widths: list[int]  # blocks that they see
    tokens: list[int]  # in these blocks, up to and with the last query
    causal: list[bool]  # whether they are all there is of their sequence, and see what is before them
    first: Numbers  # where their blocks begin in the tables

    def cuts(self, most_blocks: int) -> Iterator[tuple[int, int]]:
        """Ranges that are computed side by side: short, of one length, and of about `most_blocks` blocks in all."""
        start = widest = 0
        for at, (new, width) in enumerate(zip(self.new, self.widths, strict=True)):
            widest = max(widest, width)
            if at > start and (new > SHORT or new != self.new[start] or (at + 1 - start) * widest > most_blocks):
                yield start, at
                start, widest = at, width
        yield start, len(self.new)


class Group:
    """The layers of one window: where they put new keys and values, and what their queries see."""

    def __init__(self, batch: AttentionBatch, window: int | None, table: Table) -> None:
        self.batch, self.window, self.table = batch, window, table
        self._plan: Plan | None = None
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
        """For tiles of so many queries, those first that see most; made by the first layer, for all that follow."""
        if self._places is None:
            new, context, blocks = self.batch.query_lens, self.batch.context_lens, self.table.blocks
            starts, sizes = self.table.starts, np.diff(self.table.starts, append=len(blocks))
            low = np.maximum(0, context - new + 1 - (self.window or 1 << 62)) // self.batch.block_size
            assert blocks[starts + low].min() >= 0, "a freed block within the window"
            width = -(-int(sizes.max()) // 16) * 16  # kernels are compiled anew for other remainders
            table = np.full(len(new) * width, -1, np.int32)
            table[np.repeat(np.arange(len(new)) * width - starts, sizes) + np.arange(len(blocks))] = blocks
            counts = -(-new // queries)
            owner, ends = np.repeat(np.arange(len(new)), counts), counts.cumsum()
            first = (np.arange(len(owner)) - np.repeat(ends - counts, counts)) * queries
            tiles = np.stack((owner, first), 1)[np.argsort(-(context - new)[owner] - first, kind="stable")]
            parts = table, context, np.append(0, new.cumsum()), tiles.ravel()
            padded = [np.pad(part, (0, -len(part) % 4)) for part in parts]  # all aligned to 16 bytes, for the same reason
            whole = self._device(np.concatenate(padded, dtype=np.int32, casting="same_kind"))
            found = [one[: len(part)] for one, part in zip(whole.split([*map(len, padded)]), parts, strict=True)]
            decoding = self.batch.longest == 1
            self._places = Places(found[0].view(-1, width), *found[1:3], None if decoding else found[3].view(-1, 2))
        return self._places

    def refresh(self, blocks: torch.Tensor, contexts: torch.Tensor) -> None:
        """Other blocks [S, up to W] and contexts [S] for a step of one query each that is replayed, on its device."""
        places = self.on_device(1)
        places.table[:, : blocks.shape[1]] = blocks
        places.contexts.copy_(contexts)
        self._plan = None

    def plan(self, most_blocks: int, dtype: torch.dtype, *, fused: bool) -> Plan:
        """Parts of about `most_blocks` blocks, with masks of a dtype; made by the first layer, for all that follow.

        fused: whether queries that see everything before them need no mask.
        """
        if self._plan is None:
            self._plan = self._make(most_blocks, dtype, fused)
        return self._plan

    def _make(self, most_blocks: int, dtype: torch.dtype, fused: bool) -> Plan:
        size, window = self.batch.block_size, self.window
        new, context = self.batch.query_lens, self.batch.context_lens
        causal = (new == context) & (new > 1) & fused & (new <= (window or new))
        split = np.where(causal, 1, -(-new // PIECE))
        owner = _spread(np.arange(len(new)), split)
        begin = (np.arange(len(owner)) - _spread(split.cumsum() - split, split)) * PIECE
        count = np.where(causal[owner], new[owner], np.minimum(PIECE, new[owner] - begin))
        end = (context - new)[owner] + begin + count
        order = np.lexsort((end, count))  # the short ones first
        owner, count, end = owner[order], count[order], end[order]
        row = ((new.cumsum() - new)[owner] + begin[order]) - (count.cumsum() - count)
        rows = _spread(row, count) + np.arange(new.sum())
        first = np.maximum(0, end - count + 1 - (window or 1 << 62)) // size
        pieces = Pieces(
            count.tolist(), (-(-end // size) - first).tolist(), (end - first * size).tolist(),
            causal[owner].tolist(), self.table.starts[owner] + first,
        )  # fmt: skip
        parts, at = [], 0
        for start, stop in pieces.cuts(most_blocks):
            parts.append(self._part(at, pieces, start, stop, None if fused and pieces.new[start] > SHORT else dtype))
            at = parts[-1].rows.stop
        if (rows == np.arange(len(rows))).all():
            return Plan(parts, None, None)
        return Plan(parts, self._device(rows), self._device(np.argsort(rows)))

    def _part(self, at: int, pieces: Pieces, start: int, stop: int, dtype: torch.dtype | None) -> Part:
        """Pieces [start, stop), whose queries begin at row `at`. dtype: of the mask; None: bool, which takes less."""
        count, new, window = stop - start, pieces.new[start], self.window
        widths, tokens = pieces.widths[start:stop], pieces.tokens[start:stop]
        longest, shortest = max(tokens), min(tokens)
        # Padded with a context's own last block: what is masked there can then never be another sequence's NaN.
        column = np.minimum(np.arange(max(widths)), np.array(widths)[:, None] - 1)
        blocks = self.table.blocks[pieces.first[start:stop, None] + column].ravel()
        assert blocks.min() >= 0, "a freed block within the window"
        low = 0 if window is None else max(0, shortest - new + 1 - window)
        causal = count == 1 and pieces.causal[start]
        mask = None
        if not causal and (new > 1 or longest > shortest):
            query = np.array(tokens)[:, None, None] - np.arange(new, 0, -1)[:, None]
            token = np.arange(low, longest)
            seen = token <= query if window is None else (token <= query) & (token > query - window)
            if dtype is None:
                mask = self._device(seen)[:, None]
            else:
                mask = self._device(np.where(seen, np.float32(0), np.float32("-inf"))).to(dtype)[:, None]
        rows = slice(at, at + count * new)
        run = slice(int(blocks[0]), int(blocks[0]) + len(blocks))
        side_by_side = count == 1 and (blocks == np.arange(run.start, run.stop)).all()
        read = run if side_by_side else self._device(blocks)
        return Part(rows, count, new, read, slice(low, longest), mask, causal)

    def _device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        host = torch.from_numpy(values)
        device = self.batch.device
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _spread(values: Numbers, counts: Numbers) -> Numbers:
    """values[i], counts[i] times."""
    return values if len(counts) == counts.sum() else np.repeat(values, counts)
