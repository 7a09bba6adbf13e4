"""Host memory behind the KV cache: copies blocks, or recurrent states, between device and host.

A block's rows of all layers are gathered into a staging buffer on the device, by the stream of the
steps, and copied from there to pinned host memory by a side stream, in one piece. So a step that
reuses the block waits only for the gathering, not for the copy over PCIe. Loading goes the other
way. There are two staging buffers, used in turn: while one is copied, the other is filled.

On a CPU both sides are ordinary memory, and everything happens at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from llmkit.kernels.device_copy import to_device
from llmkit.runtime.engine.host_cache import HostCopies

STAGING_BYTES = 64 << 20  # of each staging buffer
NUM_STAGING_BUFFERS = 2
PINNED_PIECE_BYTES = 64 << 20  # PyTorch rounds pinned allocations up to a power of two
_WORD_BYTES = 8


def word_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous cache tensor [A, rows, ...] as [A, rows, words or bytes of a row].

    Larger elements are copied faster.
    """
    assert tensor.is_contiguous()
    rows = tensor.flatten(2).view(torch.uint8)
    return rows.view(torch.int64) if rows.shape[2] % _WORD_BYTES == 0 else rows


def padded_bytes(num_bytes: int) -> int:
    """The next multiple of a word's bytes: a view as words must begin at one."""
    return -(-num_bytes // _WORD_BYTES) * _WORD_BYTES


def bytes_per_row(tensors: list[torch.Tensor]) -> int:
    """The bytes of a row of all tensors [A, rows, ...], as they are stored."""
    return sum(padded_bytes(t[:, :1].nbytes) for t in tensors if t.numel())


class HostBlockStore:
    """Rows of host memory, each with the content of one row of all cache tensors."""

    def __init__(
        self,
        tensors: list[torch.Tensor],
        num_rows: int,
        device: torch.device,
        cuda: Any = torch.cuda,
    ) -> None:
        """tensors: contiguous [A, rows of the device, ...]. num_rows: of host memory.

        cuda: `torch.cuda`, whose streams and events order copies and kernels.
        """
        self._device = device
        self._cuda = cuda
        self._uses_streams = device.type == "cuda" or cuda is not torch.cuda
        self.bytes_per_row = bytes_per_row(tensors)
        self.num_rows = num_rows
        self.saved_bytes = 0  # since the start
        self.loaded_bytes = 0
        # Each as [rows, A, words], and where its part of a row of host memory begins.
        self._tensors: list[tuple[torch.Tensor, int]] = []
        start = 0
        for tensor in tensors:
            if tensor.numel():
                self._tensors.append((word_rows(tensor).transpose(0, 1), start))
                start += padded_bytes(tensor[:, :1].nbytes)
        if not self.bytes_per_row:
            return
        self._rows_per_piece = max(1, PINNED_PIECE_BYTES // self.bytes_per_row)
        self._pieces: list[torch.Tensor] = []
        for first in range(0, num_rows, self._rows_per_piece):
            size = min(self._rows_per_piece, num_rows - first)
            piece = torch.empty(size, self.bytes_per_row, dtype=torch.uint8)
            self._pieces.append(piece.pin_memory() if device.type == "cuda" else piece)
        self._staging_rows = max(1, min(num_rows, STAGING_BYTES // self.bytes_per_row))
        num_buffers = NUM_STAGING_BUFFERS if self._uses_streams else 1
        self._staging = [
            torch.empty(self._staging_rows, self.bytes_per_row, dtype=torch.uint8, device=device)
            for _ in range(num_buffers)
        ]
        self._next_buffer = 0
        if self._uses_streams:
            self._stream = cuda.Stream(device)
            # When the last use of each staging buffer ends.
            self._unused = [cuda.Event() for _ in self._staging]

    @torch.inference_mode()
    def copy(self, copies: HostCopies) -> None:
        """Start all copies. Steps that are launched later find and may overwrite the blocks."""
        if not self.bytes_per_row:
            return
        for saves in self._batches(copies.saves):
            self._save(saves)
        for loads in self._batches(copies.loads):
            self._load(loads)
        self.saved_bytes += len(copies.saves) * self.bytes_per_row
        self.loaded_bytes += len(copies.loads) * self.bytes_per_row

    def _save(self, saves: list[tuple[int, int]]) -> None:
        index, staging = self._take_buffer()
        if self._uses_streams:
            self._current_stream.wait_event(self._unused[index])
        device_rows = self._on_device([device_row for device_row, _ in saves])
        for tensor, part in self._parts(staging[: len(saves)]):
            part.copy_(tensor.index_select(0, device_rows))
        host_rows = [host_row for _, host_row in saves]
        if not self._uses_streams:
            self._copy_rows(staging, host_rows, to_host=True)
            return
        gathered = self._cuda.Event()
        gathered.record(self._current_stream)
        self._stream.wait_event(gathered)
        with self._cuda.stream(self._stream):
            self._copy_rows(staging, host_rows, to_host=True)
            self._unused[index].record(self._stream)

    def _load(self, loads: list[tuple[int, int]]) -> None:
        index, staging = self._take_buffer()
        host_rows = [host_row for host_row, _ in loads]
        if not self._uses_streams:
            self._copy_rows(staging, host_rows, to_host=False)
        else:
            # The copy does not wait for the step in flight, only for what used the buffer.
            self._stream.wait_event(self._unused[index])
            loaded = self._cuda.Event()
            with self._cuda.stream(self._stream):
                self._copy_rows(staging, host_rows, to_host=False)
                loaded.record(self._stream)
            self._current_stream.wait_event(loaded)
        device_rows = self._on_device([device_row for _, device_row in loads])
        for tensor, part in self._parts(staging[: len(loads)]):
            tensor.index_copy_(0, device_rows, part)
        if self._uses_streams:
            self._unused[index].record(self._current_stream)

    def _copy_rows(self, staging: torch.Tensor, host_rows: list[int], to_host: bool) -> None:
        """Copy the first rows of a staging buffer to rows of host memory, or back.

        Neighbouring rows are copied in one piece.
        """
        cuts = [0]
        for index, (row, following) in enumerate(pairwise(host_rows), start=1):
            if following != row + 1 or following % self._rows_per_piece == 0:
                cuts.append(index)
        for start, stop in pairwise([*cuts, len(host_rows)]):
            piece, first = divmod(host_rows[start], self._rows_per_piece)
            host = self._pieces[piece][first : first + stop - start]
            if to_host:
                host.copy_(staging[start:stop], non_blocking=True)
            else:
                staging[start:stop].copy_(host, non_blocking=True)

    def _parts(self, staging: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor [rows, A, words], and its part of staging rows: [n, A, words]."""
        for tensor, start in self._tensors:
            num_bytes = tensor[:1].nbytes
            part = staging[:, start : start + num_bytes].view(tensor.dtype)
            yield tensor, part.unflatten(1, tensor.shape[1:])

    def _batches(self, rows: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(rows), self._staging_rows):
            yield rows[start : start + self._staging_rows]

    def _take_buffer(self) -> tuple[int, torch.Tensor]:
        index = self._next_buffer
        self._next_buffer = (index + 1) % len(self._staging)
        return index, self._staging[index]

    def _on_device(self, rows: list[int]) -> torch.Tensor:
        return to_device(torch.tensor(rows, dtype=torch.int64), self._device)

    @property
    def _current_stream(self) -> Any:
        return self._cuda.current_stream(self._device)
