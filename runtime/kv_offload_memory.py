"""How the host memory of `--kv-offload` is divided between blocks and recurrent states."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmkit.common.errors import InputError, ShortageError
from llmkit.common.formatting import bytes_text
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.host_block_store import NUM_STAGING_BUFFERS, STAGING_BYTES
from llmkit.runtime.memory_plan import MemoryPlan, free_bytes


@dataclass(frozen=True)
class HostMemory:
    """The share of one rank."""

    num_blocks: int = 0  # of the KV cache
    num_states: int = 0  # recurrent states at the ends of prefixes
    num_bytes: int = 0


def staging_bytes(spec: ModelSpec, device: torch.device, options: EngineOptions) -> int:
    """Bytes on the device through which blocks are copied; part of the workspace."""
    if not options.kv_offload or device.type == "cpu":
        return 0
    num_stores = len(spec.full_model.sliding_windows) + (spec.recurrent is not None)
    return num_stores * NUM_STAGING_BUFFERS * min(STAGING_BYTES, options.kv_offload)


def plan_host_memory(
    plan: MemoryPlan, device: torch.device, options: EngineOptions, num_ranks: int
) -> HostMemory:
    """A rank's share of `--kv-offload`, which all ranks and replicas of the machine divide.

    Blocks and recurrent states get what their shares of the device's caches are. On a CPU there is
    nothing: its KV cache is in host memory.

    Raises InputError for a size below one block and without the prefix cache, and ShortageError
    when there is too little host memory.
    """
    if not options.kv_offload:
        return HostMemory()
    if not options.prefix_cache:
        raise InputError(
            "--kv-offload keeps cached prefixes, and --no-prefix-cache caches none",
            "One of the two was expected",
            "Leave out --no-prefix-cache or --kv-offload",
        )
    if device.type == "cpu":
        return HostMemory()
    share = options.kv_offload // (num_ranks * options.dp)
    state_bytes = plan.num_state_snapshots * plan.bytes_per_state
    cache_bytes = plan.kv_cache_bytes + state_bytes
    num_states = 0
    if state_bytes:
        num_states = share * state_bytes // cache_bytes // plan.bytes_per_state
    if plan.bytes_per_block:
        num_blocks = (share - num_states * plan.bytes_per_state) // plan.bytes_per_block
    else:  # without attention, blocks only name prefixes
        num_blocks = plan.num_blocks
    if not num_blocks or (state_bytes and not num_states):
        # The least share that gives a state, and a block beside it.
        least = plan.bytes_per_block + plan.bytes_per_state
        if state_bytes:
            least = max(least, -(-plan.bytes_per_state * cache_bytes // state_bytes))
        least *= num_ranks * options.dp
        raise InputError(
            f"--kv-offload {bytes_text(options.kv_offload)} is too small",
            f"At least {least} bytes ({bytes_text(least)}) were expected: a block for each rank",
            "Use a larger size, or leave it out",
        )
    num_bytes = num_blocks * plan.bytes_per_block + num_states * plan.bytes_per_state
    free = free_bytes(torch.device("cpu"), 1.0)
    wanted = num_bytes * num_ranks * options.dp
    if wanted > free:
        raise ShortageError(
            f"--kv-offload needs {bytes_text(wanted)} of host memory",
            f"There are {bytes_text(free)}",
            "Use a smaller size",
        )
    return HostMemory(num_blocks, num_states, num_bytes)


def with_host_memory(
    plan: MemoryPlan, device: torch.device, options: EngineOptions, num_ranks: int
) -> MemoryPlan:
    """The plan with its part in host memory. Raises as `plan_host_memory` does."""
    host = plan_host_memory(plan, device, options, num_ranks)
    return replace(
        plan,
        num_host_blocks=host.num_blocks,
        num_host_states=host.num_states,
        host_bytes=host.num_bytes,
    )
