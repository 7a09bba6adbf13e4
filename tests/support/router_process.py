"""A router of several models as a process, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from support.server_process import LlmkitServer

_LAUNCHER = """
import json, sys, time
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.server.router.run_models import run_models
from llmkit.runtime.server.serve_options import ServeOptions
engine = EngineOptions(device="cpu", kv_cache_memory=2**25)
options = ServeOptions("", port=0, engine=engine, **json.loads(sys.argv[2]))
def log(text):
    sys.stderr.write(f"{text}\\n")
    sys.stderr.flush()
sys.exit(
    run_models(
        options, json.loads(sys.argv[1]), 2, 0.0, log, lambda facts: None, time.perf_counter(),
        dict,
    )
)
"""


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """Return all descendants of the router's process."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engines(self) -> list[psutil.Process]:
        """Return the engine processes of all loaded models."""
        name = "llmkit.runtime.server.engines.engine_process"
        return [process for process in self.family() if name in process.cmdline()]

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


class UncheckedRouter(LlmkitRouter):
    """`run_models` as a process: with options that are not on the command line.

    The models are not checked at the start. Two of them may be loaded at a time.
    """

    def __init__(self, log: Path, models: Mapping[str, Path], **options: Any) -> None:
        self.log = log
        self.key = None
        words = [json.dumps({name: str(path) for name, path in models.items()})]
        words.append(json.dumps(options))
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, *words],
                stdout=stream,
                stderr=stream,
                env=os.environ,
            )
