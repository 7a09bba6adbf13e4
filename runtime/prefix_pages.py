"""The parts of a prompt that the prefix cache on disk stores, and how their bytes are copied."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from llmkit.runtime.engine.host_block_store import padded_bytes, word_rows


@dataclass(eq=False)
class Page:
    """A page of a request's prompt, or the recurrent states at the end of one."""

    block_hashes: list[bytes]  # of recurrent states: of the page's last block
    key: str  # in the store
    used_ns: int  # when it was requested; later pages of a prompt count as older
    is_state: bool = False
    read: Future[torch.Tensor | None] | None = None  # its bytes, set when reading begins
    read_since: float = 0.0  # monotonic seconds, set when reading begins


@dataclass(frozen=True)
class CopiedPage:
    """A page on its way from the caches to a file."""

    page: Page
    data: torch.Tensor  # uint8 [num_bytes], on the host once `copied` is done
    copied: torch.cuda.Event | None  # None: the data is on the host already


class PageCopier:
    """Copies rows of all layers' caches to the host and back: blocks, or rows of states."""

    def __init__(self, tensors: list[torch.Tensor], num_rows: int, device: torch.device) -> None:
        """tensors: contiguous [A, rows of the cache, ...]. num_rows: those of a page."""
        self._num_rows = num_rows
        self._device = device
        # Each as [A, rows, words or bytes of a row], and the bytes that it has of a page.
        self._tensors: list[tuple[torch.Tensor, int]] = []
        for tensor in tensors:
            if not tensor.numel():
                continue
            self._tensors.append((word_rows(tensor), num_rows * tensor[:, :1].nbytes))
        self.num_bytes = sum(padded_bytes(page_bytes) for _, page_bytes in self._tensors)

    @torch.inference_mode()
    def copy(self, page: Page, rows: list[int]) -> CopiedPage:
        """Start copying a page to the host; on a GPU the copy runs after the steps in flight."""
        index = torch.tensor(rows).to(self._device)
        data = torch.zeros(self.num_bytes, dtype=torch.uint8, device=self._device)
        for tensor, piece in self._split(data):
            torch.index_select(tensor, 1, index, out=piece)
        if self._device.type == "cpu":
            return CopiedPage(page, data, None)
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        host.copy_(data, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return CopiedPage(page, host, copied)

    @torch.inference_mode()
    def restore(self, rows: list[int], data: torch.Tensor) -> None:
        """Copy a page's data, uint8 [num_bytes] on the host, to these rows."""
        index = torch.tensor(rows).to(self._device)
        for tensor, piece in self._split(data.to(self._device)):
            tensor.index_copy_(1, index, piece)

    def _split(self, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each tensor, and its part of a page's data: [A, rows of a page, words of a row]."""
        start = 0
        for tensor, page_bytes in self._tensors:
            piece = data[start : start + page_bytes].view(tensor.dtype)
            yield tensor, piece.view(tensor.shape[0], self._num_rows, tensor.shape[2])
            start += padded_bytes(page_bytes)
