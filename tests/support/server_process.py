"""Servers as processes, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

_LAUNCHER = """
import json, sys
from llmkit.common.errors import LlmkitError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.server.run_server import run_server
from llmkit.runtime.server.serve_options import ServeOptions
try:
    options = json.loads(sys.argv[1])
    engine = {name: options.pop(name) for name in list(options) if name in vars(EngineOptions())}
    sys.exit(run_server(ServeOptions(engine=EngineOptions(**engine), **options)))
except LlmkitError as error:
    sys.stderr.write(f"llmkit serve: error: {error}\\n")
    sys.exit(error.exit_code)
"""


class LlmkitServer:
    """`run_server` as a process. It listens on a free port unless `options` has one."""

    def __init__(self, log: Path, model: Path, key: str | None = None, **options: Any) -> None:
        self.log = log
        self.key = key
        arguments = json.dumps({"model": str(model), "port": 0, "device": "cpu", **options})
        environment = dict(os.environ)
        # The id of the test that starts the server may contain a key.
        environment.pop("PYTEST_CURRENT_TEST", None)
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, arguments],
                stdout=stream,
                stderr=stream,
                env=environment,
            )

    @property
    def port(self) -> int:
        line = self.wait_for_line(" is ready at ")
        return int(line.split(" after ")[0].rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> LlmkitServer:
        self.wait_for_line(" is ready at ")
        return self

    def wait_for_line(self, text: str) -> str:
        """Return the first line of the log that has `text`, when it is written."""
        found: list[str] = []

        def written() -> bool:
            ended = self.process.poll() is not None
            # A line is complete when its end is there.
            lines = self.log.read_text().rpartition("\n")[0].splitlines()
            found.extend(line for line in lines if text in line)
            assert found or not ended, self.log.read_text()
            return bool(found)

        wait_for(written)
        return found[0]

    def client(self) -> httpx.Client:
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def engines(self) -> list[psutil.Process]:
        """Return the engine processes that have not ended."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a ZombieProcess, too
                if "llmkit.runtime.server.sandbox_process" not in child.cmdline():
                    found.append(child)
        return found

    def engine(self) -> psutil.Process:
        (child,) = self.engines()
        return child

    def metric(self, name: str) -> float:
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"llmkit:{name} ")).split()[-1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(
    log: Path, model: Path, key: str | None = None, **options: Any
) -> Iterator[LlmkitServer]:
    """Yield a server that is ready. It ends with the context, even if it hangs."""
    server = LlmkitServer(log, model, key, **options)
    try:
        yield server.wait_ready()
    finally:
        server.process.kill()
        server.process.wait()


@contextlib.contextmanager
def held(*processes: psutil.Process) -> Iterator[None]:
    """Stop processes for the time of the context: what they do is not over before it."""
    for process in processes:
        process.suspend()
    try:
        wait_for(lambda: all(p.status() == psutil.STATUS_STOPPED for p in processes))
        yield
    finally:
        for process in processes:
            process.resume()


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
