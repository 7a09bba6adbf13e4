"""Bytes and tensors out of files, and their digests. Short reads are errors, never short tensors."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmkit.checkpoint.errors import InputError
from llmkit.checkpoint.safetensors_header import TensorInfo

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 64 * 2**20
DIGEST_BYTES = 8 * 2**20  # read at once to be hashed
READERS = min(4, len(os.sched_getaffinity(0)))  # threads that read ahead
AHEAD_BYTES = 2 * CHUNK_BYTES  # they have in memory before they are wanted, and at least one tensor
PATIENCE = 50  # tensors that may be taken before one that was to come earlier


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


class ReadAhead:
    """Tensors in about the order in which they will be wanted, read by threads before they are.

    read: reads one; it is called in threads. At most about AHEAD_BYTES are held for `take`.
    """

    def __init__(self, read: Callable[[TensorInfo], torch.Tensor], infos: Sequence[TensorInfo]) -> None:
        self._read, self._infos = read, infos
        self._index = {info.name: index for index, info in enumerate(infos)}
        self._flying: dict[int, Future[torch.Tensor]] = {}
        self._taken: set[int] = set()
        self._next = 0  # the first that no thread has been given
        self._bytes = 0  # of the flying
        self.waited_s = 0.0  # in `take`, for the threads
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
        self._advance()

    def take(self, name: str) -> torch.Tensor | None:
        """The tensor, once; None when no thread has been given it. Raises what reading it raised.

        Those that should have been taken long before are forgotten.
        """
        index = self._index.get(name)
        if index is None or index in self._taken:
            return None
        self._taken.add(index)
        future = self._forget(index) if index in self._flying else None
        oldest = index - PATIENCE
        for passed in [i for i in self._flying if i < oldest]:
            self._forget(passed).cancel()
        self._next = max(self._next, oldest)
        self._advance()
        if future is None:
            return None
        began = time.perf_counter()
        found = future.result()
        self.waited_s += time.perf_counter() - began
        return found

    def close(self) -> None:
        """Wait for the threads and end them."""
        self._pool.shutdown(cancel_futures=True)

    def _advance(self) -> None:
        while self._next < len(self._infos) and (self._bytes < AHEAD_BYTES or not self._flying):
            if self._next not in self._taken:
                info = self._infos[self._next]
                self._flying[self._next] = self._pool.submit(self._read, info)
                self._bytes += info.nbytes
            self._next += 1

    def _forget(self, index: int) -> Future[torch.Tensor]:
        self._bytes -= self._infos[index].nbytes
        return self._flying.pop(index)


def read_range(path: Path, start: int, count: int) -> torch.Tensor:
    """`count` bytes of a file from byte `start`, as uint8 [count]. Raises as `read_into` does."""
    import torch

    buffer = torch.empty(count, dtype=torch.uint8)
    read_into(path, start, buffer.numpy().data)
    return buffer


def read_into(path: Path, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a file from byte `start`.

    Raises InputError when the file cannot be opened or ends early.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(view):
                got = os.preadv(fd, [view[done:]], start + done)
                if got == 0:
                    size = os.fstat(fd).st_size
                    raise InputError(f"{path} ends at byte {size}, but {start + len(view)} were expected")
                done += got
        finally:
            os.close(fd)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


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


class FileDigest:
    """The SHA-256 of a file from byte `start`, which is read or written piece by piece, once each, in whatever order.

    Pieces that continue the ones before are hashed as they come. What others leave out is read in the end.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path, self._start = path, start
        self._digest = hashlib.sha256()
        self._done = start  # the byte up to which it is hashed

    def add(self, start: int, data: memoryview) -> None:
        """Bytes of the file from byte `start`, as they are in it from now on."""
        if start == self._done:
            self._digest.update(data)
            self._done += len(data)

    def rewind(self, start: int) -> None:
        """Bytes from byte `start` on are about to change."""
        if start < self._done:
            self._digest, self._done = hashlib.sha256(), self._start

    def catch_up(self, stop: int) -> None:
        """Read what has been left out before byte `stop`. Raises InputError as `read_into` does."""
        buffer = bytearray(min(DIGEST_BYTES, max(0, stop - self._done)))
        while self._done < stop:
            view = memoryview(buffer)[: stop - self._done]
            read_into(self._path, self._done, view)
            self.add(self._done, view)

    def forget(self) -> None:
        """Give the pages of what is hashed back: a checkpoint larger than the memory would displace everything else."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, self._start, self._done - self._start, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def hexdigest(self, stop: int) -> str:
        """Of the bytes up to `stop`."""
        self.catch_up(stop)
        return self._digest.hexdigest()


def sha256_range(path: Path, start: int, count: int) -> str:
    """The SHA-256 of `count` bytes from byte `start`, read in chunks. Raises InputError as `read_range` does."""
    digest = hashlib.sha256()
    for offset in range(0, count, CHUNK_BYTES):
        digest.update(read_range(path, start + offset, min(CHUNK_BYTES, count - offset)).numpy().data)
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in C order, without a copy where it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single element may have any stride, which a view as bytes refuses.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
