"""`llmkit shard merge`: from the ranks' files back to one checkpoint, with the source's bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.progress import Progress, SilentProgress
from llmkit.checkpoint.safetensors_header import TensorInfo, read_header
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, PlannedTensor, check_output, plan_files, planned_bytes
from llmkit.shard.blocks import Bytes, Chunk, Grid, overlaps
from llmkit.shard.layout import Layout, StoredSlice, read_layout
from llmkit.shard.shard import COMMIT_BYTES, checked_hashes

Held = tuple[StoredSlice, TensorInfo]


def merge(path: str | Path, output: str | Path, progress: Progress | None = None) -> dict[str, list[PlannedTensor]]:
    """Write the sharded directory `path` as a whole checkpoint into the new directory `output`; its files' tensors.

    Every tensor has the bytes it had in the checkpoint that was sharded. An interrupted run is continued. Raises
    InputError when `path` is not sharded, when a rank's file is absent or is not the one the manifest describes
    (telling both digests), and when the ranks do not make up the whole; OutputError and ShortageError as
    CheckpointWriter does.
    """
    progress = progress or SilentProgress()
    checkpoint = open_checkpoint(path)
    layout = read_layout(checkpoint.path)
    if gaps := layout.gaps():
        raise InputError(f"{path}: {gaps[0]}", "Ranks that make up the whole checkpoint", "Shard the source again")
    planned = [_planned(slices[0]) for slices in layout.by_source.values()]
    files = plan_files(planned)
    check_output(Path(output).expanduser(), checkpoint, planned_bytes(files))
    identity = {"command": "shard merge", "source": checked_hashes(checkpoint, progress)}
    held = _held(checkpoint, layout)
    with CheckpointWriter(output, files, checkpoint, identity) as writer:
        progress.start("merge", sum(tensor.nbytes for tensor in planned), "bytes")
        uncommitted = 0
        for file, tensors in files.items():
            for tensor in tensors:
                if not writer.done(tensor.name, file):
                    _join(checkpoint, held[tensor.name], file, writer)
                    uncommitted += tensor.nbytes
                if uncommitted >= COMMIT_BYTES:
                    writer.commit()
                    uncommitted = 0
                progress.advance(tensor.nbytes, tensor.name)
        progress.finish()
        writer.finish(checkpoint.config, checkpoint.side_files(), {})
    return files


def _planned(stored: StoredSlice) -> PlannedTensor:
    return PlannedTensor(stored.slice.name, stored.slice.dtype, stored.slice.source_shape)


def _held(checkpoint: Checkpoint, layout: Layout) -> dict[str, list[Held]]:
    """Each source tensor's slices and where they lie. Raises InputError when a file's header is not as planned."""
    headers = {file: read_header(checkpoint.path / file) for file in layout.files}
    held: dict[str, list[Held]] = {}
    for name, slices in layout.by_source.items():
        for stored in slices:
            info = headers[stored.file].get(name)
            if info is None or (info.dtype, info.shape) != (stored.slice.dtype, stored.slice.shape):
                found = "absent" if info is None else f"{info.dtype} {list(info.shape)}"
                raise InputError(
                    f"{checkpoint.path / stored.file}: tensor {name} is {found}",
                    f"{stored.slice.dtype} {list(stored.slice.shape)}",
                    "Shard the source again",
                )
            held.setdefault(name, []).append((stored, info))
    return held


def _join(checkpoint: Checkpoint, held: list[Held], file: str, writer: CheckpointWriter) -> None:
    """Write one source tensor from its slices."""
    first = held[0][0].slice
    if first.derived == "shape":
        writer.write_chunk(file, first.name, 0, np.array(first.source_dense_shape, "<i8").tobytes())
        return
    grid = Grid.of(first.dtype, first.source_shape, first.dim)
    for chunk in grid.chunks():
        whole = np.empty((chunk.bottom - chunk.top, chunk.stop - chunk.start, grid.inner), np.uint8)
        for stored, info in held:
            _fill(whole, chunk, checkpoint, stored, info)
        writer.write_chunk(file, first.name, grid.bytes_of(chunk)[0], whole.reshape(-1).data)


def _fill(whole: Bytes, chunk: Chunk, checkpoint: Checkpoint, stored: StoredSlice, info: TensorInfo) -> None:
    """Put what a slice has of a chunk where it belongs."""
    piece = stored.slice
    grid = Grid.of(piece.dtype, piece.shape, piece.dim)
    parts = list(overlaps(piece.intervals, chunk))
    if not parts:
        return
    # The slice's own elements are contiguous in its file, so the parts of a chunk are read at once.
    first, last = parts[0][2], parts[-1][2] + parts[-1][1] - parts[-1][0]
    if grid.outer > 1:
        first, last = 0, grid.length
    local = Chunk(chunk.top, chunk.bottom, first, last)
    data = grid.view(checkpoint.read_bytes(info, *grid.bytes_of(local)), local)
    if piece.derived == "group_index":
        index = data.reshape(-1).view("<i4") + np.int32(piece.first_group)
        data = index.astype("<i4").view(np.uint8).reshape(data.shape)
    for start, stop, offset in parts:
        whole[:, start - chunk.start : stop - chunk.start] = data[:, offset - first : offset - first + stop - start]
