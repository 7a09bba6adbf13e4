"""What every rank does to get its engine: load its part, agree on the sizes, build the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.device import resolve_device
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.parallel.distributed_group import DistributedGroup
from llmkit.runtime.parallel.rank_messages import ANY_NUMBER, Connect, PartLoaded
from llmkit.runtime.part_loader import LoadedPart, StartupReport, load_part
from llmkit.shard.rank_part import RankPart

E = TypeVar("E", bound=Engine)


@dataclass(frozen=True)
class LoadedRank:
    """A rank's part in memory, before it is connected to the other ranks."""

    part: LoadedPart
    group: DistributedGroup
    message: PartLoaded  # for the leader

    def connect(self, sizes: Connect) -> None:
        """Connect to the other ranks; returns when all have called this."""
        device = resolve_device(self.part.options.device)
        self.group.connect(Path(sizes.store_path), device)

    def make_engine(self, sizes: Connect, report: StartupReport, engine_class: type[E]) -> E:
        """Build this rank's engine, with the sizes that all ranks use."""
        memory = replace(
            self.part.plan.memory,
            num_blocks=sizes.num_blocks,
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.max_num_seqs,
            num_state_snapshots=sizes.num_state_snapshots,
            num_host_blocks=sizes.num_host_blocks,
            num_host_states=sizes.num_host_states,
        )
        part = replace(self.part, plan=replace(self.part.plan, memory=memory))
        return part.make_engine(report, engine_class)


def load_rank(
    parts: list[RankPart],
    rank: int,
    options: EngineOptions,
    report: StartupReport,
    num_threads: int,
) -> LoadedRank:
    """Load the part of a rank, without connecting to the others.

    num_threads: for computing on a CPU.
    """
    part = parts[rank]
    assert part.spec.rank is not None
    if resolve_device(options.device).type == "cuda":
        torch.cuda.set_device(rank)
    else:
        cpu_kernels.set_num_threads(num_threads)
    num_stages = len(parts) // part.spec.rank.tp_size
    group = DistributedGroup(part.spec, rank, num_stages)
    seconds_before = sum(report.seconds.values())
    loaded = load_part(part.checkpoint, part.spec, options, report, group, len(parts), part.whole)
    memory = loaded.plan.memory
    message = PartLoaded(
        num_blocks=memory.num_blocks if memory.bytes_per_block else ANY_NUMBER,
        max_model_len=memory.max_model_len,
        file=part.file,
        nbytes=part.nbytes,
        seconds=sum(report.seconds.values()) - seconds_before,
        max_num_seqs=memory.max_num_seqs,
        num_state_snapshots=memory.num_state_snapshots if memory.bytes_per_state else ANY_NUMBER,
        num_host_blocks=memory.num_host_blocks if memory.bytes_per_block else ANY_NUMBER,
        num_host_states=memory.num_host_states if memory.bytes_per_state else ANY_NUMBER,
    )
    return LoadedRank(loaded, group, message)
