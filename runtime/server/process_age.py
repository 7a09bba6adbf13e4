"""The age of this process, from which start-up times are counted."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_age() -> float:
    """Return the seconds since the kernel started this process, to about 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # Field 22 of proc_pid_stat(5): the start time since boot, in clock ticks.
    start_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_s
