"""The machine and the software of a measurement."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from llmkit.common.version import version

CPU_INFO = Path("/proc/cpuinfo")
# The flags of x86 and Arm processors that decide which kernels run, as Linux names them.
CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def describe_environment(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, processor, the cores this process may use, and the GPU when `device` is "cuda"."""
    return {
        "llmkit": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_flags": cpu_flags(),
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def cpu_flags(cpu_info: Path | None = None) -> str | None:
    """The CPU_FLAGS that the processor has, with blanks between them.

    None where the system has no list of flags. A virtual machine may hide some of them, so that two
    machines with one processor differ. cpu_info: the file to read; None: this machine's.
    """
    for name, value in _cpu_info(cpu_info or CPU_INFO):
        if name in ("flags", "Features"):  # the names on x86 and on Arm
            found = set(value.split())
            return " ".join(flag for flag in CPU_FLAGS if flag in found)
    return None


def _cpu() -> str:
    """The model name of the processor, or else its architecture."""
    names = [value for name, value in _cpu_info(CPU_INFO) if name == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_info(path: Path) -> list[tuple[str, str]]:
    """The lines of /proc/cpuinfo: name and value. Empty on systems without it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    parts = [line.partition(":") for line in lines]
    return [(name.strip(), value.strip()) for name, _, value in parts]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
