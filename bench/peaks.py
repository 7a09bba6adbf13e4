"""What this machine's memory and arithmetic can do at best: measured once by `llmkit doctor --peaks` and kept."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from llmkit.bench.environment import describe_environment
from llmkit.bench.steps import copy_bandwidth, time_ms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # far more than caches hold
SLOW_S = 0.5  # a product that would take longer is not measured
TRIALS = 3  # of which the best counts: others may use the machine
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices that are multiplied


@dataclass(frozen=True)
class Peaks:
    """The best that was measured on one device with one dtype."""

    device: str  # its name and, of a CPU, its threads
    dtype: str
    bytes_per_s: float  # that a large copy reads and writes together
    flops_per_s: float  # of a product of large square matrices


def measure_peaks(device: str, copy_bytes: int | None = None, side: int | None = None) -> list[Peaks]:
    """Measure "cpu" or "cuda" with each dtype, smaller than by default if told to, and keep the figures."""
    where, side = torch.device(device), side or SIDE[device]
    bandwidth = max(copy_bandwidth(where, copy_bytes or COPY_BYTES[device]) for _ in range(TRIALS))
    found = [
        Peaks(_name(device), str(dtype).removeprefix("torch."), bandwidth, _product_rate(where, dtype, side))
        for dtype in DTYPES
    ]
    kept = [one for one in _kept() if one.device != _name(device)]
    path = peaks_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}")
    partial_path.write_text(json.dumps([asdict(one) for one in [*kept, *found]], indent=1))
    partial_path.replace(path)
    return found


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a product of square matrices; of smaller ones where the device has no units for it."""

    def rate(side: int) -> float:
        square = torch.randn(side, side, device=device).to(dtype)
        return 2 * side**3 / (time_ms(partial(torch.mm, square, square), device, 3) / 1e3)

    small = rate(side // 4)
    return small if 2 * side**3 / small > SLOW_S else max(rate(side) for _ in range(TRIALS))


def known_peaks(device: str, dtype: torch.dtype) -> Peaks | None:
    """What was measured on this device before; None when nothing was."""
    wanted = _name(device), str(dtype).removeprefix("torch.")
    return next((one for one in _kept() if (one.device, one.dtype) == wanted), None)


def peaks_file() -> Path:
    """What this user has measured."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / "peaks.json"


def _kept() -> list[Peaks]:
    try:
        return [Peaks(**entry) for entry in json.loads(peaks_file().read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _name(device: str) -> str:
    environment = describe_environment(device, torch.float32)
    return str(environment["gpu"] or f"{environment['cpu']}, {torch.get_num_threads()} threads")
