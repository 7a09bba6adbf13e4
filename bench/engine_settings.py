"""The engine's options that `llmkit bench` passes on to the checkpoints that it runs."""

from __future__ import annotations

from llmkit.bench.bench_options import BenchOptions
from llmkit.runtime.engine.engine_options import EngineOptions


def bench_engine_options(options: BenchOptions, device: str = "auto") -> EngineOptions:
    """The options of the engines that run checkpoints."""
    return EngineOptions(
        dtype=options.dtype,
        device=device,
        max_model_len=options.max_model_len,
        threads=options.threads,
        cpu_activations=options.cpu_activations,
        speculate=options.speculate,
        draft_model=options.draft_model,
        synthetic_acceptance_rates=options.synthetic_acceptance_rates,
        synthetic_acceptance_length=options.synthetic_acceptance_length,
    ).with_draft_tokens()
