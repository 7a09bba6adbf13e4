"""Bytes and tensors out of files, and their digests. Short reads are errors, never short tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.safetensors_header import TensorInfo

CHUNK_BYTES = 64 * 2**20


class RowReader(Protocol):
    """Reads whole rows (dimension 0) of tensors."""

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor that has at least one dimension, in memory of their own."""


class SafetensorsRows:
    """Rows of tensors in the safetensors files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`. Raises InputError when the file has become shorter."""
        row_bytes = (info.end - info.start) // max(1, info.shape[0])
        buffer = read_range(self._folder / info.file, info.start + start * row_bytes, (stop - start) * row_bytes)
        return buffer.view(info.torch_dtype).reshape(stop - start, *info.shape[1:])


def read_range(path: Path, start: int, count: int) -> torch.Tensor:
    """`count` bytes of a file from byte `start`, as uint8 [count].

    Raises InputError when the file cannot be opened or ends early.
    """
    buffer = torch.empty(count, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < count:
                got = os.preadv(fd, [view[done:]], start + done)
                if got == 0:
                    size = os.fstat(fd).st_size
                    raise InputError(f"{path} ends at byte {size}, but {start + count} were expected")
                done += got
        finally:
            os.close(fd)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return buffer


def row_chunks(info: TensorInfo, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Intervals of a tensor's rows of at most about `limit` bytes each, one row at least."""
    count = info.shape[0]
    step = max(1, limit * count // max(1, info.nbytes))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal. Raises InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def sha256_range(path: Path, start: int, count: int) -> str:
    """The SHA-256 of `count` bytes from byte `start`, read in chunks. Raises InputError as `read_range` does."""
    digest = hashlib.sha256()
    for offset in range(0, count, CHUNK_BYTES):
        digest.update(read_range(path, start + offset, min(CHUNK_BYTES, count - offset)).numpy().data)
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in C order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single element may have any stride, which a view as bytes refuses.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
