"""From a source to an output: each chunk is read once and cut for all files that keep something of it.

The next chunk is read, and the last one hashed for the source's own digests, while one is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.progress import Progress
from llmkit.checkpoint.writer import CheckpointWriter
from llmkit.shard import blocks
from llmkit.shard.blocks import Bytes, Chunk, Grid, cut_chunk
from llmkit.shard.slices import Slice, Target
from llmkit.shard.source import Block, Source

COMMIT_BYTES = 2**30  # an interrupted run writes at most about this much again


@dataclass(frozen=True)
class _Job:
    """A chunk of a source tensor and what is to be cut from it."""

    name: str
    grid: Grid
    chunk: Chunk
    targets: list[Target]


def write_output(
    source: Source,
    targets: Mapping[str, list[Target]],
    writer: CheckpointWriter,
    manifest: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Write the slices of each source tensor and finish the output.

    Raises InputError for a source that is not what its manifest says: nothing is then left of the output.
    """
    checkpoint = source.checkpoint
    progress.start("write", sum(source.tensors[name].nbytes for name in targets), "bytes")
    with ThreadPoolExecutor(2, thread_name_prefix="shard") as pool:
        uncommitted = 0
        hashed: Future[None] = pool.submit(lambda: None)
        for job, block in _ahead(pool, source, _jobs(source, targets, writer, progress)):
            hashed.result()
            hashed = pool.submit(source.hash, block)
            for target in job.targets:
                uncommitted += _write(job, block.view, target, writer, source)
            if uncommitted >= COMMIT_BYTES:
                writer.commit()
                uncommitted = 0
        hashed.result()
    try:
        source.check()
    except InputError:
        writer.discard()
        raise
    progress.finish()
    writer.finish(checkpoint.config, checkpoint.side_files(), manifest)


def require_ordered_groups(source: Source, targets: Iterable[Target]) -> None:
    """Refuse to split what act-order has mixed, before anything is written. Raises InputError.

    What is read for it is kept for when its turn comes.
    """
    for target in targets:
        piece = target.piece
        if piece.derived == "group_index" and piece.length < piece.source_shape[0]:
            derived_values(source.keep(piece.name).tobytes(), piece, source)


def _jobs(
    source: Source, targets: Mapping[str, list[Target]], writer: CheckpointWriter, progress: Progress
) -> Iterator[_Job]:
    for name in _sequence(source, targets):
        info = source.tensors[name]
        wanted = [target for target in targets[name] if not writer.done(target.name, target.file)]
        if wanted:
            first = wanted[0].piece
            grid = Grid.of(info.dtype, info.shape, first.dim)
            # Derived values are a few numbers per column at most.
            for chunk in [grid.whole] if first.derived else grid.chunks():
                yield _Job(name, grid, chunk, wanted)
        progress.advance(info.nbytes, name)


def _sequence(source: Source, targets: Mapping[str, list[Target]]) -> list[str]:
    """The source's order, but what becomes one tensor of the output together and in that tensor's order."""
    places: dict[tuple[str, str], int] = {}
    for place, name in enumerate(source.sequence()):
        for target in targets.get(name, ()):
            places.setdefault((target.file, target.name), place)
    return sorted(targets, key=lambda n: min((places[t.file, t.name], t.first) for t in targets[n]))


def _ahead(pool: ThreadPoolExecutor, source: Source, jobs: Iterator[_Job]) -> Iterator[tuple[_Job, Block]]:
    """Each job and what it is cut from; the next is read meanwhile."""
    waiting: tuple[_Job, Future[Block]] | None = None
    for job in jobs:
        following = job, pool.submit(source.read, job.name, job.grid, job.chunk)
        if waiting:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting:
        yield waiting[0], waiting[1].result()


def _write(job: _Job, view: Bytes, target: Target, writer: CheckpointWriter, source: Source) -> int:
    """Write what a slice has of a chunk, after the last also its padding; the bytes written."""
    piece, grid, written = target.piece, job.grid, 0

    def put(start: int, data: bytes | memoryview) -> None:
        nonlocal written
        writer.write_chunk(target.file, target.name, target.first + start, data)
        written += len(data)

    if piece.derived:
        put(0, derived_values(view.tobytes(), piece, source))
        return written
    if (found := cut_chunk(view, job.chunk, piece.intervals)) is not None:
        part, first = found
        put((job.chunk.top * piece.length + first) * grid.inner, part.reshape(-1).data)
    if piece.padding and job.chunk.stop == grid.length:
        assert grid.outer == 1, "only rows are padded"
        for start in range(piece.nbytes - piece.padding_bytes, piece.nbytes, blocks.CHUNK_BYTES):
            put(start, bytes(min(blocks.CHUNK_BYTES, piece.nbytes - start)))
    return written


def derived_values(values: bytes, piece: Slice, source: Source) -> bytes:
    """What a derived slice holds, from the whole tensor. Raises InputError for values that it cannot be made of."""
    return (_group_index if piece.derived == "group_index" else _shape)(values, piece, source)


def _shape(values: bytes, piece: Slice, source: Source) -> bytes:
    """The slice's own dense shape. The source's has to be what a merge will write back."""
    found = np.frombuffer(values, "<i8").tolist()
    if found != list(piece.source_dense_shape):
        raise InputError(f"{source.checkpoint.reference}: {piece.name} is {found}", f"{list(piece.source_dense_shape)}")
    return np.array(piece.dense_shape, "<i8").tobytes()


def _group_index(values: bytes, piece: Slice, source: Source) -> bytes:
    """The slice's group indices, counted from its first group."""
    ((start, stop),) = piece.intervals
    index = np.frombuffer(values, "<i4")[start:stop]
    if stop - start < piece.source_shape[0]:
        quantization = source.checkpoint.quantization
        assert quantization is not None
        scheme = quantization.scheme_of(piece.name.rpartition(".")[0])
        size = -1 if scheme is None else scheme.group_size
        if not np.array_equal(index, np.arange(start, stop) // (piece.source_shape[0] if size == -1 else size)):
            raise InputError(
                f"{source.checkpoint.reference}: {piece.name} does not number its groups in the order of the columns",
                "Each group's columns next to each other (no act-order), as a split of the input features needs",
                "Shard with --tp 1, or quantize the original model with llmkit quantize --method gptq",
            )
    return (index - np.int32(piece.first_group)).astype("<i4").tobytes()
