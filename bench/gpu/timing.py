"""Times of work on a GPU, measured by CUDA events; on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import cycle, islice

import torch

from llmkit.runtime.engine.cuda_graphs import CudaGraph, Replayable

L2_BYTES = 64 << 20  # at least as large as the L2 cache of the GPUs that are measured
MAX_COPIES = 64
MIN_REPLAY_MS = 0.3  # of a graph that is timed: its own launch takes a few microseconds
MAX_LAUNCHES = 128  # of a kernel in one graph


class EagerGraph:
    """Stands in for a CUDA graph without a GPU: it runs the function again."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        run()

    def replay(self) -> None:
        """Run it again."""
        self._run()


def time_ms(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> float:
    """The median time of `run` in milliseconds, measured by CUDA events on a GPU.

    before: runs before each repeat and is not measured.
    """
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        before()
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(float(start.elapsed_time(stop)))
        else:
            start_s = time.perf_counter()
            run()
            times.append((time.perf_counter() - start_s) * 1e3)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size_bytes: int = 1 << 30) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / (time_ms(lambda: target.copy_(source), device, 10) / 1e3)


def capture(run: Callable[[], object], device: torch.device) -> Replayable:
    """A CUDA graph of `run`; on a CPU the function itself. Kernels are compiled before."""
    return CudaGraph(run) if device.type == "cuda" else EagerGraph(run)


def kernel_ms(
    run: Callable[[], object], num_bytes: int, device: torch.device, repeats: int = 10
) -> float:
    """The time of one launch, from a graph with many.

    One kernel of 5 us would mostly time the replay. The launches take turns between copies of the
    arguments of `run`, a `functools.partial`, which together are larger than the L2 cache: none
    finds its weights there.

    num_bytes: what a launch reads and writes.
    """
    run()  # compiles
    once_ms = time_ms(run, device, 3)
    copies = min(MAX_COPIES, max(1, -(-2 * L2_BYTES // max(num_bytes, 1))))
    launches = max(copies, min(MAX_LAUNCHES, int(MIN_REPLAY_MS / max(once_ms, 1e-3)) + 1))
    if device.type != "cuda":
        copies = 2
        launches = 2
    runs = [run, *(deepcopy(run) for _ in range(copies - 1))]
    graph = capture(_run_all(list(islice(cycle(runs), launches))), device)
    return time_ms(graph.replay, device, repeats) / launches


def _run_all(runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run_all() -> None:
        for run in runs:
            run()

    return run_all
