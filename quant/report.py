"""The report of a run: plain data, the same in the output's llmkit_report.json and on the command line."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmkit.checkpoint.text import finite
from llmkit.checkpoint.version import version

Report = dict[str, Any]


class Stopwatch:
    """Wall-clock seconds by stage: `with watch("evaluate"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's time to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 3)


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {"llmkit": version(), "torch": torch.__version__, "python": platform.python_version()}


def report_json(report: Report) -> bytes:
    """The report as a file."""
    return (json.dumps(finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
