"""Checks and locks an output directory: it overwrites nothing, and one run writes it at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmkit.common.errors import LlmkitError, OutputError, ShortageError
from llmkit.common.formatting import bytes_text

NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
SPARE_BYTES = 32 * 2**20  # for tokenizer, configs and manifest


def sibling(out: Path, suffix: str) -> Path:
    """`<out><suffix>`, next to the output."""
    return out.with_name(out.name + suffix)


def partial_path(out: Path) -> Path:
    """The directory that holds the output while it is written."""
    return sibling(out, ".partial")


def check_output(out: Path, source: Path | None, need_bytes: int) -> None:
    """Refuse an output path that is taken or too small; creates nothing.

    source: the directory or file that the output is made from.
    need_bytes: the size of the whole output. The bytes of an interrupted run count as free space.
    Raises OutputError when `out` exists and is not empty or lies in the source, ShortageError when
    the disk is too small or not writable.
    """
    out = out.absolute()
    check_not_in_source(out, source)
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(
            f"The output {out} exists and is not empty", todo="Remove it or choose another output"
        )
    if out.exists() and not out.is_dir():
        raise OutputError(
            f"The output {out} exists and is a file", todo="Remove it or choose another output"
        )
    check_space(out, need_bytes)


def write_new_file(path: Path, text: str) -> None:
    """Write one file: after an error there is none.

    Raises OutputError when it exists, ShortageError when it cannot be written.
    """
    check_output(path, None, 0)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def check_not_in_source(out: Path, source: Path | None) -> None:
    """Raise OutputError when `out` is the source or lies in it."""
    if source is not None:
        real_out = out.resolve()
        real_source = source.resolve()
        is_inside = real_source.is_dir() and real_source in real_out.parents
        if real_out == real_source or is_inside:
            raise OutputError(
                f"The output {out} is the source or lies in it", todo="Choose another output"
            )


def check_space(out: Path, need_bytes: int) -> None:
    """Raise ShortageError when the output's disk is too small or not writable.

    The bytes of an interrupted run count as free space.
    """
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ShortageError(
            f"{parent} is not writable",
            "A directory to write to was expected",
            "Choose another output",
        )
    written = 0
    with suppress(FileNotFoundError):  # another run may rename it at this moment
        written = sum(file.stat().st_blocks * 512 for file in partial_path(out).iterdir())
    need = need_bytes + SPARE_BYTES
    have = shutil.disk_usage(parent).free + written
    if need > have:
        raise ShortageError(
            f"The output {out} needs {need} bytes ({bytes_text(need)})"
            f" and the disk has {have} ({bytes_text(have)})",
            todo="Free some space or choose another disk",
        )


@contextmanager
def output_lock(out: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `<out>.lock` during the block, and remove it at the end.

    wait: wait for another run that holds it.
    Raises OutputError with the process id when another run holds it, ShortageError when it cannot
    be created.
    """
    path = sibling(out, ".lock")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _acquire(path, wait)
    try:
        with write_errors(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        # The file is removed while the lock is held, so that a waiting run notices the removal.
        path.unlink(missing_ok=True)
        os.close(fd)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            out = path.with_suffix("")
            raise OutputError(
                f"The output {out} is being written by another run (process {pid})",
                todo="Wait for it or stop it",
            ) from None
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        # Another run removed the file after `os.open` and before `flock`: try again.
        os.close(fd)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Within the block, turn a full disk or missing permission at `path` into ShortageError."""
    try:
        yield
    except LlmkitError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShortageError(
                f"The disk is full ({path})", todo="Free some space and run the command again"
            ) from error
        if error.errno in NOT_WRITABLE:
            raise ShortageError(
                f"{path} is not writable ({error.strerror})", todo="Choose another output"
            ) from error
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that may exist: after an error or a crash, it is the old one.

    Raises ShortageError when it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with write_errors(path):
        try:
            write_synced(new, data)
            if path.exists():
                shutil.copymode(path, new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync the names in a directory to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
