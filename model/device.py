"""Where to compute, in what memory, and how weights get there without either side waiting for the other."""

from __future__ import annotations

import math
import mmap
from functools import cache
from threading import Lock
from typing import Any

import torch

from llmkit.checkpoint.errors import ShortageError

BUFFER_BYTES, BUFFERS = 32 << 20, 3


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


class Upload:
    """Copies through pinned buffers, which are filled in turn while the device takes what is in the others.

    cuda: `torch.cuda`, whose streams and events order copies and kernels.
    """

    def __init__(
        self, device: torch.device, size: int = BUFFER_BYTES, count: int = BUFFERS, cuda: Any = torch.cuda
    ) -> None:
        self._device, self._cuda, self._stream, self._lock = device, cuda, cuda.Stream(device), Lock()
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(count)]
        self._copied = [cuda.Event(blocking=True) for _ in range(count)]  # out of each buffer

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor, on the device; work that is given to the current stream from now on finds it there."""
        source, current = tensor.contiguous(), self._cuda.current_stream(self._device)
        with self._lock, self._cuda.stream(self._stream):
            found = torch.empty(source.shape, dtype=source.dtype, device=self._device)
            pieces = [one.view(-1).view(torch.uint8).split(len(self._buffers[0])) for one in (source, found)]
            for host, there in zip(*pieces, strict=True):
                self._copied.append(copied := self._copied.pop(0))
                self._buffers.append(buffer := self._buffers.pop(0))
                copied.synchronize()
                there.copy_(buffer[: len(host)].copy_(host), non_blocking=True)
                copied.record(self._stream)
            current.wait_event(self._copied[-1])
        if found.is_cuda:
            found.record_stream(current)
        return found


_upload = cache(torch.inference_mode(False)(lambda device: Upload(device)))  # wherever it is first called from


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the host on a device; there before what the caller has the device do next."""
    there = torch.device(device)
    return tensor if there.type == "cpu" else _upload(there)(tensor)
