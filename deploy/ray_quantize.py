"""Quantization on a Ray cluster: independent linear layers as tasks, or many models side by side.

A task runs the same function as this process, with the same number of threads. So nodes with the
same processors write the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from llmkit.common.errors import LlmkitError
from llmkit.common.progress import Progress, SilentProgress
from llmkit.deploy.ray_cluster import connect
from llmkit.quant.algorithm import QuantizeJob, Quantizer, QuantizeResult
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_linear import quantize_linear
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantize_report import Report

# Tasks in flight for each one that can run, so that the next task's weights arrive in time.
TASKS_PER_SLOT = 2


class RaySolver:
    """A `Solver` whose jobs are Ray tasks.

    Raises ShortageError when Ray is not installed, or no cluster is at the address.
    """

    def __init__(self, address: str, device: torch.device) -> None:
        self._ray = connect(address)
        threads = torch.get_num_threads()
        gpus = int(device.type == "cuda")
        self._task = self._ray.remote(num_cpus=0 if gpus else threads, num_gpus=gpus)(_solve)
        self._device = device
        self._threads = threads
        available = self._ray.cluster_resources().get("GPU" if gpus else "CPU", 1)
        slots = max(1, int(available // (gpus or threads)))
        self._max_in_flight = TASKS_PER_SLOT * slots

    def __call__(
        self, quantizer: Quantizer, jobs: Iterable[QuantizeJob]
    ) -> Iterator[QuantizeResult]:
        in_flight: deque[Any] = deque()
        for job in jobs:
            if len(in_flight) >= self._max_in_flight:
                yield self._result(in_flight.popleft())
            in_flight.append(
                self._task.remote(
                    quantizer, _to_device(job, "cpu"), self._device.type, self._threads
                )
            )
        while in_flight:
            yield self._result(in_flight.popleft())

    def _result(self, task: Any) -> QuantizeResult:
        result: QuantizeResult = self._ray.get(task)
        result.weight = result.weight.to(self._device)
        return result


def quantize_all(
    models: Sequence[tuple[str, str]], options: QuantizeOptions, address: str, progress: Progress
) -> list[Report | LlmkitError]:
    """Quantize many models; returns a report or an error for each.

    models: (source, output) pairs, paths that all nodes have. Each model is a task with as many
    threads as this process has, and a GPU when the option `device` is "cuda".
    """
    ray = connect(address)
    threads = torch.get_num_threads()
    gpus = int(options.device == "cuda")
    task = ray.remote(num_cpus=threads, num_gpus=gpus)(_quantize)
    tasks = {
        task.remote(source, output, options, threads): index
        for index, (source, output) in enumerate(models)
    }
    results: dict[int, Report | LlmkitError] = {}
    progress.start("quantize", len(models), "models")
    while tasks:
        (ready,), _ = ray.wait(list(tasks), num_returns=1)
        index = tasks.pop(ready)
        results[index] = ray.get(ready)
        progress.advance(1, models[index][0])
    progress.finish()
    return [results[index] for index in range(len(models))]


def _solve(quantizer: Quantizer, job: QuantizeJob, device: str, threads: int) -> QuantizeResult:
    torch.set_num_threads(threads)
    with torch.no_grad():
        result = quantize_linear(quantizer, _to_device(job, device))
    result.weight = result.weight.to("cpu")
    return result


def _quantize(
    source: str, output: str, options: QuantizeOptions, threads: int
) -> Report | LlmkitError:
    from llmkit.runtime.generate import generate

    torch.set_num_threads(threads)
    try:
        return quantize(source, output, options, SilentProgress(), generate)
    except LlmkitError as error:
        return error


def _to_device(job: QuantizeJob, device: str) -> QuantizeJob:
    return QuantizeJob(job.target, job.weight.to(device), job.input_stats.to(device), job.fallback)
