"""Writing a checkpoint: all or nothing, resumable, and the same bytes whatever the order of writing.

Every tensor has its place before the first is written. Data goes to `<out>.partial` and is synced before the
journal tells of it; the manifest is the last file, and only then does the directory get its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llmkit.checkpoint.dtypes import DTYPES, NAMES
from llmkit.checkpoint.errors import LlmkitError, OutputError
from llmkit.checkpoint.files import CONFIG
from llmkit.checkpoint.journal import Journal, Key
from llmkit.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    is_plain_name,
    manifest_digest,
    tensor_key,
    verify_manifest,
)
from llmkit.checkpoint.output import (
    check_output,
    locked,
    partial_path,
    sibling,
    sync_directory,
    write_synced,
    writing,
)
from llmkit.checkpoint.reading import FileDigest, read_range, sha256_file, sha256_range, tensor_bytes
from llmkit.checkpoint.safetensors_header import TensorInfo, byte_count, write_header
from llmkit.checkpoint.source import INDEX, Checkpoint
from llmkit.checkpoint.version import version

LARGE_BYTES = 2**20  # from here on a write is hashed by threads meanwhile, and goes past the page cache
DIRECT_BYTES = 8 * 2**20  # written at once past the page cache
PAGE = 4096  # what is written past the page cache begins and ends at multiples of it

__all__ = ["CheckpointWriter", "PlannedTensor", "check_output", "plan_files", "verify_manifest"]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` as in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return byte_count(self.dtype, self.shape)


def plan_files(
    tensors: Sequence[PlannedTensor], max_bytes: int = 5 * 2**30, stem: str = "model"
) -> dict[str, list[PlannedTensor]]:
    """Distribute tensors, in order, over files of at most `max_bytes` (a larger tensor gets a file of its own).

    One file is `<stem>.safetensors`, several are `<stem>-00001-of-0000N.safetensors`.
    """
    files: list[list[PlannedTensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if tensor.nbytes > room and files[-1]:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{i:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files, 1)}


def planned_bytes(files: Mapping[str, Sequence[PlannedTensor]]) -> int:
    """Bytes of the weight files of a plan, headers included."""
    return sum(len(write_header(_ordered(part))[0]) + sum(tensor.nbytes for tensor in part) for part in files.values())


class CheckpointWriter:
    """Writes the planned `files` into the new directory `out`; use as a context manager, end with `finish`.

    `identity` is everything that decides the bytes: command, options, source hashes. A partial output of the same
    identity and plan is continued, any other is started afresh. Leaving the block with an exception, or being
    killed, keeps the partial output; whatever was committed need not be written again.

    Entering raises OutputError when `out` exists and is not empty, lies in the source or is being written by
    another run, and ShortageError when the disk is too small or not writable.
    """

    def __init__(
        self,
        out: str | Path,
        files: Mapping[str, Sequence[PlannedTensor]],
        source: Checkpoint | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        assert all(is_plain_name(file) for file in files)
        self.out = Path(out).expanduser().absolute()
        self._source = source
        self._partial = partial_path(self.out)
        self._headers: dict[str, bytes] = {}
        self._places: dict[Key, TensorInfo] = {}
        self._files_of: dict[str, list[str]] = {}
        for file, tensors in files.items():
            self._headers[file], infos = write_header(_ordered(tensors))
            for name, info in infos.items():
                self._places[file, name] = info
                self._files_of.setdefault(name, []).append(file)
        plan = hashlib.sha256(b"".join(name.encode() + header for name, header in self._headers.items())).hexdigest()
        self._journal = Journal(sibling(self.out, ".partial.journal"), {"plan": plan, **(identity or {})})
        self._pending: dict[Key, Any] = {}  # written since the last commit: their hashes
        self._hashing: list[Future[None]] = []  # of what was written last
        self._aligned = mmap.mmap(-1, DIRECT_BYTES)  # at a multiple of PAGE in memory too
        self._open: dict[Key, tuple[Any, int]] = {}  # tensors being written in chunks: their hash and bytes so far
        self._resumed: frozenset[Key] = frozenset()
        self._fds: dict[str, int] = {}
        self._direct: dict[str, int] = {}  # the same files, past the page cache where the file system can do that
        self._digests = {file: FileDigest(self._partial / file) for file in self._headers}
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointWriter:
        with ExitStack() as stack:
            check_output(self.out, self._source, 0)  # before a lock file appears next to it
            stack.enter_context(locked(self.out))
            sizes = {file: self._file_bytes(file) for file in self._headers}
            check_output(self.out, self._source, sum(sizes.values()))
            with writing(self._partial):
                if not self._can_resume(sizes):
                    self._start_afresh(sizes)
                for file, header in self._headers.items():
                    self._fds[file] = os.open(self._partial / file, os.O_RDWR | os.O_CLOEXEC)
                    stack.callback(os.close, self._fds[file])
                    with suppress(OSError):
                        self._direct[file] = os.open(self._partial / file, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
                        stack.callback(os.close, self._direct[file])
                    self._digests[file].add(0, memoryview(header))
            self._hashers = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="hash"))
            self._resumed = frozenset(self._journal.entries)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._partial.exists():
                # The error that brought us here is the one to tell; what is not committed is written again.
                with suppress(OSError, LlmkitError):
                    self.commit()

    def write(self, name: str, tensor: torch.Tensor, file: str | None = None) -> None:
        """Write a whole tensor. ValueError when it is not planned like this; ShortageError when the disk is full.

        `file` is needed when several files have a tensor of that name.
        """
        key = self._key(name, file)
        info = self._places[key]
        if NAMES.get(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, planned as {info.dtype} {list(info.shape)}"
            )
        digest = hashlib.sha256()
        self._write_at(key, info.start, tensor_bytes(tensor), digest)
        wait(self._hashing)  # the caller may change the tensor now
        self._pending[key] = digest
        self._open.pop(key, None)

    def write_chunk(self, file: str, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of a tensor from byte `offset` of it. Each tensor's chunks come in order and without gaps.

        A chunk at 0 starts the tensor anew. `data` must stay as it is until the next chunk has been written: it is
        hashed meanwhile. ValueError when chunks are out of order or too long.
        """
        data = memoryview(data).cast("B")
        key = self._key(name, file)
        info = self._places[key]
        digest, done = self._open.get(key, (None, 0))
        if digest is None or offset == 0:
            digest, done = hashlib.sha256(), 0
        if offset != done or offset + len(data) > info.nbytes:
            raise ValueError(f"{name}: chunk [{offset}, {offset + len(data)}) after byte {done} of {info.nbytes}")
        self._write_at(key, info.start + offset, data, digest)
        if offset + len(data) == info.nbytes:
            self._open.pop(key, None)
            self._pending[key] = digest
        else:
            self._open[key] = digest, offset + len(data)

    def files_of(self, name: str) -> tuple[str, ...]:
        """The planned files that have a tensor of this name."""
        return tuple(self._files_of[name])

    def done(self, name: str, file: str | None = None) -> bool:
        """Whether the tensor was written and committed, by this run or an interrupted one."""
        return self._key(name, file) in self._journal.entries

    def commit(self) -> None:
        """Sync what was written and record it, so that an interrupted run need not write it again."""
        wait(self._hashing)
        if not self._pending:
            return
        with writing(self._partial):
            for file in {file for file, _ in self._pending}:
                os.fsync(self._fds[file])
            self._journal.append({key: digest.hexdigest() for key, digest in self._pending.items()})
        self._pending = {}

    def read_back(self, name: str, file: str | None = None) -> torch.Tensor:
        """A tensor that has been written. ValueError when it has not."""
        key = self._key(name, file)
        if key not in self._pending and key not in self._journal.entries:
            raise ValueError(f"{name} has not been written")
        info = self._places[key]
        buffer = read_range(self._partial / key[0], info.start, info.nbytes)
        return buffer.view(DTYPES[info.dtype]).reshape(info.shape)

    def discard(self) -> None:
        """Remove the partial output: what it was made from is wrong, so that no run may continue it."""
        self._pending = {}
        self._journal.remove()
        shutil.rmtree(self._partial)

    def finish(self, config: Mapping[str, Any], side_files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        """Write everything else, the manifest last, and give the directory its name.

        `manifest` adds to the manifest ("recipe", "seed", "layout"...). An index is written when there are several
        files and no "layout". ValueError when a planned tensor has not been written; OutputError when what an
        interrupted run left is no longer what it wrote; InputError when the source changed while it was read.
        """
        self.commit()
        missing = [name for file, name in self._places if (file, name) not in self._journal.entries]
        if missing:
            raise ValueError(f"{len(missing)} tensors have not been written ({', '.join(missing[:5])})")
        self._check_resumed()
        if self._source is not None:
            self._source.require_unchanged()
        texts = {name: bytes(data) for name, data in side_files.items()}
        assert not {CONFIG, INDEX, MANIFEST, *self._headers} & texts.keys(), "a side file has a reserved name"
        texts[CONFIG] = _json(config)
        if len(self._headers) > 1 and manifest.get("layout") is None:
            texts[INDEX] = self._index()
        with writing(self._partial):
            for stale in self._partial.iterdir():  # of an earlier attempt to finish
                if stale.name not in self._headers and stale.name not in texts:
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            for name, data in texts.items():
                write_synced(self._partial / name, data)
            write_synced(self._partial / MANIFEST, _json(self._manifest(texts, manifest)))
            for fd in self._fds.values():
                os.fsync(fd)
            sync_directory(self._partial)
            self._partial.rename(self.out)
            self._journal.remove()
            sync_directory(self.out.parent)

    def _manifest(self, texts: Mapping[str, bytes], further: Mapping[str, Any]) -> dict[str, Any]:
        sharded = further.get("layout") is not None
        files = {name: self._file_entry(name) for name in sorted([*self._headers, *texts])}
        tensors = {
            tensor_key(name, file, sharded): {
                "file": file,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "sha256": self._journal.entries[file, name],
            }
            for (file, name), info in self._places.items()
        }
        source = further.get("source")
        if source is None and self._source is not None:
            source = {"reference": self._source.reference, "files": self._source.source_hashes()}
        document = {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "llmkit", "version": version()},
            **({"source": source} if source else {}),
            **further,
            "files": files,
            "tensors": tensors,
        }
        # Of the others it would be one more figure that depends on how long a run took.
        return {**document, "sha256": manifest_digest(document)} if sharded else document

    def _file_entry(self, name: str) -> dict[str, Any]:
        path = self._partial / name
        size, digest = path.stat().st_size, self._digests.get(name)
        return {"bytes": size, "sha256": digest.hexdigest(size) if digest else sha256_file(path)}

    def _index(self) -> bytes:
        total = sum(info.nbytes for info in self._places.values())
        located = {name: file for file, name in self._places}
        assert len(located) == len(self._places), "a tensor lies in two files of one checkpoint"
        return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))})

    def _check_resumed(self) -> None:
        for key in sorted(self._resumed):
            info = self._places[key]
            if sha256_range(self._partial / key[0], info.start, info.nbytes) != self._journal.entries[key]:
                raise OutputError(
                    f"{self._partial / key[0]}: tensor {key[1]} changed after the interrupted run wrote it",
                    todo=f"Remove {self._partial} and run the command again",
                )

    def _can_resume(self, sizes: Mapping[str, int]) -> bool:
        for file, size in sizes.items():
            path = self._partial / file
            if not path.is_file() or path.stat().st_size != size:
                return False
            with path.open("rb") as handle:
                if handle.read(len(self._headers[file])) != self._headers[file]:
                    return False
        return self._journal.load() and self._journal.entries.keys() <= self._places.keys()

    def _start_afresh(self, sizes: Mapping[str, int]) -> None:
        self._journal.remove()
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir()
        for file, size in sizes.items():
            with (self._partial / file).open("wb") as handle:
                handle.write(self._headers[file])
                handle.truncate(size)
                handle.flush()
                os.fsync(handle.fileno())
        sync_directory(self._partial)
        self._journal.start()
        sync_directory(self._partial.parent)

    def _file_bytes(self, file: str) -> int:
        return len(self._headers[file]) + sum(info.nbytes for (of, _), info in self._places.items() if of == file)

    def _key(self, name: str, file: str | None) -> Key:
        files = self._files_of.get(name, [])
        if file is None and len(files) == 1:
            return files[0], name
        if file is None or (file, name) not in self._places:
            raise ValueError(f"{name} is planned in {files or 'no file'}, asked for in {file}")
        return file, name

    def _write_at(self, key: Key, position: int, view: memoryview, digest: Any) -> None:
        """Write to a file; hash for the tensor and for the file, by threads that may not be done when it returns."""
        wait(self._hashing)
        of_file = self._digests[key[0]]
        of_file.rewind(position)
        tasks: tuple[Callable[[], None], ...] = partial(digest.update, view), partial(of_file.add, position, view)
        if len(view) >= LARGE_BYTES:
            self._hashing = [self._hashers.submit(task) for task in tasks]
        else:
            for task in tasks:
                task()
        self._pwrite(key, position, view)

    def _pwrite(self, key: Key, position: int, view: memoryview) -> None:
        """Write to a file; whole pages of a large view past the page cache, which costs more than the disk does."""
        file, start, stop = key[0], -position % PAGE, 0
        with writing(self._partial / file):
            if len(view) >= LARGE_BYTES and file in self._direct:
                stop = len(view) - (position + len(view)) % PAGE
                try:
                    self._past_the_cache(self._direct[file], position + start, view[start:stop])
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    del self._direct[file]  # the file system cannot do it, and says so only now
                    stop = 0
            pieces = [(0, start), (stop, len(view))] if stop else [(0, len(view))]
            for first, last in pieces:
                _pwrite_all(self._fds[file], position + first, view[first:last])

    def _past_the_cache(self, fd: int, position: int, view: memoryview) -> None:
        for first in range(0, len(view), DIRECT_BYTES):
            piece = view[first : first + DIRECT_BYTES]
            self._aligned[: len(piece)] = piece
            _pwrite_all(fd, position + first, memoryview(self._aligned)[: len(piece)])


def _pwrite_all(fd: int, position: int, view: memoryview) -> None:
    while view:
        done = os.pwrite(fd, view, position)
        view, position = view[done:], position + done


def _ordered(tensors: Sequence[PlannedTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """As planned, but wide dtypes first, so that every tensor starts at a multiple of its element size."""
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    return [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in ordered]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
