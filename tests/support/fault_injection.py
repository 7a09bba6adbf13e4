"""Faults for tests: a process killed at its n-th file operation, and a disk that becomes full.

Nothing depends on time: operations are counted, so that a seed determines the moment.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
KILLED = -signal.SIGKILL


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child process; its exit status in `subprocess`'s form (1: it raised)."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(out: Path, work: Callable[[], object]) -> int:
    """The number of operations of `work`, in a child process, on files of `out` or next to it."""
    reader, writer = os.pipe()

    def child() -> None:
        operations = _watch(out)
        work()
        os.write(writer, str(operations()).encode())

    status = forked(child)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert status == 0, status
    return int(text)


def killed_at(operation: int, out: Path, work: Callable[[], object]) -> int:
    """Run `work` in a child process that is killed before its n-th operation; its exit status."""

    def child() -> None:
        _watch(out, operation)
        work()

    return forked(child)


def _watch(out: Path, last: int | None = None) -> Callable[[], int]:
    """Count this process's file operations below `out`, its syncs and positioned writes.

    The counting cannot be switched off.
    """
    done = 0
    prefix = str(out)

    def one() -> None:
        nonlocal done
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(arguments[0]).startswith(prefix):
            one()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            one()
            return function(*arguments)

        return call

    sys.addaudithook(hook)
    # audit events do not cover these
    os.pwrite = counting(os.pwrite)
    os.fsync = counting(os.fsync)
    return lambda: done


@contextmanager
def disk_with_room(count: int, named: str = "") -> Iterator[None]:
    """Within the block, writes of more than `count` bytes in total raise ENOSPC.

    Only files with `named` in their path count. The bytes that still fit are written.
    """
    left = count
    pwrite = os.pwrite
    opened = io.open

    def take(size: int) -> int:
        nonlocal left
        if left <= 0 and size:
            raise OSError(errno.ENOSPC, "No space left on device")
        size = min(size, left)
        left -= size
        return size

    def write_at(fd: int, data: Any, position: int) -> int:
        if named not in str(Path(f"/proc/self/fd/{fd}").readlink()):
            return pwrite(fd, data, position)
        return pwrite(fd, memoryview(data)[: take(len(data))], position)

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data).cast("B")[: take(memoryview(data).nbytes)])

    def open_limited(
        file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any
    ) -> Any:
        if not set(mode) & set("wax") or isinstance(file, int) or named not in str(file):
            return opened(file, mode, buffering, *args, **kwargs)
        raw = Raw(str(file), mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", write_at)
        patch.setattr(io, "open", open_limited)
        patch.setattr(builtins, "open", open_limited)
        yield
