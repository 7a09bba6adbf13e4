"""How long a request may be and how many blocks the KV cache gets: planned before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.model.spec import ModelSpec

CPU_SHARE = 0.25  # of the free memory, for the KV cache
CPU_LIMIT_BYTES = 4 << 30
WORKSPACE_BYTES_PER_TOKEN = 16  # per hidden and intermediate element of a step's tokens, on CUDA


@dataclass(frozen=True)
class MemoryPlan:
    """What the KV cache gets."""

    max_model_len: int  # tokens
    num_blocks: int
    bytes_per_block: int


def plan_memory(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_memory: int | None,
    gpu_memory_utilization: float,
    block_size: int = 16,
) -> MemoryPlan:
    """Divide memory for a model whose weights are already on `device`.

    `kv_cache_memory` in bytes is taken as it is; None takes what is free. `max_model_len` None: the model's own
    limit, or the most that fits. Raises InputError for one beyond the model's limit and ShortageError when the
    cache cannot hold one request of that length.
    """
    if max_model_len is not None and max_model_len > spec.max_positions:
        raise InputError(
            f"--max-model-len {max_model_len} is over the model's limit",
            f"At most {spec.max_positions} tokens (max_position_embeddings)",
        )
    per_block = spec.kv_elements_per_token * dtype.itemsize * block_size
    if kv_cache_memory is None:
        have = _available(spec, device, gpu_memory_utilization, max_num_batched_tokens)
    else:
        have = kv_cache_memory
    blocks = have // per_block
    longest = blocks * block_size
    wanted = min(spec.max_positions, longest) if max_model_len is None else max_model_len
    if wanted > longest or longest == 0:
        need = -(-(max_model_len or 1) // block_size) * per_block
        raise ShortageError(
            f"the KV cache cannot hold one request of {max_model_len or 1} tokens: that needs {need} bytes and there "
            f"are {have}",
            f"At most {longest} tokens fit",
            f"Use --max-model-len {longest}" if longest else "Give it more with --kv-cache-memory",
        )
    if kv_cache_memory is None:  # no more than could ever be used
        blocks = min(blocks, max_num_seqs * -(-wanted // block_size))
    return MemoryPlan(wanted, blocks, per_block)


def _available(spec: ModelSpec, device: torch.device, utilization: float, step_tokens: int) -> int:
    """Bytes that the KV cache may take by default."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        width = spec.hidden + 2 * spec.intermediate
        workspace = step_tokens * width * WORKSPACE_BYTES_PER_TOKEN
        return max(0, int(free - total * (1 - utilization)) - workspace)
    return min(int(psutil.virtual_memory().available * CPU_SHARE), CPU_LIMIT_BYTES)
