"""`llmkit shard merge`: joins the files of all ranks to one checkpoint with the source's bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import check_output
from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.checkpoint.writer import CheckpointWriter, plan_files, planned_bytes
from llmkit.common.errors import InputError
from llmkit.common.progress import Progress, SilentProgress
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.shard.copy_slices import write_output
from llmkit.shard.shard_checkpoint import validated_spec
from llmkit.shard.shard_source import ShardSource


def merge(
    path: str | Path, output: str | Path, progress: Progress | None = None
) -> dict[str, list[TensorInfo]]:
    """Write the sharded directory `path` as one checkpoint into the new directory `output`.

    Every tensor has the bytes that it had in the checkpoint that was sharded. An interrupted run is
    continued. Returns the tensors of each written file.

    Raises InputError when `path` is not sharded, when a rank's file is missing or differs from the
    manifest (with both digests), when the ranks do not cover the whole model, and when scales are
    none, as `shard` does; OutputError and ShortageError as CheckpointWriter does.
    """
    checkpoint = open_checkpoint(path)
    source = ShardSource(checkpoint)
    if source.layout is None:
        raise InputError(
            f"{path} is not sharded", "A directory that `llmkit shard` wrote was expected"
        )
    stored = checkpoint_tensors(validated_spec(source), checkpoint.quantization)
    scales = {name: packed.scale for name, (_, packed) in stored.items()}
    files = plan_files(list(source.tensors.values()))
    check_output(Path(output).expanduser(), checkpoint.path, planned_bytes(files))
    slices = {}
    for file, tensors in files.items():
        for tensor in tensors:
            full_slice = source.layout.slices_by_source[tensor.name][0].full_slice()
            # Carried tensors are in no row of the parameter table.
            scale = scales.get(tensor.name, "")
            slices[tensor.name] = [replace(full_slice, file=file, target=tensor.name, scale=scale)]
    identity = {"command": "shard merge", "source": checkpoint.stamps}
    progress = progress or SilentProgress()
    with CheckpointWriter(output, files, checkpoint, identity) as writer:
        if writer.resume_note:
            progress.message(writer.resume_note)
        write_output(source, slices, writer, {"source": source.origin}, progress)
    if writer.time_note():
        progress.message(writer.time_note())
    return files
