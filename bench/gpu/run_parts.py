"""`make gpu`: measures on a GPU in parts, each in processes of its own and in a limited time.

Every figure goes to RESULTS/figures.jsonl as soon as it is measured. A part that fails, hangs or
runs out of time does not stop the next one. A part that ended well is not run again, and one that
did not measures only what is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch

from llmkit.bench.gpu.figure_log import (
    DeviceLostError,
    FigureLog,
    PartOptions,
    part_is_complete,
)

MAX_PART_S = 480.0
# A part's process may end this much after its time, for a figure that took longer than expected.
GRACE_S = 30.0
MIN_RESTART_S = 10.0  # a part with less time left is not started again
# Exit codes of a part's process.
COMPLETE = 0
DEVICE_LOST = 3
INCOMPLETE = 4


@dataclass(frozen=True)
class Part:
    """One part: `measure(log, options)` of a module of this folder."""

    name: str
    module: str
    budget_s: float  # of all its figures together
    stall_s: float  # a figure that shows no progress for so long is given up


class PartModule(Protocol):
    """A module that measures a part."""

    def measure(self, log: FigureLog, options: PartOptions) -> None:
        """Measure all figures of the part, the most important ones first."""


# In the order of `make gpu`: figures first.
PARTS = {
    part.name: part
    for part in (
        Part("ceilings", "ceilings", 60, 60),
        Part("steps", "decode_steps", 180, 100),
        Part("profile", "graph_profile", 40, 60),
        Part("kernels", "kernel_times", 150, 60),
        Part("saturate", "saturation", 60, 90),
        Part("graphs", "graph_steps", 90, 60),
        Part("serving", "serving_times", 120, 90),
        Part("tests", "gpu_tests", 440, 240),
        Part("tune", "tune_kernels", 300, 90),
        Part("rivals", "baselines", 420, 240),
        Part("quantized", "quantized_baselines", 440, 240),
        Part("quantize", "quantize_time", 440, 440),
    )
}


def main(words: Sequence[str] | None = None) -> int:
    """Measure on the GPU, part by part. Exit code 1 if a part is incomplete."""
    parser = argparse.ArgumentParser(
        prog="python -m llmkit.bench.gpu.run_parts", description=main.__doc__
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--results", type=Path, default=Path("gpu-results"), metavar="DIR")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small models, to try the programs on a CPU"
    )
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for each part")
    parser.add_argument(
        "--one", nargs=3, metavar=("PART", "SECONDS", "RUN"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(words)
    options = PartOptions(torch.device(arguments.device), arguments.results, arguments.tiny)
    if arguments.one:
        name, seconds, run = arguments.one
        return measure_part(PARTS[name], options, float(seconds), run)
    unknown = set(arguments.parts) - PARTS.keys()
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("make gpu: torch sees no CUDA device here, so nothing was run\n")
        return 0
    incomplete = []
    for name in arguments.parts or PARTS:
        if part_is_complete(options.figures_path, name):
            sys.stderr.write(f"{name}: ended well before\n")
        elif not run_part(PARTS[name], options, arguments.budget):
            incomplete.append(name)
    sys.stderr.write(f"figures: {options.figures_path}\n")
    if incomplete:
        sys.stderr.write(f"make gpu: incomplete: {' '.join(incomplete)}\n")
    return int(bool(incomplete))


def measure_part(part: Part, options: PartOptions, seconds: float, run: str) -> int:
    """Measure a part in this process, for at most about so many seconds. Returns its exit code."""
    log = FigureLog(options.figures_path, part.name, seconds, run)
    module: PartModule = import_module(f"llmkit.bench.gpu.{part.module}")
    try:
        module.measure(log, options)
    except DeviceLostError as error:
        sys.stderr.write(f"{part.name}: the GPU answers no more ({error})\n")
        return DEVICE_LOST
    log.end_part("complete" if log.is_complete else "incomplete")
    return COMPLETE if log.is_complete else INCOMPLETE


def run_part(part: Part, options: PartOptions, budget_s: float | None = None) -> bool:
    """Run a part in subprocesses. Returns whether it ended well.

    A process that crashed or hung is started again: the next one leaves out the figure that was
    being measured.
    """
    sys.stderr.write(f"== {part.name}\n")
    run = uuid.uuid4().hex
    path = options.figures_path
    end_s = time.monotonic() + min(budget_s or part.budget_s, MAX_PART_S - GRACE_S)
    how = "it had no time"
    while (left_s := end_s - time.monotonic()) > 0:
        size = path.stat().st_size if path.exists() else 0
        command = part_command(part, options, left_s, run)
        process = subprocess.Popen(command, start_new_session=True)  # noqa: S603
        try:
            how = _watch(process, path, part.stall_s, left_s + GRACE_S)
        finally:
            _kill_group(process)
        if how in ("complete", "incomplete"):
            return how == "complete"
        sys.stderr.write(f"{part.name}: {how}\n")
        has_begun = path.exists() and path.stat().st_size > size
        if not has_begun or end_s - time.monotonic() < MIN_RESTART_S:
            break
    FigureLog(path, part.name, 0, run).end_part(how)
    return False


def part_command(part: Part, options: PartOptions, seconds: float, run: str) -> list[str]:
    """The command line of a part's process."""
    command = [sys.executable, "-m", "llmkit.bench.gpu.run_parts"]
    command += ["--results", str(options.results), "--device", str(options.device)]
    command += ["--tiny"] if options.is_tiny else []
    return [*command, "--one", part.name, str(seconds), run]


def _watch(process: subprocess.Popen[bytes], path: Path, stall_s: float, limit_s: float) -> str:
    """Wait for the end of a part's process. Returns how it ended."""
    start_s = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.5)
            endings = {
                COMPLETE: "complete",
                INCOMPLETE: "incomplete",
                DEVICE_LOST: "the GPU failed",
            }
            return endings.get(code, f"its process ended with code {code}")
        now_s = time.monotonic()
        if now_s - start_s > limit_s:
            return "its time was over"
        age_s = time.time() - path.stat().st_mtime if path.exists() else 0.0
        if min(age_s, now_s - start_s) > stall_s:
            return f"a figure showed no progress for {stall_s:.0f} s"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a part's process with its own subprocesses."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
