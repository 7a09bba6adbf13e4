"""`llmkit shard merge`: from the ranks' files back to one checkpoint, with the source's bytes."""

from __future__ import annotations

from pathlib import Path

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.progress import Progress, SilentProgress
from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, PlannedTensor, check_output, plan_files, planned_bytes
from llmkit.shard.slices import Target
from llmkit.shard.source import Source
from llmkit.shard.stream import write_output


def merge(path: str | Path, output: str | Path, progress: Progress | None = None) -> dict[str, list[PlannedTensor]]:
    """Write the sharded directory `path` as a whole checkpoint into the new directory `output`; its files' tensors.

    Every tensor has the bytes it had in the checkpoint that was sharded. An interrupted run is continued. Raises
    InputError when `path` is not sharded, when a rank's file is absent or is not the one the manifest describes
    (telling both digests), and when the ranks do not make up the whole; OutputError and ShortageError as
    CheckpointWriter does.
    """
    checkpoint = open_checkpoint(path)
    source = Source(checkpoint)
    if source.layout is None:
        raise InputError(f"{path} is not sharded", "A directory that `llmkit shard` wrote was expected")
    pieces = {name: source.layout.by_source[name][0].slice.whole() for name in source.tensors}
    files = plan_files([PlannedTensor(piece.name, piece.dtype, piece.source_shape) for piece in pieces.values()])
    check_output(Path(output).expanduser(), checkpoint, planned_bytes(files))
    targets = {
        tensor.name: [Target(file, tensor.name, pieces[tensor.name])]
        for file, tensors in files.items()
        for tensor in tensors
    }
    with CheckpointWriter(output, files, checkpoint, {"command": "shard merge", "source": checkpoint.stamps}) as writer:
        write_output(source, targets, writer, {"source": source.origin}, progress or SilentProgress())
    return files
