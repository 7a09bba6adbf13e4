"""Energy and memory of the GPUs, read through NVML (the `gpu` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch


class GpuMonitor:
    """Counters of CUDA devices. Without NVML or without a device, every counter is None."""

    def __init__(self, indices: Sequence[int] | None = None) -> None:
        """indices: the devices to monitor; None: all that this process sees."""
        self._nvml: Any = None
        self._handles: Sequence[Any] = ()
        indices = range(torch.cuda.device_count()) if indices is None else indices
        # The exception classes of NVML are in the module, which may be missing.
        with suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            uuids = [torch.cuda.get_device_properties(index).uuid for index in indices]
            self._nvml = pynvml
            self._handles = [self._open(str(uuid)) for uuid in uuids]

    def energy_j(self) -> float | None:
        """Joules that the devices have used since the driver was loaded."""
        return self._sum(
            lambda handle: self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        )

    def memory_bytes(self) -> float | None:
        """Memory in use on the devices, by all processes."""
        return self._sum(lambda handle: self._nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _open(self, uuid: str) -> Any:
        """A GPU, or an instance of one (MIG), whose UUID torch gives without the prefix."""
        with suppress(self._nvml.NVMLError):
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def _sum(self, read: Any) -> float | None:
        try:
            return float(sum(map(read, self._handles))) if self._handles else None
        except Exception:  # an older device may lack the counter
            return None


def energy_metrics(
    before_j: float | None, after_j: float | None, wall_s: float, output_tokens: int
) -> dict[str, float]:
    """gpu_power_w and energy_per_token_j between two readings; {} when a reading is missing."""
    if before_j is None or after_j is None:
        return {}
    used_j = after_j - before_j
    return {"gpu_power_w": used_j / wall_s, "energy_per_token_j": used_j / output_tokens}
