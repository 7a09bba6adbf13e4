"""Quantizing on a Ray cluster: linears that do not need one another as tasks, and many models side by side.

A task runs the very function that this process would, with as many threads: on nodes with the same processors the
bytes are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from llmkit.checkpoint.errors import LlmkitError
from llmkit.checkpoint.progress import Progress, SilentProgress
from llmkit.deploy.cluster import connect
from llmkit.quant.algorithm import Coder, Job, Quantized
from llmkit.quant.pipeline import solved
from llmkit.quant.plan import QuantizeOptions
from llmkit.quant.quantize import quantize
from llmkit.quant.report import Report

AHEAD = 2  # tasks for each that can run, so that the next one's weights are there


class RaySolve:
    """A `Solve` whose jobs are Ray tasks. Raises ShortageError where there is no Ray, or no cluster at the address."""

    def __init__(self, address: str, device: torch.device) -> None:
        self._ray = connect(address)
        threads, gpus = torch.get_num_threads(), int(device.type == "cuda")
        self._task = self._ray.remote(num_cpus=0 if gpus else threads, num_gpus=gpus)(_solve)
        self._device, self._threads = device, threads
        most = self._ray.cluster_resources().get("GPU" if gpus else "CPU", 1) // (gpus or threads)
        self._most = AHEAD * max(1, int(most))

    def __call__(self, coder: Coder, jobs: Iterable[Job]) -> Iterator[Quantized]:
        under_way: deque[Any] = deque()
        for job in jobs:
            if len(under_way) >= self._most:
                yield self._taken(under_way.popleft())
            under_way.append(self._task.remote(coder, _moved(job, "cpu"), self._device.type, self._threads))
        while under_way:
            yield self._taken(under_way.popleft())

    def _taken(self, task: Any) -> Quantized:
        found: Quantized = self._ray.get(task)
        found.weight = found.weight.to(self._device)
        return found


def quantize_all(
    models: Sequence[tuple[str, str]], options: QuantizeOptions, address: str, progress: Progress
) -> list[Report | LlmkitError]:
    """Quantize many models, (source, output) each at a path that all nodes have; a report or the error of each.

    Each is a task with all of a node's threads that this process has, and a GPU where the device is one.
    """
    ray = connect(address)
    threads, gpus = torch.get_num_threads(), int(options.device == "cuda")
    task = ray.remote(num_cpus=threads, num_gpus=gpus)(_quantize)
    tasks = {task.remote(source, output, options, threads): place for place, (source, output) in enumerate(models)}
    found: dict[int, Report | LlmkitError] = {}
    progress.start("quantize", len(models), "models")
    while tasks:
        (ready,), _ = ray.wait(list(tasks), num_returns=1)
        place = tasks.pop(ready)
        found[place] = ray.get(ready)
        progress.advance(1, models[place][0])
    progress.finish()
    return [found[place] for place in range(len(models))]


def _solve(coder: Coder, job: Job, device: str, threads: int) -> Quantized:
    torch.set_num_threads(threads)
    with torch.no_grad():
        found = solved(coder, _moved(job, device))
    found.weight = found.weight.to("cpu")
    return found


def _quantize(source: str, output: str, options: QuantizeOptions, threads: int) -> Report | LlmkitError:
    from llmkit.runtime.generate import generate

    torch.set_num_threads(threads)
    try:
        return quantize(source, output, options, SilentProgress(), generate)
    except LlmkitError as error:
        return error


def _moved(job: Job, device: str) -> Job:
    return Job(job.site, job.weight.to(device), job.seen.to(device), job.fallback)
