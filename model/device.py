"""The device to compute on, memory for caches, and weight uploads that overlap with compute."""

from __future__ import annotations

import math
import mmap
from functools import cache
from threading import Lock
from typing import Any

import torch

from llmkit.common.errors import ShortageError

BUFFER_BYTES = 32 << 20
NUM_BUFFERS = 3


def resolve_device(name: str) -> torch.device:
    """The device for "auto", "cuda" or "cpu" on this machine.

    Raises ShortageError for "cuda" where there is no CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ShortageError(
            "--device cuda was given, and PyTorch sees no CUDA device",
            "An NVIDIA GPU, its driver and a PyTorch built for CUDA were expected",
            "Use --device cpu, or see with llmkit doctor what is missing",
        )
    use_cuda = name == "cuda" or (name == "auto" and available)
    return torch.device("cuda" if use_cuda else "cpu")


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros. On a CPU, a page uses memory only after something is written to it."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


class PinnedUploader:
    """Copies to a device through pinned buffers: one is filled while others are copied.

    cuda: `torch.cuda`; tests pass a replacement with the same streams and events.
    """

    def __init__(
        self,
        device: torch.device,
        buffer_bytes: int = BUFFER_BYTES,
        num_buffers: int = NUM_BUFFERS,
        cuda: Any = torch.cuda,
    ) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._lock = Lock()
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for _ in range(num_buffers)
        ]
        # For each buffer, an event: the copy from it to the device is done.
        self._copied = [cuda.Event(blocking=True) for _ in range(num_buffers)]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor. Work queued on the current stream afterwards can use the copy."""
        source = tensor.contiguous()
        current_stream = self._cuda.current_stream(self._device)
        with self._lock, self._cuda.stream(self._stream):
            result = torch.empty(source.shape, dtype=source.dtype, device=self._device)
            buffer_bytes = len(self._buffers[0])
            source_pieces = source.view(-1).view(torch.uint8).split(buffer_bytes)
            result_pieces = result.view(-1).view(torch.uint8).split(buffer_bytes)
            for source_piece, result_piece in zip(source_pieces, result_pieces, strict=True):
                # The buffers are used in turn: the least recently used one is next.
                copied = self._copied.pop(0)
                self._copied.append(copied)
                buffer = self._buffers.pop(0)
                self._buffers.append(buffer)
                copied.synchronize()
                filled = buffer[: len(source_piece)].copy_(source_piece)
                result_piece.copy_(filled, non_blocking=True)
                copied.record(self._stream)
            current_stream.wait_event(self._copied[-1])
        if result.is_cuda:
            # The allocator must not reuse the memory before the current stream is done with it.
            result.record_stream(current_stream)
        return result


@cache
@torch.inference_mode(False)  # the buffers must not be inference tensors
def uploader(device: torch.device) -> PinnedUploader:
    """The uploader of a device, made on first use."""
    return PinnedUploader(device)


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a host tensor to a device. Work that the caller queues afterwards can use the copy."""
    target = torch.device(device)
    return tensor if target.type == "cpu" else uploader(target)(tensor)
