"""Collective operations of the ranks of a stage on one machine, over memory that they share.

The compiled kernels run them (kernels/cpu/shared_reduce.c), so that recorded steps contain them.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from llmkit.kernels.cpu import cpu_kernels


def can_share_memory() -> bool:
    """Whether this machine has the compiled kernels and anonymous files."""
    return hasattr(cpu_kernels.library, "all_reduce") and hasattr(os, "memfd_create")


def create_shared_memory(tp_size: int, num_stages: int) -> int:
    """A new file in memory for all stages of `tp_size` ranks. Returns its descriptor.

    It has no name, so it is gone when the last process that uses it has ended.
    """
    descriptor = os.memfd_create("llmkit-ranks")
    os.ftruncate(descriptor, num_stages * _stage_bytes(tp_size))
    return descriptor


class SharedMemoryGroup:
    """The ranks of a stage, as one of them sees them. All make the same calls in the same order."""

    def __init__(self, file: Path, rank: int, tp_size: int, num_stages: int) -> None:
        """file: of `create_shared_memory`. rank: its number among all ranks, by stage.

        Raises OSError when the file cannot be opened.
        """
        self.rank = rank % tp_size
        self.tp_size = tp_size
        self._stage_bytes = _stage_bytes(tp_size)
        self._num_stages = num_stages
        size = num_stages * self._stage_bytes
        with file.open("r+b") as opened:
            self._memory = torch.frombuffer(mmap.mmap(opened.fileno(), size), dtype=torch.uint8)
        self._address = self._memory.data_ptr() + rank // tp_size * self._stage_bytes

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Replace x, contiguous and float32, by its sum over the ranks.

        The sum is in the order of the ranks, so all of them get the same bits.
        """
        assert cpu_kernels.library is not None
        assert x.dtype is torch.float32 and x.is_contiguous()
        cpu_kernels.library.all_reduce(
            self._address, self.rank, self.tp_size, x.data_ptr(), x.numel()
        )

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The x of all ranks, contiguous and of any dtype: [ranks, *x.shape]."""
        assert cpu_kernels.library is not None and x.is_contiguous()
        out = torch.empty(self.tp_size, *x.shape, dtype=x.dtype)
        cpu_kernels.library.all_gather(
            self._address, self.rank, self.tp_size, x.data_ptr(), x.nbytes, out.data_ptr()
        )
        return out

    def stop(self) -> None:
        """Let the operations of all stages raise RuntimeError from now on, also those that wait."""
        assert cpu_kernels.library is not None
        for stage in range(self._num_stages):
            cpu_kernels.library.stop_ranks(self._memory.data_ptr() + stage * self._stage_bytes)


def _stage_bytes(tp_size: int) -> int:
    assert cpu_kernels.library is not None
    return int(cpu_kernels.library.shared_memory_bytes(tp_size))
