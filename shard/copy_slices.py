"""Copies slices from a source to an output. Each chunk is read once and cut into all its slices.

While a chunk is written, the next one is read and the last one is hashed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkit.checkpoint.dtypes import DTYPES
from llmkit.checkpoint.stored_tensors import check_scales
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress
from llmkit.shard import chunking
from llmkit.shard.chunking import Bytes, ByteShape, Chunk, cut_chunk
from llmkit.shard.shard_source import ChunkData, ShardSource
from llmkit.shard.tensor_slice import TensorSlice

COMMIT_BYTES = 2**30  # an interrupted run repeats at most about this much


@dataclass(frozen=True)
class _CopyJob:
    """A chunk of a source tensor and the slices to cut from it."""

    name: str
    byte_shape: ByteShape
    chunk: Chunk
    slices: list[TensorSlice]


def write_output(
    source: ShardSource,
    slices: Mapping[str, list[TensorSlice]],
    writer: CheckpointWriter,
    manifest: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the slices of each source tensor, and finish the output.

    Raises InputError for scales that are not finite, and for a source that differs from its
    manifest; the output is then removed.
    """
    checkpoint = source.checkpoint
    progress.start("write", sum(source.tensors[name].nbytes for name in slices), "bytes")
    try:
        _copy(source, _jobs(source, slices, writer, progress), writer)
        source.check_digests()
    except InputError:
        writer.discard()
        raise
    progress.finish()
    writer.finish(checkpoint.config, checkpoint.side_files(), manifest)


def _copy(source: ShardSource, jobs: Iterator[_CopyJob], writer: CheckpointWriter) -> None:
    """Read, check, hash and write the chunks of `jobs`. Raises InputError for wrong values."""
    with ThreadPoolExecutor(2, thread_name_prefix="shard") as pool:
        uncommitted = 0
        hashed: Future[None] = pool.submit(lambda: None)
        for job, chunk_data in _read_ahead(pool, source, jobs):
            _check_scales(job, chunk_data.data, source)
            hashed.result()
            hashed = pool.submit(source.hash, chunk_data)
            for piece in job.slices:
                uncommitted += _write(job, chunk_data.data, piece, writer, source)
            if uncommitted >= COMMIT_BYTES:
                writer.commit()
                uncommitted = 0
        hashed.result()


def _check_scales(job: _CopyJob, data: Bytes, source: ShardSource) -> None:
    """Raises InputError for a chunk of scales that are not finite. Other values are not looked at.

    It is the check of `QuantizedFormat.unpack`: a model with such scales cannot be loaded.
    """
    first = job.slices[0]
    if not first.scale:
        return
    scales = torch.from_numpy(data.reshape(-1)).view(DTYPES[first.dtype])
    try:
        check_scales(job.name, scales, first.scale)
    except InputError as error:
        what = f"{source.checkpoint.reference}: {error.what}"
        raise InputError(what, error.expected, error.todo) from error


def require_ordered_groups(source: ShardSource, slices: Iterable[TensorSlice]) -> None:
    """Check that no split of input features divides groups that act-order has permuted.

    It is called before anything is written. The group indices that it reads are kept in `source`
    and not read again. Raises InputError.
    """
    for piece in slices:
        if piece.derived == "group_index" and piece.length < piece.source_shape[0]:
            derived_values(source.read_early(piece.name).tobytes(), piece, source)


def _jobs(
    source: ShardSource,
    slices: Mapping[str, list[TensorSlice]],
    writer: CheckpointWriter,
    progress: Progress,
) -> Iterator[_CopyJob]:
    for name in _copy_order(source, slices):
        info = source.tensors[name]
        remaining = [
            piece for piece in slices[name] if not writer.is_written(piece.target, piece.file)
        ]
        if remaining:
            first = remaining[0]
            byte_shape = ByteShape.of(info.dtype, info.shape, first.dim)
            # Derived tensors are small, so each is one chunk.
            chunks = [byte_shape.full_chunk] if first.derived else byte_shape.chunks()
            for chunk in chunks:
                yield _CopyJob(name, byte_shape, chunk, remaining)
        progress.advance(info.nbytes, name)


