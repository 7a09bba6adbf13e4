"""Decoding with quantized weights beside vLLM: the part `quantized` of `make gpu`.

Random weights in a real shape, in the same format: FP8 with a scale for each output and each token,
and INT4 in groups of 128 (GPTQ), which vLLM computes with its Marlin kernels. An engine is made
once and runs every number of requests.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llmkit.bench.gpu.baselines import (
    MAX_ENGINE_S,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    Workload,
    measure_in_subprocess,
)
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, tiny_config

MODEL = "Llama-3.1-8B"
WEIGHTS = ("fp8", "int4")
ENGINES = ("llmkit", "vllm")
COUNTS = (1, 16, 64, 256)  # requests
ENGINE_S = 90.0  # a guess of the time of one engine


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure both engines with each kind of weights."""
    config = MODEL_CONFIGS[MODEL]
    counts: tuple[int, ...] = COUNTS
    prompt, output = PROMPT_TOKENS, OUTPUT_TOKENS
    if options.is_tiny:
        config, counts, prompt, output = tiny_config(config), (1, 2), 5, 4
    for weights in WEIGHTS if not options.is_tiny else ("bf16",):
        for engine in ENGINES if not options.is_tiny else ENGINES[:1]:
            work = Workload(
                config, options.device.type, max(counts), prompt, output, weights, counts
            )
            name = f"{MODEL} {weights}; {engine}"
            run = partial(_measure_engine, log, engine, work)
            log.measure("throughput", name, run, needs_s=1 if options.is_tiny else ENGINE_S)


def _measure_engine(log: FigureLog, engine: str, work: Workload) -> dict[str, Any]:
    found = measure_in_subprocess(engine, work, min(MAX_ENGINE_S, max(log.time_left_s, 1.0)))
    return {"model": MODEL, "weights": work.weights, "engine": engine, **found}
