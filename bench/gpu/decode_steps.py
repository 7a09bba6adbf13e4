"""Times of decode and prefill steps, with the sampler that serves requests.

A decode step is a replay of the engine's CUDA graph, from token ids to sampled ids. A prefill is
one request to an engine, from its prompt to its first token on the host. The models have random
weights in real shapes. It is the part `steps` of `make gpu`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.bench.gpu.floors import step_cost
from llmkit.bench.gpu.model_shapes import (
    BLOCK_SIZE,
    MODEL_CONFIGS,
    WEIGHT_SCHEMES,
    random_model,
    tiny_config,
)
from llmkit.bench.gpu.timing import EagerGraph, time_ms
from llmkit.kernels.kv_cache import KVCache
from llmkit.model.decoder import Decoder
from llmkit.model.families import model_spec
from llmkit.model.spec import ModelSpec
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner, StepGraph
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.paged_model import ForwardInputs
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.sampling_tensors import SamplingTensorCache, SamplingTensors
from llmkit.runtime.engine.sequence import Sequence

CONTEXT = 1024  # tokens of each sequence of a decode step
PREFILL_TOKENS = 2048
BATCHES = (1, 16, 64, 256)
KV_CACHE_SHARE = 0.8  # of the free memory of a GPU, at most
SAMPLERS = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True),
    "top-k top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95, ignore_eos=True),
}


@dataclass(frozen=True)
class StepModel:
    """A model whose steps are measured."""

    model: str  # a key of MODEL_CONFIGS
    weights: str  # a key of WEIGHT_SCHEMES
    kv_cache_dtype: str | None = None
    batches: tuple[int, ...] = BATCHES
    has_prefill: bool = True

    @property
    def label(self) -> str:
        """Its name in figures."""
        kv = f", {self.kv_cache_dtype} KV" if self.kv_cache_dtype else ""
        return f"{self.model} {self.weights}{kv}"

    def figures(self) -> Iterator[tuple[str, str, int, str]]:
        """Kind, name, batch and sampler of each figure, the most important ones first."""
        for sampler in SAMPLERS:
            for batch in self.batches:
                yield "decode", f"{self.label}, batch {batch}, {sampler}", batch, sampler
        if self.has_prefill:
            for sampler in SAMPLERS:
                yield "prefill", f"{self.label}, {sampler}", 1, sampler


STEP_MODELS = (
    StepModel("Llama-3.1-8B", "bf16"),
    StepModel("Llama-3.1-8B", "fp8"),
    StepModel("Llama-3.1-8B", "int4"),
    StepModel("Qwen3-0.6B", "bf16"),
    StepModel("Llama-3.1-8B", "fp8", "fp8", (64, 256), has_prefill=False),
    StepModel("Llama-3.1-8B", "nvfp4", batches=(1, 64), has_prefill=False),
)


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure the steps of every model."""
    for step_model in STEP_MODELS:
        if options.is_tiny:
            step_model = replace(step_model, batches=(1, 3))
        bench = StepBench(step_model, options.device, options.is_tiny)
        for figure, name, batch, sampler in step_model.figures():
            if figure == "decode":
                run = partial(bench.decode, batch, sampler)
            else:
                run = partial(bench.prefill, sampler)
            log.measure(figure, name, run, needs_s=5)
            del run  # it refers to the model
        # The next model needs the memory.
        del bench
        free_memory(options.device)


