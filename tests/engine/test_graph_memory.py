"""The memory plan counts what CUDA graphs take, measured on a CPU that acts as a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fake_cuda import GPU
from support.fake_cuda_api import fake_gpu
from support.live_memory import LiveMemory
from support.triton_checks import interpreted

from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, WEIGHT_SCHEMES, random_model
from llmkit.model.families import model_spec
from llmkit.model.lora import LoraManager, LoraWeights
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner, batch_descriptors
from llmkit.runtime.engine.logits_processor_tables import LogitsProcessorTables
from llmkit.runtime.graph_memory import (
    BYTES_PER_KERNEL,
    KERNELS_PER_LAYER,
    SPLIT_SUMS_BYTES,
    estimate_graph_bytes,
)

SIZES = {"num_hidden_layers": 2, "vocab_size": 2048, "max_position_embeddings": 4096}
NUM_SEQS, NUM_BLOCKS = 6, 256
CASES: dict[str, dict[str, Any]] = {
    "decodes": {"max_mixed_tokens": 0},
    "prompts": {},
    "drafts, a head and adapters": {"max_query_len": 4, "has_lora": True, "hidden_size": 576},
    "int4, many tokens": {"weights": "int4", "max_query_len": 96, "max_mixed_tokens": 0},
}
# Four for decodes, four for drafts, and six with prompts; as many again with adapters.
NUM_GRAPHS = {
    "decodes": 4,
    "prompts": 10,
    "drafts, a head and adapters": 28,
    "int4, many tokens": 8,
}


def measure(name: str) -> tuple[int, int, int]:
    """The most bytes that the graphs take, their estimate, and the number of graphs."""
    case = {"max_query_len": 1, "max_capture_size": None, "max_mixed_tokens": 160} | CASES[name]
    has_lora = case.pop("has_lora", False)
    hidden_size = case.pop("hidden_size", 0)
    weights = case.pop("weights", "bf16")
    with fake_gpu():
        spec = model_spec(MODEL_CONFIGS["SmolLM2-135M"] | SIZES)
        model = random_model(spec, torch.bfloat16, GPU, WEIGHT_SCHEMES[weights])
        adapters = LoraManager(model, uses_slots=True)
        if has_lora:
            down = spec.hidden_size, spec.intermediate_size
            lora = LoraWeights(
                torch.zeros(8, down[1], dtype=torch.bfloat16, device=GPU),
                torch.zeros(down[0], 8, dtype=torch.bfloat16, device=GPU),
            )
            adapters.add("one", {f"layers.{n}.mlp.down": lora for n in range(2)})
        num_rows = NUM_SEQS * case["max_query_len"]
        processors = LogitsProcessorTables(
            NUM_SEQS, num_rows, spec.vocab_size, 0, torch.device("cuda", 0)
        )
        caches = [model.new_kv_cache(4, 16) for _ in model.layers]
        memory = LiveMemory()
        with memory:
            runner = CudaGraphRunner(
                model,
                caches,
                NUM_BLOCKS,
                16,
                NUM_SEQS,
                adapters=adapters,
                hidden_size=hidden_size,
                logits_processors=processors,
                **case,
            )
            runner.capture_all()
        sizes = NUM_SEQS, case["max_query_len"], case["max_capture_size"]
        descriptors = batch_descriptors(*sizes, case["max_mixed_tokens"])
        estimate = estimate_graph_bytes(
            spec,
            torch.bfloat16,
            torch.device("cuda", 0),
            descriptors,
            NUM_SEQS,
            NUM_BLOCKS,
            has_lora,
            hidden_size,
            weights != "bf16",
        )
    return memory.peak_bytes, estimate, runner.num_graphs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int, int]]:
    folder = tmp_path_factory.mktemp("memory")
    calls = [(name,) for name in CASES]
    answers = interpreted("engine.test_graph_memory", "measure", calls, folder, interpret=False)
    return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_graph_memory_is_planned(name: str, found: dict[str, tuple[int, int, int]]) -> None:
    measured, estimate, num_graphs = found[name]
    num_kernels = num_graphs * (SIZES["num_hidden_layers"] + 1) * KERNELS_PER_LAYER
    estimate -= num_kernels * BYTES_PER_KERNEL  # no tensor has the driver's memory
    assert num_graphs == NUM_GRAPHS[name]
    constants = SPLIT_SUMS_BYTES if CASES[name].get("weights") else 0
    assert measured <= estimate <= 4 * measured + constants
