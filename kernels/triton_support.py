"""Triton, where it is installed. Kernel files import `jit` and `tl` from here.

Without Triton, the kernel files can still be imported, and the torch implementations run. When
TRITON_INTERPRET is set before Triton is imported, kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

# Importing Triton takes a large part of a server's start time on a CPU. It is imported only where
# its kernels can run, or where another module has imported it already.
if (
    TYPE_CHECKING
    or torch.cuda.is_available()
    or "TRITON_INTERPRET" in os.environ
    or "triton" in sys.modules
):
    try:
        import triton
        import triton.language as tl
    except ImportError:  # an installation for the CPU only
        triton = tl = None
else:
    triton = tl = None

__all__ = [
    "device_capability",
    "interprets",
    "is_amd",
    "jit",
    "jit_without_specializing",
    "multiplies_from_shared_memory",
    "runs_ptx",
    "runs_triton",
    "tl",
    "triton",
]

# What an AMD GPU counts as: products of 16-bit floats and int8. The numbers of its architecture
# mean something else, and gfx942 has an FP8 of its own (e4m3fnuz).
AMD_CAPABILITY = (8, 0)

# The interpreter runs no inline PTX.
interprets = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"


def jit(function: Callable[..., Any]) -> Any:
    """Make a Triton kernel from a function. Without Triton, the function is returned unchanged."""
    return function if triton is None else triton.jit(function)


def jit_without_specializing(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` for kernels with arguments that change from step to step.

    For other arguments, Triton compiles further kernels: where integers are 1 or a multiple of 16,
    and where addresses are multiples of 16. An engine compiles all kernels at its start
    (`runtime.engine.kernel_warm_up`), so that no request waits for one.
    """

    def make_kernel(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=arguments)

    return make_kernel


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can compute with this tensor. They compute no gradients."""
    return triton is not None and tensor.is_cuda and not torch.is_grad_enabled()


def is_amd() -> bool:
    """Whether torch's CUDA devices are AMD GPUs."""
    return torch.version.hip is not None


def runs_ptx() -> bool:
    """Whether kernels may use inline assembly: NVIDIA GPUs, and not the interpreter."""
    return not interprets and not is_amd()


def device_capability(device: torch.device | str) -> tuple[int, int]:
    """The compute capability of a GPU, which says what the kernels may use."""
    return AMD_CAPABILITY if is_amd() else torch.cuda.get_device_capability(device)


def multiplies_from_shared_memory(major: int) -> bool:
    """Whether tensor cores read both operands there, which large tiles need to fit into registers.

    major: of the compute capability. Hopper has wgmma; Blackwell's 10.x and 11.x have tcgen05. Its
    consumer GPUs, 12.x, have neither, and the shared memory of sm_89: they take its tiles.
    """
    return 9 <= major < 12
