"""What the card does at most, and a few tests of the kernels: the part `ceilings` of `make gpu`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from llmkit.bench.gpu.figure_log import FigureLog, NotInstalledError, PartOptions
from llmkit.bench.gpu.gpu_tests import run_pytest
from llmkit.bench.gpu.timing import capture, copy_bandwidth, time_ms
from llmkit.common.version import version
from llmkit.kernels import triton_support
from llmkit.kernels.activation_quant import FP8

SIDE = 8192  # of the multiplied matrices
TINY_KERNELS = 200  # in the graph that shows what a launch costs


def measure(log: FigureLog, options: PartOptions) -> None:
    """Measure bandwidth, products and launches, then run the smoke tests."""
    device = options.device
    side = 64 if options.is_tiny else SIDE
    log.measure("machine", "machine", partial(describe_machine, device))
    copy_bytes = 1 << 20 if options.is_tiny else 2 << 30
    log.measure("bandwidth", "copy", lambda: {"bytes_per_s": copy_bandwidth(device, copy_bytes)})
    log.measure("bandwidth", "read", lambda: {"bytes_per_s": read_bandwidth(device, copy_bytes)})
    for name, make_product in PRODUCTS.items():
        run = partial(product_rate, make_product, side, device)
        log.measure("product", name, run, needs_s=2)
    log.measure("launch", "kernel in a graph", lambda: {"us": launch_us(device)})
    if options.is_tiny:
        return
    run_pytest(log, "smoke", {"LLMKIT_SMOKE_TESTS": "1"})


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The card and the versions that every figure depends on."""
    values: dict[str, Any] = {
        "llmkit": version(),
        "torch": torch.__version__,
        "triton": getattr(triton_support.triton, "__version__", None),
        "python": platform.python_version(),
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return values


def read_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes per second of the largest element of a large tensor, which reads it once."""
    source = torch.zeros(size_bytes // 4, device=device)
    return source.nbytes / (time_ms(source.amax, device, 10) / 1e3)


def product_rate(
    make_product: Callable[[int, torch.device], Callable[[], object]],
    side: int,
    device: torch.device,
) -> dict[str, Any]:
    """Operations per second of a product of square matrices of random values."""
    ms = time_ms(make_product(side, device), device, 10)
    return {"side": side, "ms": ms, "flops_per_s": 2 * side**3 / (ms / 1e3)}


def launch_us(device: torch.device) -> float:
    """Microseconds of a kernel that does nothing, in a graph of many."""
    x = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(TINY_KERNELS):
            x.add_(1)

    return time_ms(capture(run, device).replay, device, 10) / TINY_KERNELS * 1e3


def _bf16_product(side: int, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return partial(torch.mm, a, b.T)


def _int8_product(side: int, device: torch.device) -> Callable[[], object]:
    a, b = (
        torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2)
    )
    return partial(torch._int_mm, a, b.T)


def _fp8_product(row_wise: bool, side: int, device: torch.device) -> Callable[[], object]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise NotInstalledError("FP8 products need compute capability 8.9")
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    a_scales = torch.ones((side, 1) if row_wise else (), device=device)
    b_scales = torch.ones((1, side) if row_wise else (), device=device)
    return partial(torch._scaled_mm, a, b.T, a_scales, b_scales, out_dtype=torch.bfloat16)


PRODUCTS: dict[str, Callable[[int, torch.device], Callable[[], object]]] = {
    "bf16": _bf16_product,
    "fp8": partial(_fp8_product, False),
    "fp8, scales by rows": partial(_fp8_product, True),
    "int8": _int8_product,
}
