"""What the GPUs themselves tell of energy and memory, through NVML (the `gpu` extra); nothing where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch


class Gpus:
    """The CUDA devices that this process sees, or no device. Without NVML or a device, every answer is None."""

    def __init__(self, indices: Sequence[int] | None = None) -> None:
        """indices: of the devices; None: all."""
        self._nvml: Any = None
        self._handles: Sequence[Any] = ()
        indices = range(torch.cuda.device_count()) if indices is None else indices
        with suppress(Exception):  # NVML's errors are classes of the module that may be missing
            import pynvml

            pynvml.nvmlInit()
            uuids = [torch.cuda.get_device_properties(index).uuid for index in indices]
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
            self._nvml = pynvml

    def energy_j(self) -> float | None:
        """Joules that the devices have used since their driver was loaded."""
        return self._sum(lambda handle: self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)

    def memory_bytes(self) -> float | None:
        """Memory in use on the devices, by anyone."""
        return self._sum(lambda handle: self._nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _sum(self, read: Any) -> float | None:
        try:
            return float(sum(map(read, self._handles))) if self._handles else None
        except Exception:  # an older device may lack the counter
            return None


def energy_figures(before: float | None, after: float | None, wall_s: float, output_tokens: int) -> dict[str, float]:
    """gpu_power_w and energy_per_token_j between two readings; {} when either is missing."""
    if before is None or after is None:
        return {}
    return {"gpu_power_w": (after - before) / wall_s, "energy_per_token_j": (after - before) / output_tokens}
