"""Byte arithmetic: a tensor as [outer, length, inner], walked in chunks and cut along its middle.

`outer` is what lies before the split dimension, `length` its elements, `inner` the bytes of everything after it.
Row slices (outer = 1) are contiguous bytes; column slices are cut out of chunks of whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.shard.slices import Intervals

Bytes = npt.NDArray[np.uint8]
CHUNK_BYTES = 8 * 2**20  # moved at once: small enough to stay in a processor's cache while it is hashed and written


@dataclass(frozen=True)
class Chunk:
    """Rows [top, bottom) of `outer`, elements [start, stop) of `length`."""

    top: int
    bottom: int
    start: int
    stop: int


@dataclass(frozen=True)
class Grid:
    """The shape [outer, length, inner] of a tensor's bytes."""

    outer: int
    length: int
    inner: int

    @staticmethod
    def of(dtype: str, shape: tuple[int, ...], dim: int) -> Grid:
        """The grid of a tensor that is split along `dim`."""
        return Grid(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]) * DTYPES[dtype].itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.outer * self.length * self.inner

    def chunks(self) -> Iterator[Chunk]:
        """The tensor in the order of its bytes, in contiguous chunks of at most CHUNK_BYTES or one row."""
        if self.outer == 1:
            step = max(1, CHUNK_BYTES // max(1, self.inner))
            for start in range(0, self.length, step):
                yield Chunk(0, 1, start, min(start + step, self.length))
        else:
            step = max(1, CHUNK_BYTES // max(1, self.length * self.inner))
            for top in range(0, self.outer, step):
                yield Chunk(top, min(top + step, self.outer), 0, self.length)

    def bytes_of(self, chunk: Chunk) -> tuple[int, int]:
        """The chunk's bytes [start, stop) within the tensor."""
        first = (chunk.top * self.length + chunk.start) * self.inner
        return first, first + (chunk.bottom - chunk.top) * (chunk.stop - chunk.start) * self.inner

    @property
    def whole(self) -> Chunk:
        """All of the tensor in one chunk."""
        return Chunk(0, self.outer, 0, self.length)

    def shape_of(self, chunk: Chunk) -> tuple[int, int, int]:
        """The chunk's bytes are [rows, elements, inner]."""
        return chunk.bottom - chunk.top, chunk.stop - chunk.start, self.inner


def overlaps(intervals: Intervals, chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """The parts [start, stop) of `intervals` within the chunk, each with its offset in their concatenation."""
    offset = 0
    for start, stop in intervals:
        low, high = max(start, chunk.start), min(stop, chunk.stop)
        if low < high:
            yield low, high, offset + low - start
        offset += stop - start


def cut_chunk(view: Bytes, chunk: Chunk, intervals: Intervals) -> tuple[Bytes, int] | None:
    """The elements of a chunk that lie in `intervals`, [rows, elements, inner], and their place in the concatenation.

    None when there are none. No copy where they are one piece of one row.
    """
    parts = list(overlaps(intervals, chunk))
    if not parts:
        return None
    pieces = [view[:, low - chunk.start : high - chunk.start] for low, high, _ in parts]
    return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)), parts[0][2]
