"""Where to compute, and in what memory."""

from __future__ import annotations

import math
import mmap

import torch

from llmkit.checkpoint.errors import ShortageError


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cuda" or "cpu" means here. Raises ShortageError for CUDA where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ShortageError(
            "--device cuda, and PyTorch sees no CUDA device", "An NVIDIA GPU and its driver", "Use --device cpu"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU they take no memory until they are written to, a page at a time."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
