"""Reads bytes and tensors from files, and computes digests. A short read is an error."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmkit.checkpoint.safetensors_header import TensorInfo
from llmkit.common.errors import InputError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 64 * 2**20
DIGEST_BYTES = 8 * 2**20  # the size of one read when a file is hashed
NUM_READER_THREADS = min(4, len(os.sched_getaffinity(0)))
# No further tensor is read ahead while the tensors that wait for `take` have this many bytes.
READ_AHEAD_BYTES = 2 * CHUNK_BYTES
# A tensor that waits for `take` is dropped when a tensor this many places after it is taken.
MAX_SKIPPED_TENSORS = 50


class RowReader(Protocol):
    """Reads whole rows (dimension 0) of tensors."""

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor with at least one dimension, in their own memory."""


class SafetensorsRows:
    """Reads rows of tensors from the safetensors files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """See `RowReader.rows`. Raises InputError when the file was shortened."""
        row_bytes = (info.end - info.start) // max(1, info.shape[0])
        buffer = read_range(
            self._folder / info.file, info.start + start * row_bytes, (stop - start) * row_bytes
        )
        return buffer.view(info.torch_dtype).reshape(stop - start, *info.shape[1:])


class ReadAhead:
    """Threads that read tensors before they are needed, in about the order of their use.

    read: reads one tensor; it is called in threads.
    At most about READ_AHEAD_BYTES wait for `take`.
    """

    def __init__(
        self, read: Callable[[TensorInfo], torch.Tensor], infos: Sequence[TensorInfo]
    ) -> None:
        self._read = read
        self._infos = infos
        self._index = {info.name: index for index, info in enumerate(infos)}
        self._pending: dict[int, Future[torch.Tensor]] = {}  # by index into `infos`
        self._taken: set[int] = set()
        self._next = 0  # index of the next tensor to read
        self._pending_bytes = 0
        self.waited_s = 0.0  # the time that `take` waited for the threads
        self._pool = ThreadPoolExecutor(NUM_READER_THREADS, thread_name_prefix="read-ahead")
        self._submit_next()

    def take(self, name: str) -> torch.Tensor | None:
        """The tensor, at the first call for it; None at later calls, or when no thread reads it.

        Raises the error of reading it. Tensors that were skipped long ago are dropped.
        """
        index = self._index.get(name)
        if index is None or index in self._taken:
            return None
        self._taken.add(index)
        future = self._remove(index) if index in self._pending else None
        oldest = index - MAX_SKIPPED_TENSORS
        for skipped in [i for i in self._pending if i < oldest]:
            self._remove(skipped).cancel()
        self._next = max(self._next, oldest)
        self._submit_next()
        if future is None:
            return None
        start = time.perf_counter()
        tensor = future.result()
        self.waited_s += time.perf_counter() - start
        return tensor

    def close(self) -> None:
        """Stop the threads and wait for their end."""
        self._pool.shutdown(cancel_futures=True)

    def _submit_next(self) -> None:
        while self._next < len(self._infos):
            if self._pending and self._pending_bytes >= READ_AHEAD_BYTES:
                return
            if self._next not in self._taken:
                info = self._infos[self._next]
                self._pending[self._next] = self._pool.submit(self._read, info)
                self._pending_bytes += info.nbytes
            self._next += 1

    def _remove(self, index: int) -> Future[torch.Tensor]:
        self._pending_bytes -= self._infos[index].nbytes
        return self._pending.pop(index)


def read_range(path: Path, start: int, count: int) -> torch.Tensor:
    """`count` bytes of a file from byte `start`, as uint8 [count]. Raises as `read_into` does."""
    import torch  # keeps torch off the path that reads headers and digests

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
            length = 0
            while length < len(view):
                count = os.preadv(fd, [view[length:]], start + length)
                if count == 0:
                    size = os.fstat(fd).st_size
                    raise InputError(
                        f"{path} ends at byte {size}, but {start + len(view)} were expected"
                    )
                length += count
        finally:
            os.close(fd)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def row_chunks(
    info: TensorInfo, limit: int = CHUNK_BYTES, block_rows: int = 1
) -> Iterator[tuple[int, int]]:
    """Intervals of a tensor's rows: blocks of `block_rows` rows, at least one of them.

    Each has at most about `limit` bytes. A number, which has no dimensions, is one row.
    """
    count = info.shape[0] if info.shape else 1
    step = limit * count // max(1, info.nbytes)
    step = max(1, step // block_rows) * block_rows
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
    """The SHA-256 of a file from byte `start`, while it is read or written piece by piece.

    The pieces may come in any order. A piece that continues the hashed ones is hashed at once; the
    rest of the file is read at the end.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path = path
        self._start = start
        self._digest = hashlib.sha256()
        self._position = start  # all bytes before it are hashed

    def add(self, start: int, data: memoryview) -> None:
        """Hash the file's bytes from byte `start`, if they continue what is hashed already."""
        if start == self._position:
            self._digest.update(data)
            self._position += len(data)

    def rewind(self, start: int) -> None:
        """Start over if bytes from `start` on were hashed. Call it before overwriting them."""
        if start < self._position:
            self._digest = hashlib.sha256()
            self._position = self._start

    def catch_up(self, stop: int) -> None:
        """Read and hash the missing bytes before `stop`. Raises InputError as `read_into` does."""
        buffer = bytearray(min(DIGEST_BYTES, max(0, stop - self._position)))
        while self._position < stop:
            view = memoryview(buffer)[: stop - self._position]
            read_into(self._path, self._position, view)
            self.add(self._position, view)

    def drop_page_cache(self) -> None:
        """Free the page cache of the hashed bytes, so that a large checkpoint does not fill it."""
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, self._start, self._position - self._start, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def hexdigest(self, stop: int) -> str:
        """The SHA-256 of the bytes up to `stop`, in hexadecimal."""
        self.catch_up(stop)
        return self._digest.hexdigest()


def sha256_range(path: Path, start: int, count: int) -> str:
    """The SHA-256 of `count` bytes from byte `start`, read in chunks.

    Raises InputError as `read_range` does.
    """
    digest = hashlib.sha256()
    for offset in range(0, count, CHUNK_BYTES):
        digest.update(
            read_range(path, start + offset, min(CHUNK_BYTES, count - offset)).numpy().data
        )
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in C order. A contiguous tensor on the CPU is not copied."""
    import torch  # keeps torch off the path that reads headers and digests

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single element may have any stride, and a view as bytes needs stride 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data
