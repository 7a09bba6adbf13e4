"""`llmkit shard`: write a checkpoint as one file per rank.

Each source tensor is read once, in chunks, and each chunk is cut for all ranks that keep something of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.manifest import mismatch
from llmkit.checkpoint.progress import Progress, SilentProgress
from llmkit.checkpoint.reading import CHUNK_BYTES
from llmkit.checkpoint.source import Checkpoint, TensorInfo, open_checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, check_output, planned_bytes
from llmkit.model.families import model_spec
from llmkit.model.loader import check_checkpoint
from llmkit.shard.blocks import Grid, cut_chunk
from llmkit.shard.plan import ShardPlan, plan_shards
from llmkit.shard.slices import Slice

COMMIT_BYTES = 2**30  # an interrupted run writes at most about this much again


def shard(
    source: str | Path,
    output: str | Path,
    tp: int,
    pp: int = 1,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ShardPlan:
    """Write the checkpoint `source` over `tp` x `pp` ranks into the new directory `output`; the plan.

    `dry_run` only plans: nothing is written and `output` is not looked at. An interrupted run is continued.
    Raises InputError for a source that is bad or is sharded already, and for ranks that do not divide it; UsageError
    for ranks below 1; OutputError and ShortageError as CheckpointWriter does.
    """
    progress = progress or SilentProgress()
    checkpoint = open_source(source)
    plan = plan_checkpoint(checkpoint, tp, pp)
    if dry_run:
        return plan
    files = plan.files()
    check_output(Path(output).expanduser(), checkpoint, planned_bytes(files))
    identity = {"command": "shard", "tp": tp, "pp": pp, "source": checked_hashes(checkpoint, progress)}
    with CheckpointWriter(output, files, checkpoint, identity) as writer:
        _write(checkpoint, plan, writer, progress)
        writer.finish(checkpoint.config, checkpoint.side_files(), {"layout": plan.layout()})
    if plan.left_out:
        progress.message(f"Left out, because other tensors hold the same: {', '.join(plan.left_out)}")
    return plan


def open_source(source: str | Path) -> Checkpoint:
    """Open what is to be split; a GGUF file as `llmkit quantize --method bf16` would import it."""
    checkpoint = open_checkpoint(source)
    return checkpoint.imported("BF16") if checkpoint.kind == "gguf" else checkpoint


def plan_checkpoint(checkpoint: Checkpoint, tp: int, pp: int) -> ShardPlan:
    """The plan for an opened checkpoint. Raises as `shard` does."""
    checkpoint.require_whole()
    spec = model_spec(checkpoint.config)
    check_checkpoint(checkpoint, spec)
    return plan_shards(spec, checkpoint.quantization, checkpoint.tensors, tp, pp)


def checked_hashes(checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    """SHA-256 of the source's files. Raises InputError when one differs from the source's own manifest."""
    progress.start("hash source", checkpoint.weight_bytes, "bytes")
    hashes = checkpoint.source_hashes()
    progress.advance(checkpoint.weight_bytes)
    progress.finish()
    recorded = checkpoint.manifest["files"] if checkpoint.manifest else {}
    for file, digest in hashes.items():
        if file in recorded and recorded[file]["sha256"] != digest:
            raise mismatch(
                f"{checkpoint.path / file} has SHA-256 {digest}, llmkit.json says {recorded[file]['sha256']}"
            )
    return hashes


def _write(checkpoint: Checkpoint, plan: ShardPlan, writer: CheckpointWriter, progress: Progress) -> None:
    progress.start("shard", sum(checkpoint.tensors[name].nbytes for name in plan.by_source), "bytes")
    uncommitted = 0
    for name, targets in plan.by_source.items():
        info = checkpoint.tensors[name]
        wanted = [(file, piece) for file, piece in targets if not writer.done(name, file)]
        if wanted:
            _copy(checkpoint, info, wanted, writer)
            uncommitted += sum(piece.nbytes for _, piece in wanted)
        if uncommitted >= COMMIT_BYTES:
            writer.commit()
            uncommitted = 0
        progress.advance(info.nbytes, name)
    progress.finish()


def _copy(checkpoint: Checkpoint, info: TensorInfo, targets: list[tuple[str, Slice]], writer: CheckpointWriter) -> None:
    """Write the slices of one source tensor; all are along the same dimension."""
    first = targets[0][1]
    if first.derived:
        values = checkpoint.read_bytes(info, 0, info.nbytes)  # a few numbers per column at most
        derive = _group_index if first.derived == "group_index" else _shape
        for file, piece in targets:
            writer.write_chunk(file, info.name, 0, derive(values, piece, checkpoint))
        return
    grid = Grid.of(info.dtype, info.shape, first.dim)
    written = dict.fromkeys((file for file, _ in targets), 0)
    for chunk in grid.chunks():
        view = grid.view(checkpoint.read_bytes(info, *grid.bytes_of(chunk)), chunk)
        for file, piece in targets:
            data = cut_chunk(view, chunk, piece.intervals)
            if data.size:
                writer.write_chunk(file, info.name, written[file], data.reshape(-1).data)
                written[file] += data.size
    for file, piece in targets:
        assert grid.outer == 1 or not piece.padding, "only rows are padded"
        while (missing := piece.nbytes - written[file]) > 0:
            zeros = bytes(min(missing, CHUNK_BYTES))
            writer.write_chunk(file, info.name, written[file], zeros)
            written[file] += len(zeros)


def _shape(values: bytes, piece: Slice, checkpoint: Checkpoint) -> bytes:
    """The slice's own dense shape. The source's has to be what a merge will write back."""
    found = np.frombuffer(values, "<i8").tolist()
    if found != list(piece.source_dense_shape):
        raise InputError(f"{checkpoint.reference}: {piece.name} is {found}", f"{list(piece.source_dense_shape)}")
    return np.array(piece.dense_shape, "<i8").tobytes()


def _group_index(values: bytes, piece: Slice, checkpoint: Checkpoint) -> bytes:
    """The slice's group indices, counted from its first group."""
    ((start, stop),) = piece.intervals
    index = np.frombuffer(values, "<i4")[start:stop]
    if stop - start < piece.source_shape[0]:
        assert checkpoint.quantization is not None
        scheme = checkpoint.quantization.scheme_of(piece.name.rpartition(".")[0])
        size = -1 if scheme is None else scheme.group_size
        if not np.array_equal(index, np.arange(start, stop) // (piece.source_shape[0] if size == -1 else size)):
            raise InputError(
                f"{checkpoint.reference}: {piece.name} does not number its groups in the order of the columns",
                "Each group's columns next to each other (no act-order), as a split of the input features needs",
                "Shard with --tp 1, or quantize the original model with llmkit quantize --method gptq",
            )
    return (index - np.int32(piece.first_group)).astype("<i4").tobytes()
