"""Chunks of tensors: which bytes they are, and which part of a slice each of them holds."""

import numpy as np
import pytest

from llmkit.shard import chunking
from llmkit.shard.chunking import ByteShape, Chunk, cut_chunk, overlaps


@pytest.mark.parametrize(
    ("shape", "dim", "expected"),
    [
        ((7, 5), 0, (1, 7, 10)),
        ((7, 5), 1, (7, 5, 2)),
        ((3, 4, 5), 1, (3, 4, 10)),
        ((9,), 0, (1, 9, 2)),
    ],
)
def test_byte_shape_of_a_tensor(
    shape: tuple[int, ...], dim: int, expected: tuple[int, int, int]
) -> None:
    found = ByteShape.of("BF16", shape, dim)
    assert (found.outer, found.length, found.inner) == expected
    assert found.nbytes == 2 * int(np.prod(shape))
    assert found.full_chunk == Chunk(0, expected[0], 0, expected[1])


@pytest.mark.parametrize(
    ("byte_shape", "expected"),
    [
        # Rows of 40 bytes: two in 99 bytes. The last chunk is shorter.
        (ByteShape(1, 5, 40), [(0, 1, 0, 2), (0, 1, 2, 4), (0, 1, 4, 5)]),
        (ByteShape(1, 3, 99), [(0, 1, 0, 1), (0, 1, 1, 2), (0, 1, 2, 3)]),
        (ByteShape(1, 2, 100), [(0, 1, 0, 1), (0, 1, 1, 2)]),  # one element is larger than a chunk
        (ByteShape(1, 198, 1), [(0, 1, 0, 99), (0, 1, 99, 198)]),
        (ByteShape(1, 4, 0), [(0, 1, 0, 4)]),  # a tensor without bytes
        # Whole rows of 4 x 10 bytes, so that columns can be cut out of them.
        (ByteShape(5, 4, 10), [(0, 2, 0, 4), (2, 4, 0, 4), (4, 5, 0, 4)]),
        (ByteShape(2, 100, 1), [(0, 1, 0, 100), (1, 2, 0, 100)]),
        (ByteShape(198, 1, 1), [(0, 99, 0, 1), (99, 198, 0, 1)]),
        (ByteShape(3, 0, 2), [(0, 3, 0, 0)]),
    ],
)
def test_chunks_are_in_byte_order_and_not_too_large(
    byte_shape: ByteShape, expected: list[tuple[int, int, int, int]], monkeypatch
) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", 99)
    chunks = list(byte_shape.chunks())
    assert chunks == [Chunk(*chunk) for chunk in expected]
    position = 0
    for chunk in chunks:
        start, stop = byte_shape.byte_range(chunk)
        assert start == position
        rows, elements, inner = byte_shape.chunk_shape(chunk)
        assert stop - start == rows * elements * inner
        position = stop
    assert position == byte_shape.nbytes


def test_chunks_have_8_mib() -> None:
    for byte_shape in (ByteShape(1, 3 * 2**20, 8), ByteShape(3 * 2**20, 2, 4)):
        sizes = [stop - start for start, stop in map(byte_shape.byte_range, byte_shape.chunks())]
        assert sizes == [8 * 2**20] * 3


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        (((0, 10),), []),  # ends where the chunk begins
        (((0, 11),), [(10, 11, 10)]),
        (((20, 30),), []),  # begins where the chunk ends
        (((19, 30),), [(19, 20, 0)]),
        (((4, 30),), [(10, 20, 6)]),
        (((2, 6), (8, 12), (14, 15), (18, 25), (30, 31)), [(10, 12, 6), (14, 15, 8), (18, 20, 9)]),
    ],
)
def test_overlaps_are_the_parts_within_a_chunk(
    intervals: tuple[tuple[int, int], ...], expected: list[tuple[int, int, int]]
) -> None:
    assert list(overlaps(intervals, Chunk(0, 1, 10, 20))) == expected


def test_cut_chunk_joins_its_parts() -> None:
    data = np.arange(2 * 10 * 3, dtype=np.uint8).reshape(2, 10, 3)
    chunk = Chunk(4, 6, 10, 20)
    assert cut_chunk(data, chunk, ((0, 10), (20, 30))) is None
    one = cut_chunk(data, chunk, ((5, 8), (12, 15)))
    assert one is not None
    assert one[0].tolist() == data[:, 2:5].tolist()
    assert one[1] == 3
    two = cut_chunk(data, chunk, ((8, 11), (15, 17)))
    assert two is not None
    assert two[0].tolist() == data[:, [0, 5, 6]].tolist()
    assert two[1] == 2
    assert two[0].flags.c_contiguous and one[0].flags.c_contiguous
    rows = cut_chunk(data[:1], Chunk(0, 1, 10, 20), ((12, 15),))
    assert rows is not None and np.shares_memory(rows[0], data)  # contiguous: not copied


@pytest.mark.parametrize(
    ("shape", "interval", "expected"),
    [
        (ByteShape(1, 10, 4), (4, 12), Chunk(0, 1, 1, 3)),
        (ByteShape(1, 10, 4), (5, 13), Chunk(0, 1, 1, 4)),
        (ByteShape(3, 10, 4), (40, 80), Chunk(1, 2, 0, 10)),
        (ByteShape(3, 10, 4), (39, 81), Chunk(0, 3, 0, 10)),
    ],
)
def test_covering_chunk_is_the_smallest_of_whole_rows_or_elements(
    shape: ByteShape, interval: tuple[int, int], expected: Chunk
) -> None:
    assert shape.covering_chunk(*interval) == expected
