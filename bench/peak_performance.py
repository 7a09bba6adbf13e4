"""The peak memory bandwidth and operation rate of this machine.

`llmkit doctor --peaks` measures them once and stores them in the user's cache directory.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from llmkit.bench.environment import describe_environment
from llmkit.bench.gpu.decode_steps import copy_bandwidth, time_ms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # much larger than the caches
MAX_MATMUL_S = 0.5  # a matrix product that would take longer is not measured
TRIALS = 3  # the best one counts, since other processes may use the machine
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the multiplied matrices


@dataclass(frozen=True)
class PeakPerformance:
    """The best measured rates of one device with one dtype."""

    device: str  # its name; for a CPU with the number of threads
    dtype: str
    bytes_per_s: float  # read and written by a large copy
    flops_per_s: float  # of a product of large square matrices


def measure_peaks(
    device: str, copy_bytes: int | None = None, matrix_size: int | None = None
) -> list[PeakPerformance]:
    """Measure "cpu" or "cuda" with each dtype and store the results.

    copy_bytes, matrix_size: smaller sizes than the default ones, for tests.
    """
    torch_device = torch.device(device)
    matrix_size = matrix_size or MATRIX_SIZE[device]
    bandwidth = max(
        copy_bandwidth(torch_device, copy_bytes or COPY_BYTES[device]) for _ in range(TRIALS)
    )
    measured = [
        PeakPerformance(
            _device_name(device),
            str(dtype).removeprefix("torch."),
            bandwidth,
            _matmul_flops_per_s(torch_device, dtype, matrix_size),
        )
        for dtype in DTYPES
    ]
    other_devices = [peak for peak in _read_peaks() if peak.device != _device_name(device)]
    path = peaks_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}")
    entries = [asdict(peak) for peak in [*other_devices, *measured]]
    partial_path.write_text(json.dumps(entries, indent=1))
    partial_path.replace(path)
    return measured


def _matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of a product of square matrices.

    A small product is measured when the large one would take too long, for example with a dtype
    that the hardware does not support.
    """

    def flops_per_s(size: int) -> float:
        matrix = torch.randn(size, size, device=device).to(dtype)
        return 2 * size**3 / (time_ms(partial(torch.mm, matrix, matrix), device, 3) / 1e3)

    small_flops_per_s = flops_per_s(size // 4)
    if 2 * size**3 / small_flops_per_s > MAX_MATMUL_S:
        return small_flops_per_s
    return max(flops_per_s(size) for _ in range(TRIALS))


def load_peaks(device: str, dtype: torch.dtype) -> PeakPerformance | None:
    """The stored results for this device and dtype; None when they were not measured."""
    key = (_device_name(device), str(dtype).removeprefix("torch."))
    for peak in _read_peaks():
        if (peak.device, peak.dtype) == key:
            return peak
    return None


def peaks_file() -> Path:
    """The file with this user's results."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / "peaks.json"
    )


def _read_peaks() -> list[PeakPerformance]:
    try:
        return [PeakPerformance(**entry) for entry in json.loads(peaks_file().read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _device_name(device: str) -> str:
    environment = describe_environment(device, torch.float32)
    return str(environment["gpu"] or f"{environment['cpu']}, {torch.get_num_threads()} threads")
