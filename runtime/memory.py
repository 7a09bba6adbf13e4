"""Who gets how much of a device's memory: the weights, a step's workspace, and the KV cache what is left."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llmkit.checkpoint.errors import InputError, ShortageError, is_out_of_memory
from llmkit.checkpoint.formats import format_of
from llmkit.checkpoint.safetensors_header import byte_count
from llmkit.checkpoint.source import Checkpoint
from llmkit.checkpoint.text import bytes_text
from llmkit.model.decoder import Decoder
from llmkit.model.layout import Parameter, parameters
from llmkit.model.linear import PackedLinear, packs_integers, packs_weights
from llmkit.model.loader import packs_on, scheme_of
from llmkit.model.sequence import hidden_states
from llmkit.model.spec import ModelSpec

__all__ = [
    "MemoryPlan", "estimate_workspace", "free_bytes", "is_out_of_memory", "loaded_bytes",
    "measure_workspace", "plan_memory", "require_weights", "weight_bytes",
]  # fmt: skip

CPU_SHARE = 0.5  # of the memory that weights and workspace leave, at most, for the KV cache
CPU_BYTES = 640 << 20  # of it by default, or one request of full length: pages that were never used take no memory
LOGIT_BYTES = 16  # per logit of a step, while it is sampled: the logit in float32, its sorted copy and their indices
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """What a device's memory is used for, in bytes, and what it comes to in tokens."""

    free: int  # what may be used, before anything is loaded
    weights: int
    workspace: int  # of one step, at its largest
    num_blocks: int  # of the KV cache
    bytes_per_block: int
    block_size: int  # tokens
    max_model_len: int  # tokens of a request
    model_limit: int  # tokens of a request, of the model itself

    @property
    def kv_cache(self) -> int:
        """Bytes of the KV cache."""
        return self.num_blocks * self.bytes_per_block

    def requests(self, tokens: int) -> int:
        """How many requests of so many tokens the KV cache holds at once."""
        return self.num_blocks // -(-tokens // self.block_size)

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """The plan as one JSON-ready document."""
        lengths = sorted({min(1024, self.max_model_len), self.max_model_len})
        return {
            "free_bytes": self.free,
            "weight_bytes": self.weights,
            "workspace_bytes": self.workspace,
            "kv_cache_bytes": self.kv_cache,
            "kv_blocks": self.num_blocks,
            "kv_block_tokens": self.block_size,
            "kv_bytes_per_token": self.bytes_per_block // self.block_size,
            "kv_cache_tokens": self.num_blocks * self.block_size,
            "max_model_len": self.max_model_len,
            "model_limit": self.model_limit,
            "requests": {str(tokens): self.requests(tokens) for tokens in lengths},
        }


