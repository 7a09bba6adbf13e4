"""From a checkpoint to an engine that is ready to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.reading import CHUNK_BYTES, READERS
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.checkpoint.text import bytes_text
from llmkit.kernels import native
from llmkit.kernels.linear import has_int8_products
from llmkit.model.decoder import ALONE, Decoder
from llmkit.model.device import resolve_device
from llmkit.model.families import model_spec
from llmkit.model.loader import check_checkpoint, load_model, stored_tensors
from llmkit.model.ranks import Ranks
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.graphs import Graphs
from llmkit.runtime.engine.sequence import Guide
from llmkit.runtime.engine.types import EngineConfig, EngineOptions
from llmkit.runtime.memory import (
    MemoryPlan,
    estimate_workspace,
    free_bytes,
    loaded_bytes,
    measure_workspace,
    plan_memory,
    require_weights,
    weight_bytes,
)
from llmkit.runtime.offload import HostLayers, Offload, host_layers
from llmkit.shard.rank import rank_parts

__all__ = ["EngineOptions", "EnginePlan", "StartUp", "load_engine", "plan_engine", "resolve_dtype"]

CHUNK_TOKENS = 256  # of a prompt in a step while others wait, at least
STEP_TOKENS = {"cuda": 8192, "cpu": 512}  # a CPU computes no more of them at once any faster
E = TypeVar("E", bound=Engine)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EnginePlan:
    """Where a model will run, in what, and with how much memory."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: str | None  # "int8" or "fp8"; None: `dtype`
    step_tokens: int
    memory: MemoryPlan
    host: HostLayers

    def as_dict(self) -> dict[str, str | int | dict[str, int]]:
        """The plan as one JSON-ready document."""
        dtype = str(self.dtype).removeprefix("torch.")
        own: dict[str, str | int | dict[str, int]] = {
            "device": self.device.type,
            "dtype": dtype,
            "kv_cache_dtype": self.kv_dtype or dtype,
        }
        own["max_num_batched_tokens"] = self.step_tokens
        if self.host.layers:
            own |= {"host_layers": self.host.layers, "host_weight_bytes": self.host.bytes}
        return own | self.memory.as_dict()


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
    """What loading would do, from headers and estimates; nothing is loaded. Raises as `load_engine` does.

    For a model on several ranks, it is that of the one with the least room for keys and values.
    """
    if not on_ranks(checkpoint, options):
        return plan_part(checkpoint, model_spec(checkpoint.config), options)
    parts = rank_parts(checkpoint, options.tp, options.pp, options.ep)
    plans = [plan_part(part.checkpoint, part.spec, options, len(parts)) for part in parts]
    return min(plans, key=lambda plan: plan.memory.num_blocks)


def on_ranks(checkpoint: Checkpoint, options: EngineOptions) -> bool:
    """Whether the model is served in parts."""
    return checkpoint.layout is not None or max(options.tp, options.pp, options.ep) > 1


def plan_part(checkpoint: Checkpoint, spec: ModelSpec, options: EngineOptions, ranks: int = 1) -> EnginePlan:
    """The plan of a whole model, or of one of `ranks` parts, which share what memory a CPU has."""
    check_checkpoint(checkpoint, spec)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, checkpoint, device)
    free = free_bytes(device, options.gpu_memory_utilization) // (1 if device.type == "cuda" else ranks * options.dp)
    host = host_layers(checkpoint, spec, dtype, device, options.cpu_offload)
    weights = weight_bytes(checkpoint, spec, dtype, device) - host.bytes + host.buffers
    draft = None if options.draft_model is None else _open_draft(options.draft_model, spec)
    if draft is not None:
        weights += weight_bytes(draft, model_spec(draft.config), dtype, device)
    require_weights(weights, free, dtype, device)
    tokens = options.max_num_batched_tokens or STEP_TOKENS[device.type]
    workspace = estimate_workspace(spec, dtype, tokens, options.max_num_seqs)
    stored = (checkpoint.quantization.kv or None) if checkpoint.quantization is not None else None
    kv_dtype: str | None = options.kv_cache_dtype
    if kv_dtype == "auto":  # a CPU converts FP8 slowly: rounded values then stay in the model's dtype
        kv_dtype = None if (stored, device.type) == ("fp8", "cpu") else stored
    per_token = spec.kv_bytes_per_token(1 if kv_dtype else dtype.itemsize, own_scales=kv_dtype not in (None, stored))
    if draft is not None:
        per_token += model_spec(draft.config).kv_bytes_per_token(dtype.itemsize)
    memory = plan_memory(
        spec,
        device.type,
        free=free,
        weights=weights,
        workspace=workspace,
        kv_bytes_per_token=per_token,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_cache_memory=options.kv_cache_memory,
    )
    return EnginePlan(device, dtype, kv_dtype, tokens, memory, host)


