"""The machine and the software of a measurement."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from llmkit.common.version import version


def describe_environment(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, processor, the cores this process may use, and the GPU when `device` is "cuda"."""
    return {
        "llmkit": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _cpu() -> str:
    """The model name of the processor, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
