"""Where the time of a step goes: the part `profile` of `make gpu`.

The kernels of one graph replay, by torch's profiler; and the host's milliseconds per engine step,
by what it does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmkit.bench.gpu.decode_steps import (
    SAMPLERS,
    StepBench,
    StepModel,
    free_memory,
    new_engine,
)
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.model.parallel_group import Waitable
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.model_runner import InFlightStep
from llmkit.runtime.engine.scheduler_output import SchedulerOutput

REPLAYED = (
    (StepModel("Qwen3-0.6B", "bf16", batches=(1, 256)), 1),
    (StepModel("Llama-3.1-8B", "fp8", batches=(64,)), 64),
    (StepModel("Llama-3.1-8B", "int4", batches=(1,)), 1),
)
HOST_MODEL = StepModel("Qwen3-0.6B", "bf16")
HOST_BATCHES = (256, 64, 1)
PROMPT_TOKENS = 16
MAX_KERNELS = 30  # in a table


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure the host's share first, then the kernels."""
    bench = StepBench(HOST_MODEL, options.device, options.is_tiny)
    for batch in (4,) if options.is_tiny else HOST_BATCHES:
        for sampler in SAMPLERS:
            name = f"{HOST_MODEL.label}, batch {batch}, {sampler}"
            run = partial(host_times, bench, batch, sampler, 4 if options.is_tiny else 40)
            log.measure("host", name, run, needs_s=4)
            del run
    del bench
    for step_model, batch in REPLAYED:
        free_memory(options.device)
        if options.is_tiny:
            step_model = replace(step_model, batches=(batch := min(batch, 2),))
        name = f"{step_model.label}, batch {batch}, top-k top-p"
        log.measure("kernels", name, partial(replay_table, step_model, batch, options), needs_s=8)


def replay_table(step_model: StepModel, batch: int, options: PartOptions) -> dict[str, Any]:
    """The kernels of one replay, the longest first, and the time from its start to its end."""
    bench = StepBench(step_model, options.device, options.is_tiny)
    values = bench.decode(batch, "top-k top-p")
    activities = [ProfilerActivity.CPU]
    if options.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    graph = bench.graph(batch)
    token_ids = torch.zeros(batch, dtype=torch.int64, device=options.device)
    with torch.inference_mode(), profile(activities=activities) as record:
        graph.replay(token_ids)
        if options.device.type == "cuda":
            torch.cuda.synchronize()
    cuda = options.device.type == "cuda"
    kernels = [
        {
            "kernel": event.key[:120],
            "count": event.count,
            "us": event.self_device_time_total if cuda else event.self_cpu_time_total,
        }
        for event in record.key_averages()
        # Of an operator, the profiler gives its kernels' time once more.
        if not cuda or event.device_type.name == "CUDA"
    ]
    kernels = sorted((one for one in kernels if one["us"] > 0), key=lambda one: -one["us"])
    return {
        "model": step_model.model,
        "weights": step_model.weights,
        "batch": batch,
        "step_ms": values["step_ms"],
        "busy_ms": sum(one["us"] for one in kernels) / 1e3,
        "launches": sum(one["count"] for one in kernels),
        "table": kernels[:MAX_KERNELS],
    }


class TimedWait:
    """A step's event, with the seconds that the host waits for it."""

    def __init__(self, event: Waitable, seconds: dict[str, float]) -> None:
        self._event = event
        self._seconds = seconds

    def synchronize(self) -> None:
        """Wait."""
        start_s = time.perf_counter()
        self._event.synchronize()
        self._seconds["wait"] += time.perf_counter() - start_s


def host_times(bench: StepBench, batch: int, sampler: str, steps: int) -> dict[str, Any]:
    """Milliseconds of an engine step with `batch` decoding requests, by what the host does.

    "wait" is the wait for the device: the rest is the host's own time.
    """
    output = 2 * steps + 32
    engine = new_engine(bench.model, PROMPT_TOKENS + output, batch)
    params = replace(SAMPLERS[sampler], max_tokens=output)
    for index in range(batch):
        prompt = torch.randint(0, bench.spec.vocab_size, (PROMPT_TOKENS,)).tolist()
        engine.add(EngineRequest(str(index), prompt, params))
    for _ in range(16):  # prompts, graphs
        engine.step()
    seconds = watch_engine(engine)
    start_s = time.perf_counter()
    for _ in range(steps):
        engine.step()
    total_s = time.perf_counter() - start_s
    decoding = sum(s.num_uncomputed_tokens <= 1 for s in engine.scheduler.running)
    if decoding != batch:
        raise RuntimeError(f"{decoding} of {batch} requests were decoding")
    ms = {name: seconds[name] / steps * 1e3 for name in ("schedule", "launch", "update", "wait")}
    step_ms = total_s / steps * 1e3
    return {
        "model": bench.step_model.model,
        "batch": batch,
        "sampler": sampler,
        "step_ms": step_ms,
        "host_ms": step_ms - ms["wait"],
        **{f"{name}_ms": value for name, value in ms.items()},
    }


def watch_engine(engine: Engine) -> dict[str, float]:
    """Have an engine add up the seconds of its stages from now on, by stage."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*arguments)
            seconds[name] += time.perf_counter() - start_s
            return result

        return run

    launch = timed("launch", engine.runner.launch)

    def launch_and_watch(step: SchedulerOutput) -> InFlightStep:
        in_flight: InFlightStep = launch(step)
        if in_flight.done is None:
            return in_flight
        return replace(in_flight, done=TimedWait(in_flight.done, seconds))

    scheduler: Any = engine.scheduler
    runner: Any = engine.runner
    scheduler.schedule = timed("schedule", scheduler.schedule)
    scheduler.update = timed("update", scheduler.update)
    runner.launch = launch_and_watch
    return seconds
