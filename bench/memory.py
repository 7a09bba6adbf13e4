"""Host memory: what a server and its children hold, and what this process and its children have grown by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; none when it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_bytes(pid: int) -> int:
    """Host memory of a process and its descendants: proportional set size, resident size where there is none."""
    total = 0
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):  # it has ended since
            try:
                info: Any = process.memory_full_info()
            except psutil.AccessDenied:
                info = process.memory_info()
            total += getattr(info, "pss", info.rss)
    return total


class OwnMemory:
    """What the resident memory of this process and its children, other ranks, has grown by within some stretches of
    work, in bytes, and the most of it."""

    def __init__(self) -> None:
        self.kept, self.peak = 0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is added within; what comes and goes too, where the kernel (Linux) lets its mark be set back."""
        marked, before = _set_mark_back(), _resident()
        yield
        after, gone = _resident(), _mark() - psutil.Process().memory_info().rss if marked else 0
        self.peak = max(self.peak, self.kept + after + max(0, gone) - before)
        self.kept += after - before


def _resident() -> int:
    total = 0
    for process in family(psutil.Process().pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _set_mark_back() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _mark() -> int:
    """The largest resident size since the mark was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