def plan_memory(
    spec: ModelSpec,
    device: str,
    *,
    free: int,
    weights: int,
    workspace: int,
    kv_bytes_per_token: int,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_memory: int | None,
    block_size: int = 16,
) -> MemoryPlan:
    """Divide `free` bytes of a "cpu" or "cuda" device; the other sizes are in bytes, too.

    `kv_cache_memory` is taken as it is; None takes what is left: all of it on CUDA, a share on a CPU. `max_model_len`
    None: the model's own limit, or the most that fits. Raises InputError for one beyond the model's limit and
    ShortageError when weights or workspace do not fit or the cache cannot hold one request of that length.
    """
    limit = spec.max_positions
    if max_model_len is not None and max_model_len > limit:
        raise InputError(
            f"--max-model-len {max_model_len} is over the model's limit",
            f"At most {limit} tokens (max_position_embeddings)",
            f"Use --max-model-len {limit}",
        )
    per_block = kv_bytes_per_token * block_size
    left = free - weights - workspace
    if left < 0:
        raise ShortageError(
            f"{_exact(workspace)} of a step's workspace do not fit on {device}",
            f"The weights leave {_exact(free - weights)}",
            "Use a smaller --max-num-batched-tokens or --max-num-seqs",
        )
    if kv_cache_memory is not None and kv_cache_memory > left:
        raise ShortageError(
            f"--kv-cache-memory {_exact(kv_cache_memory)} does not fit on {device}",
            f"Weights and workspace leave {_exact(left)}",
            "Use a smaller one",
        )
    if kv_cache_memory is not None:
        have = kv_cache_memory
    elif device == "cuda":
        have = left
    else:
        have = min(max(CPU_BYTES, -(-(max_model_len or limit) // block_size) * per_block), int(left * CPU_SHARE))
    blocks = have // per_block
    longest = blocks * block_size
    wanted = min(limit, longest) if max_model_len is None else max_model_len
    if wanted > longest or longest == 0:
        need = -(-(max_model_len or 1) // block_size) * per_block
        raise ShortageError(
            f"the KV cache cannot hold one request of {max_model_len or 1} tokens: that needs {_exact(need)} and there "
            f"are {_exact(have)}",
            f"At most {longest} tokens fit",
            f"Use --max-model-len {longest}" if longest else "Give it more with --kv-cache-memory",
        )
    if kv_cache_memory is None:  # no more than could ever be used
        blocks = min(blocks, max_num_seqs * -(-wanted // block_size))
    return MemoryPlan(free, weights, workspace, blocks, per_block, block_size, wanted, limit)


def weight_bytes(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device,
    rows: Iterable[Parameter] | None = None,
) -> int:  # fmt: skip
    """Bytes of the weights (of `rows`) in memory: dense in `dtype`, but as stored where they are multiplied so."""
    cpu, total = device.type == "cpu", 0
    packs = cpu and packs_weights(dtype)
    for row in parameters(spec) if rows is None else rows:
        kept = packs and (row.linear or row.head or row.name == "embed.weight")
        on_gpu = not cpu and packs_on(device, row, checkpoint.quantization, dtype)
        copies = 1 + (kept and spec.tied and row.name == "embed.weight")  # looked up, and multiplied with
        for tensor in row.tensors:
            scheme = scheme_of(row, tensor, checkpoint.quantization)
            shapes = [part.shape for part in row.parts if part.tensor == tensor]
            if checkpoint.quantization and scheme and (packs or on_gpu or (cpu and packs_integers(scheme))):
                layout = format_of(checkpoint.quantization)
                stored = layout.tensors(scheme, sum(shape[0] for shape in shapes), shapes[0][1])
                total += sum(byte_count(one.dtype, one.shape) for one in stored)
                continue
            own = dtype.itemsize if scheme else checkpoint.tensors[tensor].torch_dtype.itemsize
            size = min(own, dtype.itemsize) if kept else dtype.itemsize
            total += copies * size * sum(math.prod(shape) for shape in shapes)
    return total


def loaded_bytes(model: Decoder) -> int:
    """Bytes of the weights as a loaded model holds them."""
    linears = [model.head, *(linear for layer in model.layers for linear in layer.linears.values())]
    packed = sum(linear.product.nbytes for linear in linears if isinstance(linear, PackedLinear))
    dense = [linear.weight for linear in linears if not isinstance(linear, PackedLinear)]
    norms = [norm for layer in model.layers for norm in layer.norms.values()]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (model.embedding, model.final_norm, *dense, *norms)}
    return packed + sum(held.values())


def free_bytes(device: torch.device, utilization: float) -> int:
    """Bytes that the engine may take of a device: what is free, on CUDA within its share of the whole."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - total * (1 - utilization)))
    return min(psutil.virtual_memory().available, _cgroup_bytes())


def _cgroup_bytes() -> int:
    """What a container's limit leaves; the page cache counts as free."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return 1 << 62 if limit == "max" else max(0, int(limit) - used + int(pages.get("file", 0)))
    except (OSError, ValueError):
        return 1 << 62


def require_weights(weights: int, free: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ShortageError when the weights alone do not fit."""
    if weights > free:
        dense = device.type != "cpu" or not packs_weights(dtype)
        halved = dense and dtype.itemsize > 2 and weights // 2 <= free
        offload = "" if device.type == "cpu" else ", or --cpu-offload to keep some in host memory"
        raise ShortageError(
            f"the weights need {_exact(weights)} in {str(dtype).removeprefix('torch.')} and {device.type} has "
            f"{_exact(free)}",
            todo="Use --dtype bfloat16" if halved else f"Use a smaller model or a larger device{offload}",
        )


def estimate_workspace(spec: ModelSpec, dtype: torch.dtype, step_tokens: int, sequences: int) -> int:
    """Bytes that a step needs besides weights and cache: its widest activations, and the logits it samples from."""
    experts = spec.experts
    wide = spec.intermediate if experts is None else max(spec.intermediate, experts.per_token * experts.intermediate)
    activations = step_tokens * (2 * spec.hidden + 3 * wide) * dtype.itemsize
    return activations + sequences * spec.vocab * LOGIT_BYTES


@torch.inference_mode()
def measure_workspace(model: Decoder, step_tokens: int, sequences: int) -> int:
    """The same on CUDA, measured: the peak of one step of so many tokens, of up to `sequences` prompts.

    The sampling of tokens is not run but counted as `estimate_workspace` does. May raise torch.OutOfMemoryError.
    """
    count = max(1, min(sequences, step_tokens))
    prompts = [torch.zeros(step_tokens // count, dtype=torch.int64) for _ in range(count)]
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model.logits(hidden_states(model, prompts)[:count])
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.empty_cache()
    return peak + count * model.spec.vocab * (LOGIT_BYTES - 4)


def _exact(count: int) -> str:
    return f"{count} bytes ({bytes_text(count)})" if count >= 1024 else f"{count} bytes"
