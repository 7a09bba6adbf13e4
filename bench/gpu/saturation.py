"""An engine with 256 requests at once: the part `saturate` of `make gpu`."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from llmkit.bench.gpu.decode_steps import SAMPLERS, StepBench, StepModel, free_memory, new_engine
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.runtime.engine.engine_request import EngineRequest

REQUESTS = 256
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 2048
SATURATED = (
    (StepModel("Llama-3.1-8B", "fp8", "fp8"), "greedy"),
    (StepModel("Qwen3-0.6B", "bf16"), "greedy"),
    (StepModel("Qwen3-0.6B", "bf16"), "top-k top-p"),
)


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure full engines, each in a share of the time that is left."""
    for index, (step_model, sampler) in enumerate(SATURATED):
        bench = StepBench(step_model, options.device, options.is_tiny)
        # The first one gets the time that it needs.
        limit_s = log.time_left_s * 0.7 if index == 0 else log.time_left_s - 4
        name = f"{step_model.label}, {REQUESTS} requests, {sampler}"
        log.measure("saturated", name, partial(saturate, bench, sampler, limit_s, options), 10)
        del bench
        free_memory(options.device)


def saturate(
    bench: StepBench, sampler: str, limit_s: float, options: PartOptions
) -> dict[str, Any]:
    """Output tokens per second of a warm engine that runs all requests at once.

    It stops after about `limit_s` seconds, start and warm-up included, even if requests still run.
    The rate counts from the first prompt.
    """
    end_s = time.monotonic() + limit_s
    requests = 4 if options.is_tiny else REQUESTS
    prompt_tokens = 8 if options.is_tiny else PROMPT_TOKENS
    output_tokens = 12 if options.is_tiny else OUTPUT_TOKENS
    engine = new_engine(
        bench.model,
        prompt_tokens + output_tokens,
        requests,
        kv_cache_dtype=bench.step_model.kv_cache_dtype,
    )
    prompts = torch.randint(0, bench.spec.vocab_size, (2 * requests, prompt_tokens)).tolist()
    params = replace(SAMPLERS[sampler], max_tokens=output_tokens)
    engine.generate(prompts[requests:], replace(params, max_tokens=4))  # compiles, captures
    for index, prompt in enumerate(prompts[:requests]):
        engine.add(EngineRequest(str(index), prompt, params))
    tokens = 0
    steps = 0
    start_s = time.monotonic()
    while engine.has_work and time.monotonic() < end_s:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            tokens += len(output.token_ids)
        steps += 1
    seconds = time.monotonic() - start_s
    if not tokens:
        raise TimeoutError("no time was left after the start")
    return {
        "model": bench.step_model.model,
        "weights": bench.step_model.weights,
        "kv_cache_dtype": bench.step_model.kv_cache_dtype,
        "sampler": sampler,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "max_tokens": output_tokens,
        "output_tokens": tokens,
        "seconds": seconds,
        "steps": steps,
        "is_finished": not engine.has_work,
        "output_tps": tokens / seconds,
    }