def load_engine(
    model: str | Path | Checkpoint, options: EngineOptions | None = None, start: StartUp | None = None,
    prefixes: tuple[str, int] | None = None,
) -> Engine:  # fmt: skip
    """Open and check a model, plan its memory, load it and build the engine. `start` is told how that went.

    prefixes: a folder for long shared prefixes, and its most bytes. Raises InputError for a checkpoint that cannot be
    run and ShortageError when the machine cannot run it.
    """
    options, start = options or EngineOptions(), start or StartUp()
    with start.stage("checkpoint check"):
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if prefixes is not None:
        return _load_keeping(checkpoint, options, start, *prefixes)
    if on_ranks(checkpoint, options):
        from llmkit.runtime.parallel.lead import load_on_ranks  # processes and their messages

        return load_on_ranks(checkpoint, options, start)
    return load_part(checkpoint, model_spec(checkpoint.config), options, start).engine(start, Engine)


def _load_keeping(
    checkpoint: Checkpoint, options: EngineOptions, start: StartUp, path: str, limit_bytes: int
) -> Engine:
    from llmkit.runtime.prefix_engine import KeepingEngine  # few want it
    from llmkit.runtime.prefix_files import private_folder

    folder = private_folder(path)
    if on_ranks(checkpoint, options):
        todo = "Leave out --prefix-cache-dir; each rank caches prefixes in memory anyway"
        raise InputError("--prefix-cache-dir is not possible with a model on several ranks", todo=todo)
    spec = model_spec(checkpoint.config)
    engine = load_part(checkpoint, spec, options, start).engine(start, KeepingEngine)
    draft = [] if options.draft_model is None else [_open_draft(options.draft_model, spec)]
    with start.stage("prefix cache on disk"):
        engine.keep(folder, limit_bytes, [checkpoint, *draft])
    start.paths.append(f"prefix cache on disk: up to {bytes_text(limit_bytes)}")
    return engine


