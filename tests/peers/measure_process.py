"""Run a command and write what it took to a JSON file: seconds, CPU seconds and peak memory.

    python -I tests/peers/measure_process.py RESULT.json COMMAND ...

A process inherits the peak memory of the one that starts it, so that a benchmark that has scored a
model would pass on its own. This script is small and starts the command in its place. It exits with
the command's exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run the command."""
    result, *command = sys.argv[1:]
    started = time.perf_counter()
    with subprocess.Popen(command) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    figures = {
        "wall_s": time.perf_counter() - started,
        # Of the command and all of its processes.
        "cpu_s": usage.ru_utime + usage.ru_stime,
        # `ru_maxrss` counts KiB on Linux and bytes on macOS.
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    Path(result).write_text(json.dumps(figures), encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    raise SystemExit(main())
