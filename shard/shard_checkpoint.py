"""`llmkit shard`: writes one file per rank. The source may itself be sharded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.output_directory import check_output
from llmkit.checkpoint.tokenizer import check_copied_tokenizer
from llmkit.checkpoint.writer import CheckpointWriter, planned_bytes
from llmkit.common.errors import UsageError
from llmkit.common.progress import Progress, SilentProgress
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.families import checkpoint_spec, require_native, require_tp_plan
from llmkit.model.spec import ModelSpec
from llmkit.shard.copy_slices import require_ordered_groups, write_output
from llmkit.shard.shard_plan import ShardPlan, plan_shards
from llmkit.shard.shard_source import ShardSource
from llmkit.shard.vllm_format import plan_vllm

OutputFormat = Literal["llmkit", "vllm"]


def shard(
    source: str | Path,
    output: str | Path,
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
    *,
    output_format: OutputFormat = "llmkit",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ShardPlan:
    """Shard the checkpoint `source` over `tp` x `pp` ranks into the new directory `output`.

    ep, pp_layers: see `plan_shards`.
    output_format: vLLM's files support tensor parallelism only.
    dry_run: plan only. Nothing is written, and `output` is not checked.

    A source that is sharded in another layout gives the same bytes as its unsharded checkpoint. An
    interrupted run is continued. Returns the plan.

    Raises InputError for a bad source (its tokenizer, too) and for ranks that do not divide it;
    UsageError for ranks below 1 and sizes that contradict each other; OutputError and ShortageError
    as CheckpointWriter does.
    """
    progress = progress or SilentProgress()
    shard_source = open_source(source)
    plan = plan_source(shard_source, tp, pp, ep, pp_layers, output_format)
    if dry_run:
        return plan
    files = plan.files()
    checkpoint = shard_source.checkpoint
    check_copied_tokenizer(checkpoint)
    check_output(Path(output).expanduser(), checkpoint.path, planned_bytes(files))
    sizes = {"tp": plan.tp, "pp": plan.pp, "ep": plan.ep, "stages": plan.stages}
    identity = {"command": "shard", **sizes, "source": checkpoint.stamps}
    manifest = {"layout": plan.layout()}
    if shard_source.origin:
        manifest["source"] = shard_source.origin
    with CheckpointWriter(output, files, checkpoint, identity) as writer:
        if writer.resume_note:
            progress.message(writer.resume_note)
        for file, name, data in plan.constants():
            writer.write_chunk(file, name, 0, data)
        write_output(shard_source, plan.slices_by_source(), writer, manifest, progress)
    if writer.time_note():
        progress.message(writer.time_note())
    if plan.left_out:
        progress.message(
            f"Left out, because other tensors hold the same: {', '.join(plan.left_out)}"
        )
    return plan


def open_source(source: str | Path) -> ShardSource:
    """Open a checkpoint to split.

    A GGUF file is read as bfloat16, as `llmkit quantize` imports it.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.file_format == "gguf":
        checkpoint = checkpoint.with_dtype("BF16")
    return ShardSource(checkpoint)


def validated_spec(source: ShardSource) -> ModelSpec:
    """The model of a source.

    Raises InputError unless the source has exactly the model's tensors.
    """
    spec = checkpoint_spec(source.checkpoint)
    require_tp_plan(spec)
    check_checkpoint(source.unsharded, spec)
    return spec


def plan_source(
    source: ShardSource,
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
    output_format: OutputFormat = "llmkit",
) -> ShardPlan:
    """The plan for a source. Raises as `shard` does."""
    spec = validated_spec(source)
    quantization = source.checkpoint.quantization
    if output_format == "vllm":
        require_native(spec, "--format vllm")
        if pp > 1 or ep > 1 or pp_layers:
            raise UsageError(
                "--format vllm with --pp, --pp-layers or --ep", "Tensor-parallel ranks only (--tp)"
            )
        plan: ShardPlan = plan_vllm(spec, quantization, source.tensors, tp)
    else:
        plan = plan_shards(spec, quantization, source.tensors, tp, pp, ep, pp_layers)
        slices = itertools.chain.from_iterable(plan.slices_by_source().values())
        require_ordered_groups(source, slices)
    return replace(plan, left_out=source.layout.left_out) if source.layout else plan
