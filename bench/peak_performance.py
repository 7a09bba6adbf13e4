"""The peak memory bandwidth and operation rate of this machine.

`llmkit doctor --peaks` measures them once and stores them in the user's cache directory. `llmkit
bench` does so on a CPU that was not measured, which takes less than a second. Where the compiled
kernels run, they are what is measured: reading a large weight, and products in each input type.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from llmkit.bench.environment import describe_environment
from llmkit.bench.gpu.timing import copy_bandwidth, time_ms
from llmkit.kernels.cpu import cpu_kernels
from llmkit.kernels.cpu.cpu_kernels import InputType, PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # much larger than the caches
MAX_MATMUL_S = 0.5  # a matrix product that would take longer is not measured
READ_COLUMNS = 4096  # of the weight that is read to measure a CPU's bandwidth
# Rows, columns and depth of the kernels' products. Inputs and weight fit in a core's cache.
PRODUCT_SHAPE = (256, 512, 512)
LINEAR_TRIALS = 6
TRIALS = 3  # the best one counts, since other processes may use the machine
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the multiplied matrices


@dataclass(frozen=True)
class PeakPerformance:
    """The best measured rates of one device with one dtype."""

    device: str  # its name; for a CPU with the number of threads
    dtype: str  # of the inputs of products; int8 on a CPU with compiled kernels alone
    bytes_per_s: float  # read and written by a large copy; with compiled kernels read from a weight
    flops_per_s: float  # of a product of large matrices


def measure_peaks(
    device: str, copy_bytes: int | None = None, matrix_size: int | None = None
) -> list[PeakPerformance]:
    """Measure "cpu" or "cuda" with each dtype and store the results.

    copy_bytes, matrix_size: smaller sizes than the default ones, for tests.
    """
    torch_device = torch.device(device)
    matrix_size = matrix_size or MATRIX_SIZE[device]
    bandwidth = measure_bandwidth(device, copy_bytes)
    if device == "cpu" and cpu_kernels.library is not None:
        rates = {str(dtype).removeprefix("torch."): 0.0 for dtype in DTYPES} | {"int8": 0.0}
        for name in rates:
            inputs = kernel_inputs(name)
            rates[name] = rates[inputs] or _kernel_flops_per_s(inputs)
    else:
        rates = {
            str(dtype).removeprefix("torch."): _matmul_flops_per_s(torch_device, dtype, matrix_size)
            for dtype in DTYPES
        }
    measured = [
        PeakPerformance(_device_name(device), dtype, bandwidth, flops_per_s)
        for dtype, flops_per_s in rates.items()
    ]
    other_devices = [peak for peak in _read_peaks() if peak.device != _device_name(device)]
    path = peaks_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}")
    entries = [asdict(peak) for peak in [*other_devices, *measured]]
    partial_path.write_text(json.dumps(entries, indent=1))
    partial_path.replace(path)
    return measured


def measure_bandwidth(device: str, copy_bytes: int | None = None) -> float:
    """The `bytes_per_s` of "cpu" or "cuda" now, which is not stored.

    copy_bytes: see `measure_peaks`.
    """
    copy_bytes = copy_bytes or COPY_BYTES[device]
    if device == "cpu" and cpu_kernels.library is not None:
        return _read_bytes_per_s(copy_bytes)
    return max(copy_bandwidth(torch.device(device), copy_bytes) for _ in range(TRIALS))


def kernel_inputs(dtype: str) -> InputType:
    """What the compiled kernels multiply for inputs of this dtype, on this processor."""
    if dtype == "int8":
        return "int8"
    return "bfloat16" if dtype == "bfloat16" and cpu_kernels.has_bfloat16() else "float32"


def _read_bytes_per_s(size_bytes: int) -> float:
    """Bytes per second of a linear layer with one input row, which reads its weight once."""
    depth = max(1, size_bytes // 4 // READ_COLUMNS)
    panels = READ_COLUMNS // cpu_kernels.PANEL_WIDTH
    values = torch.ones(panels, depth, cpu_kernels.PANEL_WIDTH, 1)
    weight = PackedWeight(values, (READ_COLUMNS, depth))
    return weight.nbytes / _linear_seconds(weight, 1, "float32")


def _kernel_flops_per_s(inputs: InputType) -> float:
    """Operations per second of a linear layer whose inputs and weight are in the cache."""
    rows, columns, depth = PRODUCT_SHAPE
    if inputs == "int8":
        values = torch.ones(columns, depth, dtype=torch.int8)
        weight = PackedWeight.pack(values, torch.ones(columns, 1))
    else:
        dtype = torch.bfloat16 if inputs == "bfloat16" else torch.float32
        weight = PackedWeight.pack(torch.ones(columns, depth, dtype=dtype))
    return 2 * rows * columns * depth / _linear_seconds(weight, rows, inputs)


def _linear_seconds(weight: PackedWeight, rows: int, inputs: InputType) -> float:
    """The shortest time of a linear layer of the compiled kernels."""
    columns, depth = weight.shape
    x = torch.ones(rows, depth)
    y = torch.empty(rows, columns)
    times = []
    for _ in range(LINEAR_TRIALS):
        start_s = time.perf_counter()
        cpu_kernels.linear(x, weight, None, y, 0, inputs)
        times.append(time.perf_counter() - start_s)
    return min(times)


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


def load_peaks(device: str, dtype: torch.dtype | str) -> PeakPerformance | None:
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
    name = str(environment["gpu"] or f"{environment['cpu']}, {torch.get_num_threads()} threads")
    if device == "cpu" and cpu_kernels.library is not None:
        name += f", {cpu_kernels.level()}"
    return name
