"""A router of several models as a process, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from support.server_process import LlmkitServer


class LlmkitRouter(LlmkitServer):
    """`llmkit serve NAME=MODEL ...` as a process."""

    def __init__(
        self, log: Path, models: Mapping[str, Path], *options: str, key: str | None = None
    ) -> None:
        self.log = log
        self.key = key
        command = [sys.executable, "-m", "llmkit.cli.main", "serve"]
        command += [f"{name}={path}" for name, path in models.items()]
        command += ["--port", "0", "--device", "cpu", "--kv-cache-memory", "32MiB", *options]
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ)

    def family(self) -> list[psutil.Process]:
        """Return all descendants of the router's process."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def of_model(self, model: str, metric: str, **labels: str) -> float:
        """Return the value of a model's metric."""
        with self.client() as client:
            text = client.get("/metrics").raise_for_status().text
        samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
        (value,) = (
            sample.value
            for sample in samples
            if sample.name == f"llmkit:{metric}" and sample.labels == labels | {"model": model}
        )
        return value
