"""Writes a checkpoint: all or nothing, resumable, with the same bytes in any order of writing.

The place of every tensor is planned before the first one is written. Data goes to `<out>.partial`,
and is synced to disk before the journal records it. The manifest is the last file; the directory is
renamed to `<out>` after it.
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
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.dtypes import DTYPE_NAMES, DTYPES
from llmkit.checkpoint.journal import Journal, Key, RunClock
from llmkit.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    is_plain_name,
    manifest_digest,
    tensor_key,
)
from llmkit.checkpoint.model_files import CONFIG, INDEX
from llmkit.checkpoint.output_directory import (
    check_output,
    output_lock,
    partial_path,
    sibling,
    sync_directory,
    write_errors,
    write_synced,
)
from llmkit.checkpoint.safetensors_header import TensorInfo, write_header
from llmkit.checkpoint.tensor_reader import (
    FileDigest,
    read_range,
    sha256_file,
    sha256_range,
    tensor_bytes,
)
from llmkit.common.errors import LlmkitError, OutputError
from llmkit.common.formatting import bytes_text, count_text
from llmkit.common.version import version

# From the tensors of a file to its header, and the tensors with their byte ranges.
HeaderFunction = Callable[[Sequence[TensorInfo]], tuple[bytes, dict[str, TensorInfo]]]

# A write of at least this size bypasses the page cache, and threads hash it at the same time.
LARGE_WRITE_BYTES = 2**20
DIRECT_IO_BYTES = 8 * 2**20  # the size of one write that bypasses the page cache
PAGE_BYTES = 4096  # such a write begins and ends at multiples of this


def plan_files(
    tensors: Sequence[TensorInfo], max_bytes: int = 5 * 2**30, stem: str = "model"
) -> dict[str, list[TensorInfo]]:
    """Distribute tensors, in order, over files of at most `max_bytes`.

    A larger tensor gets its own file. One file is named `<stem>.safetensors`, several are
    `<stem>-00001-of-0000N.safetensors`.
    """
    files: list[list[TensorInfo]] = [[]]
    free_bytes = max_bytes
    for tensor in tensors:
        if tensor.nbytes > free_bytes and files[-1]:
            files.append([])
            free_bytes = max_bytes
        files[-1].append(tensor)
        free_bytes -= tensor.nbytes
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {
        f"{stem}-{number:05d}-of-{len(files):05d}.safetensors": part
        for number, part in enumerate(files, 1)
    }


def safetensors_header(tensors: Sequence[TensorInfo]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a safetensors file, and its tensors in an order that aligns them."""
    return write_header(_wide_dtypes_first(tensors))


def planned_bytes(
    files: Mapping[str, Sequence[TensorInfo]], headers: HeaderFunction = safetensors_header
) -> int:
    """The size of the weight files of a plan, including headers."""
    total = 0
    for tensors in files.values():
        header, placed = headers(tensors)
        total += len(header) + sum(tensor.nbytes for tensor in placed.values())
    return total


