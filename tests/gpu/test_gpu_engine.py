"""The engine on a CUDA device: transformers' logits, graphs, what the host waits for.

Run with `make gpu`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, WEIGHT_SCHEMES, random_model
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.device import PinnedUploader
from llmkit.model.families import model_spec
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.cuda_graphs import (
    BatchDescriptor,
    CudaGraph,
    CudaGraphRunner,
    StepGraph,
    padding_blocks_of,
)
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.slot_block_tables import SlotBlockTables
from llmkit.runtime.engine_loader import load_engine

pytest.importorskip("transformers")
from support.engine_steps import errors, run_watched
from support.tiny_families import family_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 17, [40, 41], [77], list(range(100, 20, -1))]
OPTIONS = EngineOptions(
    device="cuda", kv_cache_memory=64 << 20, max_num_seqs=8, max_num_batched_tokens=48
)


@pytest.mark.parametrize(
    "family",
    [
        "llama3-rope",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3-longrope",
        "phi3-partial",
        "gemma2",
        "gemma3",
        "granite",
        "olmo2",
        "smollm3",
        "mixtral",
        "qwen3-moe",
    ],
)
def test_engine_logits_equal_transformers_in_bf16(family: str, tmp_path: Path) -> None:
    """Prompts in chunks beside decode steps, which are graphs.

    The tokens are those of bfloat16, the logits of float32 for the same tokens.
    """
    oracle = family_oracle(family, tmp_path).cuda()
    engine = load_engine(tmp_path, replace(OPTIONS, dtype="bfloat16"))
    shares = errors(oracle, PROMPTS, run_watched(engine, PROMPTS, 24))
    assert float(shares.median()) < 0.03
    if "mixtral" not in family and "moe" not in family:  # where a near tie may choose other experts
        assert float(shares.max()) < 0.12


class Rerun:
    """What a graph repeats, launched kernel by kernel."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


@pytest.mark.parametrize("kv_cache_dtype", [None, "fp8"])
@pytest.mark.parametrize("weights", WEIGHT_SCHEMES)
@pytest.mark.parametrize("shape", ["SmolLM2-135M", "Qwen3-0.6B"])
def test_cuda_graph_gives_what_its_kernels_give(
    shape: str, weights: str, kv_cache_dtype: str | None
) -> None:
    if "fp8" in (kv_cache_dtype, weights) and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    config = MODEL_CONFIGS[shape] | {"num_hidden_layers": 2, "vocab_size": 1024}
    model = random_model(
        model_spec(config), torch.bfloat16, torch.device("cuda"), WEIGHT_SCHEMES[weights]
    )
    for rows, contexts in ((1, [600]), (8, [1, 16, 17, 300, 5]), (32, list(range(1, 600, 20)))):
        logits, ids = _step(model, rows, contexts, kv_cache_dtype, CudaGraph)
        others, other_ids = _step(model, rows, contexts, kv_cache_dtype, Rerun)
        assert torch.equal(logits, others) and torch.equal(ids, other_ids)


