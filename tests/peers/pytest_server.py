"""Runs pytest again and again, in forks of one process that has imported the libraries.

Reads one JSON object per line from standard input: `{"tests": [path, ...], "timeout_s": 60}`.
Writes one line for each: the exit code of pytest, or `timeout`. Importing torch and transformers
takes longer than most test files do. llmkit itself is not imported before the fork, so each run
reads its source files as they are at that time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time

import pytest

LIBRARIES = (
    "aiohttp",
    "datasets",
    "fastapi.testclient",
    "hypothesis",
    "llguidance",
    "msgspec",
    "openai",
    "schemathesis",
    "torch",
    "transformers.generation",
    "typer",
    "uvicorn",
)


def run_in_fork(tests: list[str], timeout_s: float) -> str:
    """Run pytest on `tests` in a process group of its own; the exit code, or `timeout`."""
    process = os.fork()
    if process == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        os._exit(int(code))
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            _kill_group(process)  # what the tests have left
            return str(os.waitstatus_to_exitcode(status))
        time.sleep(0.02)
    _kill_group(process)
    os.waitpid(process, 0)
    return "timeout"


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def main() -> None:
    """Serve until the standard input ends."""
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        request = json.loads(line)
        print(run_in_fork(request["tests"], request["timeout_s"]), flush=True)


if __name__ == "__main__":
    main()
