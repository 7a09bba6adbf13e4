"""Host memory: the size of a process tree, and the growth of this process and its children."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty when the process has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_bytes(pid: int) -> int:
    """Host memory of a process and its descendants.

    It is the proportional set size (PSS), or the resident set size (RSS) where the system has no
    PSS or denies it.
    """
    total = 0
    for process in process_tree(pid):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            try:
                info: Any = process.memory_full_info()
            except psutil.AccessDenied:
                info = process.memory_info()
            total += getattr(info, "pss", info.rss)
    return total


class ProcessMemoryTracker:
    """Growth of the RSS of this process and its children (other ranks) over `track` blocks."""

    def __init__(self) -> None:
        self.kept_bytes = 0  # growth that remains after the blocks so far
        self.peak_bytes = 0

    @contextmanager
    def track(self) -> Iterator[None]:
        """Add the growth within the block.

        On Linux, memory that is freed again before the end of the block counts for the peak.
        """
        has_peak = _reset_peak_rss()
        before = _tree_rss_bytes()
        yield
        after = _tree_rss_bytes()
        freed = _peak_rss_bytes() - psutil.Process().memory_info().rss if has_peak else 0
        self.peak_bytes = max(self.peak_bytes, self.kept_bytes + after + max(0, freed) - before)
        self.kept_bytes += after - before


def _tree_rss_bytes() -> int:
    total = 0
    for process in process_tree(psutil.Process().pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _reset_peak_rss() -> bool:
    """Reset this process's peak RSS (VmHWM). False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss_bytes() -> int:
    """The peak RSS of this process since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
