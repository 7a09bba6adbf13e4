"""Byte arithmetic: a tensor as [outer, length, inner], walked in chunks and cut along `length`.

`outer` is the product of the dimensions before the split dimension, `length` is the split
dimension, and `inner` is the number of bytes of everything after it. A slice of rows (outer = 1) is
contiguous in memory; a slice of columns is cut out of chunks of whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.shard.tensor_slice import Intervals

Bytes = npt.NDArray[np.uint8]
# A chunk is small enough to stay in the CPU cache while it is hashed and written.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: [first_row, end_row) along `outer`, [start, stop) along `length`."""

    first_row: int
    end_row: int
    start: int
    stop: int


@dataclass(frozen=True)
class ByteShape:
    """The shape [outer, length, inner] of a tensor's bytes."""

    outer: int
    length: int
    inner: int

    @staticmethod
    def of(dtype: str, shape: tuple[int, ...], dim: int) -> ByteShape:
        """The byte shape of a tensor that is split along `dim`. A scalar has one element."""
        shape = shape or (1,)
        inner = math.prod(shape[dim + 1 :]) * DTYPES[dtype].itemsize
        return ByteShape(math.prod(shape[:dim]), shape[dim], inner)

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        return self.outer * self.length * self.inner

    def chunks(self) -> Iterator[Chunk]:
        """Contiguous chunks in byte order, each of at most CHUNK_BYTES or one row."""
        if self.outer == 1:
            step = max(1, CHUNK_BYTES // max(1, self.inner))
            for start in range(0, self.length, step):
                yield Chunk(0, 1, start, min(start + step, self.length))
        else:
            step = max(1, CHUNK_BYTES // max(1, self.length * self.inner))
            for row in range(0, self.outer, step):
                yield Chunk(row, min(row + step, self.outer), 0, self.length)

    def byte_range(self, chunk: Chunk) -> tuple[int, int]:
        """The chunk's bytes [start, stop) within the tensor."""
        start = (chunk.first_row * self.length + chunk.start) * self.inner
        num_rows, num_elements, inner = self.chunk_shape(chunk)
        return start, start + num_rows * num_elements * inner

    def covering_chunk(self, start: int, stop: int) -> Chunk:
        """The smallest contiguous chunk of whole rows with the tensor's bytes [start, stop).

        Of a single row it is the smallest chunk of whole elements.
        """
        if self.outer == 1:
            return Chunk(0, 1, start // self.inner, -(-stop // self.inner))
        row_bytes = self.length * self.inner
        return Chunk(start // row_bytes, -(-stop // row_bytes), 0, self.length)

    @property
    def full_chunk(self) -> Chunk:
        """The whole tensor as one chunk."""
        return Chunk(0, self.outer, 0, self.length)

    def chunk_shape(self, chunk: Chunk) -> tuple[int, int, int]:
        """The shape of the chunk's bytes: [rows, elements, inner]."""
        return chunk.end_row - chunk.first_row, chunk.stop - chunk.start, self.inner


def overlaps(intervals: Intervals, chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """The parts of `intervals` in a chunk: start, stop, offset in the concatenated intervals."""
    offset = 0
    for start, stop in intervals:
        low = max(start, chunk.start)
        high = min(stop, chunk.stop)
        if low < high:
            yield low, high, offset + low - start
        offset += stop - start


def cut_chunk(data: Bytes, chunk: Chunk, intervals: Intervals) -> tuple[Bytes, int] | None:
    """The elements of a chunk that lie in `intervals`, and their offset in the slice.

    data: the chunk's bytes [rows, elements, inner].
    Returns None when no element lies in `intervals`. Contiguous elements are not copied.
    """
    parts = list(overlaps(intervals, chunk))
    if not parts:
        return None
    pieces = [data[:, low - chunk.start : high - chunk.start] for low, high, _ in parts]
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    return np.ascontiguousarray(joined), parts[0][2]
