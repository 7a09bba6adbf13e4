"""What the system tells of the server's processes and GPUs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from llmkit.runtime.server.engines.shares import visible_gpus

GPU_FIGURES = {
    "gpu_utilization_perc": "Share of the time in which the GPU computed, by anyone; 1 is all of it.",
    "gpu_memory_used_bytes": "Memory of the GPU in use, by anyone.",
    "gpu_memory_total_bytes": "Memory of the GPU.",
    "gpu_power_watts": "Power that the GPU draws.",
}


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process and of those it has started, directly or not."""
    own, others = psutil.Process(), 0
    for process in own.children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            others += process.memory_info().rss
    return {"api": own.memory_info().rss, "engine": others}


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and those that it has started have used; 0 once it is gone."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return sum(sum(one.cpu_times()[:4]) for one in (process, *process.children(recursive=True)))
    return 0.0


class Gpus:
    """The GPUs that CUDA would show, through NVML (the `gpu` extra); none where either is missing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: dict[str, Any] | None = None  # by CUDA's names, None before the first reading

    def read(self) -> dict[str, dict[str, float]]:
        """The figures that each GPU has, of GPU_FIGURES."""
        if self._handles is None:
            self._handles = self._open()
        return {name: self._figures(handle) for name, handle in self._handles.items()}

    def _open(self) -> dict[str, Any]:
        if not (names := visible_gpus()):
            return {}
        with suppress(Exception):  # NVML's errors are classes of the module that may be missing
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            return {
                name: pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(name)
                for name in names
            }
        return {}

    def _figures(self, handle: Any) -> dict[str, float]:
        nvml = self._nvml
        readers: dict[str, Callable[[], float]] = {
            "gpu_utilization_perc": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "gpu_memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu_memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "gpu_power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        figures: dict[str, float] = {}
        for name, read in readers.items():
            with suppress(Exception):  # some GPUs, and slices of one, lack some
                figures[name] = read()
        return figures
