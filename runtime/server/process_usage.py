"""Memory and processor time of the server's processes, and the state of its GPUs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from llmkit.runtime.server.engines.resource_shares import visible_gpus

# The help text of each metric.
GPU_METRICS = {
    "gpu_utilization_perc": (
        "Share of the time in which the GPU was busy, for any process; 1 is all the time."
    ),
    "gpu_memory_used_bytes": "Memory of the GPU in use, by any process.",
    "gpu_memory_total_bytes": "Memory of the GPU.",
    "gpu_power_watts": "Power that the GPU draws.",
}


def memory_bytes() -> dict[str, int]:
    """Return the resident memory of this process ("api") and of all its descendants ("engine")."""
    this_process = psutil.Process()
    descendants_bytes = 0
    for process in this_process.children(recursive=True):
        with suppress(psutil.Error):  # it has ended in the meantime
            descendants_bytes += process.memory_info().rss
    return {"api": this_process.memory_info().rss, "engine": descendants_bytes}


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants; 0 once it has ended."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        family = (process, *process.children(recursive=True))
        return sum(sum(member.cpu_times()[:4]) for member in family)
    return 0.0


class GpuUsageReader:
    """Reads the GPUs that CUDA shows, through NVML (the `gpu` extra).

    It reads nothing where NVML or a GPU is missing.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        # By the names that CUDA uses; None before the first reading.
        self._handles: dict[str, Any] | None = None

    def read(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each GPU; a GPU may lack some of GPU_METRICS."""
        if self._handles is None:
            self._handles = self._open()
        return {name: self._read_gpu(handle) for name, handle in self._handles.items()}

    def _open(self) -> dict[str, Any]:
        names = visible_gpus()
        if not names:
            return {}
        with suppress(Exception):  # NVML's error classes are in the module that may be missing
            import pynvml  # an optional dependency

            pynvml.nvmlInit()
            self._nvml = pynvml
            return {name: self._open_gpu(name) for name in names}
        return {}

    def _open_gpu(self, name: str) -> Any:
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def _read_gpu(self, handle: Any) -> dict[str, float]:
        nvml = self._nvml
        readers: dict[str, Callable[[], float]] = {
            "gpu_utilization_perc": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu_memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "gpu_power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        values: dict[str, float] = {}
        for name, read in readers.items():
            with suppress(Exception):  # some GPUs, and MIG slices, lack some of these
                values[name] = read()
        return values
