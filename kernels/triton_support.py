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

__all__ = ["jit", "runs_triton", "tl", "triton"]


def jit(function: Callable[..., Any]) -> Any:
    """Make a Triton kernel from a function. Without Triton, the function is returned unchanged."""
    return function if triton is None else triton.jit(function)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can compute with this tensor. They compute no gradients."""
    return triton is not None and tensor.is_cuda and not torch.is_grad_enabled()
