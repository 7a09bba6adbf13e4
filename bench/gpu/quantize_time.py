"""The time and memory of GPTQ on a model of 8B shape: the part `quantize` of `make gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.bench.gpu.gpu_tests import ROOT

LAYERS = 32


def measure(log: FigureLog, options: PartOptions) -> None:
    """Quantize first a model of two layers, which shows whether it works at all."""
    if options.is_tiny:
        return
    for layers in (2, LAYERS):
        log.measure(
            "gptq",
            f"8B shape, {layers} layers, 128 x 2,048 tokens",
            partial(_quantize, log, layers, options),
            needs_s=30,
        )


def _quantize(log: FigureLog, layers: int, options: PartOptions) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "peers" / "bench_memory.py")]
    command += ["--device", options.device.type, "--layers", str(layers)]
    with tempfile.TemporaryDirectory() as work:
        process = subprocess.run(  # noqa: S603
            [*command, "--work", work],
            stdout=subprocess.PIPE,
            text=True,
            timeout=max(log.time_left_s - 2, 1),
            cwd=ROOT,
        )
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}; its messages are in the log")
    (values,) = json.loads(process.stdout).values()
    return {"layers": layers, **values}
