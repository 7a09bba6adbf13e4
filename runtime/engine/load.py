"""From a checkpoint to an engine that is ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.memory import plan_memory
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


def load_engine(model: str | Path | Checkpoint, options: EngineOptions | None = None) -> Engine:
    """Open and check a model, plan its memory, load it and build the engine.

    Raises InputError for a checkpoint that cannot be run and ShortageError when the machine cannot run it.
    """
    options = options or EngineOptions()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    checkpoint.require_whole()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    plan = plan_memory(
        model_spec(checkpoint.config),
        device,
        dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_memory=options.kv_cache_memory,
        gpu_memory_utilization=options.gpu_memory_utilization,
    )
    config = EngineConfig(
        max_model_len=plan.max_model_len,
        num_blocks=plan.num_blocks,
        device=device,
        dtype=dtype,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    return Engine(load_model(checkpoint, dtype, device), config, eos_ids(checkpoint))


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
