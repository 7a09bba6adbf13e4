"""The plan of an engine, from checkpoint headers and estimates: device, dtypes and memory.

Nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.common.errors import InputError
from llmkit.common.options import CpuActivations
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES, QUANTIZED_KV_CACHE_DTYPES
from llmkit.model.checkpoint_tensors import check_checkpoint
from llmkit.model.device import resolve_device
from llmkit.model.families import checkpoint_spec, require_native
from llmkit.model.linear import MIN_FP8_CAPABILITY, gpu_capability, keeps_weights_packed
from llmkit.model.spec import ModelSpec
from llmkit.runtime.draft_source import open_draft
from llmkit.runtime.engine.cuda_graphs import batch_descriptors, can_capture_prompts
from llmkit.runtime.engine.draft_model import MAX_KNOWN_TOKENS
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.graph_memory import CUBLAS_BYTES, estimate_graph_bytes
from llmkit.runtime.kv_offload_memory import staging_bytes, with_host_memory
from llmkit.runtime.memory_plan import (
    EXPANDED_WORKSPACE,
    MemoryPlan,
    StateMemory,
    estimate_workspace,
    free_bytes,
    plan_memory,
    require_weights_fit,
    weight_bytes,
)
from llmkit.runtime.weight_offload import OffloadPlan, plan_offload
from llmkit.shard.rank_part import rank_parts

# Tokens of a step by default. A larger step is no faster on a CPU.
DEFAULT_BATCHED_TOKENS = {"cuda": 8192, "cpu": 512}
BLOCK_SIZE = 16  # tokens of a block of the KV cache
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EnginePlan:
    """Where a model will run, in which dtypes, and with how much memory.

    `weight_dtype` is what `--dtype` says. On a CPU with compiled kernels, hidden states are float32
    whatever it says; elsewhere they have this type, too.
    """

    device: torch.device
    dtype: torch.dtype  # of hidden states, and of what no kernel packs
    weight_dtype: torch.dtype  # of dense weights, see `held_dtype`
    cpu_activations: CpuActivations  # what a CPU rounds the inputs of linear layers to
    kv_cache_dtype: str | None  # a name in KV_CACHE_DTYPES; None: `dtype`
    max_num_batched_tokens: int
    memory: MemoryPlan
    offload: OffloadPlan
    uses_kv_offload: bool = False  # --kv-offload was given

    def as_dict(self) -> dict[str, str | int | dict[str, int]]:
        """The plan as one JSON-ready document."""
        document: dict[str, str | int | dict[str, int]] = {
            "device": self.device.type,
            "dtype": str(self.weight_dtype).removeprefix("torch."),
            "kv_cache_dtype": self.kv_cache_dtype or str(self.dtype).removeprefix("torch."),
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        if self.offload.num_layers:
            document["host_layers"] = self.offload.num_layers
            document["host_weight_bytes"] = self.offload.weight_bytes
        if self.uses_kv_offload:  # of one rank; 0 on a CPU
            document["kv_offload_bytes"] = self.memory.host_bytes
            document["kv_offload_tokens"] = self.memory.num_host_blocks * self.memory.block_size
        return document | self.memory.as_dict()


def plan_engine(
    checkpoint: Checkpoint, options: EngineOptions, free_memory: int | None = None
) -> EnginePlan:
    """The plan that `load_engine` would follow. Raises as `load_engine` does.

    For a model on several ranks, it is the plan of the rank with the smallest KV cache.
    free_memory: of another machine, for a whole model; None: what is free on this one.
    """
    if not uses_several_ranks(checkpoint, options):
        spec = checkpoint_spec(checkpoint)
        return plan_part(checkpoint, spec, options, free_memory=free_memory)
    parts = rank_parts(checkpoint, options.tp, options.pp, options.ep)
    plans = [
        plan_part(part.checkpoint, part.spec, options, len(parts), part.whole) for part in parts
    ]
    return min(plans, key=lambda plan: plan.memory.num_blocks)


def uses_several_ranks(checkpoint: Checkpoint, options: EngineOptions) -> bool:
    """Whether the model is served in parts, one per rank."""
    return checkpoint.layout is not None or max(options.tp, options.pp, options.ep) > 1


def plan_part(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    num_parts: int = 1,
    whole: Checkpoint | None = None,
    free_memory: int | None = None,
) -> EnginePlan:
    """The plan of a whole model, or of one of its parts; the parts share the memory of a CPU.

    whole: of a part, see `RankPart.whole`. free_memory: as for `plan_engine`.
    """
    check_checkpoint(checkpoint, spec)
    for name, is_used in (
        ("--require-native", options.require_native),
        ("--lora", bool(options.adapters)),
        ("--cpu-offload", bool(options.cpu_offload)),
    ):
        if is_used:
            require_native(spec, name)
    device = resolve_device(options.device)
    weight_dtype = resolve_dtype(options.dtype, checkpoint, device)
    on_cpu_kernels = device.type == "cpu" and keeps_weights_packed()
    dtype = torch.float32 if on_cpu_kernels else weight_dtype
    free = free_memory
    if free is None:
        free = free_bytes(device, options.gpu_memory_utilization)
    if device.type == "cpu":
        free //= num_parts * options.dp
    offload = plan_offload(checkpoint, spec, dtype, device, options.cpu_offload)
    draft = open_draft(whole or checkpoint, spec, options)
    models = [(checkpoint, spec)]
    if draft is not None:
        models.append((draft.checkpoint, draft.spec))

    def weights_in(held: torch.dtype) -> int:
        hidden = torch.float32 if on_cpu_kernels else held
        weights = sum(weight_bytes(*model, hidden, device, weight_dtype=held) for model in models)
        return weights + offload.buffer_bytes - offload.weight_bytes

    weights = weights_in(weight_dtype)
    require_weights_fit(weights, free, weight_dtype, device, weights_in(torch.bfloat16))

    max_num_batched_tokens = options.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[device.type]
    workspace = estimate_workspace(
        spec,
        dtype,
        max_num_batched_tokens,
        options.max_num_seqs,
        gathers_logits=device.type != "cpu",
    )
    if spec.mla is not None and device.type != "cpu":
        workspace += EXPANDED_WORKSPACE
    workspace += staging_bytes(spec, device, options)
    checkpoint_kv_dtype = None  # the dtype for which the checkpoint has scales
    if checkpoint.quantization is not None:
        checkpoint_kv_dtype = checkpoint.quantization.kv or None
    kv_cache_dtype: str | None = options.kv_cache_dtype
    if kv_cache_dtype == "auto":
        kv_cache_dtype = checkpoint_kv_dtype
        has_fp8 = device.type != "cpu" and gpu_capability(device) >= MIN_FP8_CAPABILITY
        if kv_cache_dtype == "fp8" and not has_fp8:
            # Older GPUs have no FP8. A CPU has none either: its kernels convert every value.
            kv_cache_dtype = None
        if kv_cache_dtype is None and on_cpu_kernels:
            kv_cache_dtype = _cpu_kv_cache_dtype(checkpoint, options)
    if spec.mla is not None and kv_cache_dtype in QUANTIZED_KV_CACHE_DTYPES:
        if options.kv_cache_dtype != "auto":
            raise InputError(
                f"--kv-cache-dtype {kv_cache_dtype} is not possible with {spec.architecture}",
                "A type of 16 or 32 bits: its attention caches one latent for each token",
                "Leave out --kv-cache-dtype",
            )
        kv_cache_dtype = None
    kv_dtype = KV_CACHE_DTYPES[kv_cache_dtype] if kv_cache_dtype else dtype
    is_quantized = kv_cache_dtype in QUANTIZED_KV_CACHE_DTYPES
    if device.type != "cpu" and not is_quantized and kv_dtype != dtype:
        raise InputError(
            f"--kv-cache-dtype {kv_cache_dtype} is not possible with a model in "
            f"{str(dtype).removeprefix('torch.')}",
            "On a GPU, keys and values have the model's dtype or 8 bits",
            "Leave out --kv-cache-dtype, or choose int8 or fp8",
        )
    kv_bytes_per_token = spec.kv_bytes_per_token(
        kv_dtype.itemsize,
        per_token_head_scales=is_quantized and kv_cache_dtype != checkpoint_kv_dtype,
    )
    if draft is not None:
        kv_bytes_per_token += draft.spec.kv_bytes_per_token(dtype.itemsize)
    max_graph_tokens = options.max_cudagraph_capture_size
    if device.type != "cuda" or offload.num_layers or spec.transformers is not None:
        max_graph_tokens = 0
    max_blocks = -(-(options.max_model_len or spec.max_position_embeddings) // BLOCK_SIZE)
    max_query_len = 1 + options.speculation.num_tokens
    head = None if draft is None else draft.spec.draft_head
    head_input_size = 0
    if head is not None:
        head_input_size = max(1, len(head.aux_layers)) * spec.hidden_size
    is_packed = checkpoint.quantization is not None
    planned = [(spec, max_query_len, bool(options.adapters), head_input_size, is_packed)]
    if draft is not None:
        is_packed = draft.checkpoint.quantization is not None
        query_len = MAX_KNOWN_TOKENS if head is None else max_query_len
        hidden_size = 0 if head is None else draft.spec.hidden_size
        planned.append((draft.spec, query_len, False, hidden_size, is_packed))
    graph_bytes = 0
    for graph_spec, query_len, has_lora, hidden_size, is_packed in planned:
        descriptors = batch_descriptors(
            options.max_num_seqs,
            query_len,
            max_graph_tokens,
            max_num_batched_tokens if can_capture_prompts(graph_spec) else 0,
        )
        graph_bytes += estimate_graph_bytes(
            graph_spec,
            dtype,
            device,
            descriptors,
            options.max_num_seqs,
            max_blocks,
            has_lora,
            hidden_size,
            is_packed,
        )
    if graph_bytes:
        graph_bytes += CUBLAS_BYTES
    memory = plan_memory(
        spec,
        device.type,
        free_bytes=free,
        weight_bytes=weights,
        workspace_bytes=workspace,
        kv_bytes_per_token=kv_bytes_per_token,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory=options.kv_cache_memory,
        cuda_graph_bytes=graph_bytes,
        block_size=BLOCK_SIZE,
        states=state_memory(spec, dtype, options),
    )
    return EnginePlan(
        device,
        dtype,
        weight_dtype,
        _cpu_activations(checkpoint, options),
        kv_cache_dtype,
        max_num_batched_tokens,
        with_host_memory(memory, device, options, num_parts),
        offload,
        uses_kv_offload=bool(options.kv_offload),
    )


def state_memory(spec: ModelSpec, dtype: torch.dtype, options: EngineOptions) -> StateMemory:
    """What an engine keeps of the recurrent states of a model."""
    checkpoint_bytes = options.state_cache_memory if options.prefix_cache else 0
    return StateMemory(
        spec.recurrent_bytes_per_sequence(dtype.itemsize),
        1 + options.speculation.num_tokens,
        checkpoint_bytes,
    )


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The torch dtype of an option. "auto" is float32 on a CPU.

    On CUDA, "auto" is the checkpoint's own dtype, and bfloat16 for float32.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = _own_dtype(checkpoint)
    return DTYPES[own] if own in ("float16", "bfloat16") else torch.bfloat16


def _own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that the checkpoint's config names, perhaps none."""
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "")


def _cpu_activations(checkpoint: Checkpoint, options: EngineOptions) -> CpuActivations:
    """What a CPU rounds inputs to.

    With "auto" to bfloat16, unless `--dtype`, or without it the checkpoint's dtype, is another
    type.
    """
    dtype = _own_dtype(checkpoint) if options.dtype == "auto" else options.dtype
    is_other = dtype in ("float32", "float16")
    return "float32" if options.cpu_activations == "auto" and is_other else options.cpu_activations


def _cpu_kv_cache_dtype(checkpoint: Checkpoint, options: EngineOptions) -> str | None:
    """The type of keys and values of a model that a CPU computes in float32; None: float32.

    It is that of `--dtype`. With "auto" it is, as with the inputs of linear layers, bfloat16 for
    models in bfloat16 where the processor multiplies it.
    """
    if options.dtype != "auto":
        return None if options.dtype == "float32" else options.dtype
    is_bfloat16 = _own_dtype(checkpoint) == "bfloat16"
    is_exact = options.cpu_activations == "float32"
    return "bfloat16" if is_bfloat16 and not is_exact and cpu_kernels.has_bfloat16() else None
