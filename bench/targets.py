"""What can be measured for speed: a server that runs already, or a checkpoint that is served for the purpose."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from llmkit.bench.load import Server, find_server, run_load
from llmkit.bench.memory import family, memory_bytes
from llmkit.bench.metrics import Run
from llmkit.bench.workload import WorkloadRequest
from llmkit.checkpoint.errors import GateError, InputError, LlmkitError, OutputError, ShortageError, UsageError
from llmkit.runtime.channel import API_KEY_VARIABLE

READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MEMORY_INTERVAL_S = 0.5
_LOOPBACK = "127.0.0.1"
_EXIT_ERRORS: dict[int, type[LlmkitError]] = {
    error.exit_code: error for error in (GateError, UsageError, InputError, ShortageError, OutputError)
}


class SpeedTarget(Protocol):
    """Something that answers requests. Used as start, any number of runs, stop; stop also follows a failed start."""

    name: str

    @property
    def context_tokens(self) -> int | None:
        """The longest prompt and output together that it takes, in tokens; None while unknown."""

    def start(self) -> dict[str, float]:
        """Make it ready; the figures of TARGET_METRICS that starting shows."""
        return {}

    def run(self, requests: Sequence[WorkloadRequest], clients: int) -> Run:
        """Answer the requests, `clients` conversations at a time, each request at its time."""

    def stop(self) -> dict[str, float]:
        """Give back what `start` took; the figures of TARGET_METRICS that are known only now."""
        return {}


class UrlTarget(SpeedTarget):
    """A server somebody else started. It was asked for its models once already, so it can be reached."""

    def __init__(self, name: str, server: Server) -> None:
        self.name, self.server = name, server

    @property
    def context_tokens(self) -> int | None:
        """What its model list says, if anything."""
        return self.server.context_tokens

    def run(self, requests: Sequence[WorkloadRequest], clients: int) -> Run:
        """See `SpeedTarget.run`."""
        return run_load(self.server, requests, clients)


class ServedTarget:
    """A checkpoint behind its own `llmkit serve` on a free loopback port, as a user would run it."""

    def __init__(self, name: str, reference: str, context_tokens: int, options: Sequence[str] = ()) -> None:
        """options: further arguments for `llmkit serve`."""
        self.name, self.reference, self.options = name, reference, list(options)
        self.model_context_tokens = context_tokens
        self.server: Server | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._peak_bytes = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  (its facts; closed by stop)

    @property
    def context_tokens(self) -> int | None:
        """The model's context; once started, what the server has of it."""
        served = self.server.context_tokens if self.server else None
        return served or self.model_context_tokens

    def command(self, port: int) -> list[str]:
        """What is run to serve the checkpoint on this port."""
        command = [sys.executable, "-m", "llmkit.cli.main", "serve", self.reference, "--host", _LOOPBACK]
        return [*command, "--port", str(port), "--json", *self.options]

    def environment(self) -> dict[str, str]:
        """The server's: keys are for the servers of others, and what follows would make it no plain server here."""
        left_out = (API_KEY_VARIABLE, "LLMKIT_CONFIG", "LLMKIT_SSL_", "LLMKIT_GRPC_PORT")
        return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}

    def start(self) -> dict[str, float]:
        """Start the server and wait until it is healthy: ready_s.

        Raises the error the server ended with, or ShortageError when it does not get ready.
        """
        port = _free_port()
        started = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603
            self.command(port), stdin=subprocess.DEVNULL, stdout=self._told, stderr=self._log, env=self.environment(),
            start_new_session=True,  # Ctrl-C is for bench, which then stops the server
        )  # fmt: skip
        sampled = 0.0
        while not _healthy(port):
            elapsed = time.perf_counter() - started
            if self._process.poll() is not None:
                raise self._failure()
            if elapsed > READY_TIMEOUT_S:
                raise ShortageError(f"the server of {self.name} was not ready after {READY_TIMEOUT_S:g} s")
            if elapsed - sampled >= _MEMORY_INTERVAL_S:
                self._sample_memory()
                sampled = elapsed
            time.sleep(_POLL_S)
        ready_s = time.perf_counter() - started
        self._sample_memory()
        self.server = find_server(f"http://{_LOOPBACK}:{port}")
        return {"ready_s": ready_s}

    def run(self, requests: Sequence[WorkloadRequest], clients: int) -> Run:
        """See `SpeedTarget.run`. Raises the server's own error when it ended meanwhile."""
        assert self.server and self._process
        result = run_load(self.server, requests, clients)
        if self._process.poll() is not None:
            raise self._failure()
        self._sample_memory()
        return result

    def stop(self) -> dict[str, float]:
        """Stop the server, by force only when it does not stop itself: peak_memory_bytes."""
        if self._process is not None:
            members = family(self._process.pid)
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for orphan in members:
                with suppress(psutil.NoSuchProcess):  # so is a process id that another has by now
                    orphan.kill()
            self._process = None
        self._log.close()
        self._told.close()
        return {"peak_memory_bytes": self._peak_bytes} if self._peak_bytes else {}

    def stages(self) -> dict[str, float]:
        """Seconds of each stage of the engine's start, in their order, as the server told them when it was ready."""
        self._told.seek(0)
        stages: dict[str, float] = json.loads(self._told.read())["engine_seconds"]
        return stages

    def _sample_memory(self) -> None:
        """Between runs, never during one: reading the memory map of a process holds it up."""
        assert self._process
        self._peak_bytes = max(self._peak_bytes, memory_bytes(self._process.pid))

    def _failure(self) -> LlmkitError:
        """The error the server ended with, in its words and with its exit code."""
        assert self._process
        code = self._process.returncode
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("llmkit serve: error: ")]
        reason = told[-1].removeprefix("llmkit serve: error: ") if told else lines[-1] if lines else "no output"
        error = _EXIT_ERRORS.get(code, LlmkitError)
        return error(f"the server of {self.name} ended with code {code}: {reason}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_url(target: str) -> bool:
    """Whether a target is a server's address.

    Raises UsageError for a scheme other than http and https, and for a password, which would end up in the report.
    """
    scheme, separator, rest = target.partition("://")
    if separator and scheme not in ("http", "https"):
        raise UsageError(f"{target} is neither a model nor an address", "Addresses begin with http:// or https://")
    if "@" in rest.partition("/")[0]:
        raise UsageError("an address holds a user or a password", todo=f"Give a key with {API_KEY_VARIABLE} instead")
    return bool(separator)


def short_name(target: str) -> str:
    """What a column is headed with: the end of a path or a hub id, host and port of an address."""
    if is_url(target):
        return target.split("://", 1)[1].split("/", 1)[0]
    return Path(target.rstrip("/")).name or target