class CheckpointWriter:
    """Writes the planned `files` into the new directory `out`.

    Use it as a context manager, and end the block with `finish`:

        with CheckpointWriter(out, files, source, identity) as writer:
            for name in ...:
                if not writer.is_written(name):
                    writer.write(name, tensor)
                writer.commit()  # from time to time
            writer.finish(config, side_files, manifest)

    clock: the time of the run; its journal keeps it for a run that continues.
    identity: everything that determines the bytes: command, options, hashes of the source. A
    partial output of the same identity and plan is continued, any other is replaced. An exception
    or a kill keeps the partial output, and tensors that were committed need not be written again.

    headers: the format of the weight files.

    Entering raises OutputError when `out` exists and is not empty, lies in the source or is being
    written by another run, and ShortageError when the disk is too small or not writable.
    """

    def __init__(
        self,
        out: str | Path,
        files: Mapping[str, Sequence[TensorInfo]],
        source: Checkpoint | None = None,
        identity: Mapping[str, Any] | None = None,
        clock: RunClock | None = None,
        headers: HeaderFunction = safetensors_header,
    ) -> None:
        assert all(is_plain_name(file) for file in files)
        self.out = Path(out).expanduser().absolute()
        self._source = source
        self._partial = partial_path(self.out)
        self._headers: dict[str, bytes] = {}
        self._tensors: dict[Key, TensorInfo] = {}
        self._files_of: dict[str, list[str]] = {}
        for file, tensors in files.items():
            self._headers[file], infos = headers(tensors)
            for name, info in infos.items():
                self._tensors[file, name] = info
                self._files_of.setdefault(name, []).append(file)
        planned = b"".join(file.encode() + header for file, header in self._headers.items())
        plan = hashlib.sha256(planned).hexdigest()
        self._clock = clock or RunClock()
        self._journal = Journal(
            sibling(self.out, ".partial.journal"),
            {"tensors": plan, **(identity or {})},
            self._clock,
        )
        # What became of the partial output of an earlier run, for the user; "": there was none.
        self.resume_note = ""
        # SHA-256 objects of the tensors that were written since the last commit.
        self._uncommitted: dict[Key, Any] = {}
        # SHA-256 objects and written bytes of the tensors that `write_chunk` has not completed.
        self._incomplete: dict[Key, tuple[Any, int]] = {}
        self._hashing: list[Future[None]] = []  # the hash tasks of the last write
        self._aligned_buffer = mmap.mmap(-1, DIRECT_IO_BYTES)  # aligned to PAGE_BYTES in memory
        self._resumed: frozenset[Key] = frozenset()  # written by an interrupted run
        self._fds: dict[str, int] = {}
        # The same files opened with O_DIRECT, where the file system supports it.
        self._direct_fds: dict[str, int] = {}
        self._file_digests = {file: FileDigest(self._partial / file) for file in self._headers}
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointWriter:
        source_path = None if self._source is None else self._source.path
        with ExitStack() as stack:
            check_output(self.out, source_path, 0)  # before the lock file is created
            stack.enter_context(output_lock(self.out))
            sizes = {file: self._file_bytes(file) for file in self._headers}
            check_output(self.out, source_path, sum(sizes.values()))
            with write_errors(self._partial):
                if self._can_resume(sizes):
                    self.resume_note = self._resumed_text()
                else:
                    self.resume_note = self._replaced_text()
                    self._start_new(sizes)
                for file, header in self._headers.items():
                    self._fds[file] = os.open(self._partial / file, os.O_RDWR | os.O_CLOEXEC)
                    stack.callback(os.close, self._fds[file])
                    with suppress(OSError):
                        self._direct_fds[file] = os.open(
                            self._partial / file, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT
                        )
                        stack.callback(os.close, self._direct_fds[file])
                    self._file_digests[file].add(0, memoryview(header))
            self._hashers = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="hash"))
            self._resumed = frozenset(self._journal.entries)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if self._partial.exists():
                # An error of this commit must not hide an error of the block. The next run writes
                # uncommitted tensors again.
                with suppress(OSError, LlmkitError):
                    self.commit()
                    self._journal.append({})  # the time until now

    def write(self, name: str, tensor: torch.Tensor, file: str | None = None) -> None:
        """Write a whole tensor.

        file: needed when several files have a tensor of that name.
        Raises ValueError when name, dtype or shape differ from the plan, ShortageError when the
        disk is full.
        """
        key = self._key(name, file)
        info = self._tensors[key]
        if DTYPE_NAMES.get(tensor.dtype) != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)},"
                f" planned as {info.dtype} {list(info.shape)}"
            )
        digest = hashlib.sha256()
        self._write_at(key, info.start, tensor_bytes(tensor), digest)
        wait(self._hashing)  # then the caller may change the tensor
        self._uncommitted[key] = digest
        self._incomplete.pop(key, None)

    def write_chunk(self, file: str, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of a tensor from its byte `offset`, in order and without gaps.

        A chunk at offset 0 starts the tensor again. `data` must not change until the next chunk has
        been written, because it is hashed meanwhile.
        Raises ValueError when a chunk is out of order or too long.
        """
        data = memoryview(data).cast("B")
        key = self._key(name, file)
        info = self._tensors[key]
        digest, written = self._incomplete.get(key, (None, 0))
        if digest is None or offset == 0:
            digest = hashlib.sha256()
            written = 0
        if offset != written or offset + len(data) > info.nbytes:
            raise ValueError(
                f"{name}: chunk [{offset}, {offset + len(data)})"
                f" after byte {written} of {info.nbytes}"
            )
        self._write_at(key, info.start + offset, data, digest)
        if offset + len(data) == info.nbytes:
            self._incomplete.pop(key, None)
            self._uncommitted[key] = digest
        else:
            self._incomplete[key] = digest, offset + len(data)

    def time_note(self) -> str:
        """The time of a continued run, with its earlier runs, for the user; "" for any other."""
        if not self._resumed:
            return ""
        clock = self._clock
        return (
            f"the whole run took {clock.total_s:.1f} s, {clock.earlier_s:.1f} s of them before it "
            "was interrupted"
        )

    def files_with(self, name: str) -> tuple[str, ...]:
        """The planned files that hold a tensor of this name."""
        return tuple(self._files_of[name])

    def is_written(self, name: str, file: str | None = None) -> bool:
        """Whether the tensor was written and committed, by this run or an interrupted one."""
        return self._key(name, file) in self._journal.entries

    def commit(self) -> None:
        """Sync and record the written tensors, so that an interrupted run does not repeat them."""
        wait(self._hashing)
        if not self._uncommitted:
            return
        with write_errors(self._partial):
            for file in {file for file, _ in self._uncommitted}:
                os.fsync(self._fds[file])
            self._journal.append(
                {key: digest.hexdigest() for key, digest in self._uncommitted.items()}
            )
        self._uncommitted = {}

    def read_back(self, name: str, file: str | None = None) -> torch.Tensor:
        """A tensor that was written, read from disk. Raises ValueError when it was not written."""
        key = self._key(name, file)
        if key not in self._uncommitted and key not in self._journal.entries:
            raise ValueError(f"{name} has not been written")
        info = self._tensors[key]
        buffer = read_range(self._partial / key[0], info.start, info.nbytes)
        return buffer.view(DTYPES[info.dtype]).reshape(info.shape)

    def discard(self) -> None:
        """Remove the partial output, because the source is wrong and no run may continue it."""
        self._uncommitted = {}
        self._journal.remove()
        shutil.rmtree(self._partial)

    def finish(
        self,
        config: Mapping[str, Any] | None,
        side_files: Mapping[str, bytes],
        manifest: Mapping[str, Any],
    ) -> None:
        """Write the other files, the manifest last, and rename the directory to `out`.

        config: None writes no config.json, because the weight file holds the config.
        manifest: further entries of the manifest ("recipe", "seed", "layout", ...).
        An index is written when there are several weight files and no "layout".
        Raises ValueError when a planned tensor was not written, OutputError when the data of an
        interrupted run changed since, InputError when the source changed while it was read.
        """
        self.commit()
        missing = [
            name for file, name in self._tensors if (file, name) not in self._journal.entries
        ]
        if missing:
            raise ValueError(
                f"{len(missing)} tensors have not been written ({', '.join(missing[:5])})"
            )
        self._check_resumed()
        if self._source is not None:
            self._source.require_unchanged()
        texts = {name: bytes(data) for name, data in side_files.items()}
        assert not {CONFIG, INDEX, MANIFEST, *self._headers} & texts.keys(), (
            "a side file has a reserved name"
        )
        if config is not None:
            texts[CONFIG] = _json(config)
        if len(self._headers) > 1 and manifest.get("layout") is None:
            texts[INDEX] = self._index()
        with write_errors(self._partial):
            for path in self._partial.iterdir():  # an earlier `finish` may have left other files
                if path.name in self._headers or path.name in texts:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for name, data in texts.items():
                write_synced(self._partial / name, data)
            write_synced(self._partial / MANIFEST, _json(self._manifest(texts, manifest)))
            for fd in self._fds.values():
                os.fsync(fd)
            sync_directory(self._partial)
            self._partial.rename(self.out)
            self._journal.remove()
            sync_directory(self.out.parent)

    def _manifest(self, texts: Mapping[str, bytes], entries: Mapping[str, Any]) -> dict[str, Any]:
        sharded = entries.get("layout") is not None
        files = {name: self._file_entry(name) for name in sorted([*self._headers, *texts])}
        tensors = {
            tensor_key(name, file, sharded): {
                "file": file,
                "dtype": info.ggml_type or info.dtype,
                "shape": list(info.shape),
                "sha256": self._journal.entries[file, name],
            }
            for (file, name), info in self._tensors.items()
        }
        source = entries.get("source")
        if source is None and self._source is not None:
            source = {"reference": self._source.reference, "files": self._source.source_hashes()}
        document = {
            "format_version": FORMAT_VERSION,
            "tool": {"name": "llmkit", "version": version()},
            **({"source": source} if source else {}),
            **entries,
            "files": files,
            "tensors": tensors,
        }
        # Only sharded manifests record a digest of themselves. Other manifests may hold durations,
        # so that the digests of two otherwise equal outputs would differ.
        return {**document, "sha256": manifest_digest(document)} if sharded else document

    def _file_entry(self, name: str) -> dict[str, Any]:
        path = self._partial / name
        size = path.stat().st_size
        digest = self._file_digests.get(name)
        return {"bytes": size, "sha256": digest.hexdigest(size) if digest else sha256_file(path)}

    def _index(self) -> bytes:
        total = sum(info.nbytes for info in self._tensors.values())
        weight_map = {name: file for file, name in self._tensors}
        assert len(weight_map) == len(self._tensors), "two files of one checkpoint hold a tensor"
        return _json(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )

    def _check_resumed(self) -> None:
        for key in sorted(self._resumed):
            file, name = key
            info = self._tensors[key]
            digest = sha256_range(self._partial / file, info.start, info.nbytes)
            if digest != self._journal.entries[key]:
                raise OutputError(
                    f"{self._partial / file}: tensor {name} changed"
                    " after the interrupted run wrote it",
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
        return self._journal.load() and self._journal.entries.keys() <= self._tensors.keys()

    def _resumed_text(self) -> str:
        written = sum(self._tensors[key].nbytes for key in self._journal.entries)
        total = sum(info.nbytes for info in self._tensors.values())
        left = len(self._tensors) - len(self._journal.entries)
        earlier = self._clock.earlier_s
        return (
            f"continuing an interrupted run of {earlier:.1f} s: "
            f"{len(self._journal.entries)} of {count_text(len(self._tensors), 'tensors')} "
            f"({bytes_text(written)} of {bytes_text(total)}) are written, {left} are left"
        )

    def _replaced_text(self) -> str:
        """Empty unless the partial output of an interrupted run is removed."""
        if not self._partial.is_dir():
            return ""
        changed = ", ".join(self._journal.changed_settings()) or "its files"
        return (
            f"the interrupted run had other settings (changed: {changed}): its partial output "
            f"{self._partial} is removed, and this run starts from the beginning"
        )

    def _start_new(self, sizes: Mapping[str, int]) -> None:
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
        tensors = [info for (path, _), info in self._tensors.items() if path == file]
        return len(self._headers[file]) + sum(info.nbytes for info in tensors)

    def _key(self, name: str, file: str | None) -> Key:
        files = self._files_of.get(name, [])
        if file is None and len(files) == 1:
            return files[0], name
        if file is None or (file, name) not in self._tensors:
            raise ValueError(f"{name} is planned in {files or 'no file'}, asked for in {file}")
        return file, name

    def _write_at(self, key: Key, position: int, view: memoryview, digest: Any) -> None:
        """Write to a file, and update the digests of the tensor and of the file.

        Threads hash a large `view`; they may still run when this method returns.
        """
        wait(self._hashing)
        file_digest = self._file_digests[key[0]]
        file_digest.rewind(position)
        tasks: tuple[Callable[[], None], ...] = (
            partial(digest.update, view),
            partial(file_digest.add, position, view),
        )
        if len(view) >= LARGE_WRITE_BYTES:
            self._hashing = [self._hashers.submit(task) for task in tasks]
        else:
            for task in tasks:
                task()
        self._pwrite(key, position, view)

    def _pwrite(self, key: Key, position: int, view: memoryview) -> None:
        """Write to a file.

        The full pages of a large `view` bypass the page cache, which is faster.
        """
        file = key[0]
        start = -position % PAGE_BYTES
        stop = 0  # [start, stop) of `view` bypasses the page cache
        with write_errors(self._partial / file):
            if len(view) >= LARGE_WRITE_BYTES and file in self._direct_fds:
                stop = len(view) - (position + len(view)) % PAGE_BYTES
                try:
                    self._write_direct(self._direct_fds[file], position + start, view[start:stop])
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    del self._direct_fds[file]  # the file system does not support it after all
                    stop = 0
            pieces = [(0, start), (stop, len(view))] if stop else [(0, len(view))]
            for first, last in pieces:
                _pwrite_all(self._fds[file], position + first, view[first:last])

    def _write_direct(self, fd: int, position: int, view: memoryview) -> None:
        for first in range(0, len(view), DIRECT_IO_BYTES):
            piece = view[first : first + DIRECT_IO_BYTES]
            self._aligned_buffer[: len(piece)] = piece
            _pwrite_all(fd, position + first, memoryview(self._aligned_buffer)[: len(piece)])


def _pwrite_all(fd: int, position: int, view: memoryview) -> None:
    while view:
        written = os.pwrite(fd, view, position)
        view = view[written:]
        position += written


def _wide_dtypes_first(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The order of tensors in a file. It aligns every tensor to its element size."""
    by_width = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    # Only name, dtype and shape are kept: the byte range in the source does not apply here.
    return [TensorInfo(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in by_width]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