@dataclass(frozen=True)
class LoadedPart:
    """A model or a rank's part of it in memory, and what memory there is for the rest of an engine."""

    checkpoint: Checkpoint
    options: EngineOptions
    model: Decoder
    draft: Decoder | None
    plan: EnginePlan

    @cached_property
    def _grammars(self) -> Callable[[str], Guide]:
        from llmkit.runtime.grammar import Grammars  # few requests have one

        return Grammars(self.checkpoint, self.model.spec.whole.vocab, eos_ids(self.checkpoint))

    def _guide(self, grammar: str) -> Guide:
        return self._grammars(grammar)

    def engine(self, start: StartUp, kind: type[E]) -> E:
        """The engine, of a kind of Engine."""
        options, plan, memory = self.options, self.plan, self.plan.memory
        start.plan = plan
        start.paths += fast_paths(plan.device)
        if plan.host.layers:
            start.paths.append(f"CUDA graphs: off, the weights of {plan.host.layers} layers come from host memory")
        config = EngineConfig(
            max_model_len=memory.max_model_len,
            num_blocks=memory.num_blocks,
            device=plan.device,
            dtype=plan.dtype,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=plan.step_tokens,
            kv_dtype=plan.kv_dtype,
            prefix_cache=options.prefix_cache,
            chunk_tokens=max(CHUNK_TOKENS, plan.step_tokens // 4),
            ahead=plan.device.type == "cuda" and not options.speculate and self.model.ranks.stages == 1,
            speculate=options.speculate,
        )
        with start.stage("KV cache"):
            engine = kind(self.model, config, eos_ids(self.checkpoint), self.draft)
            engine.grammars = self._guide
        if isinstance(graphs := engine.runner.recordings, Graphs):
            graphs.possible = graphs.possible and not plan.host.layers
            with start.stage("CUDA graphs"):
                graphs.prepare()
        for name, directory in options.adapters.items():
            with start.stage("adapters"):
                engine.add_adapter(name, directory)
        return engine


def load_part(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    start: StartUp,
    ranks: Ranks = ALONE,
    count: int = 1,
) -> LoadedPart:
    """Plan and load a whole model, or one of `count` parts of it, which will meet the others by `ranks`."""
    with start.stage("memory plan"):
        plan = plan_part(checkpoint, spec, options, count)
    device, dtype, memory = plan.device, plan.dtype, plan.memory
    loaded = _load(checkpoint, spec, dtype, device, start, ranks, plan.host.layers)
    draft = None
    if options.draft_model is not None:
        opened = _open_draft(options.draft_model, spec)
        draft = _load(opened, model_spec(opened.config), dtype, device, start)
    with start.stage("memory plan"):
        weights, workspace = sum(loaded_bytes(m) for m in (loaded, draft) if m is not None), memory.workspace
        if device.type == "cuda":
            weights = torch.cuda.memory_allocated(device)
            if spec.rank is None:  # a part's steps need the others
                workspace = measure_workspace(loaded, plan.step_tokens, options.max_num_seqs)
        memory = plan_memory(
            loaded.spec,
            device.type,
            free=memory.free,
            weights=weights,
            workspace=workspace,
            kv_bytes_per_token=memory.bytes_per_block // memory.block_size,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            kv_cache_memory=options.kv_cache_memory,
        )
    return LoadedPart(checkpoint, options, loaded, draft, replace(plan, memory=memory))


def _load(
    checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype, device: torch.device, start: StartUp,
    ranks: Ranks = ALONE, offloaded: int = 0,
) -> Decoder:  # fmt: skip
    names = _read_whole(checkpoint, spec, dtype)
    with start.stage("building"), _cores_for_readers(), checkpoint.reading_ahead(names) as ahead:
        loaded = load_model(checkpoint, dtype, device, packed=True, spec=spec, ranks=ranks, offloaded=offloaded)
        if offloaded:
            Offload(loaded.layers[-offloaded:], device)
    checkpoint.require_unchanged()
    start.seconds["building"] -= ahead.waited_s
    start.seconds["waiting for the disk"] = start.seconds.get("waiting for the disk", 0.0) + ahead.waited_s
    return loaded


def _open_draft(reference: str, spec: ModelSpec) -> Checkpoint:
    """A draft model's checkpoint. Raises InputError when it cannot guess for a model of `spec`."""
    draft = open_checkpoint(reference)
    draft.require_whole()
    check_checkpoint(draft, guessing := model_spec(draft.config))
    if guessing.vocab != spec.vocab:
        raise InputError(
            f"the draft model {reference} has {guessing.vocab} tokens and the model {spec.vocab}",
            "A draft model with the same tokenizer was expected",
            "Choose a smaller model of the same family, or leave out --draft-model to guess from the text itself",
        )
    if None not in spec.windows:
        raise InputError(
            "--draft-model is not possible with a model whose layers all have a sliding window",
            "A model with full attention was expected",
            "Leave out --draft-model to guess from the text itself",
        )
    return draft


@contextmanager
def _cores_for_readers() -> Iterator[None]:
    """Within, torch leaves cores to the threads that read: its own wait for each other by spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - READERS))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_whole(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype) -> list[str]:
    """The tensors in the order in which they are loaded, without large ones to be cast, which are read in pieces."""
    stored = stored_tensors(spec, checkpoint.quantization)
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
        f"compiled kernels: {native.status()}",
        f"products of integers: {'on' if has_int8_products() else 'off, no exact oneDNN product on this processor'}",
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
    from llmkit.checkpoint.tokenizer import load_tokenizer  # few need it

    try:
        return load_tokenizer(checkpoint).eos_ids
    except InputError:  # token ids alone can be run without one
        return ()