class StepBench:
    """A model with its KV caches and graphs, made for the first figure that needs them."""

    def __init__(self, step_model: StepModel, device: torch.device, is_tiny: bool = False) -> None:
        self.step_model = step_model
        self.device = device
        self.repeats = 2 if is_tiny else 20
        self.context = 40 if is_tiny else CONTEXT
        self.prefill_tokens = 32 if is_tiny else PREFILL_TOKENS
        config = MODEL_CONFIGS[step_model.model]
        self.spec: ModelSpec = model_spec(tiny_config(config) if is_tiny else config)

    @cached_property
    def model(self) -> Decoder:
        """The model with random weights."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        scheme = WEIGHT_SCHEMES[self.step_model.weights]
        return random_model(self.spec, dtype, self.device, scheme)

    @cached_property
    def kv_caches(self) -> list[KVCache]:
        """Random keys and values for the largest batch, and the graphs' padding block."""
        num_blocks = max(self.step_model.batches) * self._blocks_per_sequence + 1
        return random_kv_caches(self.model, num_blocks, self.step_model.kv_cache_dtype)

    @cached_property
    def graph_runner(self) -> CudaGraphRunner:
        """The engine's graphs with its sampler; on a CPU the same steps without a capture."""
        arguments: dict[str, Any] = {}
        if self.device.type != "cuda":
            arguments = {"capture": EagerGraph, "sampler": None}
        return CudaGraphRunner(
            self.model,
            self.kv_caches,
            self._blocks_per_sequence,
            BLOCK_SIZE,
            max(self.step_model.batches),
            **arguments,
        )

    @property
    def _blocks_per_sequence(self) -> int:
        return -(-self.context // BLOCK_SIZE)

    def graph(self, batch: int) -> StepGraph:
        """The graph that has run a step of `batch` sequences."""
        large_enough = [g for g in self.graph_runner.graphs.values() if g.num_reqs >= batch]
        return min(large_enough, key=lambda graph: graph.num_reqs)

    @torch.inference_mode()
    def decode(self, batch: int, sampler: str) -> dict[str, Any]:
        """The time of a replay, and of the whole call with the copies to the device."""
        token_ids = torch.randint(0, self.spec.vocab_size, (batch,), device=self.device)
        per_sequence = self._blocks_per_sequence
        tables = [list(range(s * per_sequence, (s + 1) * per_sequence)) for s in range(batch)]
        block_tables = dict.fromkeys(self.spec.sliding_windows, tables)
        sampling = sampling_tensors(SAMPLERS[sampler], batch)
        inputs = ForwardInputs(
            query_lens=[1] * batch,
            seq_lens=[self.context] * batch,
            positions=[self.context - 1] * batch,
            block_tables=block_tables,
            slots=list(range(batch)),
            state_rows=[],
        )
        num_sampled = [1] * batch

        def run() -> None:
            self.graph_runner.replay(token_ids, inputs, sampling, num_sampled)

        run()  # captures the graph, and copies what it reads
        graph = self.graph(batch)
        step_ms = time_ms(lambda: graph.replay(token_ids), self.device, self.repeats)
        call_ms = back_to_back_ms(run, self.device, self.repeats)
        return self._values("decode", batch, 1, self.context) | {
            "sampler": sampler,
            "step_ms": step_ms,
            "call_ms": call_ms,
            "output_tps": batch / step_ms * 1e3,
        }

    def prefill(self, sampler: str) -> dict[str, Any]:
        """The time from a prompt to its first token on the host, in an engine."""
        tokens = self.prefill_tokens
        engine = new_engine(
            self.model,
            max_model_len=tokens + BLOCK_SIZE,
            max_num_seqs=1,
            max_num_batched_tokens=tokens,
        )
        params = replace(SAMPLERS[sampler], max_tokens=1)
        times = []
        for _ in range(2 if self.repeats < 10 else 7):
            prompt = torch.randint(0, self.spec.vocab_size, (tokens,)).tolist()
            start_s = time.perf_counter()
            engine.generate([prompt], params)
            times.append((time.perf_counter() - start_s) * 1e3)
        step_ms = statistics.median(times[len(times) // 3 :])  # the first ones compile
        return self._values("prefill", 1, tokens, tokens) | {
            "sampler": sampler,
            "step_ms": step_ms,
            "prompt_tps": tokens / step_ms * 1e3,
        }

    def _values(self, kind: str, batch: int, query_len: int, context: int) -> dict[str, Any]:
        kv_bytes = 1 if self.step_model.kv_cache_dtype else 2
        cost = step_cost(self.spec, self.step_model.weights, batch, query_len, context, kv_bytes)
        return {
            "model": self.step_model.model,
            "weights": self.step_model.weights,
            "kv_cache_dtype": self.step_model.kv_cache_dtype,
            "kind": kind,
            "batch": batch,
            "context": context,
            "bytes": cost.bytes,
            "flops": cost.flops,
        }


def random_kv_caches(
    model: Decoder, num_blocks: int, kv_cache_dtype: str | None = None
) -> list[KVCache]:
    """KV caches full of random values: zeros would cost less power than real ones."""
    caches = [model.new_kv_cache(num_blocks, BLOCK_SIZE, kv_cache_dtype) for _ in model.layers]
    for cache in caches:
        for head in cache.kv:  # one after the other, since the random values take memory too
            values = torch.randn(head.shape, dtype=model.dtype, device=head.device)
            head.copy_(values.to(head.dtype))
        if cache.scales is not None:
            cache.scales.fill_(0.02)
    return caches


def sampling_tensors(params: SamplingParams, batch: int) -> SamplingTensors:
    """The engine's sampling tensors for sequences that all have these parameters."""
    sequences = [
        Sequence(EngineRequest(str(index), [0], params), seed=index) for index in range(batch)
    ]
    return SamplingTensorCache().get(sequences)


def new_engine(
    model: Decoder,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int = 8192,
    kv_cache_dtype: str | None = None,
    num_tokens: int | None = None,
) -> Engine:
    """An engine as `llmkit serve` configures it, without a prefix cache.

    num_tokens: for which the KV cache has room; None: for all sequences at their longest. On a GPU
    it takes at most KV_CACHE_SHARE of the free memory.
    """
    tokens = max_num_seqs * (max_model_len + BLOCK_SIZE) if num_tokens is None else num_tokens
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info()
        token_bytes = model.spec.kv_elements_per_token * (1.1 if kv_cache_dtype else 2)
        tokens = min(tokens, int(KV_CACHE_SHARE * free_bytes / token_bytes))
    config = EngineConfig(
        max_model_len,
        -(-tokens // BLOCK_SIZE),
        model.device,
        model.dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=False,
        async_scheduling=model.device.type == "cuda",
    )
    return Engine(model, config)


def back_to_back_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The mean time of `run`, by the host's clock, with no wait between the runs."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / repeats * 1e3


def free_memory(device: torch.device) -> None:
    """Give the memory of deleted models back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
