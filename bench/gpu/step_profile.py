"""The time of a decode step and of a prefill step, by group of operators.

`python -m llmkit.bench.gpu.step_profile MODEL` runs the engine, with its scheduler and sampling,
under torch's profiler. Time outside all operators is reported as Python's. With `--host` it
measures the host's part of a step alone, without a model; see `host_profile`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmkit.bench.gpu.host_profile import host_times
from llmkit.kernels.cpu import cpu_kernels
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

MAX_MODEL_LEN = 2048
SPARE_TOKENS = 256  # of a request, for the steps in which other requests' prompts are computed
PREFILL_PROMPT_TOKENS = 512  # of a prompt whose prefill is profiled
# An operator belongs to the first group with a word that is in its name.
GROUPS = {
    "attention": ("attention", "bmm", "softmax", "baddbmm"),
    "linear layers and head": ("linear", "mlp", "addmm", "::mm", "moe", "product"),
    "KV cache reads and writes": ("index_select", "index_copy", "index_put", "gather", "store"),
    "norms": ("norm",),
    "sampling": ("argmax", "topk", "sort", "isfinite", "multinomial", "cumsum"),
}


def operator_group(operator: str) -> str:
    """The group of an operator of the profiler ("aten::addmm")."""
    name = operator.lower()
    return next(
        (group for group, words in GROUPS.items() if any(word in name for word in words)),
        "other operators",
    )


class TimedLibrary:
    """The compiled CPU kernels, with the seconds of each: torch's profiler does not see them."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self.library, name)

        def timed(*arguments: float) -> None:
            start_s = time.perf_counter()
            kernel(*arguments)
            self.seconds[name] += time.perf_counter() - start_s

        return timed


def profile_steps(engine: Engine, steps: int) -> dict[str, float]:
    """Milliseconds of a step by group: the mean over `steps` steps of an engine with requests."""
    cuda = engine.config.device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    step_ms = _time_step_ms(engine, steps)
    compiled = TimedLibrary(cpu_kernels.library)
    with ExitStack() as stack:
        if not cuda:  # replayed kernels would not be timed one by one
            stack.enter_context(engine.runner.without_graphs())
        if cpu_kernels.library is not None:
            stack.enter_context(cpu_kernels.intercept(compiled))
        record = stack.enter_context(profile(activities=activities))
        _time_step_ms(engine, steps)
    spent: dict[str, float] = defaultdict(float)
    for name, seconds in compiled.seconds.items():
        spent[operator_group(name)] += seconds * 1e3 / steps
    for event in record.key_averages():
        total_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[operator_group(event.key)] += total_us / 1e3 / steps
    groups = dict(sorted(spent.items(), key=lambda item: -item[1]))
    groups["Python and waiting"] = max(0.0, step_ms - sum(groups.values()))
    return groups | {"whole step": step_ms}


def _time_step_ms(engine: Engine, steps: int) -> float:
    """Milliseconds of a step, without the overhead of the profiler."""
    start_s = time.perf_counter()
    for _ in range(steps):
        engine.step()
    if engine.config.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start_s) / steps * 1e3


def make_busy_engine(
    model: str, options: EngineOptions, prompt_tokens: int, context: int, output: int
) -> Engine:
    """An engine with requests whose prompts have `prompt_tokens` tokens together.

    context: tokens of each prompt. output: tokens to generate for each request.
    """
    engine = load_engine(model, options)
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    for index in range(prompt_tokens // context):
        prompt = torch.randint(
            0, engine.model.spec.vocab_size, (context,), generator=generator
        ).tolist()
        engine.add(EngineRequest(str(index), prompt, sampling))
    return engine


def main() -> int:
    """Profile decode steps and a prefill step: a table on stderr, JSON on stdout.

    With --host, the host's part of decode steps, for which no model is needed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.step_profile", description=main.__doc__
    )
    parser.add_argument("model", nargs="?", help="not with --host")
    parser.add_argument(
        "--host",
        action="store_true",
        help="the thread CPU time of the host by phase, with a model that costs nothing",
    )
    parser.add_argument("--dtype", default="auto", help="default: auto")
    parser.add_argument("--device", default="auto", help="default: auto")
    parser.add_argument(
        "--steps", type=int, default=20, help="decode steps that are averaged (default: 20)"
    )
    parser.add_argument(
        "--context", type=int, default=256, help="tokens of each prompt (default: 256)"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1 or (arguments.model is None) != arguments.host:
        parser.error("expected a model or --host, and at least one step")
    if arguments.host:
        times = host_times(arguments.steps)
        sys.stdout.write(json.dumps({"torch": torch.__version__, "steps": times}, indent=1) + "\n")
        return 0
    context = arguments.context
    output = MAX_MODEL_LEN - arguments.context
    if min(arguments.steps, context) < 1 or output < 2 * arguments.steps + SPARE_TOKENS:
        parser.error(
            f"--context and twice --steps are more than {MAX_MODEL_LEN - SPARE_TOKENS} tokens,"
            " or less than 1"
        )
    options = EngineOptions(
        dtype=arguments.dtype,
        device=arguments.device,
        prefix_cache=False,
        max_model_len=MAX_MODEL_LEN,
    )
    results: dict[str, Any] = {"model": arguments.model, "torch": torch.__version__, "steps": {}}
    for batch in (1, 16, 32):
        engine = make_busy_engine(arguments.model, options, batch * context, context, output)
        while (
            any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.running)
            or engine.scheduler.waiting
        ):
            engine.step()
        _time_step_ms(engine, 3)
        results["steps"][f"decode, batch {batch}"] = profile_steps(engine, arguments.steps)
    tokens = engine.config.max_num_batched_tokens
    # Enough prompts for the five steps that run.
    engine = make_busy_engine(arguments.model, options, 8 * tokens, PREFILL_PROMPT_TOKENS, 1)
    _time_step_ms(engine, 1)
    results["steps"][f"prefill, {tokens} tokens"] = profile_steps(engine, 2)
    for name, groups in results["steps"].items():
        step_ms = groups["whole step"]
        sys.stderr.write(f"{name}: {step_ms:.1f} ms\n")
        for group, spent in groups.items():
            if group != "whole step":
                sys.stderr.write(f"  {group:28} {spent:8.2f} ms  {spent / step_ms:5.0%}\n")
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