def _copy_order(source: ShardSource, slices: Mapping[str, list[TensorSlice]]) -> list[str]:
    """The source's order, except that the slices of one target tensor follow each other."""
    first_index: dict[tuple[str, str], int] = {}
    for index, name in enumerate(source.read_order()):
        for piece in slices.get(name, ()):
            first_index.setdefault((piece.file, piece.target), index)

    def position(name: str) -> tuple[int, int]:
        return min(
            (first_index[piece.file, piece.target], piece.target_offset) for piece in slices[name]
        )

    return sorted(slices, key=position)


def _read_ahead(
    pool: ThreadPoolExecutor, source: ShardSource, jobs: Iterator[_CopyJob]
) -> Iterator[tuple[_CopyJob, ChunkData]]:
    """Each job with its data. A thread reads the next one meanwhile."""
    previous: tuple[_CopyJob, Future[ChunkData]] | None = None
    for job in jobs:
        current = job, pool.submit(source.read, job.name, job.byte_shape, job.chunk)
        if previous:
            yield previous[0], previous[1].result()
        previous = current
    if previous:
        yield previous[0], previous[1].result()


def _write(
    job: _CopyJob, data: Bytes, piece: TensorSlice, writer: CheckpointWriter, source: ShardSource
) -> int:
    """Write the slice's part of a chunk, and after the last chunk the slice's padding.

    Returns the number of bytes written.
    """
    byte_shape = job.byte_shape
    written = 0

    def write(offset: int, part: bytes | memoryview) -> None:
        nonlocal written
        writer.write_chunk(piece.file, piece.target, piece.target_offset + offset, part)
        written += len(part)

    if piece.derived:
        write(0, derived_values(data.tobytes(), piece, source))
        return written
    cut = cut_chunk(data, job.chunk, piece.intervals)
    if cut is not None:
        part, offset = cut
        first_byte = (job.chunk.first_row * piece.length + offset) * byte_shape.inner
        write(first_byte, part.reshape(-1).data)
    if piece.padding and job.chunk.stop == byte_shape.length:
        assert byte_shape.outer == 1, "only rows are padded"
        step = chunking.CHUNK_BYTES
        for start in range(piece.nbytes - piece.padding_bytes, piece.nbytes, step):
            write(start, bytes(min(step, piece.nbytes - start)))
    return written


def derived_values(values: bytes, piece: TensorSlice, source: ShardSource) -> bytes:
    """The content of a derived slice. values: the whole source tensor.

    Raises InputError for values that cannot be split.
    """
    if piece.derived == "group_index":
        return _group_index_values(values, piece, source)
    return _shape_values(values, piece, source)


def _shape_values(values: bytes, piece: TensorSlice, source: ShardSource) -> bytes:
    """The dense shape of the slice. The source must hold the dense shape of the whole weight."""
    source_shape = np.frombuffer(values, "<i8").tolist()
    if source_shape != list(piece.source_dense_shape):
        raise InputError(
            f"{source.checkpoint.reference}: {piece.name} is {source_shape}",
            f"{list(piece.source_dense_shape)}",
        )
    return np.array(piece.dense_shape, "<i8").tobytes()


def _group_index_values(values: bytes, piece: TensorSlice, source: ShardSource) -> bytes:
    """The group indices of the slice, counted from its first group."""
    ((start, stop),) = piece.intervals
    index = np.frombuffer(values, "<i4")[start:stop]
    num_columns = piece.source_shape[0]
    if stop - start < num_columns:
        quantization = source.checkpoint.quantization
        assert quantization is not None
        scheme = quantization.scheme_of(piece.name.rpartition(".")[0])
        group_size = -1 if scheme is None else scheme.group_size
        if group_size == -1:
            group_size = num_columns
        if not np.array_equal(index, np.arange(start, stop) // group_size):
            raise InputError(
                f"{source.checkpoint.reference}: {piece.name} does not number its groups"
                " in the order of the columns",
                "Each group's columns next to each other (no act-order),"
                " as a split of the input features needs",
                "Shard with --tp 1, or quantize the original model"
                " with llmkit quantize --method gptq",
            )
    return (index - np.int32(piece.first_group)).astype("<i4").tobytes()
