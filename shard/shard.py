"""`llmkit shard`: write a checkpoint, whole or sharded already, as one file per rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from llmkit.checkpoint.errors import UsageError
from llmkit.checkpoint.progress import Progress, SilentProgress
from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.writer import CheckpointWriter, check_output, planned_bytes
from llmkit.model.families import model_spec
from llmkit.model.loader import check_checkpoint
from llmkit.model.spec import ModelSpec
from llmkit.shard.plan import ShardPlan, plan_shards
from llmkit.shard.source import Source
from llmkit.shard.stream import require_ordered_groups, write_output
from llmkit.shard.vllm import plan_vllm

Form = Literal["llmkit", "vllm"]


def shard(
    source: str | Path,
    output: str | Path,
    tp: int,
    pp: int = 1,
    ep: int = 1,
    pp_layers: Sequence[int] = (),
    *,
    form: Form = "llmkit",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ShardPlan:
    """Write the checkpoint `source` over `tp` x `pp` ranks into the new directory `output`; the plan.

    `ep`, `pp_layers`: see `plan_shards`. `form`: whose files are written; vLLM's are for tensor parallelism alone.
    A source that is sharded in another layout gives the bytes that its whole checkpoint would. `dry_run` only plans:
    nothing is written and `output` is not looked at. An interrupted run is continued. Raises InputError for a source
    that is bad and for ranks that do not divide it; UsageError for ranks below 1 and sizes that contradict each other;
    OutputError and ShortageError as CheckpointWriter does.
    """
    progress = progress or SilentProgress()
    opened = open_source(source)
    plan = plan_source(opened, tp, pp, ep, pp_layers, form)
    if dry_run:
        return plan
    files, checkpoint = plan.files(), opened.checkpoint
    check_output(Path(output).expanduser(), checkpoint, planned_bytes(files))
    sizes = {"tp": plan.tp, "pp": plan.pp, "ep": plan.ep, "stages": plan.stages}
    identity = {"command": "shard", **sizes, "source": checkpoint.stamps}
    manifest = {"layout": plan.layout(), **({"source": opened.origin} if opened.origin else {})}
    with CheckpointWriter(output, files, checkpoint, identity) as writer:
        for file, name, data in plan.constants():
            writer.write_chunk(file, name, 0, data)
        write_output(opened, plan.targets(), writer, manifest, progress)
    if plan.left_out:
        progress.message(f"Left out, because other tensors hold the same: {', '.join(plan.left_out)}")
    return plan


def open_source(source: str | Path) -> Source:
    """Open what is to be split; a GGUF file as `llmkit quantize --method bf16` would import it."""
    checkpoint = open_checkpoint(source)
    return Source(checkpoint.imported("BF16") if checkpoint.kind == "gguf" else checkpoint)


def checked_spec(source: Source) -> ModelSpec:
    """The model of an opened source. Raises InputError unless the source has exactly its tensors."""
    spec = model_spec(source.checkpoint.config)
    check_checkpoint(source.whole, spec)
    return spec


def plan_source(
    source: Source, tp: int, pp: int = 1, ep: int = 1, pp_layers: Sequence[int] = (), form: Form = "llmkit"
) -> ShardPlan:
    """The plan for an opened source. Raises as `shard` does."""
    spec, quantization = checked_spec(source), source.checkpoint.quantization
    if form == "vllm":
        if pp > 1 or ep > 1 or pp_layers:
            raise UsageError("--format vllm with --pp, --pp-layers or --ep", "Tensor-parallel ranks only (--tp)")
        plan: ShardPlan = plan_vllm(spec, quantization, source.tensors, tp)
    else:
        plan = plan_shards(spec, quantization, source.tensors, tp, pp, ep, pp_layers)
        require_ordered_groups(source, itertools.chain(*plan.targets().values()))
    return replace(plan, left_out=source.layout.left_out) if source.layout else plan
