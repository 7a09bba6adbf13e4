"""Where an output may go: not over anything, not into the source, one run at a time, onto a disk that has room."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.checkpoint.errors import LlmkitError, OutputError, ShortageError
from llmkit.checkpoint.text import bytes_text

if TYPE_CHECKING:
    from llmkit.checkpoint.source import Checkpoint

NOT_WRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
}  # fmt: skip
SPARE_BYTES = 32 * 2**20  # for tokenizer, configs and manifest


def sibling(out: Path, suffix: str) -> Path:
    """`<out><suffix>`, next to the output."""
    return out.with_name(out.name + suffix)


def partial_path(out: Path) -> Path:
    """Where the output is while it is being written."""
    return sibling(out, ".partial")


def check_output(out: Path, source: Checkpoint | None, need_bytes: int) -> None:
    """Refuse an output that is in the way or does not fit; creates nothing.

    `need_bytes` is the whole output's size; what an interrupted run has written counts as room.
    Raises OutputError when `out` exists and is not empty or lies in the source, ShortageError when the disk is
    too small or there is no permission to write.
    """
    out = out.absolute()
    if source is not None:
        here, there = out.resolve(), source.path.resolve()
        if here == there or (source.kind == "safetensors" and there in here.parents):
            raise OutputError(f"The output {out} is the source or lies in it", todo="Choose another output")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"The output {out} exists and is not empty", todo="Remove it or choose another output")
    if out.exists() and not out.is_dir():
        raise OutputError(f"The output {out} exists and is a file", todo="Remove it or choose another output")
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ShortageError(
            f"{parent} is not writable", "A directory to write to was expected", "Choose another output"
        )
    partial = partial_path(out)
    written = 0
    with suppress(FileNotFoundError):  # another run may be renaming it
        written = sum(file.stat().st_blocks * 512 for file in partial.iterdir())
    need, have = need_bytes + SPARE_BYTES, shutil.disk_usage(parent).free + written
    if need > have:
        raise ShortageError(
            f"The output {out} needs {need} bytes ({bytes_text(need)}) and the disk has {have} ({bytes_text(have)})",
            todo="Free some space or choose another disk",
        )


@contextmanager
def locked(out: Path, wait: bool = False) -> Iterator[None]:
    """Hold `<out>.lock` for as long as the block runs; it is removed at the end. wait: until another run lets go of it.

    Raises OutputError, telling the pid, when another run holds it, ShortageError when it cannot be created.
    """
    path = sibling(out, ".lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _acquire(path, wait)
    try:
        with writing(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever waits sees that the name has gone
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
                f"The output {out} is being written by another run (process {pid})", todo="Wait for it or stop it"
            ) from None
        try:
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # its holder removed it between our open and our lock


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing to `path` that a user can act on into ShortageError."""
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
            raise ShortageError(f"{path} is not writable ({error.strerror})", todo="Choose another output") from error
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and have it on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Have a directory's names on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
