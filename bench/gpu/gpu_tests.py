"""The GPU tests, as figures: the part `tests` of `make gpu`, and the smoke tests of `ceilings`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.bench.gpu.figure_log import FigureLog, NotInstalledError, PartOptions, is_installed

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = "tests/gpu"
RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST_NAME = re.compile(r"(tests/gpu/\S+::\S.*?)(?= - | PASSED| FAILED| ERROR| SKIPPED| XFAIL|$)")


def measure(log: FigureLog, options: PartOptions) -> None:
    """Run all GPU tests, with a process for each core."""
    if not options.is_tiny:
        run_pytest(log, "tests", {})


def run_pytest(log: FigureLog, figure: str, environment: Mapping[str, str]) -> None:
    """Run tests in what is left of the part's time: a figure for each failure, and the counts.

    environment: variables that select tests (tests/gpu/conftest.py).
    """
    log.measure(figure, "pytest", lambda: _pytest(log, figure, environment), needs_s=5)


def _pytest(log: FigureLog, figure: str, environment: Mapping[str, str]) -> dict[str, Any]:
    if not is_installed("pytest"):
        raise NotInstalledError("pytest is not installed")
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    if is_installed("xdist"):  # Triton compiles on one core each
        command += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"]
    process = subprocess.Popen(  # noqa: S603
        [*command, GPU_TESTS],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(max(log.time_left_s - 3, 1), process.kill)
    timer.start()
    assert process.stdout is not None
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}
    last_beat_s = time.monotonic()
    try:
        for line in process.stdout:
            sys.stderr.write(line)
            if time.monotonic() - last_beat_s > 1:
                log.heartbeat()
                last_beat_s = time.monotonic()
            note_result(line, counts, failures)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    for name, reason in failures.items():
        log.note_missing(figure, name, f"failed: {reason}")
    if code < 0:
        done = ", ".join(f"{count} {result.lower()}" for result, count in counts.items())
        raise TimeoutError(f"no time was left after {done or 'no test'}")
    if failures or code not in (0, 5):  # 5: all tests were deselected
        raise RuntimeError(f"{len(failures)} of {sum(counts.values())} failed, exit code {code}")
    return {result.lower(): count for result, count in counts.items()}


def note_result(line: str, counts: dict[str, int], failures: dict[str, str]) -> None:
    """Count the result in a line of `pytest -v`, and keep the reasons of its short summary."""
    result = RESULT.search(line)
    name = TEST_NAME.search(line)
    if result is None or name is None:
        return
    test = name[1].strip()
    has_progress = "%]" in line
    if has_progress:
        counts[result[1]] = counts.get(result[1], 0) + 1
    if result[1] in ("FAILED", "ERROR"):
        _, _, reason = line.strip().partition(" - ")
        failures[re.sub(r"\s*\[ *\d+%\]$", "", test)] = reason[:300] or "see the log"
