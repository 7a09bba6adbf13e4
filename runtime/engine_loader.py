"""From a checkpoint to an engine that is ready to run, on one rank or several."""

from __future__ import annotations

from pathlib import Path

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.formatting import bytes_text
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.families import checkpoint_spec
from llmkit.runtime.draft_source import open_draft
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_plan import uses_several_ranks
from llmkit.runtime.part_loader import StartupReport, load_part
from llmkit.runtime.prefix_engine import PrefixStoreEngine
from llmkit.runtime.prefix_folder import private_folder


def load_engine(
    model: str | Path | Checkpoint,
    options: EngineOptions | None = None,
    report: StartupReport | None = None,
    prefix_store: tuple[str, int] | None = None,
) -> Engine:
    """Open and check a model, plan its memory, load it and build the engine. Fills in `report`.

    prefix_store: the folder of the prefix cache on disk, and its maximum size in bytes. Raises
    InputError for a checkpoint that cannot be run and ShortageError when the machine cannot run it.
    """
    options = options or EngineOptions()
    # Replicas share the threads; without the option, each finds its share in OMP_NUM_THREADS.
    cpu_kernels.use_threads(options.threads and max(1, options.threads // options.dp))
    report = report or StartupReport()
    with report.stage("checkpoint check"):
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if prefix_store is not None:
        folder, limit_bytes = prefix_store
        return _load_with_prefix_store(checkpoint, options, report, folder, limit_bytes)
    if uses_several_ranks(checkpoint, options):
        # This imports torch.distributed and msgspec, which an engine on one rank does not need.
        from llmkit.runtime.parallel.leader import load_on_ranks

        return load_on_ranks(checkpoint, options, report)
    part = load_part(checkpoint, checkpoint_spec(checkpoint), options, report)
    return part.make_engine(report, Engine)


def _load_with_prefix_store(
    checkpoint: Checkpoint,
    options: EngineOptions,
    report: StartupReport,
    path: str,
    limit_bytes: int,
) -> Engine:
    folder = private_folder(path)
    if uses_several_ranks(checkpoint, options):
        raise InputError(
            "--prefix-cache-dir is not possible with a model on several ranks",
            todo="Leave out --prefix-cache-dir; each rank caches prefixes in memory anyway",
        )
    spec = checkpoint_spec(checkpoint)
    part = load_part(checkpoint, spec, options, report)
    engine = part.make_engine(report, PrefixStoreEngine)
    checkpoints = [checkpoint]
    draft = open_draft(checkpoint, spec, options)
    if draft is not None:
        checkpoints.append(draft.checkpoint)
    with report.stage("prefix cache on disk"):
        engine.open_store(folder, limit_bytes, checkpoints)
    report.fast_paths.append(f"prefix cache on disk: up to {bytes_text(limit_bytes)}")
    return engine
