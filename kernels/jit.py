"""Triton, where it is installed: a kernel file takes `jit` and `tl` from here, so that it imports without Triton too.

Triton reads TRITON_INTERPRET when it is imported: set before, kernels run on the CPU, slowly, for tests. It is imported
only where it can run kernels or is there already: that would be a good part of the start of a server on a CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING or torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # an installation for the CPU only
        triton = tl = None
else:
    triton = tl = None

__all__ = ["jit", "runs_triton", "sent", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """`function` as a Triton kernel; unchanged without Triton, where nothing may launch it."""
    return function if triton is None else triton.jit(function)


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the CPU, on a device; the host does not wait until they are there."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` is to be done by its Triton kernel. They give no gradients."""
    return triton is not None and tensor.is_cuda and not torch.is_grad_enabled()
