"""How long a request may be and how many blocks the KV cache gets: planned before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.model.facts import parameter_count
from llmkit.model.spec import ModelSpec

CPU_SHARE = 0.5  # of the memory that the weights leave, at most, for the KV cache
CPU_BYTES = 1 << 30  # of it by default: a cache on the CPU is resident from the start
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
    """Divide memory between the weights, which are not loaded yet, and the KV cache.

    `kv_cache_memory` in bytes is taken as it is; None takes a share of what the weights leave. `max_model_len`
    None: the model's own limit, or the most that fits. Raises InputError for one beyond the model's limit and
    ShortageError when the weights do not fit or the cache cannot hold one request of that length.
    """
    if max_model_len is not None and max_model_len > spec.max_positions:
        raise InputError(
            f"--max-model-len {max_model_len} is over the model's limit",
            f"At most {spec.max_positions} tokens (max_position_embeddings)",
            f"Use --max-model-len {spec.max_positions}",
        )
    per_block = spec.kv_elements_per_token * dtype.itemsize * block_size
    left = _beside_weights(spec, device, dtype, gpu_memory_utilization)
    if kv_cache_memory is not None and kv_cache_memory > left:
        raise ShortageError(
            f"--kv-cache-memory {kv_cache_memory} bytes does not fit on {device.type}",
            f"The weights leave {left} bytes",
            "Use a smaller one",
        )
    if kv_cache_memory is not None:
        have = kv_cache_memory
    elif device.type == "cuda":
        have = max(0, left - workspace_bytes(spec, max_num_batched_tokens))
    else:
        one_request = -(-(max_model_len or 1) // block_size) * per_block
        have = min(max(CPU_BYTES, one_request), int(left * CPU_SHARE))
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


def workspace_bytes(spec: ModelSpec, step_tokens: int) -> int:
    """What a step of so many tokens needs besides weights and cache, on CUDA; an estimate."""
    return step_tokens * (spec.hidden + 2 * spec.intermediate) * WORKSPACE_BYTES_PER_TOKEN


def _beside_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, utilization: float) -> int:
    """Bytes that the weights leave of what the engine may take. Raises ShortageError when they do not fit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free = max(0, int(free - total * (1 - utilization)))
    else:
        free = psutil.virtual_memory().available
    weights = parameter_count(spec) * dtype.itemsize
    if weights > free:
        halved = dtype.itemsize > 2 and weights // 2 <= free
        raise ShortageError(
            f"the weights need {weights} bytes in {str(dtype).removeprefix('torch.')} and {device.type} has {free}",
            todo="Use --dtype bfloat16" if halved else "Use a smaller model or a larger device",
        )
    return free - weights
