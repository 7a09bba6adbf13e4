"""Loads a model, or the part of it that one rank holds, and builds an engine on it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.tensor_reader import CHUNK_BYTES, NUM_READER_THREADS
from llmkit.common.cpu_threads import choose_threads
from llmkit.common.errors import InputError
from llmkit.common.formatting import bytes_text
from llmkit.common.options import CpuActivations
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.triton_support import tl
from llmkit.model.checkpoint_tensors import checkpoint_tensors
from llmkit.model.decoder import SINGLE_RANK, Decoder
from llmkit.model.draft_head import DraftHead, load_draft_head
from llmkit.model.families import FALLBACK
from llmkit.model.language_model import LanguageModel
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.spec import ModelSpec
from llmkit.model.weight_loader import load_model
from llmkit.runtime.draft_source import open_draft
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import NO_KV_OFFLOAD, EngineOptions
from llmkit.runtime.engine.grammar_matcher import GrammarMatcher
from llmkit.runtime.engine.kernel_warm_up import warm_up
from llmkit.runtime.engine_plan import EnginePlan, plan_part, state_memory
from llmkit.runtime.kv_offload_memory import staging_bytes, with_host_memory
from llmkit.runtime.memory_plan import MemoryPlan, loaded_bytes, measure_workspace, plan_memory
from llmkit.runtime.weight_offload import WeightOffload

if TYPE_CHECKING:
    from llmkit.runtime.grammar_backend import GrammarBackend

MIN_PREFILL_CHUNK = 256  # tokens of a prompt in a step while other prompts wait
BAR_WIDTH = 30
E = TypeVar("E", bound=Engine)


@dataclass
class StartupReport:
    """Timings, plan and fast paths of an engine's start. The functions that load it fill it in."""

    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, in their order
    plan: EnginePlan | None = None  # the final plan
    fast_paths: list[str] = field(default_factory=list)  # which ones are on, and why others are off

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds that the `with` block takes to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class LoadedPart:
    """A model or a rank's part of it in memory, and the plan for the rest of an engine."""

    checkpoint: Checkpoint
    options: EngineOptions
    model: LanguageModel
    draft: LanguageModel | DraftHead | None
    plan: EnginePlan

    def make_engine(self, report: StartupReport, engine_class: type[E]) -> E:
        """Build an engine of this class, with its KV cache, CUDA graphs and adapters."""
        options = self.options
        plan = self.plan
        report.plan = plan
        used = replace(options, cpu_activations=plan.cpu_activations)
        report.fast_paths += fast_paths(plan.device, used)
        if self.model.spec.transformers is not None:
            report.fast_paths.append(FALLBACK)
        if plan.memory.max_num_seqs < options.max_num_seqs:
            report.fast_paths.append(
                f"requests at the same time: {plan.memory.max_num_seqs} of --max-num-seqs "
                f"{options.max_num_seqs}, as the recurrent states of each need "
                f"{bytes_text(plan.memory.bytes_per_state * (1 + options.speculation.num_tokens))}"
            )
        if plan.uses_kv_offload:
            report.fast_paths.append(f"KV cache in host memory: {host_memory_text(plan.memory)}")
        if plan.offload.num_layers:
            report.fast_paths.append(
                f"CUDA graphs: off, the weights of {plan.offload.num_layers} layers come from host "
                "memory"
            )
        config = EngineConfig(
            max_model_len=plan.memory.max_model_len,
            num_blocks=plan.memory.num_blocks,
            device=plan.device,
            dtype=plan.dtype,
            weight_dtype=plan.weight_dtype,
            max_num_seqs=plan.memory.max_num_seqs,
            num_state_snapshots=plan.memory.num_state_snapshots,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            kv_cache_dtype=plan.kv_cache_dtype,
            enable_prefix_caching=options.prefix_cache,
            num_host_blocks=plan.memory.num_host_blocks,
            num_host_states=plan.memory.num_host_states,
            prefill_chunk_size=max(MIN_PREFILL_CHUNK, plan.max_num_batched_tokens // 4),
            async_scheduling=(
                plan.device.type == "cuda"
                and not options.speculation.num_tokens
                and self.model.parallel_group.pp_size == 1
            ),
            num_speculative_tokens=options.speculation.num_tokens,
            draft_method=options.speculation.method,
            synthetic_acceptance_rates=options.acceptance_rates,
            enforce_eager=bool(plan.offload.num_layers),
            max_cudagraph_capture_size=options.max_cudagraph_capture_size,
        )
        with report.stage("KV cache"):
            engine = engine_class(self.model, config, eos_token_ids(self.checkpoint), self.draft)
            engine.compile_grammar = self._compile_grammar
        for name, directory in options.adapters.items():
            with report.stage("adapters"):
                engine.add_adapter(name, directory)
        if isinstance(engine.runner.graph_runner, CudaGraphRunner):
            with report.stage("CUDA graphs"):
                self._capture_graphs(engine, report)
        if plan.device.type == "cuda" and tl is not None:
            with report.stage("kernels"):
                self._warm_up_kernels(engine, report)
        return engine

    def _capture_graphs(self, engine: Engine, report: StartupReport) -> None:
        """Capture the CUDA graphs. Show how far it is on a terminal, and report what it took."""
        runner = engine.runner.graph_runner
        if not isinstance(runner, CudaGraphRunner) or self.plan.offload.num_layers:
            return  # weights in host memory: reported already
        if not runner.enabled:
            reason = "the host sees which experts are chosen"
            if not runner.can_capture_attention:
                reason = "attention over this KV cache runs in torch; its kernels need Triton, and"
                reason += " sm_89 or newer for FP8"
            if engine.config.max_cudagraph_capture_size == 0:
                reason = "--max-cudagraph-capture-size is 0"
            report.fast_paths.append(f"CUDA graphs: off, {reason}")
            return
        start = time.perf_counter()
        free_before, _ = torch.cuda.mem_get_info(self.plan.device)
        engine.runner.capture_graphs(self._progress_of("CUDA graphs"))
        seconds = time.perf_counter() - start
        used = max(0, free_before - torch.cuda.mem_get_info(self.plan.device)[0])
        planned = bytes_text(self.plan.memory.cuda_graph_bytes)
        report.fast_paths.append(
            f"CUDA graphs: {runner.num_graphs}, for up to {runner.max_num_reqs} requests, in "
            f"{seconds:.1f} s and {bytes_text(used)} (planned: {planned})"
        )

    def _warm_up_kernels(self, engine: Engine, report: StartupReport) -> None:
        """Compile the kernels of steps without graphs, and report what it took."""
        start = time.perf_counter()
        num_steps = warm_up(engine.runner, self._progress_of("kernels"))
        seconds = time.perf_counter() - start
        report.fast_paths.append(
            f"kernels: compiled before the first request, by {num_steps} steps in {seconds:.1f} s"
        )

    def _progress_of(self, what: str) -> Callable[[int, int], None]:
        """Shows on a terminal how far something is. Only the first rank does."""
        rank = self.model.spec.rank
        is_first_rank = rank is None or (rank.tp_rank, rank.first_layer) == (0, 0)
        if is_first_rank and sys.stderr.isatty():
            return partial(show_progress, what)
        return lambda *_: None

    @cached_property
    def _grammar_backend(self) -> GrammarBackend:
        # llguidance and the tokenizer are loaded with the first grammar: few requests have one.
        from llmkit.runtime.grammar_backend import GrammarBackend

        vocab_size = self.model.spec.full_model.vocab_size
        return GrammarBackend(self.checkpoint, vocab_size, eos_token_ids(self.checkpoint))

    def _compile_grammar(self, grammar: str) -> GrammarMatcher:
        return self._grammar_backend.compile(grammar)


def host_memory_text(memory: MemoryPlan) -> str:
    """What host memory keeps of the KV cache with --kv-offload."""
    if not memory.num_host_blocks:
        return NO_KV_OFFLOAD
    num_tokens = memory.num_host_blocks * memory.block_size
    return f"{bytes_text(memory.host_bytes)}, {num_tokens:,} tokens"


def show_progress(what: str, number: int, total: int) -> None:
    """Write a progress bar to the terminal, and remove it at the end."""
    done = BAR_WIDTH * number // total
    bar = "#" * done + "." * (BAR_WIDTH - done)
    line = f"{what} [{bar}] {number}/{total}"
    sys.stderr.write(f"\r{line}" if number < total else f"\r{' ' * len(line)}\r")
    sys.stderr.flush()


def load_part(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    report: StartupReport,
    parallel_group: ParallelGroup = SINGLE_RANK,
    num_parts: int = 1,
    whole: Checkpoint | None = None,
) -> LoadedPart:
    """Plan and load a whole model, or one of its `num_parts` parts.

    The ranks of all parts form the `parallel_group`. whole: of a part, see `RankPart.whole`.
    """
    with report.stage("memory plan"):
        plan = plan_part(checkpoint, spec, options, num_parts, whole)
    device = plan.device
    model = load_weights(
        checkpoint,
        spec,
        plan.dtype,
        device,
        report,
        parallel_group,
        plan.offload.num_layers,
        plan.cpu_activations,
        plan.weight_dtype,
    )
    draft: LanguageModel | DraftHead | None = None
    source = open_draft(whole or checkpoint, spec, options)
    if source is not None and source.spec.draft_head is not None:
        assert isinstance(model, Decoder), "open_draft refuses it"
        with report.stage("building"):
            draft = load_draft_head(
                source.checkpoint,
                source.spec,
                model,
                packed=True,
                cpu_activations=plan.cpu_activations,
                weight_dtype=plan.weight_dtype,
            )
            draft.reserve(plan.max_num_batched_tokens)  # before the memory is measured
    elif source is not None:
        draft = load_weights(
            source.checkpoint,
            source.spec,
            plan.dtype,
            device,
            report,
            cpu_activations=plan.cpu_activations,
            weight_dtype=plan.weight_dtype,
        )

    # Plan the memory again, now with the real sizes.
    with report.stage("memory plan"):
        memory = plan.memory
        weights = loaded_bytes(model)
        if draft is not None:
            weights += loaded_bytes(draft)
        workspace = memory.workspace_bytes
        if device.type == "cuda":
            weights = torch.cuda.memory_allocated(device)
            if spec.rank is None:  # a step of a part needs the other ranks
                workspace = measure_workspace(
                    model, plan.max_num_batched_tokens, options.max_num_seqs
                )
                workspace += staging_bytes(spec, device, options)
        memory = plan_memory(
            model.spec,
            device.type,
            free_bytes=memory.free_bytes,
            weight_bytes=weights,
            workspace_bytes=workspace,
            kv_bytes_per_token=memory.bytes_per_block // memory.block_size,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            kv_cache_memory=options.kv_cache_memory,
            cuda_graph_bytes=memory.cuda_graph_bytes,
            states=state_memory(model.spec, plan.dtype, options),
        )
        memory = with_host_memory(memory, device, options, num_parts)
    return LoadedPart(checkpoint, options, model, draft, replace(plan, memory=memory))


def load_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    report: StartupReport,
    parallel_group: ParallelGroup = SINGLE_RANK,
    num_offloaded_layers: int = 0,
    cpu_activations: CpuActivations = "auto",
    weight_dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Read the weights while the model is built from them."""
    names = _tensors_read_whole(checkpoint, spec, dtype)
    with (
        report.stage("building"),
        _cores_left_to_readers(),
        checkpoint.reading_ahead(names) as read_ahead,
    ):
        model = load_model(
            checkpoint,
            dtype,
            device,
            packed=True,
            spec=spec,
            parallel_group=parallel_group,
            offloaded=num_offloaded_layers,
            cpu_activations=cpu_activations,
            weight_dtype=weight_dtype,
        )
        if num_offloaded_layers:
            assert isinstance(model, Decoder), "plan_part refuses it"
            WeightOffload(model.layers[-num_offloaded_layers:], device)
    checkpoint.require_unchanged()
    report.seconds["building"] -= read_ahead.waited_s
    waited_before = report.seconds.get("waiting for the disk", 0.0)
    report.seconds["waiting for the disk"] = waited_before + read_ahead.waited_s
    return model


@contextmanager
def _cores_left_to_readers() -> Iterator[None]:
    """Let torch use fewer threads inside the `with` block, so that the file readers have cores.

    The threads of torch spin while they wait for each other, which takes whole cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads - NUM_READER_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _tensors_read_whole(checkpoint: Checkpoint, spec: ModelSpec, dtype: torch.dtype) -> list[str]:
    """The tensors that are read in one piece, in loading order; large casts are read in chunks."""
    names = []
    for name, (_, packed) in checkpoint_tensors(spec, checkpoint.quantization).items():
        info = checkpoint.tensors.get(name)
        if packed.num_experts:  # read expert by expert
            continue
        if info is not None and (info.torch_dtype == dtype or info.nbytes <= CHUNK_BYTES):
            names.append(info.name)
    return names


def fast_paths(device: torch.device, options: EngineOptions) -> list[str]:
    """What makes the engine fast on this machine, and what is missing, one line each."""
    if device.type == "cuda":
        return [f"CUDA: {torch.cuda.get_device_name(device)}"]
    no_cuda = "the CPU was asked for" if torch.cuda.is_available() else "PyTorch sees no device"
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors == "DEFAULT":
        vectors = "off, neither AVX2 nor AVX-512"
    return [
        f"CUDA: off, {no_cuda}",
        f"CPU vector operators: {vectors}",
        f"compiled kernels: {_kernels_text()}",
        f"CPU threads: {_threads_text(options.threads)}",
        f"CPU activations: {_activations_text(options.cpu_activations)}",
    ]


def _kernels_text() -> str:
    """The level of the compiled kernels, or why they do not run."""
    if cpu_kernels.library is None:
        return cpu_kernels.status()
    return f"level {cpu_kernels.level()}"


def _activations_text(wanted: CpuActivations) -> str:
    """What the inputs of linear layers are rounded to."""
    if cpu_kernels.library is None:
        return "in the model's dtype, as the compiled kernels are off"
    if wanted in ("auto", "bfloat16") and not cpu_kernels.has_bfloat16():
        return f"float32 ({wanted}; level {cpu_kernels.level()} has no bfloat16 products)"
    return {
        "auto": "bfloat16 for weights of 16 bits (bfloat16), 8 and 4 bits, else float32 (auto)",
        "float32": "float32",
        "bfloat16": "bfloat16 for weights of 16 bits (bfloat16), 8 and 4 bits, else float32",
        "int8": "int8 for int8 and 4-bit weights, else float32",
    }[wanted]


def _threads_text(wanted: int | None) -> str:
    """How many threads compute, and why."""
    used = torch.get_num_threads()
    allowed = choose_threads(wanted)
    if used == allowed.count:
        return f"{used}, {allowed.why}"
    return f"{used}, a share of {allowed.count}, {allowed.why}"


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end an output: those of the configs, else the tokenizer's.

    There are none when neither names one. The tokenizer is loaded only when the configs name none.
    """
    found: list[int] = []
    for config in (checkpoint.generation_config, checkpoint.config):
        ids = config.get("eos_token_id")
        if isinstance(ids, list):
            found += ids
        elif ids is not None:
            found.append(ids)
    if found:
        return tuple(dict.fromkeys(found))
    from llmkit.checkpoint.tokenizer import load_tokenizer  # heavy, and few checkpoints need it

    try:
        return load_tokenizer(checkpoint).eos_token_ids
    except InputError:  # without a tokenizer, prompts of token ids can still run
        return ()
