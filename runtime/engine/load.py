"""From a checkpoint to an engine that is ready to run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.reading import CHUNK_BYTES, READERS
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.loader import load_model, stored_tensors
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.memory import (
    MemoryPlan,
    estimate_workspace,
    free_bytes,
    measure_workspace,
    plan_memory,
    require_weights,
    weight_bytes,
)
from llmkit.runtime.engine.types import EngineConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose; sizes that are None are planned from memory."""

    device: str = "auto"  # "auto", "cuda" or "cpu"
    dtype: str = "auto"  # "auto" or a key of DTYPES
    max_model_len: int | None = None  # tokens
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_cache_memory: int | None = None  # bytes
    gpu_memory_utilization: float = 0.9


@dataclass(frozen=True)
class EnginePlan:
    """Where a model will run, in what, and with how much memory."""

    device: torch.device
    dtype: torch.dtype
    memory: MemoryPlan

    def as_dict(self) -> dict[str, str | int | dict[str, int]]:
        """The plan as one JSON-ready document."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")} | self.memory.as_dict()


@dataclass
class StartUp:
    """What loading an engine came to; `load_engine` fills it."""

    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, in their order
    plan: EnginePlan | None = None  # as it became
    paths: list[str] = field(default_factory=list)  # which fast ways are taken, and why others are not

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds within."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def plan_engine(checkpoint: Checkpoint, options: EngineOptions) -> EnginePlan:
    """What loading would do, from headers and estimates; nothing is loaded. Raises as `load_engine` does."""
    checkpoint.require_whole()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    spec = model_spec(checkpoint.config)
    free = free_bytes(device, options.gpu_memory_utilization)
    weights = weight_bytes(spec, dtype, checkpoint.quantization, packed=False)
    require_weights(weights, free, dtype, device)
    workspace = estimate_workspace(spec, dtype, options.max_num_batched_tokens, options.max_num_seqs)
    return EnginePlan(device, dtype, _plan_memory(spec, device, dtype, options, free, weights, workspace))


def load_engine(
    model: str | Path | Checkpoint, options: EngineOptions | None = None, start: StartUp | None = None
) -> Engine:
    """Open and check a model, plan its memory, load it and build the engine. `start` is told how that went.

    Raises InputError for a checkpoint that cannot be run and ShortageError when the machine cannot run it.
    """
    options, start = options or EngineOptions(), start or StartUp()
    with start.stage("checkpoint check"):
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    with start.stage("memory plan"):
        plan = plan_engine(checkpoint, options)
    device, dtype, memory = plan.device, plan.dtype, plan.memory
    names = _read_whole(checkpoint, dtype)
    with start.stage("building"), _cores_for_readers(), checkpoint.reading_ahead(names) as ahead:
        loaded = load_model(checkpoint, dtype, device)
    checkpoint.require_unchanged()
    start.seconds["building"] -= ahead.waited_s
    start.seconds["waiting for the disk"] = ahead.waited_s
    if device.type == "cuda":
        with start.stage("memory plan"):
            weights = torch.cuda.memory_allocated(device)
            workspace = measure_workspace(loaded, options.max_num_batched_tokens, options.max_num_seqs)
            memory = _plan_memory(loaded.spec, device, dtype, options, memory.free, weights, workspace)
    start.plan, start.paths = EnginePlan(device, dtype, memory), fast_paths(device)
    config = EngineConfig(
        max_model_len=memory.max_model_len,
        num_blocks=memory.num_blocks,
        device=device,
        dtype=dtype,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    with start.stage("KV cache"):
        return Engine(loaded, config, eos_ids(checkpoint))


def _plan_memory(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    options: EngineOptions,
    free: int,
    weights: int,
    workspace: int,
) -> MemoryPlan:
    return plan_memory(
        spec,
        device.type,
        free=free,
        weights=weights,
        workspace=workspace,
        kv_itemsize=dtype.itemsize,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory=options.kv_cache_memory,
    )


@contextmanager
def _cores_for_readers() -> Iterator[None]:
    """Within, torch leaves cores to the threads that read: its own wait for each other by spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - READERS))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_whole(checkpoint: Checkpoint, dtype: torch.dtype) -> list[str]:
    """The tensors in the order in which they are loaded, without large ones to be cast, which are read in pieces."""
    stored = stored_tensors(model_spec(checkpoint.config), checkpoint.quantization)
    infos = [checkpoint.tensors[name] for name in stored if name in checkpoint.tensors]
    return [info.name for info in infos if info.torch_dtype == dtype or info.nbytes <= CHUNK_BYTES]


def fast_paths(device: torch.device) -> list[str]:
    """What makes the engine fast here, and what is missing: one line each."""
    if device.type == "cuda":
        return [f"CUDA: {torch.cuda.get_device_name(device)}"]
    vectors = torch.backends.cpu.get_cpu_capability()
    return [
        "CUDA: off, PyTorch sees no device" if not torch.cuda.is_available() else "CUDA: off, the CPU was asked for",
        f"CPU vector operators: {'off, neither AVX2 nor AVX-512' if vectors == 'DEFAULT' else vectors}",
        f"CPU threads: {torch.get_num_threads()}",
    ]


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype that "auto" means: float32 on a CPU, the checkpoint's own on CUDA (bfloat16 for float32)."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
    return DTYPES[own] if own in ("float16", "bfloat16") else torch.bfloat16


def eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The token ids that end an answer: the configs', else the tokenizer's; none when nothing names one.

    The same as the tokenizer's own `eos_ids`, which is loaded only when it is needed.
    """
    found: list[int] = []
    for config in (checkpoint.generation_config, checkpoint.config):
        ids = config.get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if found:
        return tuple(dict.fromkeys(found))
    try:
        return load_tokenizer(checkpoint).eos_ids
    except InputError:  # token ids alone can be run without one
        return ()