@torch.inference_mode()
def _step(
    model: Decoder, rows: int, contexts: list[int], kv_cache_dtype: str | None, capture: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of two steps, the second of other contexts."""
    width = 40
    blocks = len(contexts) * 40
    caches = [model.new_kv_cache(blocks + 1, 16, kv_cache_dtype) for _ in model.layers]
    generator = torch.Generator("cuda").manual_seed(0)
    for cache in caches:
        cache.kv.copy_(
            torch.randn(cache.kv.shape, device="cuda", generator=generator).to(cache.kv.dtype)
        )
        if cache.scales is not None:
            cache.scales.fill_(0.02)
    padding_blocks = padding_blocks_of(model.spec, caches)
    slot_tables = SlotBlockTables(rows, width, padding_blocks, "cuda")
    descriptor = BatchDescriptor(rows, rows, rows)
    graph = StepGraph(model, caches, descriptor, slot_tables, 16, capture)
    tables = [list(range(row * width, (row + 1) * width)) for row in range(len(contexts))]
    tokens = torch.randint(
        0, model.spec.vocab_size, (len(contexts),), device="cuda", generator=generator
    )
    answers = []
    for more in (0, 1):
        lengths = [context + more for context in contexts]
        graph.prepare_inputs([length - 1 for length in lengths], lengths, {None: tables})
        graph.replay(tokens)
        answers.append(
            (
                graph.logits[: len(contexts)].clone(),
                graph.sampled_token_ids[: len(contexts)].clone(),
            )
        )
    return torch.cat([logits for logits, _ in answers]), torch.cat([ids for _, ids in answers])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "qwen3_moe"])
def test_engine_with_graphs_answers_as_without(architecture: str, tmp_path: Path) -> None:
    """The same sizes of steps, so that every product is the same one."""
    path = tiny_checkpoint(tmp_path, architecture)
    found = []
    for capture in (CudaGraph, Rerun):
        engine = load_engine(path, replace(OPTIONS, dtype="bfloat16", max_num_batched_tokens=512))
        runner = engine.runner
        size = engine.config.block_size
        longest = -(-engine.config.max_model_len // size)
        runner.graph_runner = CudaGraphRunner(
            engine.model, runner.paged_model.kv_caches, longest, size, 8, capture
        )
        assert runner.graph_runner.enabled
        found.append(run_watched(engine, PROMPTS, 24))
    for (answer, logits), (other, others) in zip(*found, strict=True):
        assert answer == other and torch.equal(logits, others)


WAITS = {"cudaMemcpy", "cudaMemcpy2D", "cudaMalloc", "cudaFree"}  # and all that synchronize


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_decode_step_waits_once(architecture: str, temperature: float, tmp_path: Path) -> None:
    """For the event after the ids of the step before, and for nothing else."""
    from torch.profiler import ProfilerActivity, profile, record_function

    engine = load_engine(
        tiny_checkpoint(tmp_path, architecture), replace(OPTIONS, dtype="bfloat16")
    )
    sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=60, ignore_eos=True)
    for index in range(4):
        engine.add(EngineRequest(f"{index}", [5, 6, 7 + index], sampling))
    for _ in range(20):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with (
            profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled,
            record_function("steps"),
        ):
            for _ in range(10):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    events = [
        event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CPU
    ]
    within = next(event.time_range for event in events if event.name == "steps")
    waits = Counter(
        event.name
        for event in events
        if (event.name in WAITS or "Synchronize" in event.name)
        and within.start <= event.time_range.start <= within.end
    )
    assert waits == {"cudaEventSynchronize": 10}


def test_pinned_uploader_takes_tensors_larger_than_a_buffer() -> None:
    upload = PinnedUploader(torch.device("cuda"), 1 << 20, 2)
    tensors = [
        torch.randint(0, 255, (size,), dtype=torch.uint8)
        for size in (1, 1 << 20, (5 << 20) + 3, 77, 9 << 20)
    ]
    got = [upload(tensor) for tensor in tensors]
    for tensor, one in zip(tensors, got, strict=True):
        assert torch.equal(one.cpu(), tensor)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_offloaded_weights_change_no_output(architecture: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, architecture, num_hidden_layers=6)
    model = load_model(open_checkpoint(path), torch.bfloat16)
    layer = sum(linear.weight.nbytes for linear in model.layers[0].linears.values())
    found: list[Any] = []
    for size in (0, 5 * layer):
        engine = load_engine(path, replace(OPTIONS, dtype="bfloat16", cpu_offload=size))
        assert isinstance(engine, Engine)
        engine.runner.graph_runner.enabled = False
        found.append(run_watched(engine, PROMPTS, 24))
    for (answer, logits), (other, others) in zip(*found, strict=True):
        assert answer == other and torch.equal(logits, others)
